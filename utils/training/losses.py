"""Losses and gradient norms since the last point of the curves, kept on the device until they are looked at."""

import math
from collections.abc import Iterator

import torch

OVERFLOWS = 10  # losses in a row that are not finite in fp16


class RecentLosses:
    """Collects one loss and one gradient norm for each optimizer step, so that no step waits for the device.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator):
        self.accelerator, self.micro, self.losses, self.norms, self.looked_at = accelerator, [], [], [], 0
        self.overflows = 0  # losses in a row, in fp16

    def add(self, losses: torch.Tensor) -> None:
        """Collect the losses of a micro-step, (B,)."""
        self.micro.append(losses.mean())

    def step(self, grad_norm: torch.Tensor) -> None:
        """Note the end of an optimizer step, with the norm of its gradient before clipping, 0-d."""
        self.losses.append(torch.stack(self.micro).mean())
        self.norms.append(grad_norm.detach())
        self.micro = []

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and gradient norms, means over all processes: (steps,) each, on the CPU. Call it on all."""
        if not self.losses:
            return torch.zeros(0), torch.zeros(0)
        pair = torch.stack([torch.stack(self.losses), torch.stack(self.norms)])
        return tuple(self.accelerator.reduce(pair, "mean").cpu())

    def unseen(self, global_step: int) -> Iterator[tuple[int, float, float, bool]]:
        """Yield step, loss and gradient norm of each step not yielded before, and whether they are finite.

        In fp16 a gradient or a loss may overflow, and counts as finite: the scaler skips that step. So many losses in a
        row do not: a smaller scale helps gradients only.
        """
        losses, norms = self.means()
        for index in range(self.looked_at, len(losses)):
            loss, norm = losses[index].item(), norms[index].item()
            self.overflows = 0 if math.isfinite(loss) else self.overflows + 1
            fine = math.isfinite(loss) and math.isfinite(norm)
            fine |= self.accelerator.mixed_precision == "fp16" and self.overflows < OVERFLOWS
            self.looked_at = index + 1
            yield global_step - len(losses) + 1 + index, loss, norm, fine

    def clear(self) -> None:
        """Forget them: a point of the curves has been written."""
        self.losses, self.norms, self.looked_at = [], [], 0

    def state(self) -> dict:
        """Return what a checkpoint keeps, so that the next point is that of a run without a stop."""
        losses, norms = self.means()
        return {"recent_losses": losses.tolist(), "recent_grad_norms": norms.tolist()}

    def load_state(self, state: dict) -> None:
        """Continue from ``state``; a checkpoint of an earlier version has none."""
        losses, norms = (state.get(name, []) for name in ("recent_losses", "recent_grad_norms"))
        self.losses, self.norms = (
            [torch.tensor(v, device=self.accelerator.device) for v in vs] for vs in (losses, norms)
        )
        self.looked_at = len(losses)
