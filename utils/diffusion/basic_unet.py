"""A UNet small enough to be read: six convolutions."""

import itertools

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class BasicUNet(ModelMixin, ConfigMixin):
    """Convolutions on the way down and up again, with a shortcut at each size. It is not told how noisy its input is.

    Each convolution is followed by SiLU, but for the last: an image may take any value. On the way down the size is
    halved between convolutions, on the way up it is doubled. What was seen before a halving is added after the
    doubling that undoes it: detail takes the shortcut, and the small sizes are left to what is large.

    Args:
        sample_size: side of the images it is trained on, or (H, W), pixels; others work too.
        in_channels, out_channels: of the images, usually the same.
        block_out_channels: of the convolutions on the way down; their number less one is the number of halvings.
        kernel_size: side of the convolutions, odd.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (32, 64, 64),
        kernel_size: int = 5,
    ):
        super().__init__()

        def convolutions(channels):
            pairs = itertools.pairwise(channels)
            return torch.nn.ModuleList(torch.nn.Conv2d(i, o, kernel_size, padding="same") for i, o in pairs)

        self.down_convs = convolutions([in_channels, *block_out_channels])
        self.up_convs = convolutions([*reversed(block_out_channels), out_channels])

    def forward(self, sample: torch.Tensor, timestep=None, return_dict: bool = True) -> UNet2DOutput | tuple:
        """Predict clean images.

        Args:
            sample: (B, C, H, W), H and W divisible by 4 (with the default channels).
            timestep: not used; here so that it is called as every other model.

        Raises:
            ValueError: H or W cannot be halved as often as the model halves it.
        """
        factor = 2 ** (len(self.down_convs) - 1)
        if sample.shape[-2] % factor or sample.shape[-1] % factor:
            raise ValueError(f"images of {tuple(sample.shape[-2:])} pixels; expected sides divisible by {factor}")
        shortcuts = []
        for conv in self.down_convs[:-1]:
            sample = F.silu(conv(sample))
            shortcuts.append(sample)
            sample = F.max_pool2d(sample, 2)
        sample = F.silu(self.down_convs[-1](sample))
        for conv in self.up_convs[:-1]:
            sample = F.silu(conv(sample))
            sample = F.interpolate(sample, scale_factor=2.0, mode="nearest") + shortcuts.pop()
        sample = self.up_convs[-1](sample)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)
