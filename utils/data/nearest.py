"""Samples and the training images nearest to them, to find copies."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pictures import make_grid


def nearest_distances(
    points: np.ndarray, others: np.ndarray, own: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the Euclidean distance of each point (N, D) to the nearest of ``others`` (M, D), and that one's index.

    Args:
        own: first row and end of the range of ``others`` that each point skips: int (N, 2). None skips no rows.
    """
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    skipped = 0 if own is None else int((own[:, 1] - own[:, 0]).max())
    neighbours = NearestNeighbors(n_neighbors=1 + skipped, algorithm="brute").fit(others)
    with config_context(working_memory=128):  # MiB; a gigabyte is no faster
        distances, indices = neighbours.kneighbors(points)
    first = np.zeros(len(points), int)
    if own is not None:
        first = ((indices < own[:, :1]) | (indices >= own[:, 1:])).argmax(1)
    rows = np.arange(len(points))
    return distances[rows, first], indices[rows, first]


def shrink(images: torch.Tensor, side: int) -> torch.Tensor:
    """Average float images (N, C, H, W) down to at most ``side`` pixels in height and width."""
    size = [min(pixels, side) for pixels in images.shape[-2:]]
    if size == [*images.shape[-2:]]:
        return images
    computed_on = "cpu" if images.device.type == "mps" else images.device  # MPS needs divisible sizes
    return F.interpolate(images.to(computed_on), size, mode="area").to(images.device)


def show_nearest(samples: np.ndarray, training_images: np.ndarray) -> Image.Image:
    """Draw samples and, below each, its nearest training image.

    Distances are computed on images that are averaged down to at most 32x32 pixels.

    Args:
        samples: uint8 (N, C, H, W).
        training_images: crops of training images, see ``TrainData.crops``: uint8 (M, C, H, W).
    """
    first, second = (
        np.concatenate([shrink(torch.from_numpy(images[k : k + 250]).float(), 32).flatten(1).numpy() for k in starts])
        for images, starts in ((group, range(0, len(group), 250)) for group in (samples, training_images))
    )
    _, indices = nearest_distances(first, second)
    return make_grid(np.concatenate([samples, training_images[indices]]), captions=["samples", "nearest"])
