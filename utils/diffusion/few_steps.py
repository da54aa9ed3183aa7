"""Models that draw in a few calls, and their sampler."""

import inspect

from diffusers import DDPMScheduler, LCMScheduler, SchedulerMixin

from .. import UserError
from .schedulers import make_sampler


def make_few_step_sampler(noise_scheduler: DDPMScheduler, solver_steps: int) -> LCMScheduler:
    """What draws samples from a model that predicts where the way from noise ends: an image at once, new noise, again.

    Multistep consistency sampling, Song et al. 2023, arXiv:2303.01469, Algorithm 1. Where the teacher predicts noise,
    the student predicts v: at the last noise level an error of the noise is one of the image a hundred times as large,
    which a single call cannot afford.

    Args:
        solver_steps: equal steps of the ways that the model learns. At their timesteps, and at no others, it is called.

    Raises:
        UserError: they do not divide the number of noise levels.
    """
    levels, prediction_type = noise_scheduler.config.num_train_timesteps, noise_scheduler.config.prediction_type
    if levels % solver_steps:
        fitting = [n for n in range(2, min(levels // 2, 64) + 1) if levels % n == 0]
        raise UserError(
            f"--solver_steps {solver_steps} does not divide the teacher's {levels} noise levels; expected one "
            f"of {', '.join(map(str, fitting))}"
        )
    config = make_sampler("ddim", noise_scheduler).config  # with explicit betas where other samplers need them
    known = inspect.signature(LCMScheduler).parameters  # others it would warn of whenever it is loaded
    config = {name: value for name, value in config.items() if name in known}
    config["prediction_type"] = "v_prediction" if prediction_type == "epsilon" else prediction_type
    return LCMScheduler(**config | {"original_inference_steps": solver_steps, "clip_sample": True})


def is_few_step(scheduler: SchedulerMixin) -> bool:
    """Whether the model that carries this scheduler predicts where the way from noise ends: a consistency model."""
    return isinstance(scheduler, LCMScheduler)


def is_compatible(name: str, scheduler: SchedulerMixin) -> bool:
    """Whether the sampler of this name is of the kind that the model that carries this scheduler was trained for."""
    return (name == "lcm") == is_few_step(scheduler)
