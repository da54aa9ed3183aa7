"""Autoencoders: the sizes of ``--autoencoder``, loading, the loss's structural term, and the scale of latents."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from .. import UserError, counted, read_record
from ..args import nearest_resolution, size_of
from ..saved import AUTOENCODERS, CONFIG, INDEX, refuse_missing, shorten, variant_of
from ..signals import Interrupted, progress
from .sampling import evaluating

logger = logging.getLogger(__name__)

SIZES = {  # keyword arguments of AutoencoderKL; each halving of the images uses one more of the widths
    "small": dict(  # 0.6 M parameters with --downsampling 4, for up to 128 pixels on a CPU
        block_out_channels=(16, 32, 64, 64), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False
    ),
    "base": dict(  # 55 M with --downsampling 4, for GPUs. With 8, it is the architecture of Stable Diffusion's
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32
    ),
}
KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "VQModel")  # classes of diffusers that --vae accepts
DEFAULT = "outputs/autoencoder"  # default of --vae
PIXELS_AT_ONCE = 2**19  # pixels of images that an autoencoder encodes or decodes at once, to limit its memory
WINDOW = 7  # pixels, side of the window of the structural similarity


class AutoencoderKL(diffusers.AutoencoderKL):
    """An ``AutoencoderKL`` with a forward pass for training. It is saved as that class."""

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Encode and decode.

        Args:
            images: images (B, C, H, W) in [-1, 1].
            noise: normal noise (B, L, h, w) with which latents are drawn. Without it they are the mean.

        Returns:
            Reconstructions (B, C, H, W), and mean and logarithm of the variance of the latents, (B, L, h, w).
        """
        distribution: DiagonalGaussianDistribution = self.encode(images).latent_dist
        latents = distribution.mean if noise is None else distribution.mean + distribution.std * noise
        return self.decode(latents).sample, distribution.mean, distribution.logvar


def make_autoencoder(
    name: str | None, downsampling: int | None, latent_channels: int | None, channels: int,
    pretrained: AutoencoderKL | None = None,
) -> AutoencoderKL:  # fmt: skip
    """Make an ``AutoencoderKL`` with random weights, or return the pretrained one.

    Args:
        name: key of ``SIZES``, or None for ``small``.
        downsampling: image pixels per latent in each direction, a power of two. None is 4, or that of ``pretrained``.
        latent_channels: channels of the latents. None is 4, or those of ``pretrained``.
        channels: channels of the images.
        pretrained: autoencoder that training starts from.

    Raises:
        UserError: the pretrained autoencoder differs from what is asked for.
    """
    if pretrained:
        has = downsampling_of(pretrained), pretrained.config.latent_channels, pretrained.config.in_channels
        asked = downsampling or has[0], latent_channels or has[1], channels
        names = "--downsampling", "--latent_channels", "channels of images"
        for flag, given, expected in zip(names, asked, has, strict=True):
            if given != expected:
                advice = (
                    "--image_mode converts the images"
                    if flag == names[2]
                    else f"Leave the flag out, or give {expected}"
                )
                raise UserError(f"{flag} {given}: the pretrained autoencoder has {expected}. {advice}")
        return pretrained
    size = dict(SIZES[name or "small"])
    count = (downsampling or 4).bit_length()  # of resolutions
    size["block_out_channels"] = size["block_out_channels"][:count]
    return AutoencoderKL(
        in_channels=channels, out_channels=channels, latent_channels=latent_channels or 4,
        down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count, **size,
    )  # fmt: skip


def load_autoencoder(name_or_path: str, flag: str, trainable: bool = False) -> torch.nn.Module:
    """Load an autoencoder, or that of a pipeline.

    Args:
        name_or_path: folder or Hub id, of the autoencoder or of a pipeline.
        flag: flag that names it, for messages.
        trainable: whether to return an ``AutoencoderKL`` with the forward pass for training, and refuse other classes.

    Raises:
        UserError: it cannot be loaded, or has another class.
    """
    label, kinds = f"{flag} {name_or_path}", ["AutoencoderKL"] if trainable else KINDS
    refuse_missing(label, name_or_path)
    expected = f"Expected an {' or '.join(kinds)}, or a pipeline with one"
    try:
        config, options = _autoencoder_config(name_or_path)
        kind = config.get("_class_name")
        if kind not in kinds:
            raise UserError(f"{label} is a {kind}. {expected}")
        options["variant"] = variant_of(Path(name_or_path, options.get("subfolder", "")))
        model = (AutoencoderKL if trainable else getattr(diffusers, kind)).from_pretrained(name_or_path, **options)
        # Otherwise a local path would be saved, and published, with the model
        model.register_to_config(_name_or_path=None if Path(name_or_path).exists() else name_or_path)
        return model
    except UserError:
        raise
    except Exception as error:  # The Hub client, diffusers and safetensors share no base class of errors
        raise UserError(f"{label} cannot be loaded: {type(error).__name__}: {shorten(error)}. {expected}") from error


