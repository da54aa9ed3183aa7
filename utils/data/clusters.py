"""Clusters of similar images, which serve as classes of images without labels.

See "Rethinking cluster-conditioned diffusion models", arXiv:2403.00570. There the features come from a trained net, and
the sizes of clusters differ. Here the features are pixels, and the sizes are about equal. Then a model that draws every
cluster equally often draws the distribution of the images.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import UserError
from .nearest import shrink

logger = logging.getLogger(__name__)

FILE = "clusters.npz"  # not pushed to the Hub, because centres are averages of images
SIDE = 16  # images are averaged down to at most this height and width, pixels
FITTED = 20_000  # maximum number of images that determine the clusters
FEWEST = 10  # images in each cluster, because a model repeats the images of small clusters
ROUNDS, BALANCING = 30, 20  # updates of the centres, and updates of the offsets after each of them


class Clusters:
    """Clusters of images: an image belongs to the one with the highest score, ``weight @ features + offset``.

    Clusters are the cells of a power diagram. A score is -|features - centre|^2 without the common term |features|^2,
    plus a term that makes the sizes equal.

    Args:
        weight, offset: float32 (K, features) and (K,).
        fingerprint: fingerprint of the images, see ``own_images.Images``.

    Attributes:
        digest: hash of weight and offset.
        names: names of the clusters. Classes are matched by name, so those of other clusters have other names.
    """

    def __init__(self, weight: np.ndarray, offset: np.ndarray, fingerprint: str = ""):
        self.arrays = dict(weight=weight, offset=offset, fingerprint=fingerprint)
        self.fingerprint = str(fingerprint)
        self.digest = hashlib.sha256(weight.tobytes() + offset.tobytes()).hexdigest()[:16]
        self.names = [f"cluster {self.digest[:4]}-{number}" for number in range(len(offset))]
        self._on_device = {}

    def assign(self, images: torch.Tensor) -> torch.Tensor:
        """Return the cluster of each image, int64 (B,), for images (B, C, H, W) in [-1, 1]."""
        device = images.device
        precise = torch.float32 if device.type == "mps" else torch.float64  # TF32 would move images near a border
        if device not in self._on_device:
            tables = (torch.from_numpy(self.arrays[name]) for name in ("weight", "offset"))
            self._on_device[device] = [table.to(device, precise) for table in tables]
        weight, offset = self._on_device[device]
        return (features_of(images).to(precise) @ weight.T + offset).argmax(1)

    def save(self, file: Path) -> None:
        """Write the clusters to a file that other users cannot read, because centres are averages of images."""
        staging = file.with_name(f".tmp-{file.name}")
        staging.touch(mode=0o600)
        with open(staging, "wb") as opened:
            np.savez(opened, **self.arrays)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(staging, file)


def has_clusters(names: Sequence[str]) -> bool:
    """Return whether classes with these names are clusters."""
    return bool(names) and bool(re.fullmatch(r"cluster [0-9a-f]{4}-0", names[0]))


def load_clusters(file: Path) -> Clusters:
    """Return the clusters that ``Clusters.save`` wrote."""
    with np.load(file) as arrays:
        return Clusters(**arrays)


def find_clusters(*folders: str | Path | None) -> Path | None:
    """Return the first file of clusters in these folders, which may be a run or a model in its folder."""
    places = [place for folder in folders if folder for place in (Path(folder), Path(folder).parent)]
    return next((place / FILE for place in places if (place / FILE).is_file()), None)


def features_of(images: torch.Tensor) -> torch.Tensor:
    """Return the features that clusters are found by, float32 (B, features), for images (B, C, H, W) in [-1, 1]."""
    return shrink(images.float(), SIDE).flatten(1)


def make_clusters(features: np.ndarray, count: int, fingerprint: str) -> Clusters:
    """Find clusters with about equal numbers of images: k-means, with an offset for each centre.

    The offset of a cluster falls while it has more images than the others, and rises while it has fewer.

    Args:
        features: features of the images, float (N, D), see ``features_of``.
        count: number of clusters.
        fingerprint: see ``Clusters``.

    Raises:
        UserError: there are too few images for so many clusters, or too many equal ones.
    """
    from sklearn.cluster import KMeans

    points = features.astype(np.float64)
    different = len(np.unique(points, axis=0))
    if different < count * FEWEST:
        raise UserError(
            f"--clusters {count}: {len(points)} images were found, {different} of them different at {SIDE} x {SIDE} "
            f"pixels. Expected at least {FEWEST} for each cluster. {advice(different // FEWEST)}"
        )
    logger.info(f"Finding {count} clusters of {len(points)} images ...")
    centres = KMeans(count, n_init=1, random_state=0).fit(points).cluster_centers_
    offset, spread = np.zeros(count), points.var(0).sum()
    for number in range(ROUNDS):
        scores = 2 * points @ centres.T - (centres**2).sum(1)
        for step in range(BALANCING + 1):
            labels = (scores + offset).argmax(1)
            sizes = np.bincount(labels, minlength=count)
            if step < BALANCING:
                offset -= 0.1 * spread / (1 + number) * (sizes * count / len(points) - 1).clip(max=2)
        if number < ROUNDS - 1:
            means = [points[labels == k].mean(0) if sizes[k] else centres[k] for k in range(count)]
            centres = np.stack(means)
    if sizes.min() < FEWEST:
        reason = ", because many images are equal" if different < len(points) / 2 else ""
        raise UserError(
            f"--clusters {count}: the smallest cluster has {sizes.min()} of {len(points)} images{reason}. Expected at "
            f"least {FEWEST}. {advice(count // 2)}"
        )
    logger.info(f"Each cluster has {sizes.min()} to {sizes.max()} images.")
    weight, offset = 2 * centres, offset - (centres**2).sum(1)
    return Clusters(weight.astype(np.float32), offset.astype(np.float32), fingerprint)


def advice(most: int) -> str:
    return f"Give at most --clusters {most}" if most > 1 else "Leave --clusters out"
