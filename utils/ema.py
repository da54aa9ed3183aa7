"""Exponential moving average of a model's weights, on diffusers' ``EMAModel``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from . import UserError


class EMA(EMAModel):
    """An average that warms up, can be swapped in and always back out, and is resumed from a saved model.

    The decay is min(max_decay, 1 - (1 + step / inv_gamma) ** -power): while it warms up, an average of about the last
    ``step ** power`` steps, so that early samples show the model and not its initial weights.

    Args:
        model: a diffusers model, whose parameters are averaged.
        max_decay: upper limit of the decay.
        inv_gamma: length of the warm-up, optimizer steps.
        power: 3/4 reaches a decay of 0.999 after 10,000 steps, 2/3 after 31,600.
        enabled: False makes every method a no-op: what is sampled and saved is the model as it is.
    """

    def __init__(self, model: torch.nn.Module, max_decay: float, inv_gamma: float, power: float, enabled: bool = True):
        self.enabled, self.names = enabled, [name for name, _ in model.named_parameters()]
        self.model_class = type(model)
        super().__init__(
            model.parameters() if enabled else [],
            decay=max_decay, inv_gamma=inv_gamma, power=power, use_ema_warmup=True, foreach=True,
        )  # fmt: skip

    def step(self, parameters) -> None:
        if self.enabled:
            super().step(parameters)

    @contextmanager
    def swapped_in(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """Inside, ``model`` has the averaged weights; after it, whatever happened, its own, bit for bit."""
        if not self.enabled:
            yield model
            return
        own = [parameter.detach().clone() for parameter in model.parameters()]
        self.copy_to(model.parameters())
        try:
            yield model
        finally:
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), own, strict=True):
                    parameter.copy_(value)

    def load(self, folder: str | Path, optimization_step: int) -> None:
        """Continue from the averaged weights that were saved in ``folder`` as a model of the averaged one's class.

        Raises:
            UserError: names or shapes differ from the averaged model's.
        """
        if not self.enabled:
            return
        saved = dict(self.model_class.from_pretrained(folder, use_safetensors=True).named_parameters())
        wrong = [
            name
            for name, mine in zip(self.names, self.shadow_params, strict=True)
            if name not in saved or saved[name].shape != mine.shape
        ]
        if wrong or len(saved) != len(self.names):
            raise UserError(f"{folder}: averaged weights do not fit the model, for example {(wrong or ['(count)'])[0]}")
        for name, mine in zip(self.names, self.shadow_params, strict=True):
            mine.copy_(saved[name].detach())
        self.optimization_step = optimization_step
        self.cur_decay_value = self.get_decay(optimization_step)
