"""The curves of a run: loss, by noise level and by class; gradient norm, learning rate; speed, memory, stragglers.

Trackers sort curves by name, in groups by what is before the slash; so what is looked at first comes first:
``loss``, ``loss_by_timestep``, ``loss_per_label``, ``metrics``, ``optimizer``, ``system``.

Losses stay on the device between two points of the curves, so that no step waits for the device.
"""

import logging
import math
import time

import torch

from .. import counted
from ..diffusion.schedulers import NOISE_LEVELS, noise_levels
from ..hardware import peak_memory, usable_cores, waiting_seconds
from .plot import draw_curves
from .trackers import check_trackers, show_picture, start_trackers

logger = logging.getLogger(__name__)

LOAD_SECONDS = 20  # in which it is seen whether others compete for the cores
LOAD_SHARE = 0.25  # of the time in which threads wait for a core
LOGS = "logs"  # folder of TensorBoard's files, in the output folder


class MetricLogger:
    """Takes part in a training run, see ``training.loop.Run``.

    Args:
        report_to: names of trackers, see ``trackers.check_trackers``.

    Raises:
        UserError: a tracker is unknown or not installed.
    """

    def __init__(self, report_to: str):
        self.trackers, self.skipped, self.restored = check_trackers(report_to), 0, None
        self.began = self.forward_ended = self.alone = 0.0  # seconds, see ``_forward_ended``
        self.load_seen_at = None  # time, and seconds that threads had waited for a core

    def started(self, run) -> None:
        start_trackers(run, self.trackers, run.output_dir / LOGS)
        self.num_train_timesteps = run.num_train_timesteps
        self.label_names = run.train_data.label_names
        bins = NOISE_LEVELS + len(self.label_names) + 1  # the last for samples whose label is missing
        self.sums = torch.zeros(2, bins, device=run.accelerator.device)  # of losses, and their number
        restored = self.restored if run.accelerator.is_main_process else None  # the others begin with zeros
        if restored and len(restored[0]) == bins:
            self.sums += torch.tensor(restored, device=self.sums.device)
        if run.accelerator.num_processes > 1:
            run.model.register_forward_hook(self._forward_ended)
        self.began = time.perf_counter()

    def measured(self, run, losses: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Collect one micro-step: loss of each sample, unweighted, (B,); its timestep (B,); its class (B,), or -1."""
        self.alone += max(0.0, self.forward_ended - self.began)
        self.began = time.perf_counter()
        bins = (timesteps * NOISE_LEVELS // self.num_train_timesteps).long()
        bins = bins.clamp(max=NOISE_LEVELS - 1)  # a real timestep just below T may have been rounded to it
        indices = [bins]
        if labels is not None and self.label_names:
            indices.append(labels.where(labels >= 0, len(self.label_names)) + NOISE_LEVELS)
        finite = losses.isfinite()  # in fp16 not all are
        losses = losses.where(finite, 0)
        for index in indices:
            self.sums[0].index_add_(0, index, losses)
            self.sums[1].index_add_(0, index, finite.float())

    def _forward_ended(self, *_) -> None:
        """Note when this process begins to wait for the others, which it does in the backward pass."""
        self.forward_ended = time.perf_counter()

    def logged(self, run, losses: torch.Tensor, grad_norms: torch.Tensor) -> None:
        """Write a point of each curve.

        Args:
            losses, grad_norms: of the steps since the last point, over all processes, (steps,) on the CPU.
        """
        accelerator, values = run.accelerator, {"learning_rate": run.learning_rate, "ema_decay": run.ema_decay}
        skipped = ~(grad_norms.isfinite() & losses.isfinite())  # only in fp16, by its scaler
        overflows = int(skipped.sum())
        if overflows:
            self.skipped += overflows
            logger.warning(
                f"step {run.global_step}: fp16 overflowed in {overflows} of the last {len(grad_norms)} steps, which "
                f"were skipped; {self.skipped} so far. A few are normal; if it continues, try --mixed_precision bf16"
            )
        losses, grad_norms = losses[~skipped], grad_norms[~skipped]
        if len(grad_norms):
            values["grad_norm"] = grad_norms.mean().item()
        if accelerator.mixed_precision == "fp16":
            values["skipped_steps"] = self.skipped
        self._look_at_the_load()
        curves = {"loss/train": losses.mean().item()} if len(losses) else {}
        curves |= {f"optimizer/{name}": value for name, value in values.items()}
        curves["system/images_per_second"] = run.images_per_second
        curves["system/peak_memory_gib"] = peak_memory(accelerator.device) / 2**30
        if accelerator.num_processes > 1:  # of each process until it waits for the others: data and forward pass
            alone = torch.tensor([self.alone / len(losses)], device=accelerator.device)
            alone = accelerator.gather(alone)
            curves |= {"system/slowest_seconds": alone.max().item(), "system/fastest_seconds": alone.min().item()}
            self.alone = 0.0
        names = [f"loss_by_timestep/{level}" for level in noise_levels(self.num_train_timesteps)]
        names += [f"loss_per_label/{name}" for name in self.label_names]
        sums, counts = accelerator.reduce(self.sums, "sum").tolist()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        curves |= {name: mean for name, mean in zip(names, means[:-1], strict=True) if mean is not None}
        run.log(curves)
        self.sums.zero_()

    def _look_at_the_load(self) -> None:
        """Say once that other programs use the cores, too: threads that wait for each other then wait for those."""
        waited, now = waiting_seconds(), time.perf_counter()
        if self.load_seen_at is None:  # the first point has what comes once
            self.load_seen_at = now, waited
            return
        since, before = self.load_seen_at
        if waited is None or before is None or now - since < LOAD_SECONDS:
            return
        threads, self.load_seen_at = torch.get_num_threads(), (math.inf, None)
        share = (waited - before) / ((now - since) * threads)
        if threads > 1 and share > LOAD_SHARE:
            logger.warning(
                f"{threads} threads on {counted(usable_cores(), 'core')}, and others compete for them: the threads "
                f"waited for a core {share:.0%} of the time. Several trainings on the same cores slow each other down "
                "many times over: give each fewer threads, OMP_NUM_THREADS=1"
            )

    def pictured(self, run, name: str, picture, caption: str) -> None:
        show_picture(run.accelerator.trackers, name, picture, run.global_step, caption)

    def state(self, run) -> dict:
        """Return what has been collected since the last point, over all processes."""
        return {"loss_sums": run.accelerator.reduce(self.sums, "sum").tolist()}

    def load_state(self, run, state: dict) -> None:
        self.restored = state.get("loss_sums")

    def paused(self, run) -> None:
        self.began = time.perf_counter()

    def finished(self, run) -> None:
        """Draw the curves that TensorBoard has; a run that is complete does not fail for it."""
        self.closed(run)
        if run.accelerator.is_main_process:
            try:
                draw_curves(run.output_dir, run.output_dir / LOGS)
            except Exception as error:  # a full disk, a damaged file, no matplotlib
                logger.warning(f"curves.png could not be drawn: {type(error).__name__}: {error}")

    def closed(self, run) -> None:
        """Close the trackers.

        As ``accelerator.end_training`` does, but the process group is left alone: gloo may hang in destroying it.
        """
        trackers, run.accelerator.trackers = run.accelerator.trackers, []
        for tracker in trackers:
            tracker.finish()
