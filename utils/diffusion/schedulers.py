"""Noise schedules: their samplers, and loss weights by signal-to-noise ratio."""

import itertools

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

NOISE_LEVELS = 4  # equal ranges of timesteps, each with its own loss curve
SAMPLER_CLASSES = {
    "ddpm": DDPMScheduler,  # ancestral sampling, Ho et al. 2020, Algorithm 2; wants hundreds of steps
    "ddim": DDIMScheduler,  # deterministic, Song et al. 2021, arXiv:2010.02502
    "dpmsolver++": DPMSolverMultistepScheduler,  # second-order multistep, Lu et al. 2022, arXiv:2211.01095
    "sde-dpmsolver++": DPMSolverMultistepScheduler,  # the same with fresh noise in every step, which corrects errors
    "unipc": UniPCMultistepScheduler,  # predictor-corrector, Zhao et al. 2023, arXiv:2302.04867
}


def noise_levels(num_train_timesteps: int) -> list[str]:
    """Name the ranges by first and last timestep, such as 0-249."""
    edges = [-(-k * num_train_timesteps // NOISE_LEVELS) for k in range(NOISE_LEVELS + 1)]
    return [f"{low}-{high - 1}" for low, high in itertools.pairwise(edges)]


def make_noise_scheduler(pretrained, default: dict, **given) -> DDPMScheduler:
    """Make the scheduler of training.

    Args:
        pretrained: a pipeline that training starts from, or None.
        default: parameters without one.
        given: parameters that flags ask for; None where they do not.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if "beta_schedule" in given:
        given["trained_betas"] = None  # a pretrained pipeline may bring explicit ones
    return DDPMScheduler.from_config(pretrained.scheduler.config if pretrained else default, **given)


def make_sampler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler that draws samples from a model trained with ``noise_scheduler``.

    Timesteps are spaced "trailing": the first is the last training timestep, where diffusers' default "leading" would
    start at t=960 of 1000 with 25 steps, from noise that the model takes for an image (arXiv:2305.08891, Sec. 3.3).
    Predicted clean images are clipped to [-1, 1] where the model predicts noise: near t=T an error of the noise is one
    of the image, magnified a hundred times and more. DDIM must then derive the noise again from the clipped image, or
    the two contradict each other and every further step makes it worse: see ``sampling.sample_batch``. With
    ``clip_sample=False`` in the noise scheduler nothing is clipped: latents do not keep to [-1, 1].
    """
    config = noise_scheduler.config
    clips = config.prediction_type == "epsilon" and config.get("clip_sample", True)
    overrides = {"timestep_spacing": "trailing"}
    if name == "ddim":
        overrides |= {"clip_sample": clips, "thresholding": False}
    elif name != "ddpm":  # which clips by itself
        overrides["thresholding"] = clips
    if name.endswith("dpmsolver++"):  # whatever the pipeline carried that the config is of
        overrides |= {key: False for key in config if key.startswith("use_")}
        overrides |= dict(algorithm_type=name, solver_order=2, lambda_min_clipped=-torch.inf, final_sigmas_type="zero")
    if config.beta_schedule == "sigmoid" and name != "ddpm":  # only DDPMScheduler knows it: hand over its betas
        plain = DDPMScheduler.from_config(config, rescale_betas_zero_snr=False)
        overrides["trained_betas"] = plain.betas.tolist()
        overrides["beta_schedule"] = "linear"  # not used beside trained_betas, but it must be a known name
    return SAMPLER_CLASSES[name].from_config(config, **overrides)


def pipeline_scheduler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler to save in a ``DDPMPipeline``: the sampler, or another where the pipeline cannot call it.

    ``DDPMPipeline`` passes a generator to ``step``, which UniPC's does not take: DDPM instead. It does not tell DDIM to
    derive the noise again after clipping: DPM-Solver++ of the first order does, and is DDIM otherwise (Lu et al. 2022,
    arXiv:2211.01095, Sec. 4).
    """
    if name == "ddim" and noise_scheduler.config.prediction_type == "epsilon":
        solver = make_sampler("dpmsolver++", noise_scheduler)
        return type(solver).from_config(solver.config, solver_order=1)
    return make_sampler("ddpm" if name == "unipc" else name, noise_scheduler)


def signal_and_noise(scheduler: SchedulerMixin, timestep, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), on straight paths 1 - a and a: float32, as ``timestep``."""
    timestep = torch.as_tensor(timestep, device=sample.device)
    if hasattr(scheduler, "signal_and_noise"):
        return scheduler.signal_and_noise(timestep)
    if scheduler.config.get("use_flow_sigmas"):  # a straight path, see ``flow``
        level = timestep / scheduler.config.num_train_timesteps
        return 1 - level, level
    alpha_bar = scheduler.alphas_cumprod.to(sample.device)[timestep.long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def predicted_images(scheduler: SchedulerMixin, output: torch.Tensor, sample: torch.Tensor, timestep) -> torch.Tensor:
    """The clean images that a model's output means, x_0 of Ho et al. 2020, Eq. 15; not clipped.

    Args:
        scheduler: one that predicts epsilon, sample or v_prediction and has ``alphas_cumprod``, or straight paths.
        output, sample: (B, C, H, W).
        timestep: of the sample.
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
    """The model output that means these clean images; the inverse of ``predicted_images``."""
    signal, noise = signal_and_noise(scheduler, timestep, sample)
    if scheduler.config.get("prediction_type") == "epsilon":
        return (sample - signal * images) / noise
    if scheduler.config.get("prediction_type") == "v_prediction":
        return (signal * sample - images) / noise
    if scheduler.config.get("prediction_type") == "flow_prediction":
        return (sample - images) / noise
    return images


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weights of the squared error that amount to min(SNR, gamma) on the clean image, whatever is predicted.

    Hang et al. 2023, arXiv:2303.09556, Sec. 3.4, with SNR(t) = alpha_bar_t / (1 - alpha_bar_t). An error in epsilon is
    sqrt(SNR) times one in x0, an error in v is sqrt(SNR + 1) times one in x0, which gives min(SNR, gamma) / SNR and
    min(SNR, gamma) / (SNR + 1).

    Args:
        noise_scheduler: its schedule and its prediction type count.
        timesteps: of each sample, any shape.
        gamma: the paper uses 5.

    Returns:
        float32, the shape of ``timesteps``.
    """
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if noise_scheduler.config.prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    clipped = snr.clamp(max=gamma)
    return clipped / (snr + 1) if noise_scheduler.config.prediction_type == "v_prediction" else clipped
