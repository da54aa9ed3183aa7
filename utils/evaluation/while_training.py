"""Evaluation during training: loss on held-out images, quality of samples, and the best model so far."""

import logging
import os
import shutil
import time

import numpy as np

from .. import read_record, sync, write_record
from ..diffusion.spaces import Pixels, encode_in_batches
from ..training.checkpoints import on_all_processes
from .denoising_loss import DenoisingLoss
from .features import choose_features, load_extractor
from .metrics import check_count, distance_name, frechet_distance, kernel_distance

logger = logging.getLogger(__name__)

RECORD = "evaluation.json"
NUM_VALIDATION_IMAGES = 64  # per set
NUM_PROBE_IMAGES = 64  # number of images by which features are chosen


class Evaluation:
    """Part of a training run, see ``training.loop.Run``."""

    def resumed(self, run) -> None:
        flags = vars(run.args)
        if flags.get("validation_split") or flags.get("prior_dataset_name"):
            validation = Validation(run, flags["validation_split"], flags["prior_dataset_name"])
            every = flags["validation_steps"] or run.args.sample_steps
            run.repeat("validation", every, validation.measure, at_start="base" in run.facts)
        if flags["evaluate_steps"]:
            quality = SampleQuality(run, flags["features"], flags["num_evaluation_samples"], flags["evaluate_steps"])
            run.repeat("evaluation", flags["evaluate_steps"], quality.measure)


class Validation:
    """Curves of the denoising loss: on training images, held-out images, and data like that of a pretrained model.

    For an autoencoder, they show PSNR and SSIM of its reconstructions.

    Args:
        run: training run.
        split: held-out split, or None.
        prior: data set like that of the pretrained model, ``NAME`` or ``NAME:SPLIT``, or None.

    Raises:
        UserError: a split cannot be loaded, or shares images with the training set.
    """

    def __init__(self, run, split: str | None, prior: str | None):
        self.run, data = run, run.train_data
        batches, self.losses = {"train": data.examples(NUM_VALIDATION_IMAGES)}, {}
        if split:
            batches["held_out"] = data.examples(NUM_VALIDATION_IMAGES, data.held_out)
        if prior:
            others = data.images.another(prior, "--prior_dataset_name")
            batches["prior"] = data.examples(NUM_VALIDATION_IMAGES, others)
        space = run.space or Pixels(data.image_shape)
        for name, batch in batches.items():
            if not run.noise_scheduler:
                from .reconstruction import Reconstruction  # its import of scikit-image takes time

                self.losses[name] = Reconstruction(batch["images"])
                continue
            images = encode_in_batches(space, batch["images"], run.accelerator.device, run.args.seed)
            inputs = run.model_inputs(batch)
            self.losses[name] = DenoisingLoss(images, run.noise_scheduler, run.args.seed, inputs)

    def measure(self) -> None:
        """Measure, and send the results to the trackers. Call it on all processes."""
        curves, run = {}, self.run
        for name, measured in self.losses.items():
            for part, value in measured.measure(run.unet, run.accelerator, run.stop_requested).items():
                level = f"loss_by_timestep_validation/{name}_{part}"
                curve = {
                    "loss": f"loss/validation_{name}",
                    "psnr": f"metrics/psnr_{name}",
                    "ssim": f"metrics/ssim_{name}",
                }
                curves[curve.get(part, level)] = value
        run.log(curves)


class SampleQuality:
    """Fréchet distance and KID between samples and as many training images; the best model is kept in ``best/``.

    Both are biased or noisy for small N, so the names of the curves contain N: ``metrics/fd_digits_N1000``.

    Args:
        run: training run. A best model of a later step is ignored, because the run resumes from an earlier step.
        features: features, or None to choose them, see ``features.choose_features``.
        count: number of samples, reduced to the number of training images if these are fewer.
        every: optimizer steps between evaluations, for a message.

    Attributes:
        count: number of samples, N.
    """

    def __init__(self, run, features: str | None, count: int, every: int):
        self.run, self.every, self.announced = run, every, False
        reference = run.train_data.shown(count)
        check_count(len(reference), "--evaluate_steps")
        self.extract = load_extractor(choose_features(features, reference[:NUM_PROBE_IMAGES]), run.accelerator.device)
        self.count, self.reference = len(reference), self.extract(reference)
        self._distance = f"{distance_name(self.extract.name)}_N{self.count}"
        self._kid = f"kid_{self.extract.name}_N{self.count}"
        self.folder = run.output_dir / "best"
        self.previous = self.folder.with_name("best-previous")
        if run.accelerator.is_main_process and self.previous.exists() and not self.folder.exists():
            os.rename(self.previous, self.folder)  # a run was killed between the two renames of ``_keep``
        self.best = np.inf
        if (self.folder / RECORD).is_file():
            record = read_record(self.folder / RECORD)
            if record["step"] <= run.global_step:
                self.best = record.get(self._distance, np.inf)
        dimensions = self.reference.shape[1]
        if self.count < 2 * dimensions:
            logger.warning(
                f"{self.count} images are fewer than twice the {dimensions} features, so fd and kid are unreliable. "
                "Raise --num_evaluation_samples, or choose other --features"
            )

    def measure(self) -> None:
        """Draw samples, compare them with the training images, write curves, keep the best. Call it on all processes.

        Raises:
            Interrupted: a stop was requested; nothing is written.
            CheckpointError: ``best/`` cannot be written; an earlier one is intact.
        """
        start, run, values = time.perf_counter(), self.run, None
        images = run.draw(self.count)
        if run.accelerator.is_main_process:
            features = self.extract(images)
            kid, _ = kernel_distance(features, self.reference, seed=run.args.seed)
            values = {self._distance: frechet_distance(features, self.reference), self._kid: kid}
            run.log({f"metrics/{name}": value for name, value in values.items()})
            values["step"] = run.global_step
            write_record(self.folder.parent / RECORD, values)  # the model card shows the values
            if not self.announced:
                self.announced = True
                logger.info(
                    f"Drawing and comparing {self.count} samples took {time.perf_counter() - start:.0f} s. This is "
                    f"repeated every {self.every} steps. Change it with --evaluate_steps and --num_evaluation_samples"
                )
        on_all_processes(
            run.accelerator, f"{self.folder} cannot be saved", lambda: self._keep(values), "The earlier one is intact"
        )

    def _keep(self, values: dict | None) -> None:
        """Publish ``best/`` if these samples are the best so far."""
        if not values or values[self._distance] >= self.best:
            return
        staging = self.folder.with_name(".tmp-best")
        for leftover in (staging, self.previous):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        self.run.save(staging)
        write_record(staging / RECORD, values)
        for path in [*staging.rglob("*"), staging]:
            sync(path)
        if self.folder.exists():
            os.rename(self.folder, self.previous)
        os.rename(staging, self.folder)
        shutil.rmtree(self.previous, ignore_errors=True)
        self.best = values[self._distance]
        logger.info(f"{self._distance} {self.best:.3g} is the lowest so far. This model is kept in {self.folder}")
