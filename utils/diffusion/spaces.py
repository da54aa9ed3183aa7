"""The space that a model denoises in: pixels, or the latents of an autoencoder.

A space is any object with the attributes of ``Pixels``. It may use an autoencoder, a whitening or a wavelet transform.
"""

import torch
from diffusers import ModelMixin

from .. import UserError, counted
from ..randomness import sample_noise
from .autoencoders import PIXELS_AT_ONCE, check_size
from .unets import weights_digest


class Pixels:
    """The pixels of images in [-1, 1], unchanged.

    Attributes:
        shape: (C, H, W) in this space.
        image_shape: (C, H, W) of images.
        model_shape: ``shape`` as arguments of a UNet's config.
        fingerprint: digest of the encoder, compared when a run resumes, or None without an encoder.
        in_unit_range: whether values are in [-1, 1], so that samplers may clip them.
        downsampling: image pixels per value in each direction.
    """

    fingerprint, in_unit_range, downsampling = None, True, 1

    def __init__(self, image_shape: tuple[int, int, int]):
        self.shape = self.image_shape = tuple(image_shape)

    def to(self, device: torch.device) -> "Pixels":
        """Move the encoder and decoder to a device."""
        return self

    @property
    def model_shape(self) -> dict:
        channels, height, width = self.shape
        sample_size = height if height == width else (height, width)
        return dict(sample_size=sample_size, in_channels=channels, out_channels=channels)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Convert images (B, C, H, W) in [-1, 1] to the model's space, (B, *shape), float32."""
        return images

    def distribution(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return mean and standard deviation of the encoded images, (B, *shape). None is no deviation."""
        return self.encode(images), None

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Convert samples in the model's space, (B, *shape), to images in about [-1, 1]."""
        return samples


class Latents(Pixels):
    """Latents of an autoencoder, multiplied by the ``scaling_factor`` of its config as in diffusers' pipelines.

    ``LDMPipeline(autoencoder, unet, scheduler)`` draws from models trained in this space. A ``shift_factor`` is not
    used, because that pipeline ignores it, see ``autoencoders.fold_normalization``.

    Args:
        autoencoder: ``AutoencoderKL``, ``AutoencoderTiny``, ``AutoencoderDC``, ``VQModel`` or another with their
            interface. This class freezes its weights.
        image_shape: (C, H, W) of images.

    Raises:
        UserError: the autoencoder does not take images of this shape.
    """

    in_unit_range = False

    def __init__(self, autoencoder: ModelMixin, image_shape: tuple[int, int, int]):
        super().__init__(image_shape)
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.scale = autoencoder.config.get("scaling_factor") or 1.0
        self.fingerprint = weights_digest(autoencoder)[:16]
        taken, channels = autoencoder.config.in_channels, self.image_shape[0]
        if taken != channels:
            advice = {1: "--image_mode L converts them", 3: "--image_mode RGB converts them"}.get(
                taken, "Choose another autoencoder"
            )
            raise UserError(
                f"the autoencoder takes {counted(taken, 'channel')}, but the images have {channels}. {advice}"
            )
        check_size(autoencoder, self.image_shape[1:])
        self.at_once = max(1, PIXELS_AT_ONCE // (self.image_shape[1] * self.image_shape[2]))
        images = torch.zeros(1, *self.image_shape, device=autoencoder.device)
        latents = self.encode(images)
        self.shape = tuple(latents.shape[1:])
        self.downsampling = self.image_shape[1] // self.shape[1]
        decoded = tuple(self.decode(latents).shape[1:])
        if decoded != self.image_shape:
            raise UserError(
                f"the autoencoder returns images of shape {decoded} for images of shape {self.image_shape}. "
                "Expected the same shape. Try another --resolution"
            )

    def to(self, device: torch.device) -> "Latents":
        self.autoencoder.to(device)
        return self

    @classmethod
    def of_shape(cls, autoencoder: ModelMixin, shape: tuple[int, int, int]) -> "Latents":
        """Return the space in which images have latents of this shape (C, H, W)."""
        with torch.no_grad():
            decoded = autoencoder.eval().decode(torch.zeros(1, *shape, device=autoencoder.device)).sample
        return cls(autoencoder, tuple(decoded.shape[1:]))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents of images. If the encoder returns a distribution, they are its mean."""
        return self.distribution(images)[0]

    @torch.no_grad()
    def distribution(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        means, deviations = [], []
        for part in images.split(self.at_once):
            encoded = self.autoencoder.encode(part)
            if hasattr(encoded, "latent_dist"):
                means.append(encoded.latent_dist.mean.float() * self.scale)
                deviations.append(encoded.latent_dist.std.float() * self.scale)
            else:
                latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
                means.append(latents.float() * self.scale)
        return torch.cat(means), torch.cat(deviations) if deviations else None

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        """Return the images of scaled latents. The result is differentiable, because guidance needs gradients."""
        parts = [samples] if torch.is_grad_enabled() else samples.split(self.at_once)
        return torch.cat([self.autoencoder.decode(part / self.scale).sample.float() for part in parts])


def encode_in_batches(space: Pixels, images: torch.Tensor, device: torch.device, seed: int) -> torch.Tensor:
    """Convert images (N, C, H, W) to the model's space as in training, (N, *shape), on the CPU.

    Latents are drawn from the encoder's distribution, with noise that depends on the seed and the image's position.
    """
    encoded = []
    for numbers in torch.arange(len(images)).split(8):
        mean, deviation = space.distribution(images[numbers].to(device))
        if deviation is not None:
            mean = mean + deviation * sample_noise(seed, "validation latents", numbers.numpy(), space.shape, device)
        encoded.append(mean.cpu())
    return torch.cat(encoded)
