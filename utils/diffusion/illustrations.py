"""Pictures of what a denoiser does: its answers to more and more noise, and how a sample arises from them."""

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..pictures import make_grid, to_uint8
from .sampling import evaluating, sample_batch, starting_noise


@torch.no_grad()
def show_denoising(
    model: torch.nn.Module, noise_scheduler: SchedulerMixin, clean_images: torch.Tensor, seed: int, decode=None
) -> Image.Image:
    """A picture of what the model is trained to do: images, the same with more and more noise, and its predictions.

    Args:
        model: predicts clean images, see ``sample_images``.
        noise_scheduler: mixes; the noise grows from none in the first column to nothing else in the last.
        clean_images: (B, C, H, W) in [-1, 1], on the model's device.
        seed: of the noise.
        decode: of the space that the model denoises in, see ``spaces``; ``clean_images`` are of that space.
    """
    count, *shape = clean_images.shape
    timesteps = torch.linspace(0, noise_scheduler.config.num_train_timesteps, count, device=clean_images.device)
    noise = starting_noise(noise_scheduler, seed, np.arange(count), shape, clean_images.device)
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    with evaluating(model):
        predicted = model(noisy_images, timesteps).sample.float()
    rows = torch.cat([clean_images, noisy_images, predicted])
    return make_grid(to_uint8(decode(rows) if decode else rows), captions=["image", "mixed with noise", "predicted"])


def show_walk(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    count: int,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    seed: int,
    device: torch.device,
    decode=None,
) -> Image.Image:
    """A picture of how samples arise: at each step, what the model is given, and which clean images it predicts.

    Args:
        model, sampler, shape, seed: as for ``sample_images``; the first images that it draws are shown.
        count: number of images.
        num_inference_steps: model calls, two rows each.
        decode: of the space that the model denoises in, see ``spaces``.
    """
    rows = []
    sample_batch(
        model, sampler, np.arange(count), shape, num_inference_steps, seed, device,
        watch=lambda given, predicted: rows.extend([given, predicted]),
    )  # fmt: skip
    steps = range(1, num_inference_steps + 1)
    captions = [caption for step in steps for caption in (f"step {step}: given", "predicted")]
    rows = torch.cat(rows)
    with torch.no_grad():
        rows = decode(rows) if decode else rows
    return make_grid(to_uint8(rows), captions=captions)
