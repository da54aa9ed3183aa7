"""The denoising loss with fixed noise and timesteps: on training and held-out images, to detect overfitting."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from .. import randomness
from ..diffusion.sampling import cycle_rows, evaluating
from ..diffusion.schedulers import NOISE_LEVELS, noise_levels, output_for
from ..signals import Interrupted, progress


class DenoisingLoss:
    """Mean squared error on fixed (image, timestep, noise) triples: every measurement uses the same ones.

    Each image appears once in every range of timesteps. The processes share the work, so call it on all of them.

    Args:
        images: images or latents in the model's space, (N, C, H, W), the same on every process.
        noise_scheduler: scheduler that the model was trained with: a ``DDPMScheduler``, or linear mixing.
        seed: seed of timesteps and noise.
        batch_size: number of triples at once, per process.
        inputs: further inputs of the model for each image, by name: class labels (N,), a condition (N, ...).
    """

    def __init__(
        self, images: torch.Tensor, noise_scheduler, seed: int, inputs: dict[str, torch.Tensor] | None = None,
        batch_size: int = 8,
    ):  # fmt: skip
        self.images, self.noise_scheduler, self.seed, self.batch_size = images, noise_scheduler, seed, batch_size
        self.inputs = inputs or {}

    @torch.no_grad()
    def measure(
        self, model: torch.nn.Module, accelerator, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Return the mean loss as ``loss``, and the loss of each range of timesteps as ``0-249`` and so on.

        Args:
            stop: function that is called before every batch; True interrupts the measurement.

        Raises:
            Interrupted: ``stop`` returned True.
        """
        steps = self.noise_scheduler.config.num_train_timesteps
        distribution = getattr(self.noise_scheduler, "noise_distribution", "normal")
        numbers = np.arange(len(self.images) * NOISE_LEVELS)  # one id for each triple
        sums = torch.zeros(2, NOISE_LEVELS, device=accelerator.device)
        mine = numbers[accelerator.process_index :: accelerator.num_processes]
        inputs = cycle_rows(self.inputs, accelerator.device)
        with evaluating(model):
            for batch in np.array_split(mine, range(self.batch_size, len(mine), self.batch_size)):
                progress("evaluation")
                if stop():
                    raise Interrupted
                levels = batch % NOISE_LEVELS
                fractions = (levels + randomness.uniform(self.seed, "validation timesteps", batch)) / NOISE_LEVELS
                timesteps = torch.from_numpy(fractions * steps)
                if isinstance(self.noise_scheduler, DDPMScheduler):
                    timesteps = timesteps.long()
                else:  # timesteps are real numbers; below timestep 1, float32 cannot recover the noise
                    timesteps = timesteps.float().clamp(min=1)
                timesteps = timesteps.to(accelerator.device)
                clean_images = self.images[batch // NOISE_LEVELS].to(accelerator.device)
                shape = tuple(clean_images.shape[1:])
                noise = randomness.sample_noise(
                    self.seed, "validation noise", batch, shape, accelerator.device, distribution
                )
                noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)
                target = output_for(self.noise_scheduler, clean_images, noisy_images, timesteps.view(-1, 1, 1, 1))
                output = model(noisy_images, timesteps, **inputs(batch // NOISE_LEVELS)).sample.float()
                losses = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
                index = torch.from_numpy(levels).to(accelerator.device)
                sums[0].index_add_(0, index, losses)
                sums[1].index_add_(0, index, torch.ones_like(losses))
        totals, counts = accelerator.reduce(sums, "sum").cpu()
        means = totals / counts
        return {"loss": means.mean().item(), **dict(zip(noise_levels(steps), means.tolist(), strict=True))}
