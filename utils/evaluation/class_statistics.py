"""Statistics of the classes that samples show: distance by class, and confusion and frequencies of digits."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .. import UserError
from ..data.clusters import has_clusters
from ..data.own_images import translate_labels
from ..diffusion.class_conditional import class_names
from .features import Extractor, as_digits, digits_net
from .metrics import frechet_distance
from .reference import Reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedClasses:
    """Requested classes of samples, and the real images that the samples are compared with.

    Attributes:
        labels: requested class of each sample, int64 (N,).
        names: names of the classes.
        real_features, real_labels: features (M, D) and labels (M,) of the real images.
    """

    labels: np.ndarray
    names: Sequence[str]
    real_features: np.ndarray
    real_labels: np.ndarray

    def by_class(self, features: np.ndarray, probabilities: np.ndarray | None) -> dict:
        """Return the Fréchet distance within each class, with its number of samples.

        For digits, add a confusion table and ``class_accuracy``, the share of samples that are recognised as the
        requested class. The table has a row for each requested class and a column for each recognised one.

        Args:
            features: features of the samples, (N, D).
            probabilities: probability of each digit for each sample, (N, 10); None to leave out the table.
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
    """Return the classes of a conditional model, or an empty list for an unconditional one.

    Raises:
        UserError: the reference has classes that the model does not have, and the model's classes are not clusters.
    """
    if not config.get("num_class_embeds"):
        return []
    names = class_names(config)
    if has_clusters(names):
        return names
    real_names = real.labels()[1]
    if not {*real_names} <= {*names}:
        raise UserError(
            f"the model has the classes {', '.join(names)[:200]}, but --reference has {', '.join(real_names)[:200]}. "
            "Compare it with images of the same classes"
        )
    return names


def asked_classes(
    names: list[str], real: Reference, extract: Extractor, preparation, count: int
) -> AskedClasses | None:
    """Return the requested class of each sample, with the frequencies of the reference; None if unconditional.

    If the reference has no labels, or the classes are clusters, all are requested equally often.
    """
    if not names:
        return None
    equal = AskedClasses(np.arange(count) % len(names), names, np.zeros((0, 1)), np.zeros(0, int))
    if has_clusters(names) or not real.labels()[1]:
        return equal
    features, labels, real_names = real.labelled(extract, preparation, len(real.images(real.args.reference_split)))
    labels = translate_labels(labels, real_names, names)
    features, labels = features[labels >= 0], labels[labels >= 0]  # images without a class are left out
    if not len(labels):  # as in a test split with hidden labels
        return equal
    if len(labels) < count:
        logger.warning(
            f"the reference has {len(labels)} images with a class, which are fewer than the samples. So their classes "
            "are repeated"
        )
    return AskedClasses(labels[np.arange(count) % len(labels)], names, features, labels)


def digit_statistics(probabilities: np.ndarray) -> dict[str, float]:
    """Return the confidence of the digit classifier, and the distance of its class frequencies from equal frequencies.

    Args:
        probabilities: probability of each digit for each image, (N, 10), see ``digit_probabilities``.

    Returns:
        ``confidence``, the mean probability of the likeliest class, and ``class_distance``, the total variation
        distance of the class frequencies from 1/10 each, in [0, 0.9]. MNIST itself has about 0.03.
    """
    frequencies = np.bincount(probabilities.argmax(1), minlength=10) / len(probabilities)
    return {"confidence": float(probabilities.max(1).mean()), "class_distance": float(abs(frequencies - 0.1).sum() / 2)}


def digit_probabilities(images: np.ndarray, device: str | torch.device = "cpu") -> np.ndarray:
    """Return the probability of each digit, float32 (N, 10), for images, uint8 (N, C, H, W)."""
    net = digits_net(device)
    return Extractor("digits", "", lambda batch: net(as_digits(batch, device))[1].softmax(1))(images)
