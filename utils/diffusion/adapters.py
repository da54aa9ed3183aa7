"""Adaptation of a pretrained UNet: trainable weights, their distance to the base model, low-rank adapters.

The methods are ``full`` (every weight), ``attention`` (the attention layers), ``norm`` (normalization layers and every
bias) and ``lora`` (Hu et al. 2021, arXiv:2106.09685: low-rank matrices that peft adds to the weights of chosen
layers). All other weights stay frozen, bit for bit.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DModel

from .. import UserError

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."  # prefix of the names of a PeftModel's weights


def choose_trainable(unet: UNet2DModel, method: str, lora_rank: int, lora_targets: list[str], seed: int) -> None:
    """Set ``requires_grad`` of each weight, and log their number. For ``lora``, add adapters to the UNet.

    Args:
        lora_rank: rank of the adapters' matrices.
        lora_targets: endings of the names of the linear and convolutional layers that get an adapter.
        seed: seed of the adapters' initial weights. Before training they leave the UNet's output unchanged.

    Raises:
        UserError: the UNet has no such layers, or peft is not installed.
    """
    total = unet.num_parameters()
    if method == "lora":
        _add_adapters(unet, lora_rank, lora_targets, seed)
    else:
        _choose_layers(unet, method)
    trainable = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    logger.info(f"--method {method}: {trainable:,} trainable weights, and {total:,} weights of the pretrained UNet")


def _choose_layers(unet: UNet2DModel, method: str) -> None:
    chosen = set()
    for name, module in unet.named_modules():
        kind = type(module).__name__
        for parameter_name, _ in module.named_parameters(recurse=False):
            in_attention = ".attentions." in f".{name}."
            is_norm = "Norm" in kind or parameter_name == "bias"
            if method == "full" or (method == "attention" and in_attention) or (method == "norm" and is_norm):
                chosen.add(f"{name}.{parameter_name}")
    if not chosen:
        raise UserError(f"--method {method}: this UNet has no such layers. Choose full, norm or lora")
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in chosen)


def _add_adapters(unet, rank: int, targets: list[str], seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(
            "--method lora needs the package peft. Install it with pip install peft, or choose another method"
        ) from error
    layers = {name for name, module in unet.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    known = {target for target in targets if any(f".{name}".endswith(f".{target}") for name in layers)}
    names = ", ".join(_short_names(layers))
    if not known:
        raise UserError(f"LORA_TARGETS {','.join(targets)}: this UNet has no such layers. It has {names}")
    if known != set(targets):
        missing = ", ".join(sorted(set(targets) - known))
        logger.info(f"LORA_TARGETS: this UNet has no layers called {missing}. It has {names}")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(known), init_lora_weights=True)
    unet.requires_grad_(False)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet)  # The adapters' weights are trainable


def _short_names(layers: set[str]) -> list[str]:
    """Return the last parts of layer names, with the part before a number: conv1, to_q, to_out.0."""
    parts = [name.split(".") for name in layers]
    return sorted({".".join(p[-2:]) if p[-1].isdigit() else p[-1] for p in parts})


def merged(unet: UNet2DModel) -> UNet2DModel:
    """Return a UNet that diffusers can load: a copy with merged adapters or, if it has none, the UNet itself."""
    if not _adapters(unet):
        return unet
    plain = UNet2DModel.from_config(unet.config)
    plain.load_state_dict(dict(_effective_weights(unet)))
    return plain.eval()


def save_adapter(unet: UNet2DModel, folder: Path) -> None:
    """Write the low-rank matrices in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

    ``PeftModel.from_pretrained`` and ``set_peft_model_state_dict`` add them to any UNet of the same shape. Without
    adapters nothing is written.
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
    """Return the relative distance of the weights to ``base``, |w - w_0| / |w_0| over the whole UNet.

    Args:
        base: weights before training, see ``base_weights``.
    """
    moved = total = 0.0
    for name, weight in _effective_weights(unet):
        original = base[name].to(weight.device)
        moved += (weight - original).square().sum().item()
        total += original.square().sum().item()
    return (moved / total) ** 0.5


def base_weights(unet: UNet2DModel) -> dict[str, torch.Tensor]:
    """Return a copy of the weights, by name, on the CPU. Call it before ``choose_trainable``."""
    return {name: parameter.detach().cpu().clone() for name, parameter in unet.named_parameters()}


def _adapters(unet) -> list:
    return [module for module in unet.modules() if hasattr(module, "get_delta_weight")]


def _effective_weights(unet) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and weights of the equivalent UNet without adapters."""
    deltas = {}
    for name, module in unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            deltas[f"{name}.base_layer.weight"] = module.get_delta_weight("default")
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name:
            weight = parameter.detach()
            yield name.replace(".base_layer.", "."), weight + deltas[name].detach() if name in deltas else weight
