"""Straight paths from images to normal noise: flow matching, its samplers, and what training needs besides.

    x_s = (1 - s) x_0 + s e,    s in [0, 1],    timestep = s T,    velocity dx_s/ds = e - x_0

Rectified flow, Liu et al. 2022, arXiv:2209.03003, and Lipman et al. 2022, arXiv:2210.02747: the path of
``linear_mix.LinearMixScheduler``, with normal instead of uniform noise. What is saved is diffusers'
``DPMSolverMultistepScheduler``, which a ``DDPMPipeline`` draws with.
"""

import math

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

from .. import UserError
from ..args import SOLVERS
from ..randomness import sample_noise
from .linear_mix import LinearMixScheduler
from .schedulers import predicted_images


class FlowScheduler(LinearMixScheduler):
    """The path, and Euler's method on it.

    Args:
        num_train_timesteps: T, the timestep of pure noise. Timesteps are real numbers in [0, T].
        prediction_type: what the model says, ``flow_prediction`` (the velocity) or ``sample`` (the clean image).
        flow_shift: of the steps that samples are drawn in, see ``shifted``.
    """

    noise_distribution = "normal"

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, prediction_type: str = "flow_prediction", flow_shift: float = 1.0
    ):
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose n steps from T to 0, equal but for the shift: ``timesteps`` is where each begins."""
        self.num_inference_steps = num_inference_steps
        levels = shifted(np.arange(num_inference_steps, -1, -1) / num_inference_steps, self.config.flow_shift)
        self._levels = torch.tensor(levels, dtype=torch.float32, device=device)
        self.timesteps = self._levels[:-1] * self.config.num_train_timesteps
        self._step = 0

    def step(self, model_output, timestep, sample) -> DDPMSchedulerOutput:
        """x + (s' - s) v, see ``LinearMixScheduler.step``."""
        images = predicted_images(self, model_output, sample, timestep)
        here, there = self._levels[self._step], self._levels[self._step + 1]
        self._step += 1
        prev_sample = images + there / here * (sample - images)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=images)


class HeunFlowScheduler(FlowScheduler):
    """Heun's method: a step of Euler's, and again with the mean of the velocities at both ends; the last is Euler's.

    n calls of the model make (n + 1) / 2 steps: it must be odd.
    """

    order = 2

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Choose (n + 1) / 2 steps; ``timesteps`` has an entry for each call of the model."""
        if num_inference_steps % 2 == 0:
            raise ValueError(f"{num_inference_steps} calls; Heun's method takes an odd number, two a step but the last")
        super().set_timesteps((num_inference_steps + 1) // 2, device)
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])
        self._before = None  # level, sample and velocity where a step began

    def step(self, model_output, timestep, sample) -> DDPMSchedulerOutput:
        """To the step's end, or, after a second call there, back and again."""
        images = predicted_images(self, model_output, sample, timestep)
        here = timestep / self.config.num_train_timesteps
        velocity = (sample - images) / here
        if self._before is None:
            there = self._levels[self._step + 1]
            self._step += 1
            prev_sample = sample + (there - here) * velocity
            self._before = (here, sample, velocity) if there > 0 else None
        else:
            begin, first, slope = self._before
            prev_sample, self._before = first + (here - begin) * (slope + velocity) / 2, None
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=images)


def make_sampler(name: str, flow: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that draws samples from a model trained on straight paths.

    Args:
        name: one of ``args.SOLVERS``. DPM-Solver++ of the first order is Euler's method here.
        flow: a ``FlowScheduler``, or what this function made of one.

    Raises:
        UserError: there is no such sampler for flows.
    """
    kept = ("num_train_timesteps", "prediction_type", "flow_shift")
    path = {key: flow.config[key] for key in kept}
    if name == "heun":
        return HeunFlowScheduler(**path)
    if name not in SOLVERS:
        raise UserError(f"--sampler {name}: the model was trained on straight paths; expected {', '.join(SOLVERS)}")
    return DPMSolverMultistepScheduler(
        **path, use_flow_sigmas=True, final_sigmas_type="zero", solver_order=1 if name == "euler" else 2
    )


def pipeline_scheduler(name: str, flow: SchedulerMixin) -> SchedulerMixin:
    """The scheduler to save in a ``DDPMPipeline``: the sampler, or the second order where it cannot call it (Heun)."""
    return make_sampler("dpmsolver++" if name == "heun" else name, flow)


def shifted(levels: np.ndarray | float, shift: float):
    """Noise levels in [0, 1], moved towards noise: a s / (1 + (a - 1) s); Esser et al. 2024, arXiv:2403.03206, Eq. 23.

    Larger images hide less behind the same noise, so that they need more of it.
    """
    return shift * levels / (1 + (shift - 1) * levels)


def flow_flags(args, size: tuple[int, int], pretrained=None) -> dict:
    """The flags of train_flow.py about the path, as parameters of a ``FlowScheduler``.

    Args:
        size: (H, W) of the images. By default the shift is 1 up to 64 pixels, then in proportion to the side.
        pretrained: a pipeline whose values count where the flags are not given.
    """
    known = {"prediction_type": "flow_prediction", "flow_shift": max(1.0, math.sqrt(size[0] * size[1]) / 64)}
    if pretrained:
        known = {name: pretrained.scheduler.config[name] for name in known}
    said = {"velocity": "flow_prediction", "sample": "sample", None: known["prediction_type"]}
    return {"prediction_type": said[args.prediction_type], "flow_shift": args.flow_shift or known["flow_shift"]}


def nearest_noise(images: torch.Tensor, seed: int, sample_ids: np.ndarray, candidates: int) -> torch.Tensor:
    """Of several normal noises for each sample the one nearest to its image: paths that cross less.

    The nearest-neighbour form of arXiv:2406.12303: unlike an assignment in a batch, it depends on the sample only.

    Args:
        images: (B, C, H, W), clean.
        sample_ids: (B,).
        candidates: noises to choose from, 1 or more.

    Returns:
        float32 (B, C, H, W).
    """
    nearest, least = None, None
    for k in range(candidates):
        noise = sample_noise(seed, f"noise {k}" if k else "noise", sample_ids, tuple(images.shape[1:]), images.device)
        distance = (noise - images).square().flatten(1).sum(1)
        if nearest is None:
            nearest, least = noise, distance
        else:
            nearest = torch.where((distance < least).view(-1, 1, 1, 1), noise, nearest)
            least = torch.minimum(distance, least)
    return nearest
