"""Distances between two sets of images, in the features of some extractor. NumPy arrays in, floats out.

Every function takes features (N, D) and (M, D), float. None of them knows what the features are: name the result by
their extractor, such as ``fd_digits``.
"""

import numpy as np

from .. import UserError

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
    first, second = first.astype(np.float64), second.astype(np.float64)
    means = first.mean(0) - second.mean(0)
    c1, c2 = np.atleast_2d(np.cov(first, rowvar=False)), np.atleast_2d(np.cov(second, rowvar=False))
    # (C1 C2)^(1/2) has the trace of (C1^(1/2) C2 C1^(1/2))^(1/2), which is symmetric
    values, vectors = np.linalg.eigh(c1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ c2 @ root).clip(0)).sum()
    return float(means @ means + np.trace(c1) + np.trace(c2) - 2 * cross)


def distance_name(features: str) -> str:
    """What the Fréchet distance is called: fid_inception, and fd_... in features that no other project has."""
    return f"fid_{features}" if features == "inception" else f"fd_{features}"


def squared_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of equally many points, with the kernel (x y / D + 1)^3."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    kernels = [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)) for kernel in kernels[:2])
    return float(within - 2 * kernels[2].mean())


def kernel_distance(
    first: np.ndarray, second: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the mean of ``squared_mmd`` over random subsets (arXiv:1801.01401, Sec. 4).

    Returns:
        Mean over random subsets, and its standard error.
    """
    rng = np.random.default_rng(seed)
    size = min(subset_size, len(first) // 2, len(second) // 2)  # or the subsets would be the same
    estimates = []
    for _ in range(subsets):
        rows = (rng.choice(len(group), size, replace=False) for group in (first, second))
        estimates.append(squared_mmd(first[next(rows)], second[next(rows)]))
    return float(np.mean(estimates)), float(np.std(estimates, ddof=1) / np.sqrt(subsets))
