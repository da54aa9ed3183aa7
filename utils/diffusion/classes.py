"""Classes for a UNet, and a model with guidance to sample from."""

import csv
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from .. import UserError
from .class_conditional import class_names, class_numbers, guided_output
from .sampling import cycle_rows

logger = logging.getLogger(__name__)


def add_class_embedding(unet: UNet2DModel, names: Sequence[str]) -> UNet2DModel:
    """A trained UNet that can be told one of these classes, or nothing.

    One that was unconditional gets an embedding of zeros, so that at first it draws what it drew before. Of other
    classes than it was trained on, those that it knows keep their rows, and new ones begin as the null class.

    Raises:
        UserError: it has no null class, or knows none of these classes.
    """
    if unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = torch.nn.Embedding(len(names) + 1, width)
        torch.nn.init.zeros_(unet.class_embedding.weight)
        unet.register_to_config(num_class_embeds=len(names) + 1)
        unet.register_to_config(_class_names=list(names))
    known = class_names(unet.config)
    if unet.config.num_class_embeds != len(known) + 1:
        raise UserError(
            f"the pretrained model has {unet.config.num_class_embeds} classes, and none of them means that no class is "
            "given; expected one trained with a null class"
        )
    if known == list(names):
        return unet
    if not {*known} & {*names}:
        raise UserError(
            f"the pretrained model knows {len(known)} classes ({', '.join(known)[:200]}), none of those of the images "
            f"({', '.join(names)[:200]}); expected some of the same"
        )
    new, left_out = [[name for name in a if name not in b] for a, b in ((names, known), (known, names))]
    logger.warning(
        f"classes go by name: {len(new)} are new and begin as the null class ({', '.join(new[:5])}), {len(left_out)} "
        f"are left out ({', '.join(left_out[:5])})"
    )
    rows = [known.index(name) if name in known else len(known) for name in names]
    table = unet.class_embedding.weight.detach()[[*rows, len(known)]]
    unet.class_embedding = torch.nn.Embedding.from_pretrained(table.clone(), freeze=False)
    unet.register_to_config(num_class_embeds=len(names) + 1)
    unet.register_to_config(_class_names=list(names))
    return unet


class GuidedModel:
    """A conditional model with guidance, to be sampled from as the model itself.

    Args:
        model: a ``UNet2DModel`` with classes.
        scale: see ``class_conditional.guided_output``.

    Raises:
        UserError: it was not trained to be told nothing, and guidance needs that.
    """

    def __init__(self, model: torch.nn.Module, scale: float):
        self.model, self.scale, self.nothing = model, scale, len(class_names(model.config))
        if scale != 1 and self.nothing >= model.config.num_class_embeds:
            raise UserError(
                f"--guidance_scale {scale:g}: all {self.nothing} classes of the model are images', none means that "
                "nothing is said, so it cannot be guided; expected 1"
            )
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
        asked: names or numbers, separated by commas, a name with a comma in quotes; ``all`` or None for all classes.

    Returns:
        Their numbers; None for a model that knows no classes.

    Raises:
        UserError: the model knows no classes, or not these.
    """
    count = len(class_names(config))
    if not count:
        if asked:
            raise UserError(f"--class_labels {asked}: this model knows no classes; leave the flag out")
        return None
    if asked in (None, "all"):
        return list(range(count))
    try:
        names = [asked] if asked in class_names(config) else next(csv.reader([asked], skipinitialspace=True))
        return class_numbers(names, config)
    except ValueError as error:
        raise UserError(f"--class_labels {asked}: {error}") from None


def cycle_labels(labels: Sequence[int] | np.ndarray, device) -> Callable[[np.ndarray], dict]:
    """``model_inputs`` of ``sampling.sample_batch``: image k is of the class ``labels[k % len(labels)]``."""
    return cycle_rows({"class_labels": torch.as_tensor(np.asarray(labels, dtype=np.int64))}, device)


def between_classes(unet: UNet2DModel, labels: Sequence[int], count: int) -> Callable[[np.ndarray], dict]:
    """``model_inputs`` of ``sampling.sample_batch`` for a walk of ``count`` images through these classes, in order.

    The model's embedding gets a row for each image, on the straight lines between the rows of the classes.
    """
    table = unet.class_embedding.weight.detach()
    corners = table[torch.tensor([labels[0], *labels])] if len(labels) == 1 else table[torch.tensor(labels)]
    places = torch.linspace(0, len(corners) - 1, count)
    before = places.long().clamp(max=len(corners) - 2)
    rows = torch.lerp(corners[before], corners[before + 1], (places - before)[:, None].to(table))
    unet.class_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table, rows]))
    return lambda sample_ids: {"class_labels": torch.from_numpy(sample_ids + len(table)).to(table.device)}


def group_by_class(images: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Images that were drawn of all classes in turn, as one row a class: for ``make_grid``.

    Returns:
        uint8 (N, C, H, W) with N cut to a multiple of the number of rows; the rows' captions.
    """
    rows = min(len(class_names), len(images))
    columns = len(images) // len(class_names) or 1
    order = [row + column * len(class_names) for row in range(rows) for column in range(columns)]
    return images[order], list(class_names[:rows])
