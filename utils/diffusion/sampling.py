"""Samples, drawn by all processes, the same whatever their number and the batch size."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import SchedulerMixin

from .. import randomness
from ..pictures import to_uint8
from ..signals import Interrupted, progress
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
    first: int = 0,
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda samples: samples,
    **options,
) -> np.ndarray:
    """Draw images with every process taking its share. Call it on all processes.

    Image k depends on the seed and k, not on the batch it is drawn in (up to float rounding). The model is put in eval
    mode and back. No global random state is used.

    Args:
        count: number of images.
        batch_size: images at once on this process.
        stop: asked before every model call of a single process, see ``sample_batch``.
        first: the number of the first image.
        decode: of the space that the model denoises in, see ``spaces``; by default samples are images.
        model, sampler, shape, num_inference_steps, seed, options: see ``sample_batch``.

    Returns:
        uint8 (count, C, H, W) on every process.
    """
    share = -(-count // accelerator.num_processes)
    mine, images = first + accelerator.process_index * share + np.arange(share), []
    options["stop"] = stop if accelerator.num_processes == 1 else lambda: False
    for sample_ids in np.array_split(mine, -(-share // batch_size)):
        batch = sample_batch(
            model, sampler, sample_ids, shape, num_inference_steps, seed, accelerator.device, **options
        )
        with torch.no_grad():
            batch = decode(batch)
        images.append(torch.from_numpy(to_uint8(batch)))  # at once: floats of 50,000 images would fill the memory
    images = torch.cat(images)
    if accelerator.num_processes > 1:
        images = accelerator.gather(images.to(accelerator.device)).cpu()
    return images[:count].numpy()


@torch.no_grad()
def sample_batch(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    sample_ids: np.ndarray,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    seed: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    guidance=None,
    noise: Callable[[np.ndarray], torch.Tensor] | None = None,
    init_images: torch.Tensor | None = None,
    strength: float = 1.0,
    watch: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    model_inputs: Callable[[np.ndarray], dict] | None = None,
) -> torch.Tensor:
    """Draw the images with these ids.

    As in ``DDPMPipeline``, but in float32 outside the model, and each image from its own generator.

    Args:
        model: called as ``model(noisy, timesteps, **inputs).sample`` with timesteps (B,); prepared (so that it
            autocasts), but not the DDP wrapper.
        sampler: a diffusers scheduler.
        shape: (C, H, W) of one image.
        num_inference_steps: model calls per image.
        stop: asked before every model call.
        guidance: steers every step, see ``guidance.Guidance``.
        noise: what image k starts from, instead of the noise of seed and k; float32 (B, C, H, W) for ids (B,). For
            example an interpolation, see ``pipelines.slerp``.
        init_images: start from these with noise on them (SDEdit, arXiv:2108.01073), one for all or one an image;
            (N, C, H, W), as the model sees them.
        strength: of that noise, in (0, 1]; of the steps, this share is done.
        watch: called at every step with what the model is given and which clean images it predicts, (B, C, H, W) each.
        model_inputs: what else the model needs for images of these ids (B,), by name: class labels, a condition.

    Returns:
        float32 (B, C, H, W), as the model sees them: images in [-1, 1] or about it, or latents.

    Raises:
        Interrupted: ``stop`` returned True.
    """
    progress("sampling")
    sample = noise(sample_ids).to(device) if noise else starting_noise(sampler, seed, sample_ids, shape, device)
    sampler.set_timesteps(num_inference_steps, device=device)
    if init_images is None:
        sample = sample * sampler.init_noise_sigma
    first_step = 0
    if init_images is not None:
        first_step = min(num_inference_steps - 1, round(num_inference_steps * (1 - strength)))
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(first_step)
        chosen = init_images[torch.from_numpy(sample_ids) % len(init_images)].to(device)
        sample = sampler.add_noise(chosen, sample, sampler.timesteps[first_step].expand(len(sample_ids)))
    inputs = model_inputs(sample_ids) if model_inputs else {}

    def predict(noisy, timestep):
        return model(noisy, timestep.expand(len(noisy)), **inputs)

    options = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        options["generator"] = randomness.sample_generators(seed, "sampler", sample_ids)
    if "use_clipped_model_output" in inspect.signature(sampler.step).parameters:  # DDIM: image and noise must agree
        options["use_clipped_model_output"] = True
    with evaluating(model):
        for timestep in sampler.timesteps[first_step:]:
            progress("sampling")
            if stop():
                raise Interrupted
            if guidance:
                model_output = guidance.predict(predict, sampler, sample, timestep)
            else:
                model_output = predict(sampler.scale_model_input(sample, timestep), timestep).sample.float()
            if watch:
                watch(sample, predicted_images(sampler, model_output, sample, timestep))
            sample = sampler.step(model_output, timestep, sample, **options).prev_sample
    return sample


def cycle_rows(inputs: dict[str, torch.Tensor], device) -> Callable[[np.ndarray], dict]:
    """``model_inputs`` of ``sample_batch``: image k gets row k % N of what has N rows."""

    def rows(sample_ids):
        chosen = torch.from_numpy(np.asarray(sample_ids))
        return {name: values[chosen % len(values)].to(device) for name, values in inputs.items()}

    return rows


def starting_noise(scheduler, seed, sample_ids, shape, device) -> torch.Tensor:
    """What samples start from: float32 (B, C, H, W), of the distribution that the scheduler mixes images with."""
    distribution = getattr(scheduler, "noise_distribution", "normal")
    return randomness.sample_noise(seed, "samples", sample_ids, shape, device, distribution)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; after it, whatever happened, as it was."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
