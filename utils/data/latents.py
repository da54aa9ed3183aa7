"""Latents of training images that are computed once, into memory or into a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .cache import Cache
from .images import PreparedImages
from .pixels import flips

BATCH = 8  # images encoded at once


class Encoder(Protocol):
    """The encoder of images, see ``diffusion.spaces``.

    Attributes:
        shape: shape of the latents of an image.
        fingerprint: digest of its weights.
        scale: factor of the latents.
    """

    shape: tuple[int, ...]
    fingerprint: str
    scale: float

    def distribution(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return mean and standard deviation of the latents of images. The deviation is None if they are not random."""


class RandomCropsError(Exception):
    """The images are cropped at random in training, so there are too many latents to keep."""


class LatentCache(Cache):
    """Mean and standard deviation of the latents of all images, float32, in memory or in a file.

    With ``--random_flip``, mirrored images are encoded, too, because their latents are not the mirrored latents.

    Args:
        images, accelerator, folder: see ``Cache``.
        encoder: encoder of images.
        normalize: function from images uint8 (B, C, H, W) to the encoder's float32 images on its device.

    Raises:
        RandomCropsError: some images are larger than the training size, so that training crops them at random.
        OSError: see ``Cache``.
    """

    content, doing = "latents", "Encoding images"

    def __init__(
        self, images: PreparedImages, accelerator, folder: Path | None = None, *, encoder: Encoder,
        normalize: Callable[[np.ndarray], torch.Tensor],
    ):  # fmt: skip
        self.encoder, self.normalize = encoder, normalize
        super().__init__(images, accelerator, folder)

    def _as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        return stored.view(torch.float32).view(len(stored), 2 if self.random_flip else 1, -1, *self.encoder.shape)

    def _stored(self, images: list[np.ndarray]) -> list[np.ndarray]:
        if any(image.shape[1:] != self.size for image in images):
            raise RandomCropsError
        found = []
        for start in range(0, len(images), BATCH):
            batch = np.stack(images[start : start + BATCH])
            variants = [batch, batch[..., ::-1].copy()] if self.random_flip else [batch]
            moments = []
            for variant in variants:
                mean, deviation = self.encoder.distribution(self.normalize(variant))
                moments.append(torch.stack([mean] if deviation is None else [mean, deviation], dim=1))
            found += [array.reshape(-1).view(np.uint8) for array in torch.stack(moments, dim=1).cpu().numpy()]
        return found

    def gather(self, indices: np.ndarray, sample_ids: np.ndarray) -> torch.Tensor:
        """Return mean and perhaps deviation of latents, of mirrored images for some sample ids: (B, 1 or 2, *shape)."""
        mirrored = flips(self.seed, sample_ids) if self.random_flip else np.zeros(len(sample_ids), bool)
        variants = torch.from_numpy(mirrored.astype(np.int64)).to(self.stacked.device, non_blocking=True)
        return self.stacked[self._rows(indices), variants]
