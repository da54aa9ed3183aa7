"""Class embeddings of a UNet, classifier-free guidance, and the classes of samples."""

import csv
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from .. import UserError, counted
from .class_conditional import class_names, class_numbers, guided_output
from .sampling import cycle_rows

logger = logging.getLogger(__name__)

MOST_ROWS = 40  # of a grid with a row for each class; with more classes, some of them have rows of 8 images
MOST_COLUMNS = 16  # images in each row


def add_class_embedding(unet: UNet2DModel, names: Sequence[str], null_class: int | None = None) -> UNet2DModel:
    """Return a trained UNet with embeddings of these classes and of the null class.

    An unconditional UNet gets an embedding of zeros, so that its output stays the same until training changes it.
    A conditional UNet keeps the rows of classes with the same name. Rows of new classes start as copies of the null
    class's row.

    Args:
        names: names of the classes.
        null_class: number of the null class, the last one. The default is the number of classes.

    Raises:
        UserError: the UNet has no null class, or was trained on none of these classes.
    """
    null_class = len(names) if null_class is None else null_class
    if unet.class_embedding is None:
        width = unet.time_embedding.linear_2.out_features
        unet.class_embedding = torch.nn.Embedding(null_class + 1, width)
        torch.nn.init.zeros_(unet.class_embedding.weight)
        unet.register_to_config(num_class_embeds=null_class + 1)
        unet.register_to_config(_class_names=list(names))
    known = class_names(unet.config)
    if unet.config.num_class_embeds <= len(known):
        raise UserError(
            f"the pretrained model has {unet.config.num_class_embeds} classes and no null class. Expected a model "
            "that was trained with a null class"
        )
    if known == list(names) and unet.config.num_class_embeds == null_class + 1:
        return unet
    if not {*known} & {*names}:
        raise UserError(
            f"the pretrained model has {counted(len(known), 'class')} ({', '.join(known)[:200]}), but none of the "
            f"classes of the images ({', '.join(names)[:200]}). Expected classes in common"
            + ". Clusters are kept in the folder of their run: give that folder, with --clusters"
            * ("cluster " in known[0])
        )
    new, dropped = [[name for name in a if name not in b] for a, b in ((names, known), (known, names))]
    logger.warning(
        f"Classes are matched by name. Started as the null class: {counted(len(new), 'new class')} "
        f"({', '.join(new[:5])}). Left out: {counted(len(dropped), 'class')} ({', '.join(dropped[:5])})."
    )
    null_row = unet.config.num_class_embeds - 1
    rows = [known.index(name) if name in known else null_row for name in names]
    table = unet.class_embedding.weight.detach()[rows + [null_row] * (null_class + 1 - len(rows))]
    unet.class_embedding = torch.nn.Embedding.from_pretrained(table.clone(), freeze=False)
    unet.register_to_config(num_class_embeds=null_class + 1)
    unet.register_to_config(_class_names=list(names))
    return unet


class GuidedModel:
    """A conditional model with guidance, called like the model itself.

    Args:
        model: ``UNet2DModel`` with classes.
        scale: guidance scale, see ``class_conditional.guided_output``.

    Raises:
        UserError: the model has no null class, which every scale except 1 needs.
    """

    def __init__(self, model: torch.nn.Module, scale: float):
        count, self.null_class = len(class_names(model.config)), model.config.num_class_embeds - 1
        self.model, self.scale = model, scale
        if scale != 1 and self.null_class < count:
            raise UserError(
                f"--guidance_scale {scale:g}: the model has {count} classes but no null class. Expected "
                "a scale of 1, which needs none"
            )
        self.eval, self.train = model.eval, model.train

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> UNet2DOutput:
        output = guided_output(self.model, noisy, timesteps, class_labels, self.scale, self.null_class)
        return UNet2DOutput(sample=output)


def choose_classes(config, asked: str | None) -> list[int] | None:
    """Return the numbers of the classes that ``--class_labels`` asks for.

    Args:
        config: config of the model.
        asked: names or numbers, separated by commas. A name that contains a comma is in quotes. ``all`` or None asks
            for all.

    Returns:
        Numbers in the order asked for, or None for an unconditional model.

    Raises:
        UserError: the model is unconditional, or has no such class.
    """
    count = len(class_names(config))
    if not count:
        if asked:
            raise UserError(f"--class_labels {asked}: this model is unconditional. Leave the flag out")
        return None
    if asked in (None, "all"):
        return list(range(count))
    try:
        names = [asked] if asked in class_names(config) else next(csv.reader([asked], skipinitialspace=True))
        return class_numbers(names, config)
    except ValueError as error:
        raise UserError(f"--class_labels {asked}: {error}") from None


def cycle_labels(labels: Sequence[int] | np.ndarray, device) -> Callable[[np.ndarray], dict]:
    """Return ``model_inputs`` for ``sampling.sample_batch`` that give image k the class ``labels[k % len(labels)]``."""
    return cycle_rows({"class_labels": torch.as_tensor(np.asarray(labels, dtype=np.int64))}, device)


def between_classes(unet: UNet2DModel, labels: Sequence[int], count: int) -> Callable[[np.ndarray], dict]:
    """Return ``model_inputs`` for ``sampling.sample_batch`` that interpolate between these classes, in order.

    The model's embedding gets a row for each of ``count`` images, interpolated linearly between the classes' rows.
    """
    table = unet.class_embedding.weight.detach()
    corners = table[torch.tensor([labels[0], *labels])] if len(labels) == 1 else table[torch.tensor(labels)]
    places = torch.linspace(0, len(corners) - 1, count)
    before = places.long().clamp(max=len(corners) - 2)
    rows = torch.lerp(corners[before], corners[before + 1], (places - before)[:, None].to(table))
    unet.class_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table, rows]))
    return lambda sample_ids: {"class_labels": torch.from_numpy(sample_ids + len(table)).to(table.device)}


def classes_to_show(classes: int, images: int) -> list[int]:
    """Return the classes of the rows of a grid: the first ones or, of more than ``MOST_ROWS``, evenly spaced ones.

    Args:
        classes: number of classes.
        images: number of images in the grid.
    """
    if classes <= MOST_ROWS:
        return list(range(min(classes, images)))
    shown = min(classes, -(-images // 8))
    return [row * classes // shown for row in range(shown)]


def group_by_class(images: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Reorder images of cycled classes so that ``make_grid`` shows one row for each class, or several for long ones.

    Returns:
        uint8 (N, C, H, W), with N cut to a multiple of the number of rows, and the captions of the rows.
    """
    classes = min(len(class_names), len(images))
    images_each = len(images) // len(class_names) or 1
    lines = -(-images_each // MOST_COLUMNS)  # rows of a class; all rows are equally long
    shown = images_each // lines * lines
    order = [number + k * len(class_names) for number in range(classes) for k in range(shown)]
    return images[order], [text for name in class_names[:classes] for text in (name, *[""] * (lines - 1))]
