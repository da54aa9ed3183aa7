"""Distances between two sets of images, in the features of some extractor. NumPy arrays in, floats out.

Every function takes features (N, D) and (M, D), float. None of them knows what the features are: name the result by
their extractor, such as ``fd_digits``.
"""

import functools
from collections.abc import Callable

import numpy as np

from .. import UserError

BLOCK = 5000  # points at once
FEWEST = 6  # images: density and coverage look at the fifth neighbour


def check_count(count: int, said: str) -> None:
    """Refuse fewer images than can be compared.

    Raises:
        UserError: names ``said``, where they come from.
    """
    if count < FEWEST:
        raise UserError(f"{said}: {count} images; expected at least {FEWEST}, better some hundred")


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Distance between normal distributions with the sets' means and covariances.

    |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2)), Heusel et al. 2017, arXiv:1706.08500, Eq. 6. It is biased upwards for
    small sets: compare only results of the same N, and give a floor.
    """
    return frechet_distance_to(second)(first)


def frechet_distance_to(second: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return ``frechet_distance`` to one set, of which what takes time is computed once."""

    @functools.cache
    def covariance_and_root() -> tuple[np.ndarray, np.ndarray]:
        covariance = _covariance(second)
        values, vectors = np.linalg.eigh(covariance)
        return covariance, (vectors * np.sqrt(values.clip(0))) @ vectors.T

    deviations = functools.cache(lambda: _deviations(second))
    mean, dimensions = second.mean(0, dtype=np.float64), second.shape[1]

    def distance(first: np.ndarray) -> float:
        if min(len(first), len(second)) <= dimensions:
            # With C = A'A, (C1 C2)^(1/2) has the trace of (A1 A2' A2 A1')^(1/2): singular values of a small matrix
            pair = _deviations(first), deviations()
            cross = np.linalg.svd(pair[0] @ pair[1].T, compute_uv=False).sum()
            traces = sum((part**2).sum() for part in pair)
        else:  # and that of (C2^(1/2) C1 C2^(1/2))^(1/2), which is symmetric
            covariance, root = covariance_and_root()
            other = _covariance(first)
            cross = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
            traces = np.trace(covariance) + np.trace(other)
        difference = mean - first.mean(0, dtype=np.float64)
        return float(difference @ difference + traces - 2 * cross)

    return distance


def _deviations(points: np.ndarray) -> np.ndarray:
    """Return A with the covariance A'A."""
    points = points.astype(np.float64)
    return (points - points.mean(0)) / np.sqrt(len(points) - 1)


def _covariance(points: np.ndarray) -> np.ndarray:
    """Return the covariance (D, D). In float64 all points would be twice as large: they are added in blocks."""
    mean, total = points.mean(0, dtype=np.float64), 0.0
    for block in np.array_split(points, -(-len(points) // BLOCK)):
        deviations = block - mean
        total = total + deviations.T @ deviations
    return total / (len(points) - 1)


def distance_name(features: str) -> str:
    """What the Fréchet distance is called: fid_inception, and fd_... in features that no other project has."""
    return f"fid_{features}" if features == "inception" else f"fd_{features}"


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of equally many points, with the kernel (x y / D + 1)^3."""
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
    """KID: ``squared_mmd`` (arXiv:1801.01401, Sec. 4), of large sets the mean over blocks that do not overlap.

    Args:
        block: points at once.
        repeats: of the bootstrap.

    Returns:
        Its value and its standard error over other draws of ``first``: by bootstrap, of several blocks each by itself.
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
            # A point that is drawn twice is no pair of two: without such pairs the estimate stays unbiased
            pairs = weights @ xx @ weights - (weights**2 * np.diag(xx)).sum()
            number = weights.sum() ** 2 - (weights**2).sum()
            drawn.append(pairs / number - 2 * (weights @ xy).sum() / (weights.sum() * count))
        variances.append(np.var(drawn, ddof=1))
    return float(np.mean(values)), float(np.sqrt(np.mean(variances) / len(values)))
