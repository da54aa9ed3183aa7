"""utils/evaluation/metrics.py: against scipy, closed forms and sets with a known answer."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from utils.data.nearest import nearest_distances
from utils.evaluation.comparison import bootstrap, compare, density_coverage, precision_recall
from utils.evaluation.metrics import frechet_distance, kernel_distance, squared_mmd


@pytest.fixture
def normal():
    return lambda count, dimension=8, seed=0: np.random.default_rng(seed).normal(size=(count, dimension))


def test_frechet_distance_equals_scipys_and_the_closed_forms(normal):
    first, second = normal(500), normal(400, seed=1) @ np.diag(np.arange(1, 9)) + 0.3
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    means = first.mean(0) - second.mean(0)
    expected = means @ means + np.trace(c1 + c2 - 2 * sqrtm(c1 @ c2).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, first + 0.5) == pytest.approx(8 * 0.25)
    assert frechet_distance(first, 3 * (first - first.mean(0)) + first.mean(0)) == pytest.approx(4 * np.trace(c1))
    flat = np.hstack([first, np.zeros((500, 3))])  # features that are always zero
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-9)


def test_blocks_change_nothing(normal, monkeypatch):
    from utils.evaluation import comparison

    first, second = normal(300).astype(np.float32), normal(200, seed=1).astype(np.float32) + 0.5
    whole = precision_recall(first, second), density_coverage(first, second)
    monkeypatch.setattr(comparison, "BLOCK", 777)
    assert whole == (precision_recall(first, second), density_coverage(first, second))


def test_bootstrap_error_has_the_size_of_the_spread(normal):
    error = bootstrap(np.mean, normal(10_000, 1), repeats=200)
    assert error == pytest.approx(1 / np.sqrt(10_000), rel=0.2)


def test_kernel_distance_of_two_halves_is_about_zero_and_of_others_is_not(normal):
    for block in (2000, 500):
        value, error = kernel_distance(normal(2000), normal(2000, seed=1), block)
        assert abs(value) < 5 * error and error < 0.01
        other, _ = kernel_distance(normal(2000), normal(2000, seed=1) + 1, block)
        assert other > 100 * error
    small = kernel_distance(normal(30), normal(30, seed=1))
    assert small == kernel_distance(normal(30), normal(30, seed=1)) and small[1] > 1e-4


@pytest.mark.parametrize(("count", "block"), [(200, 2000), (400, 100)])
def test_the_error_of_the_kernel_distance_is_its_spread_over_other_draws(normal, count, block):
    real = normal(count, 16, seed=999) * 1.3
    found = [kernel_distance(normal(count, 16, seed=k) + 0.3, real, block, seed=k) for k in range(40)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.35)


def test_kernel_distance_is_the_unbiased_estimate(normal):
    x, y = normal(4, 2), normal(4, 2, seed=1)

    def kernel(a, b):
        return (a @ b / 2 + 1) ** 3

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = np.mean([kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs])
    expected -= 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert squared_mmd(x, y) == pytest.approx(expected)


def test_precision_recall_density_coverage_of_known_sets(normal):
    real = normal(1000, 2)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    assert density_coverage(real + 100, real) == (0, 0)
    same = normal(1000, 2, seed=1)
    precision, recall = precision_recall(same, real)
    density, coverage = density_coverage(same, real)
    assert precision > 0.9 and recall > 0.9 and density == pytest.approx(1, abs=0.1) and coverage > 0.9
    one_mode = real[:1] + 0.01 * normal(1000, 2, seed=2)  # a single mode: precise, but without recall
    precision, recall = precision_recall(one_mode, real)
    _, coverage = density_coverage(one_mode, real)
    assert precision > 0.9 and recall < 0.05 and coverage < 0.05


def test_nearest_distances(normal):
    points = normal(50, 3)
    distances, indices = nearest_distances(points + 1e-4, points)
    assert (indices == np.arange(50)).all() and (distances < 1e-3).all()
    own = np.stack([np.arange(50), np.arange(50) + 1], axis=1)
    distances, indices = nearest_distances(points, points, own)
    assert (indices != np.arange(50)).all() and (distances > 0).all()
    pairs = np.repeat(own[::2, :1], 2, axis=0) + np.array([0, 2])  # two rows belong together, and skip each other
    _, indices = nearest_distances(points, points, pairs)
    assert (indices // 2 != np.arange(50) // 2).all()


def test_names_say_which_features(normal):
    result = compare(normal(100), normal(100, seed=1), "digits", seed=0)
    assert {"fd_digits", "fd_digits_error", "kid_digits", "precision", "recall", "density", "coverage"} <= set(result)
    assert "fid_inception" in compare(normal(100), normal(100, seed=1), "inception", seed=0)
