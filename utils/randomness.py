"""Randomness as a function of (seed, purpose, sample id), never of history.

A training run numbers its samples 0, 1, 2 ...: optimizer step ``s`` with a global batch of ``G`` takes the ids
``s*G ... s*G+G-1``, whichever process and micro-step works on them. Every draw is computed from that id. So nothing
depends on the number of workers, on prefetching or on where a run was interrupted, and two processes draw what one
process with twice the accumulation draws.
"""

import zlib
from functools import lru_cache

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def random_bits(seed: int, purpose: str, sample_ids: np.ndarray) -> np.ndarray:
    """64 random bits for each sample id: SplitMix64 (Steele et al. 2014) of a key and the id.

    Args:
        seed: the run's seed.
        purpose: separates streams, for example "flip" and "timesteps".
        sample_ids: non-negative integers, any shape.

    Returns:
        uint64 of the same shape.
    """

    def mix(z):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    with np.errstate(over="ignore"):
        key = mix(mix(np.array([seed], np.uint64) + _GOLDEN) ^ np.uint64(zlib.crc32(purpose.encode())))
        sample_ids = np.asarray(sample_ids)
        return mix(key + (sample_ids.astype(np.uint64).reshape(-1) + np.uint64(1)) * _GOLDEN).reshape(sample_ids.shape)


def uniform(seed: int, purpose: str, sample_ids: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for each sample id; see ``random_bits``."""
    return (random_bits(seed, purpose, sample_ids) >> np.uint64(11)) * 2.0**-53


def logit_normal(fractions: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
    """Uniform numbers in [0, 1) as logit-normal ones: sigmoid(z), z normal; Esser et al. 2024, arXiv:2403.03206."""
    return torch.sigmoid(mean + deviation * torch.special.ndtri(torch.from_numpy(fractions))).numpy()


def shuffled_indices(seed: int, sample_ids: np.ndarray, length: int) -> np.ndarray:
    """Index into a data set of ``length`` images for each sample id; each epoch is its own permutation.

    Sample ``k`` is entry ``k % length`` of the permutation of epoch ``k // length``: nothing is dropped at an epoch's
    end, and the length of the data need not divide by the batch size.
    """
    sample_ids = np.asarray(sample_ids)
    indices = np.empty(sample_ids.shape, dtype=np.int64)
    for epoch in np.unique(sample_ids // length):
        chosen = sample_ids // length == epoch
        indices[chosen] = _permutation(seed, int(epoch), length)[sample_ids[chosen] % length]
    return indices


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def sample_generators(seed: int, purpose: str, sample_ids: np.ndarray, device="cpu") -> list[torch.Generator]:
    """One torch generator for each sample id, on ``device``."""
    return [torch.Generator(device).manual_seed(bits) for bits in random_bits(seed, purpose, sample_ids).tolist()]


def sample_noise(
    seed: int, purpose: str, sample_ids: np.ndarray, shape: tuple[int, ...], device="cpu", distribution: str = "normal"
) -> torch.Tensor:
    """float32 noise (len(sample_ids), *shape), a function of (seed, purpose, sample id) for each sample.

    The values differ between device types (CPU, CUDA), as torch's generators do, and on nothing else.

    Args:
        distribution: ``normal``, with mean 0 and variance 1, or ``uniform`` in [-1, 1).
    """
    noise = torch.empty(len(sample_ids), *shape, device=device)
    generator = torch.Generator(device)
    draw = {"normal": torch.Tensor.normal_, "uniform": torch.Tensor.uniform_}[distribution]
    limits = {"normal": (0, 1), "uniform": (-1, 1)}[distribution]
    for row, bits in zip(noise, random_bits(seed, purpose, sample_ids).tolist(), strict=True):
        draw(row, *limits, generator=generator.manual_seed(bits))
    return noise
