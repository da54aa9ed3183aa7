"""Clusters of similar images, which serve as classes of images without labels.

See "Rethinking cluster-conditioned diffusion models", arXiv:2403.00570. There the features come from a trained net, and
the sizes of clusters differ. Here the features are pixels, and the sizes are about equal. Then a model that draws every
cluster equally often draws the distribution of the images.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from .. import UserError, counted
from .nearest import shrink

FILE = "clusters.npz"  # not pushed to the Hub, because centres are averages of images
PREFIX = "cluster "  # of the names of clusters
SIDE = 16  # images are averaged down to at most this height and width, pixels
FITTED = 20_000  # maximum number of images that determine the clusters
FEWEST = 10  # images in each cluster: fewer would invite copying
ROUNDS, BALANCING = 30, 20  # updates of the centres, and updates of the offsets after each of them


class Clusters:
    """Clusters of images: an image belongs to the one with the highest score, ``weight @ image + offset``.

    This is the cell of a power diagram. Its score is -|image - centre|^2 without the common term |image|^2, plus an
    offset that makes the sizes equal.

    Args:
        tensors: ``weight`` float32 (K, features) and ``offset`` float32 (K,).

    Attributes:
        names: names of the clusters.
        digest: hash of the tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        digest = hashlib.sha256(b"".join(tensors[name].numpy().tobytes() for name in ("weight", "offset")))
        self.digest = digest.hexdigest()[:16]
        # Classes are matched by name, so those of other clusters have other names
        self.names = [f"{PREFIX}{self.digest[:4]}-{number}" for number in range(len(tensors["offset"]))]

    def assign(self, images: torch.Tensor) -> torch.Tensor:
        """Return the cluster of each image, int64 (B,), for images (B, C, H, W) in [-1, 1]."""
        weight, offset = (self.tensors[name].to(images.device) for name in ("weight", "offset"))
        return (features_of(images) @ weight.T + offset).argmax(1)

    def save(self, file: Path) -> None:
        """Write the clusters to a file that other users cannot read, because centres are averages of images."""
        staging = file.with_name(f".tmp-{file.name}")
        np.savez(staging, **self.tensors)
        staging.chmod(0o600)
        os.replace(staging, file)


def is_cluster(name: str) -> bool:
    """Return whether a class with this name is a cluster."""
    return name.startswith(PREFIX)


def load_clusters(file: Path) -> Clusters:
    """Return the clusters that ``Clusters.save`` wrote."""
    with np.load(file) as arrays:
        return Clusters({name: torch.from_numpy(arrays[name]) for name in arrays})


def features_of(images: torch.Tensor) -> torch.Tensor:
    """Return the features that clusters are found by, float32 (B, features), for images (B, C, H, W) in [-1, 1]."""
    return shrink(images.float(), SIDE).flatten(1)


def make_clusters(images: np.ndarray, count: int) -> Clusters:
    """Find clusters with about equal numbers of images: k-means, with an offset for each centre.

    The offset of a cluster falls while it has more images than the others, and rises while it has fewer.

    Args:
        images: uint8 (N, C, H, W).
        count: number of clusters.

    Raises:
        UserError: there are too few images, or too few different ones.
    """
    if len(images) < count * FEWEST:
        most = len(images) // FEWEST
        raise UserError(
            f"--clusters {count}: {counted(len(images), 'image')} are too few. Expected {FEWEST} for each cluster, so "
            + (f"give at most --clusters {most}" if most > 1 else "leave --clusters out")
        )
    from sklearn.cluster import KMeans

    blocks = np.array_split(images, -(-len(images) // 250))
    points = np.concatenate([features_of(torch.from_numpy(block) / 127.5 - 1).numpy() for block in blocks])
    points = points.astype(np.float64)
    different = len(np.unique(points, axis=0))
    if different < count * FEWEST:
        raise UserError(
            f"--clusters {count}: only {different} of the {len(images)} images are different. Expected {FEWEST} for "
            "each cluster. Give fewer, or leave --clusters out"
        )
    centres = KMeans(count, n_init=1, random_state=0).fit(points).cluster_centers_
    offset, spread = np.zeros(count), points.var(0).sum()
    for number in range(ROUNDS):
        distances = 2 * points @ centres.T - (centres**2).sum(1)
        for _ in range(BALANCING):
            labels = (distances + offset).argmax(1)
            excess = np.bincount(labels, minlength=count) * count / len(points) - 1
            offset -= 0.1 * spread / (1 + number) * excess.clip(max=2)
        if number < ROUNDS - 1 and (excess > -1).all():
            centres = np.stack([points[labels == cluster].mean(0) for cluster in range(count)])
    tensors = {"weight": 2 * centres, "offset": offset - (centres**2).sum(1)}
    return Clusters({name: torch.from_numpy(values).float().contiguous() for name, values in tensors.items()})
