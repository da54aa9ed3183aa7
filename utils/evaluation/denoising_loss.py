"""The denoising loss on fixed questions: on training images and on held-out ones, so that overfitting shows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from .. import UserError, randomness
from ..data.datasets import reading
from ..data.images import PreparedImages
from ..data.sources import ImageSource, load_source
from ..diffusion.sampling import evaluating
from ..diffusion.schedulers import output_for
from ..pictures import from_uint8
from ..training.curves import NOISE_LEVELS, noise_levels
from ..watchdog import progress


class DenoisingLoss:
    """Mean squared error on fixed (image, timestep, noise) triples: every measurement uses the same ones.

    Each image appears once in every range of timesteps. The processes share the work; call it on all of them.

    Args:
        images: (N, C, H, W) in [-1, 1], the same on every process.
        noise_scheduler: the one with which the model was trained: a ``DDPMScheduler``, or linear mixing.
        seed: of timesteps and noise.
        batch_size: triples at once, per process.
        labels: int64 (N,), the class of each image, of a model that is told it.
    """

    def __init__(self, images: torch.Tensor, noise_scheduler, seed: int, batch_size: int = 8, labels=None):
        self.images, self.noise_scheduler, self.seed, self.batch_size = images, noise_scheduler, seed, batch_size
        self.labels = labels

    @torch.no_grad()
    def measure(
        self, model: torch.nn.Module, accelerator, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """The mean loss as ``loss`` and that of each range of timesteps as ``0-249`` and so on.

        Nothing if ``stop``, which a single process asks before every batch, says so.
        """
        steps = self.noise_scheduler.config.num_train_timesteps
        distribution = getattr(self.noise_scheduler, "noise_distribution", "normal")
        numbers = np.arange(len(self.images) * NOISE_LEVELS)  # one id for each triple
        sums = torch.zeros(2, NOISE_LEVELS, device=accelerator.device)
        mine = numbers[accelerator.process_index :: accelerator.num_processes]
        with evaluating(model):
            for batch in np.array_split(mine, range(self.batch_size, len(mine), self.batch_size)):
                progress()
                if accelerator.num_processes == 1 and stop():
                    return {}
                levels = batch % NOISE_LEVELS
                fractions = (levels + randomness.uniform(self.seed, "validation timesteps", batch)) / NOISE_LEVELS
                timesteps = torch.from_numpy(fractions * steps)
                if isinstance(self.noise_scheduler, DDPMScheduler):
                    timesteps = timesteps.long()
                else:  # real numbers; where there is next to no noise, float32 cannot tell what it was
                    timesteps = timesteps.float().clamp(min=1)
                timesteps = timesteps.to(accelerator.device)
                clean_images = self.images[batch // NOISE_LEVELS].to(accelerator.device)
                shape = tuple(clean_images.shape[1:])
                noise = randomness.sample_noise(
                    self.seed, "validation noise", batch, shape, accelerator.device, distribution
                )
                noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)
                target = output_for(self.noise_scheduler, clean_images, noisy_images, timesteps.view(-1, 1, 1, 1))
                inputs = {}
                if self.labels is not None:
                    inputs["class_labels"] = self.labels[batch // NOISE_LEVELS].to(accelerator.device)
                output = model(noisy_images, timesteps, **inputs).sample.float()
                losses = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3))
                index = torch.from_numpy(levels).to(accelerator.device)
                sums[0].index_add_(0, index, losses)
                sums[1].index_add_(0, index, torch.ones_like(losses))
        totals, counts = accelerator.reduce(sums, "sum").cpu()
        means = totals / counts
        return {"loss": means.mean().item(), **dict(zip(noise_levels(steps), means.tolist(), strict=True))}


class Validation:
    """Curves of the denoising loss: on training images, held-out ones and, of an adapted model, those of its base.

    Args:
        args: the flags of a training script; without ``validation_split`` and ``prior_dataset_name`` there are only the
            training images.
        train_data: what the script trains on.
        noise_scheduler: with which it trains.
        conditional: the model is told the images' classes.

    Raises:
        UserError: a split cannot be loaded, or shares images with the training set.
    """

    def __init__(self, args, accelerator, train_data, noise_scheduler, conditional: bool = False):
        images = {"train": train_data.examples(args.num_validation_images, with_labels=True)}
        if args.validation_split:
            images["held_out"] = load_images(args, accelerator, train_data, "validation")
        if vars(args).get("prior_dataset_name"):
            images["prior"] = load_images(args, accelerator, train_data, "prior")
        self.accelerator, self.losses = accelerator, {}
        for name, (shown, labels) in images.items():
            labels = torch.from_numpy(labels).where(torch.from_numpy(labels) >= 0, len(train_data.label_names))
            labels = labels if conditional else None
            self.losses[name] = DenoisingLoss(shown, noise_scheduler, args.seed, labels=labels)

    def log(self, model: torch.nn.Module, step: int, stop: Callable[[], bool] = lambda: False, **values: float) -> None:
        """Measure, and write to the trackers, beside further values. Call it on all processes.

        Args:
            step: optimizer steps done.
            stop: see ``DenoisingLoss.measure``.
        """
        curves = {f"optimizer/{name}": value for name, value in values.items()}
        for name, denoising_loss in self.losses.items():
            for part, value in denoising_loss.measure(model, self.accelerator, stop).items():
                level = f"loss_by_timestep_validation/{name}_{part}"
                curves[f"loss/validation_{name}" if part == "loss" else level] = value
        self.accelerator.log(curves, step=step)


def load_images(args, accelerator, train_data, kind: str) -> tuple[torch.Tensor, np.ndarray]:
    """Images to validate with, shaped as the training images, float32 in [-1, 1]; and their labels, or -1.

    Args:
        kind: ``validation``, another split of the training data (``--validation_split``), or ``prior``, another data
            set (``--prior_dataset_name``, ``--prior_dataset_split``).

    Returns:
        ``--num_validation_images`` of them, or as many as there are.

    Raises:
        UserError: as ``load_source``; images that are trained on, too.
    """
    if kind == "prior":
        flags = {"name": "--prior_dataset_name", "split": "--prior_dataset_split"}
        source = ImageSource(args.prior_dataset_name, args.prior_dataset_split, flags=flags)
    else:
        trained_on = ImageSource.from_args(args)
        flags = {**trained_on.flags, "split": "--validation_split"}
        find = bool(train_data.label_names) and trained_on.label_column is None
        source = replace(trained_on, split=args.validation_split, max_samples=None, find_labels=find, flags=flags)
        check_disjoint(trained_on, source, accelerator)
    dataset, name = load_source(source, accelerator)
    images = PreparedImages(
        dataset, name, train_data.mode, train_data.size, image_range=train_data.image_range, **reading(args)
    )
    shown, labels = images.examples(args.num_validation_images, with_labels=True)
    if "label" in dataset.features:  # by name, for the classes of strings are those that occur in the split
        labels = labels_by_name(labels, dataset.features["label"].names, train_data.label_names)
    return from_uint8(shown), labels


def labels_by_name(labels: np.ndarray, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Labels (N,) of one split, whose classes are called ``names``, as numbers of the classes ``known``; -1: none."""
    return np.array([*(known.index(name) if name in known else -1 for name in names), -1])[labels]


