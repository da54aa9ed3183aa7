"""Models that draw in a few calls, and their sampler."""

import inspect

from diffusers import DDPMScheduler, LCMScheduler, SchedulerMixin

from .schedulers import make_sampler


def make_few_step_sampler(noise_scheduler: DDPMScheduler) -> LCMScheduler:
    """What draws samples from a model that predicts where the way from noise ends: an image at once, new noise, again.

    Multistep consistency sampling, Song et al. 2023, arXiv:2303.01469, Algorithm 1, at evenly spaced timesteps.
    """
    config = make_sampler("ddim", noise_scheduler).config  # with explicit betas where other samplers need them
    known = inspect.signature(LCMScheduler).parameters  # others it would warn of whenever it is loaded
    config = {name: value for name, value in config.items() if name in known}
    return LCMScheduler(**config | {"original_inference_steps": config["num_train_timesteps"], "clip_sample": True})


def is_few_step(scheduler: SchedulerMixin) -> bool:
    """Whether the model that carries this scheduler predicts where the way from noise ends: a consistency model."""
    return isinstance(scheduler, LCMScheduler)
