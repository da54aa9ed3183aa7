"""Pictures of a denoiser: its predictions at rising noise levels, and the steps of its samples."""

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image

from ..pictures import make_grid, to_uint8
from .sampling import evaluating, sample_batch, starting_noise


@torch.no_grad()
def show_denoising(
    model: torch.nn.Module, noise_scheduler: SchedulerMixin, clean_images: torch.Tensor, seed: int
) -> Image.Image:
    """Draw three rows: clean images, the same images at rising noise levels, and the model's predictions.

    Args:
        model: model that predicts clean images, see ``sample_images``.
        noise_scheduler: scheduler that adds the noise, none in the first column and pure noise in the last.
        clean_images: (B, C, H, W) in [-1, 1], on the model's device.
        seed: seed of the noise.
    """
    count, *shape = clean_images.shape
    timesteps = torch.linspace(0, noise_scheduler.config.num_train_timesteps, count, device=clean_images.device)
    noise = starting_noise(noise_scheduler, seed, np.arange(count), shape, clean_images.device)
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    with evaluating(model):
        predicted = model(noisy_images, timesteps).sample.float()
    rows = torch.cat([clean_images, noisy_images, predicted])
    return make_grid(to_uint8(rows), captions=["image", "mixed with noise", "predicted"])


def show_walk(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    count: int,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """Draw two rows for each sampling step: the model's input, and its prediction of the clean images.

    Args:
        model, sampler, shape, seed: see ``sample_images``. The pictured samples are its first ones.
        count: number of images.
        num_inference_steps: number of sampling steps.
    """
    rows = []
    sample_batch(
        model, sampler, np.arange(count), shape, num_inference_steps, seed, device,
        watch=lambda given, predicted: rows.extend([given, predicted]),
    )  # fmt: skip
    steps = range(1, num_inference_steps + 1)
    captions = [caption for step in steps for caption in (f"step {step}: given", "predicted")]
    return make_grid(to_uint8(torch.cat(rows)), captions=captions)
