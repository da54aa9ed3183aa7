"""Nearest-neighbour metrics of two sets of images, and all metrics in one row.

Every function takes features (N, D) and (M, D), float, as the functions in ``metrics`` do.
"""

import numpy as np

from .metrics import distance_name, frechet_distance_to, kernel_distance

BLOCK = 2**23  # distances in memory at once


def bootstrap(metric, points: np.ndarray, repeats: int = 20, seed: int = 0) -> float:
    """Return the standard error of ``metric(points)``: its standard deviation over bootstrap resamples."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(points), size=len(points)) for _ in range(repeats))
    return float(np.std([metric(points[rows]) for rows in drawn], ddof=1))


def precision_recall(
    generated: np.ndarray, real: np.ndarray, k: int = 3, real_radii: np.ndarray | None = None
) -> tuple[float, float]:  # fmt: skip
    """Return the shares of each set within the k-nearest-neighbour balls of the other (arXiv:1904.06991).

    Args:
        k: number of neighbours.
        real_radii: radii of the balls around real points, if they are known, see ``radii``.

    Returns:
        Precision, the share of generated points in balls of real ones, and recall, the share of real points in balls of
        generated ones.
    """
    real_radii = radii(real, k)[0] if real_radii is None else real_radii
    precise = _inside(generated, real, real_radii)[0] > 0
    recalled = _inside(real, generated, radii(generated, k)[0])[0] > 0
    return float(precise.mean()), float(recalled.mean())


def density_coverage(
    generated: np.ndarray, real: np.ndarray, k: int = 5, real_radii: np.ndarray | None = None
) -> tuple[float, float]:  # fmt: skip
    """Return density and coverage, variants of precision and recall that are robust against outliers.

    See Naeem et al. 2020, arXiv:2002.09797.

    Args:
        k, real_radii: see ``precision_recall``.

    Returns:
        Density, about 1 for equal distributions but without an upper limit, and coverage, in [0, 1].
    """
    balls, points = _inside(generated, real, radii(real, k)[0] if real_radii is None else real_radii)
    return float(balls.mean() / k), float((points > 0).mean())


def radii(points: np.ndarray, *ks: int) -> list[np.ndarray]:
    """Return the distance of each point to its k-th nearest other point, (N,) for each k."""
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    with config_context(working_memory=128):  # MiB; the default is a gigabyte
        distances = NearestNeighbors(n_neighbors=max(ks) + 1).fit(points).kneighbors(points)[0]
    return [distances[:, k] for k in ks]  # column 0 is the point itself


def _inside(points: np.ndarray, centres: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of balls that hold each point (N,), and the number of points in each ball (M,).

    The balls have these centres, and ``limits`` as radii. The N x M distances are computed in blocks.
    """
    balls, counts, size = [], np.zeros(len(centres), int), max(1, BLOCK // len(centres))
    norms = (centres**2).sum(1)
    for block in np.split(points, range(size, len(points), size)):
        squares = (block**2).sum(1)[:, None] + norms - 2 * block @ centres.T
        inside = squares <= limits**2
        balls.append(inside.sum(1))
        counts += inside.sum(0)
    return np.concatenate(balls), counts


def compare(generated: np.ndarray, real: np.ndarray, name: str, seed: int) -> dict[str, float]:
    """Return all metrics of two sets of images, named after the features.

    For pixels, return only distances, because noise lies inside the large balls around images in the space of pixels.
    """
    kid, kid_error = kernel_distance(generated, real, seed=seed)
    distance, measure = distance_name(name), frechet_distance_to(real)
    row = {
        distance: measure(generated),
        f"{distance}_error": bootstrap(measure, generated, seed=seed),
        f"kid_{name}": kid,
        f"kid_{name}_error": kid_error,
    }
    if name == "pixels":
        return row
    near, further = radii(real, 3, 5)
    precision, recall = precision_recall(generated, real, 3, near)
    density, coverage = density_coverage(generated, real, 5, further)
    return {**row, "precision": precision, "recall": recall, "density": density, "coverage": coverage}
