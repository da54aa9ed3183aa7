"""The parts of a training run that do not depend on the method.

A script makes a ``Run``, prepares model and optimizer, and iterates over ``run.steps(...)``. The run manages the
accelerator, the output folder, resuming, checkpoints, stopping and the final samples. The script alone computes noise,
target, loss and gradient. At the end of an optimizer step, the run logs, saves a checkpoint, stops if asked to, and
performs due actions (validation, evaluation, samples), in this order. Completed actions are recorded, so that a run
that stopped at a step performs the remaining ones when it resumes.

Optional folders take part through ``optional.Parts``.
"""

import contextlib
import itertools
import logging
import math
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import set_seed
from PIL import Image
from tqdm.auto import tqdm

from .. import UserError, counted, exits, optional, randomness
from ..args import defaults_of
from ..diffusion.sampling import sample_images
from ..hardware import device_name
from ..pictures import with_caption
from ..saved import AUTOENCODERS, index_file, is_complete
from ..signals import Interrupted, StopSignal, progress
from . import checkpoints, output_dir
from .ema import EMA
from .last_lines import how_to_load, last_lines
from .losses import RecentLosses
from .process import on_main_process, start_process
from .repeats import Repeats

logger = logging.getLogger(__name__)


class Run:
    """One training run in its output folder.

    Args:
        args: the script's flags.
        name: name of the script. A run resumes in a folder of the same script only.
        title: title of the model on its page.
        constants: ``globals()`` of the script. Its constants are compared when a run resumes, like its flags.

    Attributes:
        accelerator: accelerator that prepares models and has the device.
        output_dir: folder of the run.
        max_train_steps: number of optimizer steps of the whole run.
        global_step: number of completed optimizer steps.

    Raises:
        UserError: see ``process.start_process`` and ``output_dir.prepare_output_dir``.
    """

    def __init__(self, args, name: str, title: str, constants: dict):
        self.args, self.name, self.title = args, name, title
        self.flags, self.constants = output_dir.plain(vars(args)), output_dir.own_constants(constants)
        self.file = Path(constants.get("__file__", f"{name}.py")).name  # A copy of the script has another name
        self.global_step, self._saved_at, self._step_is_open = 0, None, False
        self.output_dir = self.stop_signal = self.bar = None
        self.tell = lambda event, *values: []  # Replaced below, when the optional folders are loaded
        exits.register(self)
        # By default accelerate steps the scheduler once per process, so its length would have to be multiplied by the
        # number of processes
        self.accelerator = start_process(
            args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            step_scheduler_with_optimizer=False,
        )
        self.tell = optional.Parts(self).ask
        self.output_dir, self._finished_at = output_dir.prepare_output_dir(
            self.accelerator, self.flags, defaults_of(args), name, self.constants
        )
        self.losses = RecentLosses(self.accelerator)
        self.tell("claimed")
        set_seed(args.seed)

    def already_finished(self, train_data) -> bool:
        """Return whether the run is already complete, with these images and at least as many steps.

        If it is complete, print its last lines.

        Args:
            train_data: training data, which also defines the length of an epoch.
        """
        self.train_data, args = train_data, self.args
        epochs = args.num_train_epochs * (train_data.length or 0) / train_data.global_batch_size
        self.max_train_steps = args.max_train_steps or math.ceil(epochs)
        if self._finished_at is None or self._finished_at < self.max_train_steps:
            return False
        output_dir.check_finished(self.output_dir, train_data.settings)
        self.global_step = output_dir.read_arguments(self.output_dir)["finished_at_step"]
        self._release("This run is already finished")
        return True

    def steps(
        self, model: torch.nn.Module, ema_model: EMA, noise_scheduler, draw: Callable, sample: Callable,
        save_pipeline: Callable[[Path], None], caption: str = "", compare: dict | None = None,
        model_inputs: Callable[[dict], dict] | None = None, space=None, **facts,
    ) -> Iterator[dict]:  # fmt: skip
        """Resume, and yield the micro-batches of the remaining steps, see ``TrainData.batches``.

        Between an optimizer step and the next batch, the actions due at that step are done.

        Args:
            model: model that ``accelerator.prepare`` returned.
            ema_model: average of its weights, used for samples and saved pipelines.
            noise_scheduler: scheduler of training, or None for a model without noise levels. Its config is compared
                when a run resumes.
            draw: function of a number of images and, with a noise scheduler, perhaps ``num_inference_steps`` that
                returns uint8 (N, C, H, W).
            sample: function without arguments that returns pictures by name, among them ``samples``.
            save_pipeline: function that saves the pipeline in the given folder.
            caption: line below the samples, such as the sampler and its steps.
            compare: further settings that must not change when the run resumes.
            model_inputs: function from a batch to further inputs of the model by name, for measurements of its loss.
            space: space that the model denoises in, see ``diffusion.spaces``. The default is pixels.
            facts: further values to record.

        Yields:
            Micro-batches.

        Raises:
            UserError: the run cannot be resumed, or the model cannot draw.
        """
        self.model, self.unet, self.ema_model = model, self.accelerator.unwrap_model(model), ema_model
        self.draw, self._sample, self._save_pipeline, self.caption = draw, sample, save_pipeline, caption
        self.model_inputs, self.space = model_inputs or (lambda batch: {}), space
        if space and noise_scheduler and noise_scheduler.config.get("clip_sample") and not space.in_unit_range:
            raise UserError(
                "the noise scheduler has clip_sample=True, so samplers would clip latents to [-1, 1]. Set "
                "clip_sample=False, for example in NOISE"
            )
        old = checkpoints.list_checkpoints(self.output_dir)  # of a run that was not refused
        if hasattr(space, "autoencoder") and space.shape[1] != space.shape[2] and not old:
            _, height, width = space.image_shape
            raise UserError(
                f"images of {height} x {width} pixels: pipelines of latent diffusion draw squares only. "
                f"Give --resolution {min(height, width)}"
            )
        channels = getattr(getattr(self.unet, "config", None), "out_channels", None)
        if not space and channels not in (None, self.train_data.channels):
            raise UserError(
                f"the model returns {counted(channels, 'channel')}, but the images have {self.train_data.channels}. "
                "For a model of another space give run.steps(..., space=...), see utils/diffusion/spaces.py"
            )
        self.noise_scheduler = noise_scheduler
        self.num_train_timesteps = noise_scheduler.config.num_train_timesteps if noise_scheduler else None
        data = self.train_data
        for wrapped in self.accelerator._optimizers:  # Fused ones would skip steps that overflow in fp16 on their own
            wrapped.optimizer._step_supports_amp_scaling = False  # Now GradScaler skips them, and accelerate knows
        group = self.accelerator._optimizers[0].param_groups[0]
        learning_rate = group.get("initial_lr", group["lr"])  # The value of the flag, or the default for the model
        if isinstance(learning_rate, torch.Tensor):  # torchao stores it as float32
            learning_rate = float(f"{learning_rate.item():.6g}")
        noise = output_dir.describe_noise(noise_scheduler) if noise_scheduler else {}
        self.facts = {
            **noise, "learning_rate": learning_rate, **facts, **data.settings,
            "data_license": data.license, "max_train_steps": self.max_train_steps,
            "parameters": facts.get("parameters", sum(weight.numel() for weight in self.unet.parameters())),
        }  # fmt: skip
        if model_inputs and data.length:
            self.facts["model_inputs"] = ", ".join(sorted(model_inputs(data.examples(1)))) or None
        if space:
            self.facts["denoises"] = f"{type(space).__name__}, {' x '.join(map(str, space.shape))}"
        self.settings = {
            **self.flags, "learning_rate": learning_rate, "autoencoder": space and space.fingerprint,
            **data.settings, **(compare or {}), "constants": self.constants,
            "net_code": type(self.unet).__module__,
            "noise_scheduler": output_dir.config_of(noise_scheduler), "model_config": output_dir.config_of(self.unet),
            "optimizer_settings": output_dir.describe_optimizers(self.accelerator),
        }  # fmt: skip
        ema_model.to(self.accelerator.device)
        self._resume()
        self._start()
        model.train()
        progress("data")
        for batch in data.batches(self._global_batches()):
            progress("step")
            # Dropout depends on the ids of the samples, so it is the same after a resume and differs between processes
            torch.manual_seed(randomness.random_bits(self.args.seed, "dropout", batch["sample_ids"]).item(0))
            yield batch
            if self._step_is_open:
                self._end_step(self.global_step == self.max_train_steps)
            progress("data")

    def end_of_step(
        self, losses: torch.Tensor, timesteps: torch.Tensor | None, grad_norm: torch.Tensor | None, labels=None
    ) -> bool:
        """Record the losses of a micro-step. Call it after ``optimizer.step()``.

        Args:
            losses: unweighted loss of each sample, (B,).
            timesteps: timestep of each sample, (B,), or None without noise levels.
            grad_norm: gradient norm before clipping, 0-d, needed in the last micro-step of an optimizer step.
            labels: class of each sample (B,), with -1 for none, or None without classes.

        Returns:
            True if the optimizer has made a step. It has not while gradients accumulate, or if fp16 overflowed.

        Raises:
            ValueError: there is not one loss for each sample, or the norm of an optimizer step is missing.
        """
        if losses.ndim != 1 or (timesteps is not None and losses.shape != timesteps.shape):
            shapes = str(tuple(losses.shape))
            shapes += "" if timesteps is None else f" for timesteps of shape {tuple(timesteps.shape)}"
            raise ValueError(f"losses of shape {shapes}. Expected the loss of each sample, (B,), before the mean")
        if grad_norm is None and self.accelerator.sync_gradients:
            raise ValueError(
                "grad_norm is missing. Expected the result of accelerator.clip_grad_norm_(parameters, limit)"
            )
        losses = losses.detach().float()
        self.losses.add(losses)
        self.tell("measured", losses, timesteps, labels)
        if not self.accelerator.sync_gradients:
            return False
        self.losses.step(grad_norm)
        self.learning_rate = float(self.accelerator._optimizers[0].param_groups[0]["lr"])
        self.global_step += 1
        self._step_is_open = True
        # After an overflow in fp16, weights, learning rate and average stay unchanged
        return not self.accelerator._optimizers[0].step_was_skipped

    def every(self, steps: int) -> bool:
        """Return whether an optimizer step was just made and its number is a multiple of ``steps``.

        Actions of the script at that point come before the step's checkpoint. They use the weights, not their average.
        """
        return self._step_is_open and self.global_step % steps == 0

    def log(self, values: dict[str, float]) -> None:
        """Write values to the trackers, at this step."""
        self.accelerator.log(values, step=self.global_step)

    def repeat(self, name: str, every: int, action: Callable[[], None], at_start=False, at_end=True) -> None:
        """Register ``action()`` to be called with the averaged weights at regular steps, see ``repeats``.

        Args:
            name: name of the action in the record of completed actions.
            every: interval, optimizer steps.
            action: function to call. If ``stop_requested()`` is true, it may raise ``Interrupted``. It is then called
                again after the run resumes.
            at_start, at_end: whether it is also due before the first step, and at the end of the run.
        """
        self.repeats.add(name, every, action, at_start, at_end)

    def sample_images(
        self, model, sampler, count: int, shape: tuple[int, int, int], num_inference_steps: int, **options
    ):  # fmt: skip
        """Return ``sampling.sample_images`` with the seed and batch size of the run. A signal ends it early."""
        args = self.args
        with self._uncompiled():
            return sample_images(
                model, sampler, self.accelerator, count, shape, num_inference_steps, args.sample_batch_size, args.seed,
                self.stop_requested, **options,
            )  # fmt: skip

    def _uncompiled(self):
        """Return a context without ``--compile``, because other batch sizes would make the compiled step slower."""
        compiled = vars(self.args).get("compile")
        return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()

    def stop_requested(self) -> bool:
        """Return whether a signal asks this process to stop, so that long actions can end early.

        With several processes it returns False.
        """
        return bool(self.stop_signal) and self.accelerator.num_processes == 1 and self.stop_signal.requested()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time of the block from the training speed, and leave it uncompiled. Blocks may be nested."""
        since_point = time.perf_counter() - self._logged_at
        try:
            with self._uncompiled():
                yield
        finally:
            self._logged_at = time.perf_counter() - since_point
            self.tell("paused")

    def finish(self) -> None:
        """Save the model and its samples, and print their paths. After a late signal, exit with 128 + its number."""
        title = "Finished"
        if self._step_is_open or self.global_step < self.max_train_steps:
            title = f"The script has ended the loop of {self.max_train_steps} steps"
            if not self.global_step:
                raise UserError("the script has ended the loop before the first optimizer step, so nothing is saved")
            self._end_step(is_last=True)
        if self.accelerator.is_main_process:
            self.save(self.output_dir)
        with contextlib.suppress(Interrupted):
            self._save_samples(self.output_dir / "samples.png")
        if number := self.stop_signal.check():
            self._stop(number)
        self.tell("finished")
        output_dir.write_finished(self.accelerator, self.output_dir, self.global_step)
        self.accelerator.wait_for_everyone()
        self._release(title)

    # ------------------------------------------------------------------------------------------------------- the start

    def _resume(self) -> None:
        """Load the checkpoint that the flags ask for. An automatic restart loads the newest."""
        path = checkpoints.find_checkpoint(
            self.accelerator, self.output_dir, self.args.resume_from_checkpoint, exits.restarted()
        )
        if path:
            state = checkpoints.read_state(path)
            output_dir.check_settings(str(path), state["settings"], self.settings, defaults_of(self.args))
            if self.accelerator.is_main_process:
                checkpoints.archive_newer(self.output_dir, path, state["global_step"])
            checkpoints.load_checkpoint(self.accelerator, path, state)
            self.ema_model.load(checkpoints.averaged_weights(path), state["ema_step"])
            self.global_step = state["global_step"]
            own = self.output_dir / f"checkpoint-{self.global_step}"
            self._saved_at = self.global_step if path.resolve() == own.resolve() else None
            self.losses.load_state(state)
            code = str(state["settings"].get("net_code"))
            if code.startswith("own_net_") and code != self.settings["net_code"]:
                logger.warning(
                    f"{path}: the file of the net has changed since. Weights and optimizer are loaded unchanged."
                )
            self.tell("load_state", state)
            logger.info(f"Resuming from {path}, {counted(self.global_step, 'optimizer step')} done.")
        else:
            on_main_process(self.accelerator, self._refuse_to_overwrite)
            if self.accelerator.is_main_process:
                checkpoints.archive_newer(self.output_dir, None, 0)
                output_dir.remove_pictures_of_others(self.output_dir, self.train_data.settings)
        self.repeats = Repeats(self.accelerator, self.output_dir, self.global_step)

    def _refuse_to_overwrite(self) -> None:
        """Refuse to train from the start in the folder of a finished model, which would be lost."""
        folder = self.output_dir
        if "finished_at_step" in output_dir.read_arguments(folder) and is_complete(folder):
            raise UserError(
                f"--output_dir {folder} holds a finished model, but no checkpoint from which to train it further. "
                "Choose another --output_dir for a new run. To draw other samples of this model, use sample.py"
            )

    def _start(self) -> None:
        """Record the settings, and test saving and drawing, so that errors appear before hours of training."""
        args, accelerator = self.args, self.accelerator
        self.tell("resumed")
        self.train_data.prepare()  # Decoded before time is measured, and while Ctrl-C still stops at once
        output_dir.write_arguments(accelerator, self.flags, self.name, self.constants, file=self.file, **self.facts)
        shown = (f"{key} {value}" for key, value in self.facts.items() if value is not None)
        logger.info("Training: " + ", ".join(shown))
        precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        logger.info(f"{accelerator.num_processes} x {device_name(accelerator.device)}, {precision}")
        self.stop_signal = StopSignal(accelerator)
        self._logged_step, self._logged_at = self.global_step, time.perf_counter()
        self.tell("started")
        self.repeat("samples", args.sample_steps, self._save_step_samples, at_end=False)  # finish() saves the last ones
        self.bar = tqdm(
            total=self.max_train_steps, initial=self.global_step, desc="Training", unit="step", dynamic_ncols=True,
            disable=not accelerator.is_local_main_process, mininterval=0.1 if sys.stderr.isatty() else 10,
        )  # fmt: skip
        if not self.global_step:
            on_main_process(accelerator, self._try_to_save)
        try:
            with self.untimed(), contextlib.suppress(Interrupted):
                self.draw(1, **({"num_inference_steps": 1} if self.noise_scheduler else {}))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            error.add_note("This was a test of draw() and the model with one image, before the first step.")
            raise
        self.repeats.write()
        self._do_what_is_due(self.global_step == self.max_train_steps)

    def _try_to_save(self) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.output_dir) as folder:
                self._save_pipeline(Path(folder))
                how_to_load(Path(folder), folder)  # This raises an error if a file of the pipeline is missing
                if hasattr(self.space, "autoencoder") and not any(Path(folder, name).is_dir() for name in AUTOENCODERS):
                    raise UserError(
                        "the script denoises latents, but saves a pipeline without their autoencoder. Expected "
                        "LDMPipeline(autoencoder, unet, scheduler)"
                    )
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # The script, diffusers and the file system raise errors of many classes
            problem = f"the pipeline of a {type(self.unet).__name__} cannot be saved: {type(error).__name__}: {error}"
            if getattr(error, "errno", None) not in exits.DISK_ERRORS:
                problem += ". Expected a model of diffusers, with save_pretrained and config. For an nn.Module "
                problem += "use as_diffusers_model of utils/diffusion/own_nets.py"
            raise UserError(problem) from error

    def _global_batches(self) -> Iterator[int]:
        numbers, *_ = [*self.tell("global_batches"), itertools.count()]
        return itertools.islice(numbers, self.global_step, self.max_train_steps)

    # ------------------------------------------------------------------------------------- after each optimizer step

    def _end_step(self, is_last: bool) -> None:
        step, args = self.global_step, self.args
        self._step_is_open = False
        self.ema_decay = self.ema_model.cur_decay_value or 0
        self.bar.update(step - self.bar.n)
        self.tell("stepped")
        due = step % args.logging_steps == 0 or (is_last and step < args.logging_steps)  # A short run has one point
        if due and self.losses.losses:
            self._log_point()
        stop = self.stop_signal.check(step)
        if stop or is_last or step % args.checkpointing_steps == 0:
            self._save_checkpoint()
        if stop:
            self._stop(stop)
        self._do_what_is_due(is_last)

    def _log_point(self) -> None:
        self._check()
        losses, norms = self.losses.means()
        seconds = time.perf_counter() - self._logged_at
        self.images_per_second = (self.global_step - self._logged_step) * self.train_data.global_batch_size / seconds
        self.bar.set_postfix_str(f"loss {losses.mean():.4f}, {self.images_per_second:.0f} images/s", refresh=False)
        self.tell("logged", losses, norms)
        self.losses.clear()
        self._logged_step, self._logged_at = self.global_step, time.perf_counter()

    def _check(self) -> None:
        """Check that losses and gradient norms are finite.

        Raises:
            UserError, RestartFromCheckpoint: one of them is NaN or infinite, see ``diverged``.
        """
        for step, loss, norm, finite in self.losses.unseen(self.global_step):
            if not finite:
                self.diverged(step, loss, norm)

    def diverged(self, step: int, loss: float, norm: float) -> NoReturn:
        """End the run because of the loss or gradient norm of a step, unless an optional folder can roll the run back.

        Args:
            step: optimizer step.
            loss, norm: loss and gradient norm of that step.

        Raises:
            UserError: the run ends.
            RestartFromCheckpoint: the run rolls back, so ``main`` has to be called again.
        """
        problem = f"step {step}: loss {loss:g}, gradient norm {norm:g} (expected finite numbers)"
        entry = dict(step=step, loss=str(loss), grad_norm=str(norm))
        used_up, instead = next(iter(self.tell("diverged", problem, entry)), ("", ""))
        raise UserError(
            f"{problem}. This step was not saved{used_up}. The same command resumes from the last checkpoint. "
            f"--mixed_precision no may help. If it happens again, {instead}start a new run with a lower --learning_rate"
        )

    def _save_checkpoint(self) -> None:
        """Publish ``checkpoint-<step>``, after a check that losses are finite."""
        if self._saved_at == self.global_step:
            return
        self._check()
        state = dict(settings=self.settings, ema_step=self.ema_model.optimization_step, **self.losses.state())
        for more in self.tell("state"):
            state |= more
        limit = self.args.checkpoints_total_limit
        with self.untimed():
            checkpoints.save_checkpoint(self.accelerator, self.output_dir, self.global_step, self.save, state, limit)
        self._saved_at = self.global_step

    def save(self, folder: Path) -> None:
        """Write the pipeline with the averaged weights into a folder."""
        with self.ema_model.averaged_weights(self.unet):
            self._save_pipeline(folder)
        files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
        for file in files:  # safetensors makes them unreadable for other users
            shutil.copymode(index_file(folder), file)
        self.tell("saved", folder)

    def _do_what_is_due(self, is_last: bool) -> None:
        """Perform the actions that are due at this step and not yet done: validation, evaluation, samples."""
        for name, action in self.repeats.due(self.global_step, is_last):
            with self.untimed(), contextlib.suppress(Interrupted):
                with self.ema_model.averaged_weights(self.unet):
                    action()
                self.repeats.note(name, self.global_step)
            if self.stop_requested():
                self._stop(self.stop_signal.received)

    # --------------------------------------------------------------------------------------------------------- samples

    def _save_step_samples(self) -> None:
        self._save_samples(self.output_dir / "samples" / f"step-{self.global_step:06}.png")

    def _save_samples(self, path: Path) -> None:
        """Write the script's pictures: ``samples`` to this path, the others beside the model."""
        with self._uncompiled(), self.ema_model.averaged_weights(self.unet):
            pictures = self._sample()
        if "samples" not in (pictures or {}):
            raise UserError(
                f"sample() returned {sorted(pictures or {})}. Expected pictures by name, among them samples"
            )
        for name, picture in pictures.items():
            caption = ", ".join([f"step {self.global_step}", self.caption] if self.caption else [])
            self.save_picture(name, picture, path if name == "samples" else self.output_dir / f"{name}.png", caption)

    def save_picture(self, name: str, picture: Image.Image, path: Path, caption: str = "") -> None:
        """Write a picture as PNG, on the main process, and show it in the trackers.

        Args:
            name: name in the trackers.
            picture: picture to write.
            path: path of the PNG file.
            caption: line below ``samples``.
        """
        if not self.accelerator.is_main_process:
            return
        picture = with_caption(picture, caption) if caption and name == "samples" else picture
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self.tell("pictured", name, picture, caption)

    # --------------------------------------------------------------------------------------------------------- the end

    def _stop(self, number: int) -> NoReturn:
        """Save, print how to resume, and exit with 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT."""
        self._save_checkpoint()
        self.close()
        if self.accelerator.is_main_process:
            print(
                f"\nStopped by {signal.Signals(number).name} after {self.global_step} of {self.max_train_steps} "
                f"optimizer steps. {self.output_dir / f'checkpoint-{self.global_step}'} is complete.\nThe same command "
                "resumes from there.",
                flush=True,
            )
        self.accelerator.wait_for_everyone()  # After the first exit the launcher may end the other processes
        sys.exit(128 + number)

    def _release(self, title: str) -> None:
        """Print the last lines: the paths of samples and pipeline, and commands to continue with."""
        self.close()
        if self.accelerator.is_main_process:
            args, continued, record = self.args, None, output_dir.read_arguments(self.output_dir)
            needs_another = {"vae", "solver_steps"} & {*vars(args)}  # first another autoencoder or teacher
            if record.get("public_data") in ("mnist", "ylecun/mnist", "digits", "faces") and not needs_another:
                continued = "--train_data_dir DIR --output_dir outputs/mine"
                continued += f" --clusters {args.clusters}" if vars(args).get("clusters") else ""
                if base := vars(args).get("pretrained_model_name_or_path"):
                    continued += f" --pretrained_model_name_or_path {base}"
                    if args.learning_rate is not None:
                        continued += f" --learning_rate {args.learning_rate:g}"
            steps = vars(args).get("num_inference_steps")
            lines = last_lines(self.output_dir, steps, continued, record.get("model_inputs"))
            print(f"\n{title}, after {counted(self.global_step, 'optimizer step')}.", *lines, sep="\n", flush=True)
        self.tell("released")

    def close(self, again: bool = False) -> None:
        """Release everything that the run holds: bar, trackers, threads, signal handlers, the lock on the folder.

        Args:
            again: whether the run rolls back to a checkpoint. Then it keeps its handlers and its lock.
        """
        if self.bar:
            self.bar.close()
        self.tell("closed")
        if again:
            self.stop_signal.keep()
            self.accelerator.free_memory()
            return
        if self.stop_signal:
            self.stop_signal.restore()
        if self.output_dir:
            output_dir.release_output_dir(self.output_dir)
