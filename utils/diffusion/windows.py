"""Images larger than those that a model was trained on, in overlapping windows."""

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput


class Windows:
    """A model with a condition, for images of the training size or larger, called like the model itself.

    At every sampling step the model sees windows of the size that it was trained on. They overlap by at least half,
    and their outputs are averaged with weights that fall towards the edges (MultiDiffusion, arXiv:2302.08113). All
    windows share one noisy image, so that their contents agree.

    Args:
        model: model that takes ``condition=``.
        size: (H, W) of a window.
    """

    def __init__(self, model: torch.nn.Module, size: tuple[int, int]):
        self.model, self.size = model, size
        self.eval, self.train = model.eval, model.train
        ramps = [1 - (torch.arange(side) * 2 + 1 - side).abs() / (side + 1) for side in size]
        self.weight = ramps[0][:, None] * ramps[1]  # (H, W), in (0, 1]

    def count(self, size: tuple[int, int]) -> int:
        """Return the number of windows of an image of (H, W)."""
        return len(_starts(size[0], self.size[0])) * len(_starts(size[1], self.size[1]))

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> UNet2DOutput:
        if noisy.shape[2:] == self.size:
            return self.model(noisy, timesteps, condition=condition)
        weight = self.weight.to(noisy.device)
        total, weights = torch.zeros_like(noisy), torch.zeros_like(noisy[:1, :1])
        for top in _starts(noisy.shape[2], self.size[0]):
            for left in _starts(noisy.shape[3], self.size[1]):
                part = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
                output = self.model(noisy[part], timesteps, condition=condition[part]).sample
                total[part] += weight * output.float()
                weights[part] += weight
        return UNet2DOutput(sample=total / weights)


def _starts(length: int, side: int) -> list[int]:
    """Return evenly spaced starts of windows that cover a length and overlap by at least half a side."""
    steps = -(-(length - side) // max(1, side // 2))
    return [round(k * (length - side) / max(1, steps)) for k in range(steps + 1)]
