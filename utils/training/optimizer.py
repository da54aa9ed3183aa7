"""The optimizer: AdamW, with moments of 32 or 8 bits, or Muon for matrices and AdamW for all other weights."""

import importlib.util

import torch
from accelerate import PartialState

from .. import UserError


def make_optimizer(args, model: torch.nn.Module) -> torch.optim.Optimizer:
    """What ``--optimizer`` and the flags of its numbers ask for, over the weights of ``model`` that learn.

    Raises:
        UserError: 8-bit moments (arXiv:2110.02861) need bitsandbytes on a GPU, or torchao, and neither is installed.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    options = dict(
        lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )  # fmt: skip
    if args.optimizer == "adamw":
        return torch.optim.AdamW(weights.values(), fused=True, **options)
    if args.optimizer == "muon":
        matrices = [weight for name, weight in weights.items() if is_hidden_matrix(name, weight)]
        others = [weight for name, weight in weights.items() if not is_hidden_matrix(name, weight)]
        return Muon(matrices, others, fused=True, **options)
    for package in ["bitsandbytes"] * (PartialState().device.type == "cuda") + ["torchao"]:
        if importlib.util.find_spec(package):
            return importlib.import_module(f"{package}.optim").AdamW8bit(weights.values(), **options)
    raise UserError(
        "--optimizer adamw8bit needs bitsandbytes (on a GPU) or torchao: pip install torchao, or choose adamw"
    )


def is_hidden_matrix(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight leads from one hidden layer to another: not from or to an image, a timestep or a class."""
    return weight.ndim > 1 and min(weight.shape[:2]) >= 16 and "emb" not in name


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for other weights.

    A matrix moves by its momentum made orthogonal, so that all directions are learnt at the same rate, the rare ones
    too. Weights of a convolution are the matrix (out channels) x (in channels * height * width). Steps are scaled as
    AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate and one weight decay suit both.

    Args:
        matrices: weights of at least two dimensions.
        others: all other weights.
        options: of ``torch.optim.AdamW``.
    """

    def __init__(self, matrices, others, momentum: float = 0.95, **options):
        super().__init__([dict(params=others), dict(params=matrices, momentum=momentum)], **options)
        self._step_supports_amp_scaling = False  # GradScaler leaves out the whole step where a gradient overflows

    @torch.no_grad()
    def step(self, closure=None):
        group = self.param_groups[1]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:  # with the step, which AdamW expects in every state
                state |= dict(step=torch.zeros(()), momentum=torch.zeros_like(weight))
            momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp_(momentum, group["momentum"]).flatten(1)  # Nesterov's
            scale = 0.2 * max(update.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(orthogonal(update).view_as(weight), alpha=-group["lr"] * scale)
            weight.grad = None  # AdamW passes it over
        return super().step(closure)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest matrix with orthonormal rows or columns, float32: singular values between 0.7 and 1.2, but for
    those that were below a thousandth of the largest.

    Five Newton-Schulz steps with Jordan's coefficients, done on the smaller of the products with its transpose: the
    polynomial is found first, and applied to the matrix once.
    """
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().T
    wide = wide / (wide.norm() + 1e-7)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False  # its rounding makes small singular values grow
    try:
        gram, total = wide @ wide.T, None
        for _ in range(5):
            square = gram @ gram
            step = 3.4445 * torch.eye(len(gram), device=gram.device) - 4.7750 * gram + 2.0315 * square
            total = step if total is None else step @ total
            gram = step @ gram @ step
        result = total @ wide
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return result if matrix.shape[0] <= matrix.shape[1] else result.T
