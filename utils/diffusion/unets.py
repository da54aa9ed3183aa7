"""UNets: the sizes of ``--unet``, the flags that choose one, conditions by concatenation, and digests of weights."""

from .. import UserError
from ..args import Parser

# fmt: off
UNETS = {  # keyword arguments of UNet2DModel
    "tiny": dict(  # 0.26 M parameters, for tests and quick trials
        block_out_channels=(16, 32, 32), layers_per_block=1, add_attention=False, norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
    ),
    "small": dict(  # 1.2 M, for 8 to 32 pixels on a CPU, so there are few channels at high resolutions and no attention
        block_out_channels=(16, 32, 96), layers_per_block=1, add_attention=False, norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
    ),
    "wide": dict(  # 1.7 M, for latents of 4 to 32 a side on a CPU. Latents have more content than pixels
        block_out_channels=(32, 64, 96), layers_per_block=1, add_attention=False, norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
    ),
    "base": dict(  # 25.8 M, for 32 to 64 pixels on a GPU, with attention at a quarter of the resolution
        block_out_channels=(128, 256, 256), layers_per_block=2, attention_head_dim=64,  # diffusers' 8 is slow
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ),
    "large": dict(  # 113.7 M, for 128 to 256 pixels on several GPUs, the architecture of google/ddpm-celebahq-256
        block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2, attention_head_dim=64,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    ),
}


def add_unet_arguments(parser: Parser) -> None:
    """Add the flags that choose a UNet by size, by config, or with pretrained weights."""
    group = parser.group("model")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--unet", choices=UNETS, help="architecture, see utils/diffusion/unets.py: tiny (for tests), small (8 to 32 pixels, the default), wide (latents, the default of train_latent.py), base (32 to 64), large (128 to 256)")
    one.add_argument("--model_config_name_or_path", help="UNet2DModel config instead of --unet, with random weights")
    one.add_argument("--pretrained_model_name_or_path", help="pipeline with the initial weights and the noise schedule")
    add_speed_arguments(parser)


def add_speed_arguments(parser: Parser) -> None:
    """Add the flags for the memory and speed of a UNet or an autoencoder."""
    group = parser.group("model")
    parser.switch(group, "--gradient_checkpointing", False, "recomputation of activations, which saves memory and makes steps slower")
    parser.switch(group, "--compile", False, "compilation of the model with torch.compile, for GPUs. It takes minutes at first. Samples are drawn without it")
# fmt: on


def make_unet(name: str | None, config: str | None, shape: dict, dropout: float = 0.0):
    """Make a ``UNet2DModel`` with random weights.

    Args:
        name: key of ``UNETS``, or None for ``small``.
        config: JSON file, folder or Hub id of a config to use instead, see ``pretrained.unet_from_config``.
        shape: ``sample_size``, ``in_channels``, ``out_channels`` and perhaps ``num_class_embeds``.
        dropout: dropout probability in the residual blocks, ignored with ``config``.
    """
    from diffusers import UNet2DModel

    from .pretrained import unet_from_config, zero_init

    if config:
        return unet_from_config(config, **shape)
    return zero_init(UNet2DModel(**shape, dropout=dropout, **UNETS[name or "small"]))


def prepare_unet(unet, device, gradient_checkpointing: bool, compile: bool):
    """Set up a UNet for training on a device. Call it before you make an average or optimizer of its weights."""
    import torch

    from ..signals import watch_compilations

    if gradient_checkpointing:
        if not getattr(unet, "_supports_gradient_checkpointing", False):
            raise UserError(f"--gradient_checkpointing: a {type(unet).__name__} does not have it. Leave the flag out")
        unet.enable_gradient_checkpointing()
    if device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # Slower on a CPU
    if compile:
        watch_compilations()
        unet.compile()
    return unet


def concatenate_condition(unet):
    """Let a model take ``condition=`` (B, K, H, W), which is concatenated to the channels of its noisy input.

    SR3 does so (Saharia et al. 2021, arXiv:2104.07636). The config has K more ``in_channels`` than ``out_channels``.

    Returns:
        The same model. Without ``condition=`` it raises TypeError, and for a wrong shape ValueError.
    """
    import torch

    def concatenate(model, inputs, options):
        if options.get("condition") is None:
            raise TypeError(
                "condition= is missing. Expected a tensor (B, K, H, W). In training call model(..., **model_inputs(batch)), in "
                "sampling run.sample_images(..., model_inputs=...), and in validation run.steps(..., model_inputs=...)"
            )
        noisy, *others = inputs
        condition = options["condition"].to(noisy)
        shapes, expected = (tuple(noisy.shape), tuple(condition.shape)), model.config.in_channels
        if condition.shape[2:] != noisy.shape[2:] or noisy.shape[1] + condition.shape[1] != expected:
            raise ValueError(
                f"noisy images and condition have the shapes {shapes[0]} and {shapes[1]}. Expected the same height and width, "
                f"and {expected} channels together (in_channels of the model)"
            )
        others_by_name = {name: value for name, value in options.items() if name != "condition"}
        return (torch.cat([noisy, condition], dim=1), *others), others_by_name

    unet.register_forward_pre_hook(concatenate, with_kwargs=True)
    return unet


def weights_digest(model) -> str:
    """Return the SHA-256 of a model's weights in the order of their names, 64 hexadecimal digits."""
    import hashlib

    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()
