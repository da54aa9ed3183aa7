"""Sampling on all processes. The images do not depend on the number of processes or the batch size."""

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
    """Draw images, an equal share on every process. Call it on all processes.

    Image k depends on the seed and k, and not on its batch (up to float rounding). During sampling the model is in eval
    mode. No global random state is used.

    Args:
        count: number of images.
        batch_size: images per batch on this process.
        stop: see ``sample_batch``. With several processes it is ignored.
        first: number of the first image.
        decode: function from the model's space to pixels, see ``spaces``. By default samples are images.
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
        # Converted batch by batch, because floats of 50,000 images would fill the memory
        images.append(torch.from_numpy(to_uint8(batch)))
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

    The steps are those of ``DDPMPipeline``, but in float32 outside the model, and each image has its own generator.

    Args:
        model: model called as ``model(noisy, timesteps, **inputs).sample`` with timesteps (B,). It is prepared, so
            that it autocasts, but not wrapped by DDP.
        sampler: scheduler of diffusers.
        sample_ids: numbers of the images, (B,).
        shape: (C, H, W) of one image.
        num_inference_steps: number of sampling steps.
        seed: seed of the starting noise and of the sampler's noise.
        device: device of the model.
        stop: function called before every step. If it returns True, sampling is interrupted.
        guidance: guidance applied at every step, see ``guidance.Guidance``.
        noise: function from ids (B,) to starting noise, float32 (B, C, H, W), that replaces the noise of the seed. An
            example is an interpolation, see ``pipelines.slerp``.
        init_images: images in the model's space to which noise is added as a start (SDEdit, arXiv:2108.01073),
            (N, C, H, W): a single one, or one for each id.
        strength: share of the steps to run, in (0, 1], with ``init_images``. It determines their noise level.
        watch: function called at every step with the model's input and its predicted clean images, (B, C, H, W) each.
        model_inputs: function from ids (B,) to further inputs of the model by name, such as labels or a condition.

    Returns:
        Samples in the model's space, float32 (B, C, H, W): latents, or images in about [-1, 1].

    Raises:
        Interrupted: ``stop`` returned True.
    """
    progress("sampling")
    sample = noise(sample_ids).to(device) if noise else starting_noise(sampler, seed, sample_ids, shape, device)
    sampler.set_timesteps(num_inference_steps, device=device)
    steps_left_out = 0 if init_images is None else round(num_inference_steps * (1 - strength))
    first_step = min(num_inference_steps - 1, steps_left_out)
    if hasattr(sampler, "set_begin_index"):  # Otherwise equal timesteps, as of a flow with a shift, are confused
        sampler.set_begin_index(first_step)
    if init_images is None:
        sample = sample * sampler.init_noise_sigma
    else:
        chosen = init_images[torch.from_numpy(sample_ids) % len(init_images)].to(device)
        sample = sampler.add_noise(chosen, sample, sampler.timesteps[first_step].expand(len(sample_ids)))
    inputs = model_inputs(sample_ids) if model_inputs else {}

    def predict(noisy, timestep):
        return model(noisy, timestep.expand(len(noisy)), **inputs)

    options = {}
    if "generator" in inspect.signature(sampler.step).parameters:
        options["generator"] = randomness.sample_generators(seed, "sampler", sample_ids)
    # Without this option, DDIM combines a clipped image with the noise of the unclipped one
    if "use_clipped_model_output" in inspect.signature(sampler.step).parameters:
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
    """Return ``model_inputs`` for ``sample_batch`` that give image k row k % N of each tensor with N rows."""

    def rows(sample_ids):
        chosen = torch.from_numpy(np.asarray(sample_ids))
        return {name: values[chosen % len(values)].to(device) for name, values in inputs.items()}

    return rows


def starting_noise(scheduler, seed, sample_ids, shape, device) -> torch.Tensor:
    """Return the starting noise of samples, float32 (B, C, H, W), of the scheduler's noise distribution."""
    distribution = getattr(scheduler, "noise_distribution", "normal")
    return randomness.sample_noise(seed, "samples", sample_ids, shape, device, distribution)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into eval mode for the block, and restore its mode afterwards, even after an error."""
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)
