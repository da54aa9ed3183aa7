"""Samples, drawn by all processes, the same whatever their number and the batch size; and how they arise."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin
from PIL import Image

from . import randomness
from .guidance import Guidance
from .images import make_grid
from .schedulers import predicted_images


def sample_images(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    accelerator,
    count: int,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    batch_size: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
    **options,
) -> np.ndarray | None:
    """Draw images with every process taking its share. Call it on all processes.

    Image k depends on the seed and k, not on the batch it is drawn in (up to float rounding). The model is put in eval
    mode and back. No global random state is used.

    Args:
        count: number of images.
        batch_size: images at once on this process.
        stop: asked before every model call of a single process; True gives up.
        model, sampler, shape, num_inference_steps, seed, options: see ``sample_batch``.

    Returns:
        uint8 (count, C, H, W) on every process; None if stopped.
    """
    share = -(-count // accelerator.num_processes)
    mine, images = accelerator.process_index * share + np.arange(share), []
    options["stop"] = stop if accelerator.num_processes == 1 else lambda: False
    for numbers in np.array_split(mine, -(-share // batch_size)):
        batch = sample_batch(model, sampler, numbers, shape, num_inference_steps, seed, accelerator.device, **options)
        if batch is None:
            return None
        images.append(batch)
    return to_uint8(accelerator.gather(torch.cat(images))[:count])


def estimate_seconds(model, sampler, accelerator, count, shape, num_inference_steps, batch_size, *rest, **options):
    """How long ``sample_images`` with the same arguments will take: float, from one model call on one batch."""
    times = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        once = min(count, batch_size * accelerator.num_processes)
        sample_images(model, sampler, accelerator, once, shape, 1, batch_size, *rest, **options)
        times.append(time.perf_counter() - start)
    return times[-1] * num_inference_steps * -(-count // once)


@torch.no_grad()
def sample_batch(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    numbers: np.ndarray,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    seed: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    guidance: Guidance | None = None,
    noise: Callable[[np.ndarray], torch.Tensor] | None = None,
    init_images: torch.Tensor | None = None,
    strength: float = 1.0,
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor | None:
    """Draw the images with these numbers.

    As in ``DDPMPipeline``, but in float32 outside the model, and each image from its own generator.

    Args:
        model: called as ``model(noisy, timestep).sample``; prepared (so that it autocasts), but not the DDP wrapper.
        sampler: a diffusers scheduler.
        shape: (C, H, W) of one image.
        num_inference_steps: model calls per image.
        stop: asked before every model call; True gives up.
        guidance: steers every step.
        noise: what image k starts from, instead of the noise of seed and k; float32 (B, C, H, W) for numbers (B,). For
            example an interpolation, see ``randomness.slerp``.
        init_images: start from these with noise on them (SDEdit, arXiv:2108.01073), one for all or one an image;
            (N, C, H, W) in [-1, 1].
        strength: of that noise, in (0, 1]; of the steps, this share is done.
        watch: called at every step with what the model is given and which clean images it predicts, (B, C, H, W) each.

    Returns:
        float32 (B, C, H, W), images in [-1, 1] or about it; None if stopped.
    """
    sample = noise(numbers).to(device) if noise else _start(sampler, seed, numbers, shape, device)
    sampler.set_timesteps(num_inference_steps, device=device)
    if init_images is None:
        sample = sample * sampler.init_noise_sigma
    first_step = 0
    if init_images is not None:
        first_step = min(num_inference_steps - 1, round(num_inference_steps * (1 - strength)))
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(first_step)
        chosen = init_images[torch.from_numpy(numbers) % len(init_images)].to(device)
        sample = sampler.add_noise(chosen, sample, sampler.timesteps[first_step].expand(len(numbers)))
    options = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        options["generator"] = randomness.sample_generators(seed, "sampler", numbers, device)
    if "use_clipped_model_output" in inspect.signature(sampler.step).parameters:  # DDIM: image and noise must agree
        options["use_clipped_model_output"] = True
    with evaluating(model):
        for timestep in sampler.timesteps[first_step:]:
            if stop():
                return None
            if guidance:
                model_output = guidance.predict(model, sampler, sample, timestep)
            else:
                model_output = model(sampler.scale_model_input(sample, timestep), timestep).sample.float()
            if watch:
                watch(sample, predicted_images(sampler, model_output, sample, timestep))
            sample = sampler.step(model_output, timestep, sample, **options).prev_sample
    return sample


@torch.no_grad()
def show_denoising(
    model: torch.nn.Module, noise_scheduler: SchedulerMixin, clean_images: torch.Tensor, seed: int
) -> Image.Image:
    """A picture of what the model is trained to do: images, the same with more and more noise, and its predictions.

    Args:
        model: predicts clean images, see ``sample_images``.
        noise_scheduler: mixes; the noise grows from none in the first column to nothing else in the last.
        clean_images: (B, C, H, W) in [-1, 1], on the model's device.
        seed: of the noise.
    """
    count, *shape = clean_images.shape
    timesteps = torch.linspace(0, noise_scheduler.config.num_train_timesteps, count, device=clean_images.device)
    noise = _start(noise_scheduler, seed, np.arange(count), shape, clean_images.device)
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    with evaluating(model):
        predicted = model(noisy_images, timesteps).sample.float()
    rows = to_uint8(torch.cat([clean_images, noisy_images, predicted]))
    return make_grid(rows, captions=["image", "mixed with noise", "predicted"])


def show_walk(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    count: int,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    seed: int,
    device: torch.device,
) -> Image.Image:
    """A picture of how samples arise: at each step, what the model is given, and which clean images it predicts.

    Args:
        model, sampler, shape, seed: as for ``sample_images``; the first images that it draws are shown.
        count: number of images.
        num_inference_steps: model calls, two rows each.
    """
    rows = []
    sample_batch(
        model, sampler, np.arange(count), shape, num_inference_steps, seed, device,
        watch=lambda given, predicted: rows.extend([given, predicted]),
    )  # fmt: skip
    steps = range(1, num_inference_steps + 1)
    captions = [caption for step in steps for caption in (f"step {step}: given", "predicted")]
    return make_grid(to_uint8(torch.cat(rows)), captions=captions)


def _start(scheduler, seed, numbers, shape, device) -> torch.Tensor:
    distribution = getattr(scheduler, "noise_distribution", "normal")
    return randomness.sample_noise(seed, "samples", numbers, shape, device, distribution)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Floats in [-1, 1], clipped, as uint8 on the CPU; the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after it, whatever happened, as it was."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def save_picture(picture: Image.Image, path: Path, accelerator, step: int, name: str) -> None:
    """Write a picture as PNG and to the trackers, on the main process.

    Args:
        path: of the PNG; its folder is made.
        step: optimizer steps done, the trackers' x-axis.
        name: in the trackers.
    """
    if not accelerator.is_main_process:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    pixels = np.atleast_3d(np.asarray(picture))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step=step)
