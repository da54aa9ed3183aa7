"""Which classes samples show: which digits, and whether those that were asked for."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import UserError
from ..data.own_images import translate_labels
from ..diffusion.class_conditional import class_names
from .features import Extractor, as_digits, digits_net
from .metrics import frechet_distance
from .reference import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedClasses:
    """The classes that samples should show.

    Attributes:
        labels: int64 (N,), of sample k.
        names: of the classes.
        real_features, real_labels: what they are compared with, (M, D) and (M,).
    """

    labels: np.ndarray
    names: Sequence[str]
    real_features: np.ndarray
    real_labels: np.ndarray

    def by_class(self, features: np.ndarray, probabilities: np.ndarray | None) -> dict:
        """The Fréchet distance within each class, with its number of samples.

        For digits also a confusion table, a row for each class asked for and a column for each that was recognised, and
        ``class_accuracy``, the share of images that are recognised as asked.

        Args:
            features: of the samples, (N, D).
            probabilities: of the digits that they show, (N, 10); None to leave that out.
        """
        result, labels = {"fd_by_class": {}, "N_by_class": {}}, self.labels[: len(features)]
        for code, name in enumerate(self.names):
            mine, theirs = features[labels == code], self.real_features[self.real_labels == code]
            if min(len(mine), len(theirs)) > 1:
                result["fd_by_class"][name] = frechet_distance(mine, theirs[: len(mine)])
                result["N_by_class"][name] = len(mine)
        if probabilities is not None and list(self.names) == [str(k) for k in range(10)]:
            table = np.zeros((10, 10), int)
            np.add.at(table, (labels, probabilities.argmax(1)), 1)
            result |= {"confusion": table.tolist(), "class_accuracy": float(table.trace() / len(labels))}
        return result


def check_classes(config, real: Reference) -> list[str]:
    """Return the classes that a model can be asked for; none for one that knows no classes.

    Raises:
        UserError: the reference has classes that the model does not know.
    """
    if not config.get("num_class_embeds"):
        return []
    names, real_names = class_names(config), real.labels()[1]
    if not {*real_names} <= {*names}:
        raise UserError(
            f"the model knows the classes {', '.join(names)[:200]}; --reference has {', '.join(real_names)[:200]}. "
            "Compare it with images of the same classes"
        )
    return names


def asked_classes(names: list[str], real: Reference, extract: Extractor, how, count: int) -> AskedClasses | None:
    """The classes to ask a model for, as often as the reference has them; None for a model that knows no classes.

    Where the reference has no labels, all classes are asked for equally often.
    """
    if not names:
        return None
    if not real.labels()[1]:
        return AskedClasses(np.arange(count) % len(names), names, np.zeros((0, 1)), np.zeros(0, int))
    features, labels, real_names = real.labelled(extract, how, len(real.images(real.args.reference_split)))
    labels = translate_labels(labels, real_names, names)
    features, labels = features[labels >= 0], labels[labels >= 0]  # what has no class cannot be asked for
    if len(labels) < count:
        logger.warning(f"the reference has {len(labels)} images: their classes are asked for again and again")
    return AskedClasses(labels[np.arange(count) % len(labels)], names, features, labels)


def digit_statistics(probabilities: np.ndarray) -> dict[str, float]:
    """What the classifier of digits says of images.

    Args:
        probabilities: of each digit, (N, 10), see ``digit_probabilities``.

    Returns:
        ``confidence``, its mean probability of the likeliest class; ``class_distance``, the total variation distance of
        the classes' frequencies from 1/10 each, in [0, 0.9]: 0.03 or so is what MNIST itself has.
    """
    frequencies = np.bincount(probabilities.argmax(1), minlength=10) / len(probabilities)
    return {"confidence": float(probabilities.max(1).mean()), "class_distance": float(abs(frequencies - 0.1).sum() / 2)}


def digit_probabilities(images: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """float32 (N, 10): how likely the classifier of digits takes images, uint8 (N, C, H, W), for each digit."""
    net = digits_net(device)
    return Extractor("digits", "", lambda batch: net(as_digits(batch, device))[1].softmax(1))(images)
