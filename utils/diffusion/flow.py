"""Flow matching on straight paths from images to normal noise: scheduler, samplers, and choice of the path.

    x_s = (1 - s) x_0 + s e,    s in [0, 1],    timestep = s T,    velocity dx_s/ds = e - x_0

Rectified flow, Liu et al. 2022, arXiv:2209.03003, and Lipman et al. 2022, arXiv:2210.02747: the path of
``linear_mix.LinearMixScheduler``, with normal instead of uniform noise. Models are saved with diffusers'
``DPMSolverMultistepScheduler``, so that a ``DDPMPipeline`` can draw from them.
"""

import math

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from .. import UserError
from ..args import SOLVERS
from .linear_mix import LinearMixScheduler
from .schedulers import predicted_images


class FlowScheduler(LinearMixScheduler):
    """A straight path, with Euler's method as its sampler.

    Args:
        num_train_timesteps: T, the timestep of pure noise. Timesteps are real numbers in [0, T].
        prediction_type: output of the model, ``flow_prediction`` (the velocity) or ``sample`` (the clean image).
        flow_shift: shift of the sampling steps towards noise, see ``shifted``.
    """

    noise_distribution = "normal"

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, prediction_type: str = "flow_prediction", flow_shift: float = 1.0
    ):
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose n steps from T to 0, equal except for the shift. ``timesteps`` holds the start of each."""
        self.num_inference_steps = num_inference_steps
        levels = shifted(np.arange(num_inference_steps, -1, -1) / num_inference_steps, self.config.flow_shift)
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self.timesteps = self._levels[:-1] * self.config.num_train_timesteps
        self._step = 0

    def step(self, model_output, timestep, sample) -> DDPMSchedulerOutput:
        """Return the sample after one Euler step, x + (s' - s) v, see ``LinearMixScheduler.step``."""
        images = predicted_images(self, model_output, sample, timestep)
        here, there = self._levels[self._step], self._levels[self._step + 1]
        self._step += 1
        prev_sample = images + there / here * (sample - images)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=images)


def make_sampler(name: str, flow: SchedulerMixin) -> SchedulerMixin:
    """Return the scheduler that draws samples from a model trained on straight paths.

    Args:
        name: one of ``args.SOLVERS``. On these paths DPM-Solver++ of the first order is Euler's method.
        flow: ``FlowScheduler``, or a scheduler that this function returned.

    Raises:
        UserError: there is no such sampler for flows.
    """
    kept = ("num_train_timesteps", "prediction_type", "flow_shift")
    path = {key: flow.config[key] for key in kept}
    if name not in SOLVERS:
        raise UserError(f"--sampler {name}: the model was trained on straight paths. Expected {', '.join(SOLVERS)}")
    return DPMSolverMultistepScheduler(
        **path, use_flow_sigmas=True, final_sigmas_type="zero", solver_order=1 if name == "euler" else 2
    )


def shifted(levels: np.ndarray | float, shift: float):
    """Return noise levels shifted towards noise, a s / (1 + (a - 1) s).

    Esser et al. 2024, arXiv:2403.03206, Eq. 23. The same noise hides less of a larger image, which therefore needs
    higher noise levels.

    Args:
        levels: s, noise levels in [0, 1].
        shift: a, 1 for no shift.
    """
    return shift * levels / (1 + (shift - 1) * levels)


def make_flow(
    prediction_type: str | None, flow_shift: float | None, size: tuple[int, int], pretrained=None
) -> FlowScheduler:  # fmt: skip
    """Make the scheduler that the flags of train_flow.py ask for.

    Args:
        prediction_type: ``velocity`` or ``sample``. None takes that of ``pretrained``, or else the velocity.
        flow_shift: shift of the sampling steps, see ``shifted``. None takes that of ``pretrained``, or else 1 up to
            64 pixels and the side / 64 above.
        size: (H, W) of the images.
        pretrained: pipeline that training starts from, or None.
    """
    known = {"prediction_type": "flow_prediction", "flow_shift": max(1.0, math.sqrt(size[0] * size[1]) / 64)}
    if pretrained:
        known = {name: pretrained.scheduler.config[name] for name in known}
    given = {"velocity": "flow_prediction", "sample": "sample", None: known["prediction_type"]}
    return FlowScheduler(prediction_type=given[prediction_type], flow_shift=flow_shift or known["flow_shift"])
