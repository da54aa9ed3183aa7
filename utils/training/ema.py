"""Exponential moving average of a model's weights, based on diffusers' ``EMAModel``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel

from .. import UserError


class EMA(EMAModel):
    """A moving average of trainable weights with a warm-up of its decay.

    The decay is min(max_decay, 1 - (1 + step / inv_gamma) ** -power). During the warm-up it averages over about the
    last ``step ** power`` steps, so that early samples do not depend on the initial weights.

    Args:
        model: model with the parameters to average.
        max_decay: upper limit of the decay.
        inv_gamma: length of the warm-up, optimizer steps.
        power: exponent of the warm-up. 3/4 reaches a decay of 0.999 after 10,000 steps, 2/3 after 31,600.
        enabled: whether to average. If False, every method is a no-op, and the model itself is sampled and saved.
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
        """Load the averaged weights into ``model`` for the block, and restore its own afterwards, bit for bit.

        Inside another such block it does nothing, because the weights are averaged already.
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
        """Resume from saved averaged weights.

        Args:
            saved: weights by name. Those of frozen parameters are ignored.
            optimization_step: number of updates of the saved average.

        Raises:
            UserError: weights are missing, or their shapes differ from the model's.
        """
        if not self.enabled:
            return
        names = [name.replace(".default.", ".") for name in self.names]  # peft does not save the adapter's name
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
