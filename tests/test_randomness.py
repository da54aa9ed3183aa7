"""utils/randomness.py: draws depend on seed, purpose and sample number only, and are as random as they should be."""

import numpy as np
import torch
from scipy import stats

from utils.diffusion.pipelines import slerp
from utils.randomness import logit_normal, random_bits, sample_noise, shuffled_indices, uniform


def test_uniform_is_uniform_and_uncorrelated():
    draws = uniform(0, "timesteps", np.arange(100_000))
    assert stats.kstest(draws, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.01
    for other in (uniform(1, "timesteps", np.arange(100_000)), uniform(0, "flip", np.arange(100_000))):
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.01


def test_logit_normal_is_the_logistic_function_of_a_normal_variable():
    draws = logit_normal(uniform(0, "timesteps", np.arange(10_000)))
    assert stats.kstest(np.log(draws / (1 - draws)), "norm").pvalue > 0.001
    ends = logit_normal(np.array([0.0, 0.5, 1 - 2.0**-53]))
    assert ends[:2].tolist() == [0, 0.5] and 0.999 < ends[2] < 1  # so that a timestep is always below T


def test_neighbouring_seeds_share_no_bits():
    bits = np.concatenate([random_bits(seed, "noise", np.arange(1000)) for seed in range(20)])
    assert len(np.unique(bits)) == len(bits)


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = sample_noise(0, "noise", np.arange(8), (1, 5, 5))
    parts = torch.cat([sample_noise(0, "noise", numbers, (1, 5, 5)) for numbers in ([0, 1, 2], [3], [4, 5, 6, 7])])
    assert torch.equal(whole, parts)
    assert whole.dtype == torch.float32


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = sample_noise(0, "noise", np.arange(200), (3, 16, 16))
    assert torch.equal(before, torch.get_rng_state())
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.001
    assert abs(np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1]) < 0.01


def test_every_epoch_is_a_permutation_whatever_the_batches():
    numbers = np.arange(30)
    order = shuffled_indices(7, numbers, 10)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(order[:10], order[10:20])
    in_batches = np.concatenate([shuffled_indices(7, batch, 10) for batch in np.split(numbers, [4, 11, 23])])
    assert np.array_equal(order, in_batches)
    assert not np.array_equal(order, shuffled_indices(8, numbers, 10))


def test_uniform_noise_fills_the_range_of_the_images():
    noise = sample_noise(0, "noise", np.arange(200), (1, 16, 16), distribution="uniform")
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() < 1
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1 / 3) < 0.01
    assert torch.equal(noise[3:5], sample_noise(0, "noise", np.array([3, 4]), (1, 16, 16), distribution="uniform"))


def test_spherical_interpolation_keeps_noise_normal():
    first, second = (sample_noise(0, "a", np.arange(8) + k, (3, 32, 32)) for k in (0, 100))
    assert torch.allclose(slerp(first, second, 0.0), first, atol=1e-5)
    assert torch.allclose(slerp(first, second, torch.ones(8)), second, atol=1e-5)
    middle = slerp(first, second, 0.5)
    assert abs(middle.std() - 1) < 0.02  # a straight line would give 0.71
    assert torch.allclose(slerp(first, first, 0.3), first, atol=1e-3)
