"""Distances between two sets of images, in the features of some extractor. NumPy arrays in, floats out.

Every function takes features (N, D) and (M, D), float. None of them knows what the features are: name the result by
their extractor, such as ``fd_digits``.
"""

import numpy as np


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


def bootstrap(metric, first: np.ndarray, second: np.ndarray, repeats: int = 20, seed: int = 0) -> float:
    """Standard error of ``metric(first, second)``: its deviation when ``first`` is drawn again with replacement."""
    rng = np.random.default_rng(seed)
    return float(
        np.std([metric(first[rng.integers(len(first), size=len(first))], second) for _ in range(repeats)], ddof=1)
    )


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


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Shares of one set that lie within the k-nearest-neighbour balls of the other (arXiv:1904.06991).

    Returns:
        Precision, how much of what is generated looks real; recall, how much of what is real is generated.
    """
    return float(_inside(generated, real, k).any(1).mean()), float(_inside(real, generated, k).any(1).mean())


def density_coverage(generated: np.ndarray, real: np.ndarray, k: int = 5) -> tuple[float, float]:
    """As precision and recall, but counting balls, and robust against outliers (Naeem et al. 2020, arXiv:2002.09797).

    Returns:
        Density, about 1 for equal distributions, may exceed it; coverage, in [0, 1].
    """
    inside = _inside(generated, real, k)
    return float(inside.sum(1).mean() / k), float(inside.any(0).mean())


def _inside(points: np.ndarray, centres: np.ndarray, k: int) -> np.ndarray:
    """bool (points, centres): whether a point is within the ball to a centre's k-th nearest fellow centre."""
    from sklearn.neighbors import NearestNeighbors

    radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]  # itself comes first
    squares = (points**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * points @ centres.T
    return squares <= radii**2


def nearest_distances(
    points: np.ndarray, others: np.ndarray, skip_first: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each point to the nearest of the others (N,), and its index (N,).

    Args:
        skip_first: the points are among the others; each passes itself over.
    """
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=1 + skip_first, algorithm="brute").fit(others)
    distances, indices = neighbours.kneighbors(points)
    return distances[:, -1], indices[:, -1]


def compare(generated: np.ndarray, real: np.ndarray, name: str, seed: int) -> dict[str, float]:
    """All of these metrics, called after the features' name."""
    kid, kid_error = kernel_distance(generated, real, seed=seed)
    precision, recall = precision_recall(generated, real)
    density, coverage = density_coverage(generated, real)
    distance = "fid" if name == "inception" else "fd"
    return {
        f"{distance}_{name}": frechet_distance(generated, real),
        f"{distance}_{name}_error": bootstrap(frechet_distance, generated, real, seed=seed),
        f"kid_{name}": kid,
        f"kid_{name}_error": kid_error,
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
    }
