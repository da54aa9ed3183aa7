"""A minimal UNet of six convolutions, short enough to read in a minute."""

import itertools

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


class BasicUNet(ModelMixin, ConfigMixin):
    """A down path and an up path of convolutions, with a skip connection at each size and no timestep embedding.

    SiLU follows each convolution except the last, because pixels may take any value. The down path halves the size
    between convolutions, and the up path doubles it. The features before each halving are added after the matching
    doubling. Therefore fine detail passes through the skip connections, and the small sizes model large structures.

    Args:
        sample_size: side of the training images, or (H, W), pixels. Other sizes work too.
        in_channels, out_channels: channels of the images, usually the same.
        block_out_channels: output channels of the down path's convolutions. The size is halved between them.
        kernel_size: side of the kernels, odd.
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
            sample: noisy images (B, C, H, W), with H and W divisible by 4 for the default channels.
            timestep: unused; an argument only so that the signature is that of other models.

        Raises:
            ValueError: H or W is not divisible by the total downsampling factor.
        """
        factor = 2 ** (len(self.down_convs) - 1)
        if sample.shape[-2] % factor or sample.shape[-1] % factor:
            raise ValueError(f"images of {tuple(sample.shape[-2:])} pixels. Expected sides divisible by {factor}")
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
