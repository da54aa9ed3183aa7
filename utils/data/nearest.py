"""Samples beside the training images nearest to them: whether a model has copied."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..pictures import make_grid


def nearest_distances(
    points: np.ndarray, others: np.ndarray, skip_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each point (N, D) to the nearest of the others (M, D): (N,), and its index (N,).

    Args:
        skip_first: the points are among the others; each skips itself.
    """
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=1 + skip_first, algorithm="brute").fit(others)
    distances, indices = neighbours.kneighbors(points)
    return distances[:, -1], indices[:, -1]


def shrink(images: torch.Tensor, side: int) -> torch.Tensor:
    """Float images (N, C, H, W), averaged down to at most ``side`` pixels each way; smaller ones as they are."""
    size = [min(pixels, side) for pixels in images.shape[-2:]]
    return images if size == [*images.shape[-2:]] else F.interpolate(images, size, mode="area")


def show_nearest(samples: np.ndarray, training_images: np.ndarray) -> Image.Image:
    """Draw samples and, below each, its nearest training image by the pixels, averaged down to 32x32 at most.

    Each training image is compared as it is and mirrored, for that is how ``--random_flip`` has shown it.

    Args:
        samples, training_images: uint8 (N, C, H, W) and (M, C, H, W).
    """
    both = np.concatenate([training_images, training_images[..., ::-1]])
    first, second = (shrink(torch.from_numpy(images).float(), 32).flatten(1).numpy() for images in (samples, both))
    _, indices = nearest_distances(first, second)
    captions = ["samples", f"nearest of {len(training_images)}"]
    return make_grid(np.concatenate([samples, both[indices]]), captions=captions)
