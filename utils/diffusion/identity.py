"""An autoencoder with weights that make it the identity, so that pipelines of latent diffusion work on pixels.

``LDMSuperResolutionPipeline`` passes a condition to the model, but decodes what the model has drawn. With this
autoencoder the latents are the image.
"""

import torch
from diffusers import AutoencoderKL

# B below. A larger B reduces the error of the variance, but increases that of rounding. With this one, both stay below
# 2e-5 at every size
CONSTANT = 512.0


def identity_autoencoder(channels: int) -> AutoencoderKL:
    """Make an ``AutoencoderKL`` that returns what it is given, in both directions and at every size.

    Encoder and decoder have the layers conv_in, residual blocks, GroupNorm, SiLU and conv_out. They become the identity
    in these steps:

    * conv_in turns each channel x into four, [x, -x, B, -B], with a large constant B.
    * The last convolution of each residual block is zero, so that the block returns its input.
    * Each group of GroupNorm holds the four channels of one x. Their mean is 0, and their variance is
      (mean(x^2) + B^2) / 2, which is almost constant. The weight B / sqrt(2) restores x.
    * conv_out subtracts the second channel from the first: silu(x) - silu(-x) = x sigmoid(x) + x sigmoid(-x) = x.

    The relative error is mean(x^2) / (2 B^2), besides rounding. The encoder's variance is exp(-30).

    Args:
        channels: number of channels of the images.

    Returns:
        The frozen model. Its config has ``_identity=True``.
    """
    autoencoder = AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=channels, block_out_channels=(4 * channels,),
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), layers_per_block=1,
        norm_num_groups=channels, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=1.0,
    )  # fmt: skip
    autoencoder.register_to_config(_identity=True)
    autoencoder.requires_grad_(False).eval()
    for weight in autoencoder.parameters():
        weight.zero_()
    for part in (autoencoder.encoder, autoencoder.decoder):
        for channel in range(channels):
            plus, minus, above, below = range(4 * channel, 4 * channel + 4)
            part.conv_in.weight[plus, channel, 1, 1], part.conv_in.weight[minus, channel, 1, 1] = 1, -1
            part.conv_in.bias[above], part.conv_in.bias[below] = CONSTANT, -CONSTANT
            part.conv_out.weight[channel, plus, 1, 1], part.conv_out.weight[channel, minus, 1, 1] = 1, -1
        part.conv_norm_out.weight.fill_(CONSTANT / 2**0.5)
    autoencoder.encoder.conv_out.bias[channels:] = -30
    return autoencoder


def is_identity(autoencoder: torch.nn.Module) -> bool:
    """Return whether an autoencoder was made by ``identity_autoencoder``, so that it can be left out."""
    return bool(autoencoder.config.get("_identity"))
