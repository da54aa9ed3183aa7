"""Classes for a UNet, and a model with guidance to sample from."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from .. import UserError
from .class_conditional import class_numbers, guided_output


def give_classes(unet: UNet2DModel, class_names: Sequence[str]) -> UNet2DModel:
    """A trained UNet that can be told one of these classes, or nothing.

    One that was unconditional gets an embedding of zeros, so that at first it draws what it drew before.

    Raises:
        UserError: it was trained on other classes.
    """
    if unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = torch.nn.Embedding(len(class_names) + 1, width)
        torch.nn.init.zeros_(unet.class_embedding.weight)
        unet.register_to_config(num_class_embeds=len(class_names) + 1)
    names, count = unet.config.get("_class_names"), unet.config.num_class_embeds
    if count != len(class_names) + 1 or (names and list(names) != list(class_names)):
        raise UserError(
            f"the pretrained model knows {count - 1} classes ({', '.join(names or [])[:200]}), the images have "
            f"{len(class_names)} ({', '.join(class_names)[:200]}); expected the same"
        )
    return unet


class GuidedModel:
    """A conditional model with guidance, to be sampled from as the model itself.

    Args:
        model: called as ``model(noisy, timesteps, class_labels).sample``.
        scale: see ``class_conditional.guided_output``.
        nothing: the class that means "nothing said".
    """

    def __init__(self, model: torch.nn.Module, scale: float, nothing: int):
        self.model, self.scale, self.nothing = model, scale, nothing
        self.eval, self.train = model.eval, model.train

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> UNet2DOutput:
        output = guided_output(self.model, noisy, timesteps, class_labels, self.scale, self.nothing)
        return UNet2DOutput(sample=output)


def choose_classes(config, asked: str | None) -> list[int] | None:
    """The classes that ``--class_labels`` asks for, in turn; all of them without it.

    Args:
        config: of the model.
        asked: names or numbers, separated by commas; ``all`` or None for all classes.

    Returns:
        Their numbers; None for a model that knows no classes.

    Raises:
        UserError: the model knows no classes, or not these.
    """
    count = (config.get("num_class_embeds") or 0) - 1
    if count < 0:
        if asked:
            raise UserError(f"--class_labels {asked}: this model knows no classes; leave the flag out")
        return None
    if asked in (None, "all"):
        return list(range(count))
    try:
        return class_numbers(asked.split(","), config)
    except ValueError as error:
        raise UserError(f"--class_labels {asked}: {error}") from None


def labels_in_turn(labels: Sequence[int] | np.ndarray, device) -> Callable[[np.ndarray], dict]:
    """``model_inputs`` of ``sampling.sample_batch``: image k is of the class ``labels[k % len(labels)]``."""
    labels = np.asarray(labels, dtype=np.int64)
    return lambda sample_ids: {"class_labels": torch.from_numpy(labels[sample_ids % len(labels)]).to(device)}


def rows_by_class(images: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Images that were drawn of all classes in turn, as one row a class: for ``make_grid``.

    Returns:
        uint8 (N, C, H, W) with N cut to a multiple of the number of rows; the rows' captions.
    """
    rows = min(len(class_names), len(images))
    columns = len(images) // len(class_names) or 1
    order = [row + column * len(class_names) for row in range(rows) for column in range(columns)]
    return images[order], list(class_names[:rows])
