"""Distances between two sets of images, in the features of some extractor: NumPy arrays in, floats out.

Every function takes features (N, D) and (M, D), float, of any extractor. Name the result after the extractor, such as
``fd_digits``.
"""

import functools
from collections.abc import Callable

import numpy as np

from .. import UserError

BLOCK = 5000  # points converted to float64 at once
MIN_IMAGES = 6  # density and coverage need a fifth neighbour


def check_count(count: int, source: str) -> None:
    """Refuse a number of images that is too small for a comparison.

    Args:
        count: number of images.
        source: origin of the images, for the message.

    Raises:
        UserError: there are fewer than ``MIN_IMAGES``.
    """
    if count < MIN_IMAGES:
        raise UserError(f"{source}: {count} images. Expected at least {MIN_IMAGES}, preferably a few hundred")


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Fréchet distance between normal distributions with the sets' means and covariances.

    |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, arXiv:1706.08500, Eq. 6. It is biased upwards for
    small sets, so compare only results with the same N, and report that of real images as a floor.
    """
    return frechet_distance_to(second)(first)


def frechet_distance_to(second: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function for ``frechet_distance`` to one set, which computes the costly parts of that set once."""

    @functools.cache
    def covariance_and_root() -> tuple[np.ndarray, np.ndarray]:
        covariance = _covariance(second, mean)
        values, vectors = np.linalg.eigh(covariance)
        return covariance, (vectors * np.sqrt(values.clip(0))) @ vectors.T

    deviations = functools.cache(lambda: _deviations(second))
    mean, dimensions = second.mean(0, dtype=np.float64), second.shape[1]

    def distance(first: np.ndarray) -> float:
        first_mean = first.mean(0, dtype=np.float64)
        if min(len(first), len(second)) <= dimensions:
            # With C = A'A, the trace of (C1 C2)^(1/2) is the sum of the singular values of A1 A2', a small matrix
            pair = _deviations(first), deviations()
            cross = np.linalg.svd(pair[0] @ pair[1].T, compute_uv=False).sum()
            traces = sum((part**2).sum() for part in pair)
        else:  # the trace is also that of (C2^(1/2) C1 C2^(1/2))^(1/2), a symmetric matrix
            covariance, root = covariance_and_root()
            other = _covariance(first, first_mean)
            cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
            traces = np.trace(covariance) + np.trace(other)
        difference = mean - first_mean
        return float(difference @ difference + traces - 2 * cross)

    return distance


def _deviations(points: np.ndarray) -> np.ndarray:
    """Return the matrix A for which A'A is the covariance."""
    points = points.astype(np.float64)
    return (points - points.mean(0)) / np.sqrt(len(points) - 1)


def _covariance(points: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the covariance (D, D), summed in blocks because all points in float64 need twice the memory."""
    total = 0.0
    for block in np.array_split(points, -(-len(points) // BLOCK)):
        deviations = block - mean
        total = total + deviations.T @ deviations
    return total / (len(points) - 1)


def distance_name(features: str) -> str:
    """Return the name of the Fréchet distance: ``fid_inception``, or ``fd_...`` in other features."""
    return f"fid_{features}" if features == "inception" else f"fd_{features}"


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased squared maximum mean discrepancy of two sets of equal size, kernel (x y / D + 1)^3."""
    return _squared_mmd(*_kernels(first, second))


def _kernels(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    x, y = first.astype(np.float64), second.astype(np.float64)
    return [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]


def _squared_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> float:
    within = sum((kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in (xx, yy))
    return float(within - 2 * xy.mean())


def kernel_distance(
    first: np.ndarray, second: np.ndarray, block: int = 2000, repeats: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Return KID: ``squared_mmd`` (arXiv:1801.01401, Sec. 4), or for large sets its mean over disjoint blocks.

    Args:
        block: number of points at once.
        repeats: number of bootstrap repeats.

    Returns:
        KID, and its standard error over other draws of ``first``, by bootstrap within each block.
    """
    size = min(len(first), len(second))
    starts = range(0, max(1, size // block) * block, block)
    rng, values, variances = np.random.default_rng(seed), [], []
    for start in starts:
        count = min(block, size)
        xx, yy, xy = _kernels(first[start : start + count], second[start : start + count])
        values.append(_squared_mmd(xx, yy, xy))
        drawn = []
        for _ in range(repeats):
            weights = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
            # Pairs of a point with its own copy are left out, which keeps the estimate unbiased
            pairs = weights @ xx @ weights - (weights**2 * np.diag(xx)).sum()
            number = weights.sum() ** 2 - (weights**2).sum()
            drawn.append(pairs / number - 2 * (weights @ xy).sum() / (weights.sum() * count))
        variances.append(np.var(drawn, ddof=1))
    return float(np.mean(values)), float(np.sqrt(np.mean(variances) / len(values)))
