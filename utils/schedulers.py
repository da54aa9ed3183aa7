"""Mixing with noise, noise schedules for sampling, loss weights by signal-to-noise ratio, and the length of a run."""

import math

import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

SAMPLER_CLASSES = {
    "ddpm": DDPMScheduler,  # ancestral sampling, Ho et al. 2020, Algorithm 2; wants hundreds of steps
    "ddim": DDIMScheduler,  # deterministic, Song et al. 2021, arXiv:2010.02502
    "dpmsolver++": DPMSolverMultistepScheduler,  # second-order multistep, Lu et al. 2022, arXiv:2211.01095
    "unipc": UniPCMultistepScheduler,  # predictor-corrector, Zhao et al. 2023, arXiv:2302.04867
}


class LinearMixScheduler(SchedulerMixin, ConfigMixin):
    """Images mixed with uniform noise along a straight line, and the way back from a prediction of the clean image.

        x_a = (1 - a) x_0 + a u,    u uniform in [-1, 1],    a in [0, 1],    timestep = a T

    This is the straight path of rectified flow (Liu et al. 2022, arXiv:2209.03003, Sec. 2.1) from a uniform instead of
    a normal base distribution. Along it dx_a/da = u - x_0 = (x_a - x_0) / a, so a model that predicts x_0 gives the
    flow's velocity, and ``step`` is Euler's method on it. With n equal steps, step i starts at a = (n - i) / n, and

        x + (-1/n) (x - x_0) / a  =  x + (x_0 - x) / (n - i):

    move 1/(n - i) of the way to the prediction.

    Args:
        num_train_timesteps: T, the timestep of pure noise. Timesteps are real numbers in [0, T].
    """

    order = 1
    init_noise_sigma = 1.0
    noise_distribution = "uniform"  # in [-1, 1]; what sampling starts from

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(1)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_a for images and uniform noise (B, C, H, W) and timesteps (B,) in [0, T]; in the images' precision."""
        amounts = (timesteps / self.config.num_train_timesteps).to(original_samples).view(-1, 1, 1, 1)
        return (1 - amounts) * original_samples + amounts * noise

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose n equal steps from T to 0: ``timesteps`` is T, T (n-1)/n, ..., T/n."""
        self.num_inference_steps = num_inference_steps
        steps_left = torch.arange(num_inference_steps, 0, -1, device=device)
        self.timesteps = steps_left * (self.config.num_train_timesteps / num_inference_steps)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """The sample as it is; part of diffusers' interface."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor]:
        """One Euler step.

        Args:
            model_output: predicted clean images, (B, C, H, W).
            timestep: of ``sample``, one of ``timesteps``.
            sample: (B, C, H, W).

        Returns:
            ``prev_sample``, T/n nearer to the images, and ``pred_original_sample``; a tuple of the first without
            ``return_dict``.
        """
        fraction = self.timesteps[-1] / timestep  # 1/(n - i); 1 in the last step
        prev_sample = sample + fraction * (model_output - sample)
        if not return_dict:
            return (prev_sample,)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=model_output)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def total_train_steps(args, num_images: int | None, global_batch_size: int) -> int:
    """Optimizer steps of a run, the length of its learning-rate schedule too.

    Args:
        args: with ``max_train_steps``, or None for ``num_train_epochs`` passes over the data.
        num_images: in the data set; None for a stream, which needs ``max_train_steps``.
        global_batch_size: images per optimizer step: per process x accumulation x processes.
    """
    return args.max_train_steps or math.ceil(args.num_train_epochs * num_images / global_batch_size)


def make_sampler(name: str, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The scheduler that draws samples from a model trained with ``noise_scheduler``.

    Timesteps are spaced "trailing": the first is the last training timestep, where diffusers' default "leading" would
    start at t=960 of 1000 with 25 steps, from noise that the model takes for an image (arXiv:2305.08891, Sec. 3.3).
    Predicted clean images are clipped to [-1, 1] where the model predicts noise: near t=T an error of the noise is one
    of the image, magnified a hundred times and more. DDIM must then derive the noise again from the clipped image, or
    the two contradict each other and every further step makes it worse: see ``sampling.sample_batch``.
    """
    config = noise_scheduler.config
    clips = config.prediction_type == "epsilon"
    overrides = {"timestep_spacing": "trailing"}
    if name == "ddim":
        overrides |= {"clip_sample": clips, "thresholding": False}
    elif name != "ddpm":  # which clips by itself
        overrides["thresholding"] = clips
    if config.beta_schedule == "sigmoid" and name != "ddpm":  # only DDPMScheduler knows it: hand over its betas
        plain = DDPMScheduler.from_config(config, rescale_betas_zero_snr=False)
        overrides["trained_betas"] = plain.betas.tolist()
        overrides["beta_schedule"] = "linear"  # not used beside trained_betas, but it must be a known name
    return SAMPLER_CLASSES[name].from_config(config, **overrides)


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that noised the training images of the model that carries this one: DDPM's, or linear mixing."""
    return scheduler if isinstance(scheduler, LinearMixScheduler) else DDPMScheduler.from_config(scheduler.config)


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
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), for linear mixing 1 - a and a: float32, as ``timestep``."""
    timestep = torch.as_tensor(timestep, device=sample.device)
    if isinstance(scheduler, LinearMixScheduler):
        return 1 - timestep / scheduler.config.num_train_timesteps, timestep / scheduler.config.num_train_timesteps
    alpha_bar = scheduler.alphas_cumprod.to(sample.device)[timestep.long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def predicted_images(scheduler: SchedulerMixin, output: torch.Tensor, sample: torch.Tensor, timestep) -> torch.Tensor:
    """The clean images that a model's output means, x_0 of Ho et al. 2020, Eq. 15; not clipped.

    Args:
        scheduler: one that predicts epsilon, sample or v_prediction and has ``alphas_cumprod``, or linear mixing.
        output, sample: (B, C, H, W).
        timestep: of the sample.
    """
    signal, noise = signal_and_noise(scheduler, timestep, sample)
    if scheduler.config.get("prediction_type") == "epsilon":
        return (sample - noise * output) / signal
    if scheduler.config.get("prediction_type") == "v_prediction":
        return signal * sample - noise * output
    return output


def output_for(scheduler: SchedulerMixin, images: torch.Tensor, sample: torch.Tensor, timestep) -> torch.Tensor:
    """The model output that means these clean images; the inverse of ``predicted_images``."""
    signal, noise = signal_and_noise(scheduler, timestep, sample)
    if scheduler.config.get("prediction_type") == "epsilon":
        return (sample - signal * images) / noise
    if scheduler.config.get("prediction_type") == "v_prediction":
        return (signal * sample - images) / noise
    return images


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
