"""Losses and gradient norms since they were last logged, kept on the device until they are read."""

import math
from collections.abc import Iterator

import torch

OVERFLOWS = 10  # number of consecutive losses in fp16 that are not finite, after which a run has diverged


class RecentLosses:
    """A collection of the loss and the gradient norm of each optimizer step, without waiting for the device.

    Args:
        accelerator: accelerator of this process.
    """

    def __init__(self, accelerator):
        self.accelerator, self.micro, self.losses, self.norms, self.checked = accelerator, [], [], [], 0
        self.overflows = 0  # consecutive losses that are not finite

    def add(self, losses: torch.Tensor) -> None:
        """Collect the losses of a micro-step, (B,)."""
        self.micro.append(losses.mean())

    def step(self, grad_norm: torch.Tensor) -> None:
        """Record the end of an optimizer step, with the norm of its gradient before clipping, 0-d."""
        self.losses.append(torch.stack(self.micro).mean())
        self.norms.append(grad_norm.detach())
        self.micro = []

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and gradient norms, averaged over all processes: (steps,) each, on the CPU. Call it on all."""
        if not self.losses:
            return torch.zeros(0), torch.zeros(0)
        pair = torch.stack([torch.stack(self.losses), torch.stack(self.norms)])
        return tuple(self.accelerator.reduce(pair, "mean").cpu())

    def unseen(self, global_step: int) -> Iterator[tuple[int, float, float, bool]]:
        """Yield step, loss, gradient norm and validity of each step not yielded before.

        A step is valid if its loss and norm are finite. In fp16 a single overflow is valid, too, because the scaler
        skips that step. ``OVERFLOWS`` losses in a row that are not finite are invalid, because a smaller scale prevents
        the overflow of gradients only.
        """
        losses, norms = self.means()
        for index in range(self.checked, len(losses)):
            loss, norm = losses[index].item(), norms[index].item()
            self.overflows = 0 if math.isfinite(loss) else self.overflows + 1
            fine = math.isfinite(loss) and math.isfinite(norm)
            fine |= self.accelerator.mixed_precision == "fp16" and self.overflows < OVERFLOWS
            self.checked = index + 1
            yield global_step - len(losses) + 1 + index, loss, norm, fine

    def clear(self) -> None:
        """Remove all losses and norms, after they were logged."""
        self.losses, self.norms, self.checked = [], [], 0

    def state(self) -> dict:
        """Return losses and norms for a checkpoint, so that a resumed run logs the same means."""
        losses, norms = self.means()
        return {"recent_losses": losses.tolist(), "recent_grad_norms": norms.tolist()}

    def load_state(self, state: dict) -> None:
        """Restore the result of ``state``."""
        losses, norms = (state[name] for name in ("recent_losses", "recent_grad_norms"))
        self.losses, self.norms = (
            [torch.tensor(v, device=self.accelerator.device) for v in vs] for vs in (losses, norms)
        )
        self.checked = len(losses)
