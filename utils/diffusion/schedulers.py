"""Noise schedules, their samplers, and loss weights by signal-to-noise ratio."""

import itertools

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

NOISE_LEVELS = 4  # equal ranges of timesteps, each with its own loss curve
SAMPLER_CLASSES = {
    "ddpm": DDPMScheduler,  # ancestral sampling, Ho et al. 2020, Algorithm 2. It needs hundreds of steps
    "ddim": DPMSolverMultistepScheduler,  # of the first order: deterministic, Song et al. 2021, arXiv:2010.02502
    "dpmsolver++": DPMSolverMultistepScheduler,  # second-order multistep, Lu et al. 2022, arXiv:2211.01095
    "sde-dpmsolver++": DPMSolverMultistepScheduler,  # The same with new noise in every step, which corrects errors
    "unipc": UniPCMultistepScheduler,  # predictor-corrector, Zhao et al. 2023, arXiv:2302.04867
}


def noise_levels(num_train_timesteps: int) -> list[str]:
    """Return names of ``NOISE_LEVELS`` ranges of timesteps: the first and last timestep of each, such as 0-249."""
    edges = [-(-k * num_train_timesteps // NOISE_LEVELS) for k in range(NOISE_LEVELS + 1)]
    return [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]


def make_noise_scheduler(pretrained, default: dict, **given) -> DDPMScheduler:
    """Make the noise scheduler of training.

    Args:
        pretrained: pipeline that training starts from, or None.
        default: parameters without a pretrained pipeline.
        given: parameters set by flags. Those that are None are not set.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "beta_schedule" in given:
        given["trained_betas"] = None  # Otherwise explicit betas of a pretrained pipeline would take precedence
    return DDPMScheduler.from_config(pretrained.scheduler.config if pretrained else default, **given)


def make_sampler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """Return the scheduler that draws samples from a model trained with ``noise_scheduler``.

    Timesteps have "trailing" spacing: sampling starts at the last training timestep. With diffusers' default "leading"
    and 25 steps it would start at t=960 of 1000, where pure noise is not a valid input (arXiv:2305.08891, Sec. 3.3).
    Predicted clean images are clipped to [-1, 1] where the model predicts noise, because near t=T an error in the noise
    becomes an error in the image that is more than a hundred times as large. Latents may exceed [-1, 1]. For latents,
    ``clip_sample=False`` in the noise scheduler turns clipping off.

    DDIM is DPM-Solver++ of the first order (Lu et al. 2022, arXiv:2211.01095, Sec. 4). diffusers' ``DDIMScheduler``
    leaves noise if the steps do not divide the noise levels. In a ``DDPMPipeline``, it also combines a clipped image
    with the noise of the unclipped one, and this error grows with every step.

    Args:
        name: key of ``SAMPLER_CLASSES``.
        noise_scheduler: scheduler that the model was trained with.
    """
    config = noise_scheduler.config
    clips = config.prediction_type == "epsilon" and config.get("clip_sample", True)
    overrides = {"timestep_spacing": "trailing"}
    if name != "ddpm":  # DDPM clips on its own. The config may come from a pipeline with other settings
        overrides |= {key: False for key in config if key.startswith("use_")}
        overrides |= dict(thresholding=clips, solver_order=1 if name == "ddim" else 2, final_sigmas_type="zero")
    if SAMPLER_CLASSES[name] is DPMSolverMultistepScheduler:
        kind = name if name.endswith("dpmsolver++") else "dpmsolver++"
        overrides |= dict(algorithm_type=kind, lambda_min_clipped=-torch.inf)
    # Only DDPMScheduler has this schedule, so its betas are passed on
    if config.beta_schedule == "sigmoid" and name != "ddpm":
        plain = DDPMScheduler.from_config(config, rescale_betas_zero_snr=False)
        overrides["trained_betas"] = plain.betas.tolist()
        overrides["beta_schedule"] = "linear"  # Ignored with trained_betas, but it must be a valid name
    return SAMPLER_CLASSES[name].from_config(config, **overrides)


def pipeline_scheduler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """Return the scheduler to save in a ``DDPMPipeline``: the sampler, or a replacement that this pipeline can use.

    DDPM replaces UniPC, because ``DDPMPipeline`` passes a generator to ``step``, and UniPC takes none.
    """
    return make_sampler("ddpm" if name == "unipc" else name, noise_scheduler)


def signal_and_noise(scheduler: SchedulerMixin, timestep, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), or 1 - a and a on straight paths.

    Returns:
        float32, in the shape of ``timestep``.
    """
    timestep = torch.as_tensor(timestep, device=sample.device)
    if hasattr(scheduler, "signal_and_noise"):
        return scheduler.signal_and_noise(timestep)
    if scheduler.config.get("use_flow_sigmas"):  # A straight path, see ``flow``
        level = timestep / scheduler.config.num_train_timesteps
        return 1 - level, level
    alpha_bar = scheduler.alphas_cumprod.to(sample.device)[timestep.long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def predicted_images(scheduler: SchedulerMixin, output: torch.Tensor, sample: torch.Tensor, timestep) -> torch.Tensor:
    """Convert a model's output to predicted clean images, x_0 of Ho et al. 2020, Eq. 15, without clipping.

    Args:
        scheduler: scheduler with ``alphas_cumprod`` and any of diffusers' prediction types, or of straight paths.
        output, sample: output and input of the model, (B, C, H, W).
        timestep: timestep of the sample.
    """
    signal, noise = signal_and_noise(scheduler, timestep, sample)
    if scheduler.config.get("prediction_type") == "epsilon":
        return (sample - noise * output) / signal
    if scheduler.config.get("prediction_type") == "v_prediction":
        return signal * sample - noise * output
    if scheduler.config.get("prediction_type") == "flow_prediction":
        return sample - noise * output
    return output


def output_for(scheduler: SchedulerMixin, images: torch.Tensor, sample: torch.Tensor, timestep) -> torch.Tensor:
    """Convert clean images to the model's output: the inverse of ``predicted_images``."""
    signal, noise = signal_and_noise(scheduler, timestep, sample)
    if scheduler.config.get("prediction_type") == "epsilon":
        return (sample - signal * images) / noise
    if scheduler.config.get("prediction_type") == "v_prediction":
        return (signal * sample - images) / noise
    if scheduler.config.get("prediction_type") == "flow_prediction":
        return (sample - images) / noise
    return images


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return weights of the squared error, equal to min(SNR, gamma) on the clean image for every prediction type.

    Hang et al. 2023, arXiv:2303.09556, Sec. 3.4, with SNR(t) = alpha_bar_t / (1 - alpha_bar_t). An error in epsilon is
    sqrt(SNR) times the error in x0, and an error in v is sqrt(SNR + 1) times the error in x0. Therefore the weights are
    min(SNR, gamma) / SNR for epsilon and min(SNR, gamma) / (SNR + 1) for v.

    Args:
        noise_scheduler: scheduler with the noise schedule and the prediction type.
        timesteps: timestep of each sample, any shape.
        gamma: upper limit of the weights, 5 in the paper.

    Returns:
        float32, in the shape of ``timesteps``.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if noise_scheduler.config.prediction_type == "v_prediction" else clipped
