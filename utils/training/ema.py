"""Exponential moving average of a model's weights, on diffusers' ``EMAModel``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from .. import UserError


class EMA(EMAModel):
    """An average that warms up, can be swapped in and always back out, and is resumed from a saved model.

    The decay is min(max_decay, 1 - (1 + step / inv_gamma) ** -power): while it warms up, an average of about the last
    ``step ** power`` steps, so that early samples show the model and not its initial weights.

    Args:
        model: whose parameters are averaged, those that learn.
        max_decay: upper limit of the decay.
        inv_gamma: length of the warm-up, optimizer steps.
        power: 3/4 reaches a decay of 0.999 after 10,000 steps, 2/3 after 31,600.
        enabled: False makes every method a no-op: what is sampled and saved is the model as it is.
    """

    def __init__(
        self, model: torch.nn.Module, max_decay: float, inv_gamma: float = 1.0, power: float = 0.75,
        enabled: bool = True,
    ):  # fmt: skip
        self.enabled, self.inside = enabled, False
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.names = list(learning)
        super().__init__(
            learning.values() if enabled else [],
            decay=max_decay, inv_gamma=inv_gamma, power=power, use_ema_warmup=True, foreach=True,
        )  # fmt: skip

    def step(self, parameters) -> None:
        if self.enabled:
            super().step([parameter for parameter in parameters if parameter.requires_grad])

    @contextmanager
    def averaged_weights(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Inside, ``model`` has the averaged weights; after it, whatever happened, its own, bit for bit.

        Inside another such block it does nothing: the weights are averaged already.
        """
        if not self.enabled or self.inside:
            yield model
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        own = [parameter.detach().clone() for parameter in parameters]
        self.copy_to(parameters)
        self.inside = True
        try:
            yield model
        finally:
            self.inside = False
            with torch.no_grad():
                for parameter, value in zip(parameters, own, strict=True):
                    parameter.copy_(value)

    def load(self, saved: dict[str, torch.Tensor], optimization_step: int) -> None:
        """Continue from averaged weights, by name; those of weights that do not learn may be among them.

        Raises:
            UserError: weights are missing, or their shapes differ from the model's.
        """
        if not self.enabled:
            return
        names = [name.replace(".default.", ".") for name in self.names]  # the adapter's name, which peft does not save
        wrong = [
            name
            for name, mine in zip(names, self.shadow_params, strict=True)
            if name not in saved or saved[name].shape != mine.shape
        ]
        if wrong:
            raise UserError(f"the saved averaged weights do not fit the model, for example {wrong[0]}")
        for name, mine in zip(names, self.shadow_params, strict=True):
            mine.copy_(saved[name])
        self.optimization_step = optimization_step
        self.cur_decay_value = self.get_decay(optimization_step)
