"""Few-step (consistency) models, and their sampler."""

import inspect

from diffusers import DDPMScheduler, LCMScheduler, SchedulerMixin

from .. import UserError
from .schedulers import make_sampler


def make_few_step_sampler(noise_scheduler: DDPMScheduler, solver_steps: int) -> LCMScheduler:
    """Return the sampler of a model that predicts the end of its teacher's trajectory.

    Multistep consistency sampling, Song et al. 2023, arXiv:2303.01469, Algorithm 1: predict the image, add new noise,
    and repeat. If the teacher predicts noise, the student predicts v instead. The reason is the last noise level, where
    an error in the noise becomes an error in the image that is about a hundred times as large. A single step cannot
    correct it.

    Args:
        noise_scheduler: scheduler that the teacher was trained with.
        solver_steps: number of equal steps of the teacher's trajectories. The model is evaluated only at the
            timesteps where they start.

    Raises:
        UserError: the number of noise levels is not divisible by ``solver_steps``.
    """
    levels, prediction_type = noise_scheduler.config.num_train_timesteps, noise_scheduler.config.prediction_type
    if levels % solver_steps:
        fitting = [n for n in range(2, min(levels // 2, 64) + 1) if levels % n == 0]
        raise UserError(
            f"--solver_steps {solver_steps} does not divide the teacher's {levels} noise levels. Expected one "
            f"of {', '.join(map(str, fitting))}"
        )
    config = make_sampler("ddim", noise_scheduler).config  # It has explicit betas where LCMScheduler needs them
    known = inspect.signature(LCMScheduler).parameters  # Unknown entries cause a warning at every loading
    config = {name: value for name, value in config.items() if name in known}
    config["prediction_type"] = "v_prediction" if prediction_type == "epsilon" else prediction_type
    return LCMScheduler(
        **config | {"original_inference_steps": solver_steps, "clip_sample": True, "thresholding": False}
    )


def is_few_step(scheduler: SchedulerMixin) -> bool:
    """Return whether a model with this scheduler is a few-step (consistency) model."""
    return isinstance(scheduler, LCMScheduler)


def is_compatible(name: str, scheduler: SchedulerMixin) -> bool:
    """Return whether the sampler of this name can draw from a model with this scheduler."""
    return (name == "lcm") == is_few_step(scheduler)
