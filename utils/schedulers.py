"""Noise schedules for sampling, loss weights by signal-to-noise ratio, and the length of a run."""

import math

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

SAMPLER_CLASSES = {
    "ddpm": DDPMScheduler,  # ancestral sampling, Ho et al. 2020, Algorithm 2; wants hundreds of steps
    "ddim": DDIMScheduler,  # deterministic, Song et al. 2021, arXiv:2010.02502
    "dpmsolver++": DPMSolverMultistepScheduler,  # second-order multistep, Lu et al. 2022, arXiv:2211.01095
    "unipc": UniPCMultistepScheduler,  # predictor-corrector, Zhao et al. 2023, arXiv:2302.04867
}


def total_train_steps(num_images: int | None, global_batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a run, the length of its learning-rate schedule too.

    Args:
        num_images: in the data set; None for a stream, which needs ``max_steps``.
        global_batch_size: images per optimizer step: per process x accumulation x processes.
        num_epochs: passes over the data, used without ``max_steps``.
        max_steps: optimizer steps.
    """
    return max_steps if max_steps is not None else math.ceil(num_epochs * num_images / global_batch_size)


def make_sampler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler that draws samples from a model trained with ``noise_scheduler``.

    Timesteps are spaced "trailing": the first is the last training timestep, where diffusers' default "leading" would
    start at t=960 of 1000 with 25 steps, from noise that the model takes for an image (arXiv:2305.08891, Sec. 3.3).
    Predicted clean images are clipped to [-1, 1] where the model predicts noise: near t=T an error of the noise is one
    of the image, magnified a hundred times and more.
    """
    overrides = {"timestep_spacing": "trailing"}
    config = noise_scheduler.config
    if name in ("dpmsolver++", "unipc") and config.prediction_type == "epsilon":
        overrides["thresholding"] = True  # clips to [-1, 1], as the other two do by themselves
    if config.beta_schedule == "sigmoid" and name != "ddpm":  # only DDPMScheduler knows it: hand over its betas
        plain = DDPMScheduler.from_config(config, rescale_betas_zero_snr=False)
        overrides["trained_betas"] = plain.betas.tolist()
        overrides["beta_schedule"] = "linear"  # not used beside trained_betas, but it must be a known name
    return SAMPLER_CLASSES[name].from_config(config, **overrides)


def pipeline_scheduler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler to save in a ``DDPMPipeline``: the sampler, or DDPM where the pipeline cannot call it.

    ``DDPMPipeline`` passes a generator to ``step``, which UniPC's does not take.
    """
    return make_sampler("ddpm" if name == "unipc" else name, noise_scheduler)


def compute_snr(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """float32 SNR(t) = alpha_bar_t / (1 - alpha_bar_t), the shape of ``timesteps``."""
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weights of the squared error that amount to min(SNR, gamma) on the clean image, whatever is predicted.

    Hang et al. 2023, arXiv:2303.09556, Sec. 3.4. An error in epsilon is sqrt(SNR) times one in x0, an error in v is
    sqrt(SNR + 1) times one in x0, which gives min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1).

    Args:
        snr: of each sample, any shape.
        gamma: the paper uses 5.
        prediction_type: epsilon, sample or v_prediction.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped
