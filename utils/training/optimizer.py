"""Optimizers: AdamW with moments of 32 or 8 bits, and Muon for matrices with AdamW for all other weights."""

import importlib.util
import logging
from collections import defaultdict

import torch
from accelerate import PartialState

from .. import UserError

logger = logging.getLogger(__name__)

SMALL = 1.2e6  # weights of --unet small, for which RATES were measured, see docs/faces.md
RATES = {"full": 1e-3, "attention": 3e-3, "norm": 1e-2, "lora": 1e-2}  # by the method of adapting a trained model


def make_optimizer(name: str, model: torch.nn.Module, **options) -> torch.optim.Optimizer:
    """Make an optimizer of the trainable weights of ``model``.

    Args:
        name: ``adamw``, ``adamw8bit`` or ``muon``.
        options: ``lr``, ``betas``, ``weight_decay`` and ``eps``, as for ``torch.optim.AdamW``.

    Raises:
        UserError: neither bitsandbytes (on a GPU) nor torchao is installed. 8-bit moments (arXiv:2110.02861) need one
            of them.
    """
    weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    if name == "adamw":
        return torch.optim.AdamW(weights.values(), fused=True, **options)
    if name == "muon":
        matrices = [weight for key, weight in weights.items() if is_hidden_matrix(key, weight)]
        others = [weight for key, weight in weights.items() if not is_hidden_matrix(key, weight)]
        return Muon(matrices, others, fused=True, **options)
    for package in ["bitsandbytes"] * (PartialState().device.type == "cuda") + ["torchao"]:
        if importlib.util.find_spec(package):
            return importlib.import_module(f"{package}.optim").AdamW8bit(weights.values(), **options)
    raise UserError(
        "--optimizer adamw8bit needs bitsandbytes (on a GPU) or torchao. Run pip install torchao, or choose adamw"
    )


def choose_learning_rate(given: float | None, model: torch.nn.Module, method: str = "full") -> float:
    """Return the given peak learning rate, or the default for adapting a trained model, which is logged.

    Args:
        given: value of ``--learning_rate``.
        model: model, with its adapters for the method ``lora``. The more weights it has, the lower is the default.
        method: ``full``, ``attention``, ``norm`` or ``lora``, see ``diffusion.adapters``.
    """
    if given is not None:
        return given
    size = sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name)
    # With this power, models of 860 M weights get the usual rates: about 1e-5 with full, about 1e-4 with lora
    rate = float(f"{RATES[method] * min(1, SMALL / size) ** 0.75:.1g}")
    logger.info(
        f"--learning_rate {rate:g}: the default to train a model of {size / 1e6:.1f} M pretrained weights "
        f"(method {method})"
    )
    return rate


def is_hidden_matrix(name: str, weight: torch.Tensor) -> bool:
    """Return whether a weight connects two hidden layers, and not an image, a timestep or a class."""
    return weight.ndim > 1 and min(weight.shape[:2]) >= 16 and "emb" not in name


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for other weights.

    The update of a matrix is its orthogonalised momentum, so that all directions are learnt at the same rate, including
    rare ones. The weights of a convolution are a matrix (out channels) x (in channels * height * width). Updates are
    scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate and one weight decay
    suit both.

    Args:
        matrices: weights of at least two dimensions.
        others: all other weights.
        momentum: decay of the momentum.
        options: further arguments of ``torch.optim.AdamW``.
    """

    def __init__(self, matrices, others, momentum: float = 0.95, **options):
        super().__init__([dict(params=others), dict(params=matrices, momentum=momentum)], **options)

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[1]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:  # AdamW expects the entry step in every state
                self.state[weight] |= dict(step=torch.zeros(()), momentum=torch.zeros_like(weight))
        if weights:
            updates, momenta = [w.grad for w in weights], [self.state[w]["momentum"] for w in weights]
            torch._foreach_lerp_(momenta, updates, 1 - group["momentum"])
            torch._foreach_lerp_(updates, momenta, group["momentum"])  # Nesterov momentum
            orders = [memory_order(weight) for weight in weights]
            updates = [as_matrix(update, order) for update, order in zip(updates, orders, strict=True)]
            factors = orthogonal_factors(updates)
            for weight, order, update, factor in zip(weights, orders, updates, factors, strict=True):
                step, decay = 0.2 * group["lr"] * max(update.shape) ** 0.5, 1 - group["lr"] * group["weight_decay"]
                left, right = (factor, update) if len(factor) == len(update) else (update, factor)
                as_matrix(weight, order).addmm_(left, right, beta=decay, alpha=-step)
                weight.grad = None  # AdamW skips weights without a gradient
        return super().step(closure)


def memory_order(weight: torch.Tensor) -> list[int]:
    """Return the dimensions of a weight except the first, in the order of memory, outermost first."""
    return sorted(range(1, weight.ndim), key=weight.stride, reverse=True)


def as_matrix(weight: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Return the matrix (out channels) x (other dimensions in this order), a view if the order is that of memory."""
    return weight.permute(0, *order).flatten(1)


def orthogonal_factors(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the Newton-Schulz factor F of each float32 matrix M such that F M is approximately orthogonal.

    If M is taller than wide, the product is M F. Its singular values are about 0.7 to 1.2, except where those of M
    are below 0.0015 of the Frobenius norm of M. Five Newton-Schulz steps with Jordan's coefficients are computed on the
    smaller of M M^T and M^T M, of which F is a polynomial. Matrices with the same smaller side are batched, because on
    a GPU a kernel launch takes longer than their computation.
    """
    factors, by_size = [None] * len(matrices), defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_size[min(matrix.shape)].append(index)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # The rounding of TF32 makes small singular values grow
    try:
        for size, indices in by_size.items():
            wide = [m if m.shape[0] == size else m.T for m in (matrices[index] for index in indices)]
            gram = torch.stack([matrix @ matrix.T for matrix in wide])
            norms = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].sqrt() + 1e-7
            gram, total = gram / norms**2, 1 / norms
            identity = 3.4445 * torch.eye(size, device=gram.device)
            for number in range(5):
                step = torch.baddbmm(identity - 4.7750 * gram, gram, gram, alpha=2.0315)
                total = step * total if number == 0 else step @ total
                if number < 4:
                    gram = step @ gram @ step
            for index, factor in zip(indices, total, strict=True):
                factors[index] = factor
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return factors
