"""What a run shows while it trains: one progress bar, and curves in the trackers.

Trackers sort curves by name, in groups by what is before the slash; so what is looked at first comes first:
``loss``, ``loss_by_timestep``, ``loss_per_label``, ``metrics``, ``optimizer``, ``system``.

Losses stay on the device between two points of the curves, so that no step waits for the device.
"""

import itertools
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .. import rollbacks
from ..hardware import peak_memory
from ..watchdog import progress

logger = logging.getLogger(__name__)

NOISE_LEVELS = 4  # equal ranges of timesteps, each with its own loss curve


def noise_levels(num_train_timesteps: int) -> list[str]:
    """Names of the ranges: first and last timestep, such as 0-249."""
    edges = [-(-k * num_train_timesteps // NOISE_LEVELS) for k in range(NOISE_LEVELS + 1)]
    return [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]


class TrainingCurves:
    """Collects losses, and every ``logging_steps`` optimizer steps writes their means to bar and trackers.

    Args:
        accelerator: with its trackers initialized.
        args: ``logging_steps``, optimizer steps between points.
        train_data: its global batch size; its label names, for a loss curve each.
        num_train_timesteps: T; timesteps are in [0, T).
        first_step, last_step: optimizer steps done before, and at the end of, this run.
    """

    def __init__(self, accelerator, args, train_data, num_train_timesteps, first_step, last_step):
        train_data.prepare()  # before the clock starts, and while Ctrl-C still stops at once
        self.accelerator, self.args, self.logging_steps = accelerator, args, args.logging_steps
        self.images_per_step, self.label_names = train_data.global_batch_size, train_data.label_names
        self.num_train_timesteps = num_train_timesteps
        self.last_written, self.written_at, self.skipped = first_step, time.perf_counter(), 0
        self.began, self.alone = self.written_at, 0.0
        if accelerator.num_processes > 1:  # they wait for each other in the backward pass
            self._backward, accelerator.backward = accelerator.backward, self._timed_backward
        self.bar = tqdm(
            total=last_step, initial=first_step, desc="Training", unit="step", dynamic_ncols=True,
            disable=not accelerator.is_local_main_process, mininterval=0.1 if sys.stderr.isatty() else 10,
        )  # fmt: skip
        self._clear()

    def _clear(self) -> None:
        self.losses, self.grad_norms, self.checked = [], [], 0
        bins = NOISE_LEVELS + len(self.label_names) + 1  # the last for samples whose label is missing
        self.sums, self.counts = torch.zeros(2, bins, device=self.accelerator.device)

    def add(self, losses: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Collect one micro-step: loss of each sample, unweighted, (B,); its timestep (B,); its class (B,), or -1."""
        progress()
        self.began = time.perf_counter()
        losses = losses.detach().float()
        bins = (timesteps * NOISE_LEVELS // self.num_train_timesteps).long()
        bins = bins.clamp(max=NOISE_LEVELS - 1)  # a real timestep just below T may have been rounded to it
        self.losses.append(losses.mean())
        indices = [bins]
        if labels is not None:
            indices.append(labels.where(labels >= 0, len(self.label_names)) + NOISE_LEVELS)
        for index in indices:
            self.sums.index_add_(0, index, losses)
            self.counts.index_add_(0, index, torch.ones_like(losses))

    def step(self, global_step: int, grad_norm: torch.Tensor, **values: float) -> None:
        """Note the end of an optimizer step; at a multiple of ``logging_steps``, write. Call it on all processes.

        Args:
            global_step: optimizer steps done.
            grad_norm: before clipping, 0-d.
            values: further curves of the optimizer, such as the learning rate.

        Raises:
            NonFiniteLoss, Again: see ``rollbacks.check``.
        """
        self.grad_norms.append(grad_norm.detach())
        self.bar.update(global_step - self.bar.n)
        if global_step % self.logging_steps:
            return
        losses, grad_norms = self.check(global_step)
        overflows = int((~grad_norms.isfinite()).sum())  # only in fp16, whose scaler has skipped these steps
        if overflows:
            self.skipped += overflows
            logger.warning(
                f"step {global_step}: fp16 overflowed in {overflows} of the last {len(grad_norms)} steps, which were "
                f"skipped; {self.skipped} so far. A few are normal; if it goes on, try --mixed_precision bf16 or no"
            )
            grad_norms = grad_norms[grad_norms.isfinite()]
        sums, counts = self.accelerator.reduce(torch.stack([self.sums, self.counts]), "sum").tolist()
        seconds = time.perf_counter() - self.written_at
        images_per_second = (global_step - self.last_written) * self.images_per_step / seconds
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        loss = losses.mean().item()
        if len(grad_norms):
            values["grad_norm"] = grad_norms.mean().item()
        if self.accelerator.mixed_precision == "fp16":
            values["skipped_steps"] = self.skipped
        curves = {"loss/train": loss, **{f"optimizer/{name}": value for name, value in values.items()}}
        curves["system/images_per_second"] = images_per_second
        curves["system/peak_memory_gib"] = peak_memory(self.accelerator.device) / 2**30
        if self.accelerator.num_processes > 1:  # of each process until it waits for the others: data and forward pass
            alone = torch.tensor([self.alone / (global_step - self.last_written)], device=self.accelerator.device)
            alone = self.accelerator.gather(alone)
            curves |= {"system/slowest_seconds": alone.max().item(), "system/fastest_seconds": alone.min().item()}
            self.alone = 0.0
        names = [f"loss_by_timestep/{level}" for level in noise_levels(self.num_train_timesteps)]
        names += [f"loss_per_label/{name}" for name in self.label_names]
        curves |= {name: mean for name, mean in zip(names, means[:-1], strict=True) if mean is not None}
        self.accelerator.log(curves, step=global_step)
        self.bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s", refresh=False)
        self.last_written, self.written_at = global_step, time.perf_counter()
        self._clear()

    def _timed_backward(self, *losses, **options) -> None:
        self.alone += time.perf_counter() - self.began
        self._backward(*losses, **options)

    def check(self, global_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean losses and gradient norms of the steps since the last point, over all processes, (steps,) on the CPU.

        Raises:
            NonFiniteLoss, Again: on every process, if something is wrong with one of them, see ``rollbacks.check``.
        """
        if not self.grad_norms:
            return torch.zeros(0), torch.zeros(0)
        losses = torch.stack(self.losses).reshape(len(self.grad_norms), -1).mean(1)
        losses, grad_norms = self.accelerator.reduce(torch.stack([losses, torch.stack(self.grad_norms)]), "mean").cpu()
        rollbacks.check(self.accelerator, self.args, global_step, losses[self.checked :], grad_norms[self.checked :])
        self.checked = len(losses)
        return losses, grad_norms

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, time does not count as training: for sampling and saving."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.written_at += time.perf_counter() - started
            self.began = time.perf_counter()

    def close(self) -> None:
        self.bar.close()


def draw_curves(folder: Path, logs: Path) -> None:
    """Write ``curves.png``, the losses in TensorBoard's files below ``logs``; nothing if there are none."""
    runs = sorted({path.parent for path in logs.glob("**/events.out.*")})
    if not runs:
        return
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", yscale="log")
    for run in runs:
        events = EventAccumulator(str(run), size_guidance={"images": 1}).Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag) if tag.startswith("loss/") else []
            if points:  # none may be left of a run that was begun again
                steps, values = [point.step for point in points], [point.value for point in points]
                axes.plot(steps, values, label=f"{tag.removeprefix('loss/')}: {values[-1]:.3g} at the end")
    if axes.lines:
        label_log_axis(axes)
        axes.legend()
        figure.savefig(folder / "curves.png")


def label_log_axis(axes) -> None:
    """Labels at 1, 2, 5, 10 ... as plain numbers; by default a short logarithmic axis has one label, or none."""
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
