"""Adapting a pretrained UNet: which weights learn, how far they have moved, and low-rank adapters.

The methods are ``full`` (every weight), ``attention`` (the attention layers), ``norm`` (normalization layers and every
bias) and ``lora`` (Hu et al. 2021, arXiv:2106.09685: low-rank matrices beside the weights of chosen layers, through
peft). What does not learn stays as it is, bit for bit.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DModel

from .. import UserError

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."  # before the names of a PeftModel's weights


def choose_trainable(unet: UNet2DModel, method: str, lora_rank: int, lora_targets: list[str], seed: int) -> None:
    """Set ``requires_grad`` of each weight, and for ``lora`` put adapters into the UNet.

    Args:
        lora_rank: of the adapters' matrices.
        lora_targets: ends of the names of linear and convolutional layers that get an adapter.
        seed: of the adapters' initial weights; the UNet does the same as before until they learn.

    Raises:
        UserError: the UNet has no such layers, or peft is not installed.
    """
    if method == "lora":
        _add_adapters(unet, lora_rank, lora_targets, seed)
        return
    chosen = set()
    for name, module in unet.named_modules():
        kind = type(module).__name__
        for parameter_name, _ in module.named_parameters(recurse=False):
            in_attention = ".attentions." in f".{name}."
            is_norm = "Norm" in kind or parameter_name == "bias"
            if method == "full" or (method == "attention" and in_attention) or (method == "norm" and is_norm):
                chosen.add(f"{name}.{parameter_name}")
    if not chosen:
        raise UserError(f"--method {method}: this UNet has no such layers; choose full, norm or lora")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in chosen)


def _add_adapters(unet, rank: int, targets: list[str], seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--method lora needs the package peft: pip install peft, or choose another method") from error
    layers = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    known = {target for target in targets if any(f".{name}".endswith(f".{target}") for name in layers)}
    names = ", ".join(_short_names(layers))
    if not known:
        raise UserError(f"LORA_TARGETS {','.join(targets)}: this UNet has no such layers; it has {names}")
    if known != set(targets) and unet.device.type != "meta":  # not when weights are only counted
        missing = ", ".join(sorted(set(targets) - known))
        logger.info(f"LORA_TARGETS: this UNet has no layers called {missing}; it has {names}")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(known), init_lora_weights=True)
    unet.requires_grad_(False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet)  # its weights learn


def _short_names(layers: set[str]) -> list[str]:
    """The ends of their names that are not numbers: conv1, to_q, to_out.0."""
    parts = [name.split(".") for name in layers]
    return sorted({".".join(p[-2:]) if p[-1].isdigit() else p[-1] for p in parts})


def log_trainable_counts(
    unet: UNet2DModel, chosen: str, lora_rank: int, lora_targets: list[str], optimizer: str
) -> None:
    """Log, for each method, how many weights learn and how much memory the optimizer needs for them.

    Args:
        chosen: the method that was asked for.
        lora_rank, lora_targets: see ``choose_trainable``.
        optimizer: its name, as ``--optimizer`` takes it.
    """
    total = sum(parameter.numel() for parameter in unet.parameters())
    for method in ("full", "attention", "norm", "lora"):
        with torch.device("meta"):
            copy = UNet2DModel.from_config(unet.config)
        try:
            choose_trainable(copy, method, lora_rank, lora_targets, 0)
        except UserError:
            continue  # not for this UNet; said if it is the one that was asked for
        sizes = [parameter.numel() for parameter in copy.parameters() if parameter.requires_grad]
        # Two moments of four bytes; in 8 bits where a weight has 4096 values or more, in blocks of 256
        small = [optimizer == "adamw8bit" and size >= 4096 and size % 256 == 0 for size in sizes]
        memory = sum(size * (2 if eight_bit else 8) for size, eight_bit in zip(sizes, small, strict=True))
        logger.info(
            f"{'->' if method == chosen else '  '} --method {method}: {sum(sizes):,} weights learn"
            f"{' in addition to' if method == 'lora' else ', of'} {total:,}; "
            f"the optimizer keeps {'at most ' * (optimizer == 'muon')}{memory / 2**20:.1f} MiB"
        )


def merged(unet: UNet2DModel) -> UNet2DModel:
    """The UNet as diffusers knows it; if there are adapters, a copy with them added to the weights beside them."""
    if not _adapters(unet):
        return unet
    plain = UNet2DModel.from_config(unet.config)
    plain.load_state_dict(dict(_effective_weights(unet)))
    return plain.eval()


def save_adapter(unet: UNet2DModel, folder: Path) -> None:
    """Write the low-rank matrices alone, as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``.

    ``PeftModel.from_pretrained`` adds them to any UNet of the same shape. So does ``set_peft_model_state_dict``.
    """
    if not _adapters(unet):
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(unet)
    state = {PEFT_PREFIX + name: value.detach().contiguous().cpu() for name, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    unet.peft_config["default"].save_pretrained(folder)


def distance_to_base(unet: UNet2DModel, base: dict[str, torch.Tensor]) -> float:
    """How far the weights have moved from ``base`` (see ``base_weights``): |w - w_0| / |w_0| over the whole UNet."""
    moved = total = 0.0
    for name, weight in _effective_weights(unet):
        original = base[name].to(weight.device)
        moved += (weight - original).square().sum().item()
        total += original.square().sum().item()
    return (moved / total) ** 0.5


def base_weights(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """A copy of the weights, by name, on the CPU. Take it before ``choose_trainable``."""
    return {name: parameter.detach().cpu().clone() for name, parameter in unet.named_parameters()}


def _adapters(unet) -> list:
    return [module for module in unet.modules() if hasattr(module, "get_delta_weight")]


def _effective_weights(unet) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of the plain UNet that does what this one does."""
    deltas = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            deltas[f"{name}.base_layer.weight"] = module.get_delta_weight("default")
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            weight = parameter.detach()
            yield name.replace(".base_layer.", "."), weight + deltas[name].detach() if name in deltas else weight
