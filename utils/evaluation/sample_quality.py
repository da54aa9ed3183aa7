"""How good samples are while a model trains, and the best model so far."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .. import sync, write_record
from ..pictures import to_uint8
from ..training.checkpoints import on_all_processes
from .features import load_extractor
from .metrics import check_count, distance_name, frechet_distance, kernel_distance

logger = logging.getLogger(__name__)

RECORD = "evaluation.json"


class SampleQuality:
    """Fréchet distance and KID between samples and as many training images.

    Both are biased or noisy for small N, which is why the curves carry it: ``metrics/fd_digits_N1000``.

    Args:
        args: ``evaluate_steps``, ``num_evaluation_samples``, ``features``, ``keep_best``, ``output_dir``, ``seed``.
        train_data: what samples are compared with.
        first_step: optimizer steps done; a best model of a later step is of a run that this one does not continue.

    Attributes:
        count: N, at most the number of training images.
    """

    def __init__(self, args, accelerator, train_data, first_step: int):
        self.args, self.accelerator, self.values, self.announced = args, accelerator, None, False
        self.extract = load_extractor(args.features, args.features_model_name_or_path, accelerator.device)
        reference = to_uint8(train_data.examples(args.num_evaluation_samples))
        check_count(len(reference), "--evaluate_steps")
        self.count, self.reference = len(reference), self.extract(reference)
        self._distance = f"{distance_name(args.features)}_N{self.count}"
        self._kid = f"kid_{args.features}_N{self.count}"
        self.folder = Path(args.output_dir) / "best"
        self.previous = self.folder.with_name("best-previous")
        if accelerator.is_main_process and self.previous.exists() and not self.folder.exists():
            os.rename(self.previous, self.folder)  # killed between the two renames of ``keep``
        self.best = np.inf
        if (self.folder / RECORD).is_file():
            record = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
            if record["step"] <= first_step:
                self.best = record.get(self._distance, np.inf)
        dimensions = self.reference.shape[1]
        if self.count < 2 * dimensions:
            logger.warning(
                f"{self.count} images for {dimensions} features: fewer than twice as many make fd and kid unreliable. "
                "Raise --num_evaluation_samples, or choose other --features"
            )

    def log(self, draw: Callable[[int], np.ndarray | None], step: int) -> None:
        """Draw samples, compare them with the training images, and write curves. Call it on all processes.

        Args:
            draw: gives so many samples, uint8 (N, C, H, W), or None if it was interrupted: nothing is written then.
            step: optimizer steps done.
        """
        self.values, start = None, time.perf_counter()
        images = draw(self.count)
        if images is None or not self.accelerator.is_main_process:
            return
        features = self.extract(images)
        kid, _ = kernel_distance(features, self.reference, seed=self.args.seed)
        self.values = {self._distance: frechet_distance(features, self.reference), self._kid: kid}
        self.accelerator.log({f"metrics/{name}": value for name, value in self.values.items()}, step=step)
        self.values["step"] = step
        write_record(self.folder.parent / RECORD, self.values)  # for the model's page
        if not self.announced:
            self.announced = True
            logger.info(
                f"Drawing and comparing {self.count} samples took {time.perf_counter() - start:.0f} s, and will every "
                f"{self.args.evaluate_steps} steps. --evaluate_steps and --num_evaluation_samples change that"
            )

    def keep(self, save_pipeline: Callable[[Path], None]) -> None:
        """With ``--keep_best``, publish ``best/`` if the last samples were the best so far. Call it on all processes.

        Args:
            save_pipeline: writes the model into the folder that it gets.

        Raises:
            CheckpointError: it cannot be written; an earlier one is untouched.
        """

        def publish():
            if not self.values or self.values[self._distance] >= self.best:
                return
            staging = self.folder.with_name(".tmp-best")
            for leftover in (staging, self.previous):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir()
            save_pipeline(staging)
            (staging / RECORD).write_text(json.dumps(self.values, indent=2) + "\n", encoding="utf-8")
            for path in [*staging.rglob("*"), staging]:
                sync(path)
            if self.folder.exists():
                os.rename(self.folder, self.previous)
            os.rename(staging, self.folder)
            shutil.rmtree(self.previous, ignore_errors=True)
            self.best = self.values[self._distance]
            logger.info(f"{self._distance} {self.best:.3g} is the lowest so far: kept in {self.folder}")

        if self.args.keep_best:
            on_all_processes(
                self.accelerator, f"{self.folder} cannot be saved", publish, "The best one before it is intact"
            )
