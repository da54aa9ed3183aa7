"""Random numbers as functions of (seed, purpose, sample id), independent of earlier draws.

A training run numbers its samples 0, 1, 2 ...: optimizer step ``s`` with a global batch of ``G`` takes the ids
``s*G ... s*G+G-1``, in any process and micro-step. Every random number is computed from that id. Therefore nothing
depends on the number of workers, on prefetching or on the step at which a run was interrupted. Two processes draw the
same numbers as one process with twice the accumulation.
"""

import math
import zlib
from functools import lru_cache

import numpy as np
import torch

# SplitMix64's constants. All arithmetic is in int64, because NumPy and torch both have it on every device. Sums and
# products wrap around as unsigned ones do, and only shifts must be masked.
_GOLDEN, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

VERSION = 2  # version of the numbers that a seed gives. Increase it if they change


def _mix(z):
    """Apply the finalizer of SplitMix64 to int64 arrays or tensors."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def random_bits(seed: int, purpose: str, sample_ids: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each sample id: SplitMix64 (Steele et al. 2014) of a key and the id.

    Args:
        seed: seed of the run.
        purpose: name of an independent stream of numbers, for example "flip" or "timesteps".
        sample_ids: non-negative integers, any shape.

    Returns:
        Array uint64 of the same shape.
    """
    key = _mix(_mix(np.array([seed]) + _GOLDEN) ^ zlib.crc32(purpose.encode()))
    sample_ids = np.asarray(sample_ids)
    bits = _mix(key + (sample_ids.astype(np.int64).reshape(-1) + 1) * _GOLDEN)
    return bits.view(np.uint64).reshape(sample_ids.shape)


def uniform(seed: int, purpose: str, sample_ids: np.ndarray) -> np.ndarray:
    """Return a float64 in [0, 1) for each sample id, see ``random_bits``."""
    return (random_bits(seed, purpose, sample_ids) >> np.uint64(11)) * 2.0**-53


def logit_normal(fractions: np.ndarray, mean: float = 0.0, deviation: float = 1.0) -> np.ndarray:
    """Turn uniform numbers in [0, 1) into logit-normal ones: sigmoid(z), z normal (arXiv:2403.03206)."""
    return torch.sigmoid(mean + deviation * torch.special.ndtri(torch.from_numpy(fractions))).numpy()


def discretize(fractions: np.ndarray, count: int) -> np.ndarray:
    """Split [0, 1) into ``count`` equal parts, and return the index of the part that contains each fraction: int64.

    A fraction that was rounded up to 1 counts as in the last part, and a negative one as in the first.
    """
    return np.clip((fractions * count).astype(np.int64), 0, count - 1)


def shuffled_indices(seed: int, sample_ids: np.ndarray, length: int) -> np.ndarray:
    """Return an index into a data set of ``length`` images for each sample id. Each epoch has its own permutation.

    Sample ``k`` is entry ``k % length`` of the permutation of epoch ``k // length``. Therefore no image is dropped at
    the end of an epoch, and the length of the data need not be a multiple of the batch size.
    """
    sample_ids = np.asarray(sample_ids)
    indices = np.empty(sample_ids.shape, dtype=np.int64)
    for epoch in np.unique(sample_ids // length):
        chosen = sample_ids // length == epoch
        indices[chosen] = _permutation(seed, int(epoch), length)[sample_ids[chosen] % length]
    return indices


@lru_cache(maxsize=2)  # a batch may contain samples of two epochs
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(length)


def sample_generators(seed: int, purpose: str, sample_ids: np.ndarray) -> list[torch.Generator]:
    """Return a torch generator for each sample id.

    The generators are on the CPU, so that diffusers' schedulers draw the same noise on every device.
    """
    return [torch.Generator().manual_seed(bits) for bits in random_bits(seed, purpose, sample_ids).tolist()]


def sample_noise(
    seed: int, purpose: str, sample_ids: np.ndarray, shape: tuple[int, ...], device="cpu", distribution: str = "normal"
) -> torch.Tensor:
    """Return float32 noise (len(sample_ids), *shape), a function of (seed, purpose, sample id, position in the sample).

    The noise is counter-based (Salmon et al. 2011): the bits of a sample and those of a position are added and mixed by
    SplitMix64, in a few operations on the device for the whole batch. Uniform noise has the same bits on every device.
    Normal noise (Box and Muller 1958) differs by the rounding of logarithm, sine and cosine.

    Args:
        distribution: ``normal``, with mean 0 and variance 1, or ``uniform`` in [-1, 1).
    """
    count = math.prod(shape)
    samples = _as_int64(random_bits(seed, purpose, sample_ids), device)
    places = _places(-(-count // 2), torch.device(device))
    bits = _mix(samples[:, None] + places)  # 64 bits give two numbers of 32 bits
    high, low = (bits >> 32) & 0xFFFFFFFF, bits & 0xFFFFFFFF
    if distribution == "uniform":
        numbers = torch.cat([high, low], dim=1) >> 8  # 24 bits are all that float32 holds
        noise = numbers.float() * 2.0**-23 - 1
    else:
        radius = ((high.float() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()  # up to 6.8
        angle = low.float() * (2 * math.pi * 2.0**-32)
        noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, :count].reshape(-1, *shape)


@lru_cache(maxsize=8)
def _places(count: int, device: torch.device) -> torch.Tensor:
    return _as_int64(random_bits(0, "place", np.arange(count)), device)


def _as_int64(bits: np.ndarray, device) -> torch.Tensor:
    on_cuda = torch.device(device).type == "cuda"  # On MPS, the copy may read memory that is already free
    return torch.from_numpy(bits.view(np.int64)).to(device, non_blocking=on_cuda)
