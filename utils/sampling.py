"""Sample grids, drawn by all processes, the same whatever their number and the batch size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import SchedulerMixin

from . import randomness
from .images import make_grid


@torch.no_grad()
def sample_images(
    model: torch.nn.Module,
    sampler: SchedulerMixin,
    accelerator,
    count: int,
    shape: tuple[int, int, int],
    num_inference_steps: int,
    batch_size: int,
    seed: int,
    stop: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """Draw images with every process taking its share. Call it on all processes.

    Image k depends on the seed and k, not on the batch it is drawn in (up to float rounding). The model is put in eval
    mode and back. No global random state is used.

    Args:
        model: called as ``model(noisy, timestep).sample``; prepared (so that it autocasts), but not the DDP wrapper.
        sampler: a diffusers scheduler.
        count: number of images.
        shape: (C, H, W) of one.
        num_inference_steps: model calls per image.
        batch_size: images at once on this process.
        stop: asked before every model call of a single process; True gives up.

    Returns:
        uint8 (count, C, H, W) on every process; None if stopped.
    """
    device, world = accelerator.device, accelerator.num_processes
    share = -(-count // world)
    mine = accelerator.process_index * share + np.arange(share)
    mode, images = model.training, []
    model.eval()
    try:
        for numbers in np.array_split(mine, -(-share // batch_size)):
            # As in DDPMPipeline, but in float32 outside the model, and each image from its own generator.
            sample = randomness.sample_noise(seed, "samples", numbers, shape, device)
            options = {}
            if "generator" in sampler.step.__code__.co_varnames:
                options["generator"] = randomness.sample_generators(seed, "sampler", numbers, device)
            sampler.set_timesteps(num_inference_steps, device=device)
            for timestep in sampler.timesteps:
                if world == 1 and stop():
                    return None
                model_output = model(sample, timestep).sample
                sample = sampler.step(model_output.float(), timestep, sample, **options).prev_sample
            images.append(sample)
    finally:
        model.train(mode)
    images = accelerator.gather(torch.cat(images))[:count]
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def save_grid(images: np.ndarray, path: Path, accelerator, step: int, name: str = "samples") -> None:
    """Write a grid as PNG and to the trackers, on the main process.

    Args:
        images: uint8 (N, C, H, W).
        path: of the PNG; its folder is made.
        step: optimizer steps done, the trackers' x-axis.
    """
    if not accelerator.is_main_process:
        return
    grid = make_grid(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    pixels = np.atleast_3d(np.asarray(grid))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [grid]}, step=step)
