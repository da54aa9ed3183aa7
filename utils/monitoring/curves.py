"""The curves of a run: loss by noise level and by class, gradient norm, learning rate, speed, memory, slow processes.

Trackers group curves by the part of the name before the slash, and sort the groups by name. The names are chosen so
that the most important groups come first: ``loss``, ``loss_by_timestep``, ``loss_per_label``, ``metrics``,
``optimizer``, ``system``.

Losses stay on the device between two points of the curves, so that no step waits for the device.
"""

import logging
import time

import torch

from .. import counted
from ..diffusion.schedulers import NOISE_LEVELS, noise_levels
from ..hardware import peak_memory, usable_cores, waiting_seconds
from .plot import draw_curves
from .trackers import check_trackers, show_picture, start_trackers

logger = logging.getLogger(__name__)

LOAD_SECONDS = 20  # shortest time over which the load of the cores is measured
LOAD_SHARE = 0.25  # share of the time in which threads wait for a core, above which a warning is logged
MAX_LABEL_CURVES = 50  # with more classes, there is no loss by class
LOGS = "logs"  # folder of TensorBoard's files, in the output folder


class MetricLogger:
    """Part of a training run that logs its curves, see ``training.loop.Run``.

    Args:
        report_to: names of trackers, see ``trackers.check_trackers``.

    Raises:
        UserError: a tracker is unknown or not installed.
    """

    def __init__(self, report_to: str):
        self.trackers, self.skipped, self.restored = check_trackers(report_to), 0, None
        self.began = self.forward_ended = self.alone = 0.0  # seconds, see ``_forward_ended``
        self.load_measured_at = None  # time, and seconds that threads had waited for a core until then

    def started(self, run) -> None:
        start_trackers(run, self.trackers, run.output_dir / LOGS)
        self.num_train_timesteps = run.num_train_timesteps
        self.levels = NOISE_LEVELS if self.num_train_timesteps else 0
        names = run.train_data.label_names
        self.label_names = names if len(names) <= MAX_LABEL_CURVES else []
        bins = self.levels + len(self.label_names) + 1  # the last bin is for samples without a label
        self.sums = torch.zeros(2, bins, device=run.accelerator.device)  # sums of losses, and numbers of losses
        restored = self.restored if run.accelerator.is_main_process else None  # the others start at zero
        if restored and len(restored[0]) == bins:
            self.sums += torch.tensor(restored, device=self.sums.device)
        if run.accelerator.num_processes > 1:
            run.model.register_forward_hook(self._forward_ended)
        self.began = time.perf_counter()

    def measured(self, run, losses: torch.Tensor, timesteps: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """Collect the losses of one micro-step.

        Args:
            losses: unweighted loss of each sample, (B,).
            timesteps: timestep of each sample, (B,); None without noise levels.
            labels: class of each sample, (B,), -1 for none; None if there are no classes.
        """
        self.alone += max(0.0, self.forward_ended - self.began)
        self.began = time.perf_counter()
        indices = []
        if timesteps is not None:
            bins = (timesteps * NOISE_LEVELS // self.num_train_timesteps).long()
            indices.append(bins.clamp(max=NOISE_LEVELS - 1))  # rounding may turn a real timestep just below T into T
        if labels is not None and self.label_names:
            indices.append(labels.where(labels >= 0, len(self.label_names)) + self.levels)
        finite = losses.isfinite()  # fp16 may overflow
        losses = losses.where(finite, 0)
        for index in indices:
            self.sums[0].index_add_(0, index, losses)
            self.sums[1].index_add_(0, index, finite.float())

    def _forward_ended(self, *_) -> None:
        """Note the time when the forward pass ends. In the backward pass, this process waits for the others."""
        self.forward_ended = time.perf_counter()

    def logged(self, run, losses: torch.Tensor, grad_norms: torch.Tensor) -> None:
        """Write a point of each curve.

        Args:
            losses, grad_norms: values of the steps since the last point, over all processes, (steps,) on the CPU.
        """
        accelerator, values = run.accelerator, {"learning_rate": run.learning_rate, "ema_decay": run.ema_decay}
        skipped = ~(grad_norms.isfinite() & losses.isfinite())  # the scaler of fp16 skips such steps
        overflows = int(skipped.sum())
        if overflows:
            self.skipped += overflows
            logger.warning(
                f"step {run.global_step}: fp16 overflowed in {overflows} of the last {len(grad_norms)} steps, which "
                f"were skipped ({self.skipped} so far). A few are normal. If this continues, try --mixed_precision bf16"
            )
        steps, losses, grad_norms = len(losses), losses[~skipped], grad_norms[~skipped]
        if len(grad_norms):
            values["grad_norm"] = grad_norms.mean().item()
        if accelerator.mixed_precision == "fp16":
            values["skipped_steps"] = self.skipped
        self._check_load()
        curves = {"loss/train": losses.mean().item()} if len(losses) else {}
        curves |= {f"optimizer/{name}": value for name, value in values.items()}
        curves["system/images_per_second"] = run.images_per_second
        curves["system/peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
        if accelerator.num_processes > 1:  # time of each process for data and forward pass, before it waits
            alone = torch.tensor([self.alone / steps], device=accelerator.device)
            alone = accelerator.gather(alone)
            curves |= {"system/slowest_seconds": alone.max().item(), "system/fastest_seconds": alone.min().item()}
            self.alone = 0.0
        names = [f"loss_by_timestep/{k}" for k in (noise_levels(self.num_train_timesteps) if self.levels else ())]
        names += [f"loss_per_label/{name}" for name in self.label_names]
        sums, counts = accelerator.reduce(self.sums, "sum").tolist()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        curves |= {name: mean for name, mean in zip(names, means[:-1], strict=True) if mean is not None}
        run.log(curves)
        self.sums.zero_()

    def _check_load(self) -> None:
        """Warn once if other programs use the same cores, because a thread without a core delays the others."""
        now = time.perf_counter()
        if self.load_measured_at is None:  # the first interval includes work that is done only once
            self.load_measured_at = now, waiting_seconds()
            return
        since, before = self.load_measured_at
        if before is None or now - since < LOAD_SECONDS:  # the load is unknown, or the interval too short
            return
        threads, waited, self.load_measured_at = torch.get_num_threads(), waiting_seconds(), (now, None)
        share = 0 if waited is None else (waited - before) / ((now - since) * threads)
        if threads > 1 and share > LOAD_SHARE:
            logger.warning(
                f"{threads} threads run on {counted(usable_cores(), 'core')}, which other programs also use. The "
                f"threads waited for a core {share:.0%} of the time. Several runs on the same cores make each "
                "other many times slower. Give each run fewer threads, for example OMP_NUM_THREADS=1"
            )

    def pictured(self, run, name: str, picture, caption: str) -> None:
        show_picture(run.accelerator.trackers, name, picture, run.global_step, caption)

    def state(self, run) -> dict:
        """Return the sums since the last point, over all processes."""
        return {"loss_sums": run.accelerator.reduce(self.sums, "sum").tolist()}

    def load_state(self, run, state: dict) -> None:
        self.restored = state.get("loss_sums")

    def paused(self, run) -> None:
        self.began = time.perf_counter()

    def finished(self, run) -> None:
        """Draw the curves that TensorBoard has. An error in drawing does not make a complete run fail."""
        self.closed(run)
        if run.accelerator.is_main_process:
            try:
                draw_curves(run.output_dir, run.output_dir / LOGS)
            except Exception as error:  # a full disk, a damaged file, no matplotlib
                logger.warning(f"curves.png could not be drawn: {type(error).__name__}: {error}")

    def closed(self, run) -> None:
        """Close the trackers.

        Unlike ``accelerator.end_training``, leave the process group alone, because destroying it may hang with gloo.
        """
        trackers, run.accelerator.trackers = run.accelerator.trackers, []
        for tracker in trackers:
            tracker.finish()