def check_disjoint(trained_on: ImageSource, held_out: ImageSource, accelerator) -> None:
    """Refuse a held-out split that shares images with the training split of the same data set.

    Raises:
        UserError: says which.
    """
    pair = (trained_on, held_out)
    names = [source.split_names for source in pair]
    if not names[0] & names[1]:
        return
    ranges = []
    for source, wholes in zip(pair, names, strict=True):
        lengths = {}
        for whole in wholes:
            entire = replace(source, split=whole, label_column=None, max_samples=None)
            lengths[whole] = 1 if source.streaming else len(load_source(entire, accelerator)[0])
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
        left = source.max_samples or math.inf
        ranges.append([])
        for part in parts:
            ranges[-1].append((part.splitname, part.from_, min(part.to, part.from_ + left)))
            left -= part.to - part.from_
    pairs = [(first, second) for first in ranges[0] for second in ranges[1] if first[0] == second[0]]
    if any(max(first[1], second[1]) < min(first[2], second[2]) for first, second in pairs):
        raise UserError(
            f"{held_out.said('split')} shares images with {trained_on.said('split')}, so it would not be held out. "
            f"Take parts that do not overlap, such as {trained_on.flags['split']} 'train[:90%]' and "
            f"{held_out.flags['split']} 'train[90%:]'"
        )