def _autoencoder_config(name_or_path: str) -> tuple[dict, dict]:
    """Return the config of an autoencoder, and the options of ``from_pretrained`` that find it in a pipeline."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir() and (folder / CONFIG).is_file():
        return read_record(folder / CONFIG), {}
    if folder.is_dir():
        index = read_record(folder / INDEX)
    else:
        try:
            return diffusers.AutoencoderKL.load_config(name_or_path), {}
        except OSError:  # not a model, but perhaps a pipeline
            index = diffusers.DiffusionPipeline.load_config(name_or_path)
    parts = [part for part in AUTOENCODERS if index.get(part, [None])[0]]
    if not parts:
        raise UserError(
            f"{name_or_path}: this {index.get('_class_name')} has no autoencoder. Expected a pipeline with one"
        )
    return {"_class_name": index[parts[0]][1]}, {"subfolder": parts[0]}


def downsampling_of(autoencoder: torch.nn.Module) -> int:
    """Return the number of image pixels per latent in each direction."""
    config = autoencoder.config
    widths = config.get("encoder_block_out_channels") or config.get("block_out_channels") or [1]
    return 2 ** (len(widths) - 1)


def check_size(autoencoder, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return the shape (L, h, w) of the latents of images of a size (H, W).

    Raises:
        UserError: the size is not a multiple of the autoencoder's downsampling.
    """
    factor = downsampling_of(autoencoder)
    height, width = size
    if height % factor or width % factor:
        raise UserError(
            f"images of {height} x {width} pixels: this autoencoder needs multiples of {factor}. "
            f"Try --resolution {nearest_resolution(size, factor)}"
        )
    return autoencoder.config.latent_channels, height // factor, width // factor


