"""utils/randomness.py: draws depend only on seed, purpose and sample number, and have the right distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from utils.diffusion.pipelines import slerp
from utils.randomness import discretize, logit_normal, random_bits, sample_noise, shuffled_indices, uniform


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


@pytest.mark.parametrize("distribution", ("normal", "uniform"))
@pytest.mark.parametrize("shape", ((1, 28, 28), (3, 5, 5), (1, 1, 1), (3, 64, 64)))
def test_noise_of_a_sample_does_not_depend_on_its_batch(shape, distribution):
    whole = sample_noise(3, "noise", np.arange(64), shape, distribution=distribution)
    alone = [sample_noise(3, "noise", np.array([k]), shape, distribution=distribution) for k in range(64)]
    assert torch.equal(whole, torch.cat(alone))
    assert whole.shape == (64, *shape) and whole.dtype == torch.float32 and whole.isfinite().all()


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    noise = sample_noise(0, "noise", np.arange(2000), (3, 16, 16)).double().numpy().reshape(2000, -1)
    assert torch.equal(before, torch.get_rng_state())
    for part in (noise, noise[:, 0], noise[0], noise[:, ::2], noise**2 - 1):  # moments, to five standard errors
        assert abs(part.mean()) < 5 * part.std() / np.sqrt(part.size)
    assert abs((noise**3).mean()) < 5 * np.sqrt(15 / noise.size)
    assert abs((noise**4).mean() - 3) < 5 * np.sqrt(96 / noise.size)
    assert stats.kstest(noise[:100].ravel(), "norm").pvalue > 0.001
    places = [stats.kstest(noise[:, place], "norm").pvalue for place in range(0, noise.shape[1], 7)]
    assert stats.kstest(places, "uniform").pvalue > 0.001  # each place in the image, over samples
    assert 4.5 < np.abs(noise).max() < 6.8


def test_noise_of_neighbours_seeds_and_purposes_is_independent():
    shape, ids = (1, 32, 32), np.arange(500)
    noise = sample_noise(0, "noise", ids, shape)
    others = {
        "the next sample": sample_noise(0, "noise", ids + 1, shape),
        "the next seed": sample_noise(1, "noise", ids, shape),
        "another purpose": sample_noise(0, "samples", ids, shape),
        "the next pixel": noise.roll(1, dims=3),
        "the next row": noise.roll(1, dims=2),
        "the other half, which shares a radius": noise.flatten(1).roll(512, dims=1).view_as(noise),
    }
    for name, other in others.items():
        for power in (1, 2):  # correlation of the values, and of their squares
            x, y = ((part**power).double().flatten().numpy() for part in (noise, other))
            assert abs(np.corrcoef(x, y)[0, 1]) * np.sqrt(len(x)) < 5, name
        products = (noise * other).flatten(1).mean(1)  # one pair of images each
        assert products.abs().max() * 32 < 6, name


def test_noise_has_a_flat_spectrum():
    power = torch.fft.rfft2(sample_noise(0, "noise", np.arange(1000), (1, 28, 28)), norm="ortho").abs().square()
    mean = power.mean(dim=(0, 1))  # 1000 images: exponential or chi-squared, standard error at most sqrt(2 / 1000)
    assert abs(mean - 1).max() < 5 * np.sqrt(2 / 1000)
    rows = torch.fft.rfft(sample_noise(0, "noise", np.arange(4096), (1, 4, 4))[:, 0, 0, 0], norm="ortho").abs().square()
    assert stats.kstest(rows[1:-1].numpy(), "expon").pvalue > 0.001  # over sample ids, at one place


def test_random_bits_of_an_id_alone_are_those_in_a_batch():
    batch = random_bits(7, "dropout", np.arange(10))
    assert [random_bits(7, "dropout", np.int64(k)).item() for k in range(10)] == batch.tolist()
    assert batch[0] == 0x12752B5BC8DAA0FE  # fixed, so that a checkpoint resumes with the same bits in every version
    noise = sample_noise(7, "noise", np.array([3]), (1, 2, 2))
    assert torch.allclose(noise.flatten(), torch.tensor([-0.5714, -0.8507, -0.4836, 1.4384]), atol=1e-4)


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
    assert stats.kstest(noise.flatten().numpy(), "uniform", (-1, 2)).pvalue > 0.001


def test_spherical_interpolation_keeps_noise_normal():
    first, second = (sample_noise(0, "a", np.arange(8) + k, (3, 32, 32)) for k in (0, 100))
    assert torch.allclose(slerp(first, second, 0.0), first, atol=1e-5)
    assert torch.allclose(slerp(first, second, torch.ones(8)), second, atol=1e-5)
    middle = slerp(first, second, 0.5)
    assert abs(middle.std() - 1) < 0.02  # a straight line would give 0.71
    assert torch.allclose(slerp(first, first, 0.3), first, atol=1e-3)


def test_shares_that_are_rounded_to_one_are_in_the_last_part():
    fractions = logit_normal(np.array([0.0, 0.5, 1 - 2**-53]), 0.0, 10.0)
    assert fractions[-1] == 1
    assert discretize(fractions, 1000).tolist() == [0, 500, 999]
    assert discretize(np.array([-0.1, 1.7]), 25).tolist() == [0, 24]
