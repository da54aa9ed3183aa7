"""The space that a model denoises in: pixels, or the latents of an autoencoder.

A space is any object with the attributes of ``Pixels``: an autoencoder, a whitening, a wavelet transform.
"""

import torch
from diffusers import ModelMixin

from .. import UserError
from .unets import weights_digest


class Pixels:
    """Images as they are, in [-1, 1].

    Attributes:
        shape: (C, H, W) of what the model denoises.
        image_shape: (C, H, W) of images.
        model_shape: ``shape`` for a UNet's config.
        fingerprint: of what encodes, compared when a run resumes; None if there is nothing to compare.
        in_unit_range: whether values keep to [-1, 1], so that samplers may clip them.
    """

    fingerprint, in_unit_range = None, True

    def __init__(self, image_shape: tuple[int, int, int]):
        self.shape = self.image_shape = tuple(image_shape)

    def to(self, device: torch.device) -> "Pixels":
        """Move what encodes and decodes to a device."""
        return self

    @property
    def model_shape(self) -> dict:
        channels, height, width = self.shape
        sample_size = height if height == width else (height, width)
        return dict(sample_size=sample_size, in_channels=channels, out_channels=channels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return images (B, C, H, W) in [-1, 1] as the model sees them: (B, *shape), float32."""
        return images

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Return what the model denoises, (B, *shape), as images in [-1, 1] or about it."""
        return samples


class Latents(Pixels):
    """Latents of an autoencoder, multiplied by the ``scaling_factor`` of its config as in diffusers' pipelines.

    ``LDMPipeline(autoencoder, unet, scheduler)`` draws with what is trained in them. A ``shift_factor`` is not used:
    that pipeline has none.

    Args:
        autoencoder: ``AutoencoderKL``, ``AutoencoderTiny``, ``VQModel`` or another with their interface. Its weights
            are frozen.
        image_shape: (C, H, W) of images.

    Raises:
        UserError: it does not take images of this shape.
    """

    in_unit_range = False

    def __init__(self, autoencoder: ModelMixin, image_shape: tuple[int, int, int]):
        super().__init__(image_shape)
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.scale = autoencoder.config.get("scaling_factor") or 1.0
        self.fingerprint = weights_digest(autoencoder)[:16]
        taken, channels = autoencoder.config.in_channels, self.image_shape[0]
        if taken != channels:
            raise UserError(
                f"the autoencoder takes {taken} channels, the images have {channels}; --image_mode "
                f"{ {1: 'L', 3: 'RGB'}.get(taken, '?') } converts them"
            )
        images = torch.zeros(1, *self.image_shape, device=autoencoder.device)
        latents = self.encode(images)
        self.shape = tuple(latents.shape[1:])
        decoded = tuple(self.decode(latents).shape[1:])
        if decoded != self.image_shape:
            raise UserError(
                f"the autoencoder returns images of shape {decoded} for {self.image_shape}; expected the same. Try a "
                "--resolution that is a multiple of 8"
            )

    def to(self, device: torch.device) -> "Latents":
        self.autoencoder.to(device)
        return self

    @classmethod
    def of_shape(cls, autoencoder: ModelMixin, shape: tuple[int, int, int]) -> "Latents":
        """Find the images that have latents of this shape (C, H, W)."""
        with torch.no_grad():
            decoded = autoencoder.eval().decode(torch.zeros(1, *shape, device=autoencoder.device)).sample
        return cls(autoencoder, tuple(decoded.shape[1:]))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents of images, of a distribution its mode."""
        encoded = self.autoencoder.encode(images)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return latents.float() * self.scale

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the images of scaled latents. Gradients pass, as guidance needs."""
        return self.autoencoder.decode(samples / self.scale).sample.float()


def encode_in_batches(space: Pixels, images: torch.Tensor, device: torch.device, batch_size: int = 8) -> torch.Tensor:
    """Return images (N, C, H, W) as the model sees them, (N, *shape), on the CPU."""
    return torch.cat([space.encode(batch.to(device)).cpu() for batch in images.split(batch_size)])
