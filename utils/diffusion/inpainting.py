"""Filling of holes by a model that was not trained for it (RePaint, Lugmayr et al. 2022, arXiv:2201.09865)."""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import SchedulerMixin

from .. import UserError, randomness
from ..signals import Interrupted, progress
from .few_steps import is_few_step
from .flow import shifted
from .linear_mix import LinearMixScheduler
from .pretrained import check_noise
from .sampling import evaluating, starting_noise
from .schedulers import predicted_images, signal_and_noise

RESAMPLINGS = 5  # repetitions of each step, so that the two parts of the image come to agree


def check_inpainting(scheduler: SchedulerMixin, model: str) -> None:
    """Refuse a model that cannot fill holes.

    Args:
        scheduler: scheduler of the model.
        model: name of the model, for messages.

    Raises:
        UserError: the model draws in a few steps, or its noise is not Gaussian.
    """
    if isinstance(scheduler, LinearMixScheduler) or is_few_step(scheduler):
        uniform = isinstance(scheduler, LinearMixScheduler)
        reason = "was trained with uniform noise" if uniform else "draws in too few steps"
        raise UserError(f"--mask: {model} {reason}. Expected a model of train_ddpm.py, train_flow.py or the like")
    check_noise(scheduler, f"--mask {model}", flow=bool(scheduler.config.get("use_flow_sigmas")))


@torch.no_grad()
def inpaint_batch(
    model: torch.nn.Module, scheduler: SchedulerMixin, sample_ids: np.ndarray, known: torch.Tensor, hole: torch.Tensor,
    num_inference_steps: int, seed: int, device: torch.device, stop: Callable[[], bool] = lambda: False,
    model_inputs: Callable[[np.ndarray], dict] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Draw images that are ``known`` outside of a hole.

    A step from timestep t to s is ancestral (Ho et al. 2020, Alg. 2) in the hole. Elsewhere, the known image gets the
    noise of s (Eq. 8). Then noise is added to return from s to t, and the step is repeated, ``RESAMPLINGS`` times in
    all (Alg. 1). For any schedule x_t = signal_t x_0 + noise_t e, including straight paths, the following holds:

        variance of the step  =  noise_s^2 (1 - (signal_t noise_s / (signal_s noise_t))^2)

    Args:
        model: model called as ``model(noisy, timesteps, **inputs).sample``.
        scheduler: scheduler of diffusers with the noise and the prediction type of the model.
        sample_ids: numbers of the images, (B,). They determine all noise.
        known: image (1, C, H, W) in [-1, 1].
        hole: bool (1, 1, H, W), True inside.
        num_inference_steps, seed, device, stop, model_inputs: see ``sampling.sample_batch``.

    Returns:
        Images, float32 (B, C, H, W), equal to ``known`` outside of the hole.

    Raises:
        Interrupted: ``stop`` returned True.
    """
    shape, count = tuple(known.shape[1:]), len(sample_ids)
    known, hole = known.to(device), hole.to(device)
    inputs = model_inputs(sample_ids) if model_inputs else {}
    timesteps = _timesteps(scheduler, num_inference_steps)
    sample = starting_noise(scheduler, seed, sample_ids, shape, device)
    with evaluating(model):
        for step, timestep in enumerate(timesteps):
            signal, noise = (value.item() for value in signal_and_noise(scheduler, timestep, sample))
            next_signal, next_noise = 1.0, 0.0
            if step + 1 < len(timesteps):
                later = signal_and_noise(scheduler, timesteps[step + 1], sample)
                next_signal, next_noise = (value.item() for value in later)
            kept = signal / next_signal  # share of the next sample that is left in this one
            variance = next_noise**2 * (1 - (kept * next_noise / noise) ** 2)
            repeats = RESAMPLINGS if next_noise else 1
            for repeat in range(repeats):
                progress("sampling")
                if stop():
                    raise Interrupted

                def draw(purpose, name=f"inpainting {step} {repeat}"):
                    return randomness.sample_noise(seed, f"{name} {purpose}", sample_ids, shape, device)

                output = model(sample, timestep.expand(count).to(device), **inputs).sample.float()
                images = predicted_images(scheduler, output, sample, timestep).clamp(-1, 1)
                direction = (sample - signal * images) / noise
                drawn = next_signal * images + (next_noise**2 - variance) ** 0.5 * direction
                drawn = drawn + variance**0.5 * draw("step")
                sample = drawn.where(hole, next_signal * known + next_noise * draw("known"))
                if repeat + 1 < repeats:
                    spread = (noise**2 - (kept * next_noise) ** 2) ** 0.5
                    sample = kept * sample + spread * draw("back")
    return sample


def _timesteps(scheduler: SchedulerMixin, count: int) -> torch.Tensor:
    """Return timesteps from the noisiest on, evenly spaced, or shifted on straight paths."""
    total = scheduler.config.num_train_timesteps
    fractions = torch.arange(count, 0, -1) / count
    if scheduler.config.get("use_flow_sigmas"):
        return shifted(fractions, scheduler.config.flow_shift) * total
    return (fractions * total).round().long() - 1