def structural_similarity(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity (SSIM, Wang et al. 2004, Eq. 13) of pairs of images in [-1, 1].

    Means and variances are those of windows of 7 x 7 pixels. A shorter side of the image limits the window.

    Args:
        images, others: (B, C, H, W).

    Returns:
        The mean over windows and channels, (B,), 1 for equal images.
    """
    side = [min(WINDOW, length) for length in images.shape[2:]]
    means = [F.avg_pool2d(values, side, stride=1) for values in (images, others)]
    squares = [F.avg_pool2d(values * values, side, stride=1) for values in (images, others)]
    variances = [square - mean * mean for square, mean in zip(squares, means, strict=True)]
    covariance = F.avg_pool2d(images * others, side, stride=1) - means[0] * means[1]
    small = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of values is 2
    luminance = (2 * means[0] * means[1] + small[0]) / (means[0] ** 2 + means[1] ** 2 + small[0])
    structure = (2 * covariance + small[1]) / (variances[0] + variances[1] + small[1])
    return (luminance * structure).mean(dim=(1, 2, 3))


@torch.no_grad()
def latent_statistics(autoencoder, images: torch.Tensor) -> dict:
    """Measure the latents of images, and return the entries of the autoencoder's config that normalise them.

    ``(latents - shift_factor) * scaling_factor`` has mean 0 and standard deviation 1 over all channels. The mean and
    standard deviation of each channel are ``latents_mean`` and ``latents_std``.

    Args:
        images: images (N, C, H, W) in [-1, 1].
    """
    means, variances, number = 0.0, 0.0, 0
    for batch in images.split(max(1, PIXELS_AT_ONCE // images[0, 0].numel())):
        progress("statistics")
        distribution = autoencoder.encode(batch.to(autoencoder.device)).latent_dist
        values, variance = (part.float().cpu().double() for part in (distribution.mean, distribution.var))
        count = values[:, 0].numel()
        means = means + values.sum(dim=(0, 2, 3))
        variances = variances + (values.square() + variance).sum(dim=(0, 2, 3))
        number += count
    means, squares = means / number, variances / number
    deviations = (squares - means.square()).clamp(min=1e-8).sqrt()
    shift = means.mean()
    scale = 1 / (squares.mean() - shift.square()).clamp(min=1e-8).sqrt()
    return {
        "scaling_factor": scale.item(), "shift_factor": shift.item(),
        "latents_mean": means.tolist(), "latents_std": deviations.tolist(),
    }  # fmt: skip


@torch.no_grad()
def reconstruct(
    autoencoder, images: torch.Tensor, device: torch.device, batch_size: int,
    stop: Callable[[], bool] = lambda: False,
) -> torch.Tensor:  # fmt: skip
    """Encode and decode images (N, C, H, W) in [-1, 1], and return the result on the CPU, float32 in [-1, 1].

    Args:
        autoencoder: autoencoder of this module. It is prepared, so that it autocasts.
        stop: function that is called before every batch; True interrupts.

    Raises:
        Interrupted: ``stop`` returned True.
    """
    parts = []
    with evaluating(autoencoder):
        for part in images.split(batch_size):
            progress("reconstruction")
            if stop():
                raise Interrupted
            parts.append(autoencoder(part.to(device))[0].float().cpu().clamp(-1, 1))
    return torch.cat(parts)


@torch.no_grad()
def fold_normalization(autoencoder, flag: str):
    """Return an autoencoder with latents that need no shift, because LDMPipeline and DiTPipeline apply none.

    The normalisation in the config of an ``AutoencoderKL`` moves into its 1 x 1 convolutions between the network and
    the latents, which changes no image, and ``scaling_factor`` becomes 1. The latents then have mean 0 and standard
    deviation 1, by channel or, if the config has scalars only, over all channels. An autoencoder without a shift stays
    unchanged.

    Args:
        autoencoder: autoencoder, changed in place.
        flag: flag that names it, for messages.

    Raises:
        UserError: another class of autoencoder has a shift.
    """
    config = autoencoder.config
    means, deviations = config.get("latents_mean"), config.get("latents_std")
    if not (means and deviations):
        if not config.get("shift_factor"):
            return autoencoder
        channels = config["latent_channels"]
        means, deviations = [config["shift_factor"]] * channels, [1 / config["scaling_factor"]] * channels
    if not isinstance(autoencoder, diffusers.AutoencoderKL):
        raise UserError(
            f"{flag}: the latents of this {type(autoencoder).__name__} have a shift, which LDMPipeline ignores. "
            "Expected an AutoencoderKL, or no shift. Choose another autoencoder"
        )
    mean, deviation = (torch.tensor(values, device=autoencoder.device).double() for values in (means, deviations))
    count = len(mean)
    for name, channels in (("quant_conv", 2 * count), ("post_quant_conv", count)):
        if getattr(autoencoder, name, None) is None:  # it is the identity
            layer = torch.nn.Conv2d(channels, channels, 1).to(autoencoder.device, autoencoder.dtype)
            layer.weight.copy_(torch.eye(channels)[:, :, None, None])
            layer.bias.zero_()
            setattr(autoencoder, name, layer.requires_grad_(False))
            autoencoder.register_to_config(**{f"use_{name}": True})
    # The encoder returns means, and logarithms of variances, for which a scale is an addition
    encoder, decoder = autoencoder.quant_conv, autoencoder.post_quant_conv
    scale = torch.cat([1 / deviation, torch.ones_like(deviation)])
    added = torch.cat([-mean / deviation, -2 * deviation.log()])
    encoder.weight.copy_(encoder.weight.double() * scale[:, None, None, None])
    encoder.bias.copy_(encoder.bias.double() * scale + added)
    weight = decoder.weight.double()
    decoder.bias.copy_(decoder.bias.double() + weight[:, :, 0, 0] @ mean)
    decoder.weight.copy_(weight * deviation[None, :, None, None])
    autoencoder.register_to_config(scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    return autoencoder


def describe_latents(autoencoder) -> str:
    """Return the number of pixels per latent and of channels as text."""
    factor = downsampling_of(autoencoder)
    return f"{factor} x {factor} pixels per latent, {counted(autoencoder.config.latent_channels, 'channel')}"


def image_config(autoencoder, unet_config=None) -> SimpleNamespace:
    """Return size and channels of images as in the config of a UNet in pixels, for ``load_train_data``.

    Args:
        unet_config: config of a pretrained UNet that draws latents, or None if images of every size are suitable.

    Raises:
        UserError: the autoencoder has other channels than images.
    """
    if autoencoder.config.out_channels not in (1, 3):
        raise UserError(f"the autoencoder returns {autoencoder.config.out_channels} channels. Expected 1 or 3")
    size = size_of(unet_config.sample_size) if unet_config else None
    size = size and [side * downsampling_of(autoencoder) for side in size]
    return SimpleNamespace(sample_size=size, out_channels=autoencoder.config.out_channels)


def choose_autoencoder(name_or_path: str | None, pretrained=None) -> torch.nn.Module:
    """Return the autoencoder that ``--vae`` names, with latents that need no shift, or that of a pretrained pipeline.

    Args:
        name_or_path: value of ``--vae``, or None for that of ``pretrained``, or else ``outputs/autoencoder``.
        pretrained: pretrained pipeline, or None.

    Raises:
        UserError: there is no autoencoder, or a second one is named. See also ``load_autoencoder``.
    """
    if pretrained and name_or_path:
        raise UserError(f"--vae {name_or_path}: the pretrained pipeline has its own autoencoder. Leave the flag out")
    if pretrained and not pretrained.autoencoder:
        raise UserError(
            "--pretrained_model_name_or_path: this pipeline draws pixels. Expected one with an autoencoder, such as "
            "the output of train_latent.py"
        )
    if pretrained:
        return pretrained.autoencoder
    if not name_or_path and not Path(DEFAULT).exists():
        raise UserError(
            f"there is no autoencoder in {DEFAULT}. Train one with train_autoencoder.py, or name one with --vae. The "
            "pipelines and checkpoints of train_latent.py have one, too"
        )
    return fold_normalization(load_autoencoder(name_or_path or DEFAULT, "--vae"), "--vae")
