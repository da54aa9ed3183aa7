"""Comparison of samples that were drawn from inputs with the true images of these inputs."""

import hashlib
import logging
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from .. import UserError
from ..data.columns import Column
from ..diffusion.conditions import COLUMN, PAIRED, Condition
from ..pictures import from_uint8, to_uint8
from .reconstruction import similarity
from .reference import Preparation, Reference

logger = logging.getLogger(__name__)

REPEATS = 8  # samples of an input, for the mean of samples
MEAN_INPUTS = 256  # inputs with that many samples
MAX_BYTES = 2**31  # of true images and pictures in memory


class Restoration:
    """Held-out images, the inputs that belong to them, and the distance of samples from the images.

    Sample k < N has input k modulo M, the number of inputs. The samples from N on are further samples of the first
    inputs, for the mean of several samples of each.

    Args:
        reference: real images.
        condition: condition of the model.
        preparation: preparation of the images.
        count: number of samples that are compared as a set, N.
        columns: column ``condition`` of the data, for pairs.

    Attributes:
        total: number of samples to draw.
        digest: hash of images and inputs.

    Raises:
        UserError: nothing is held out, or the pairs are missing.
    """

    def __init__(
        self, reference: Reference, condition: Condition, preparation: Preparation, count: int,
        columns: dict[str, Column],
    ):  # fmt: skip
        self.condition, self.count = condition, count
        self.check(reference, condition, columns)
        split, blocks, size = reference.held_out_split, [], 0
        found = reference.blocks(preparation, count, split, columns)
        for stacked, indices, _ in found:
            blocks.append((stacked, indices))
            if (size := size + stacked.nbytes) > MAX_BYTES:
                number = sum(len(block[1]) for block in blocks)
                logger.warning(
                    f"Only the first {number} held-out images are used, to limit their memory to about 2 GiB"
                )
                break
        stacked, self.indices = (np.concatenate(part) for part in zip(*blocks, strict=True))
        self.true, self.paired = np.split(stacked, [preparation.shape[0]], axis=1)
        self.mean_count = min(len(self.true), MEAN_INPUTS, count)
        self.total = count + (REPEATS - 1) * self.mean_count
        content = hashlib.sha256(condition.kind.encode())
        for array in (self.true, self.paired, self.indices):
            content.update(np.ascontiguousarray(array))
        self.digest = content.hexdigest()[:16]

    @staticmethod
    def check(reference: Reference, condition: Condition, columns: dict[str, Column]) -> None:
        """Refuse a reference without the inputs that a model needs, before anything is drawn."""
        if condition.kind == PAIRED and not columns:
            raise UserError(
                "the model was trained on pairs. Give --condition_dir or --condition_column, the inputs of the "
                "held-out images"
            )
        if not reference.held_out_split:
            raise UserError("no images are held out to make inputs from. Name some with --held_out_split")

    def numbers(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the index of each sample's input."""
        further = np.maximum(sample_ids - self.count, 0) % self.mean_count
        return np.where(sample_ids < self.count, sample_ids % len(self.true), further)

    def model_inputs(self, sample_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the inputs of samples, see ``sampling.sample_batch``."""
        chosen = self.numbers(np.asarray(sample_ids))
        batch = {"images": from_uint8(self.true[chosen]), "sample_ids": self.indices[chosen]}
        if self.condition.kind == PAIRED:
            batch[COLUMN] = from_uint8(self.paired[chosen])
        return self.condition.model_inputs(batch)

    def guesses(self) -> Iterator[np.ndarray]:
        """Yield the best guess without a model for each of N samples: the first channels of its input."""
        for ids in np.array_split(np.arange(self.count), -(-self.count // 250)):
            yield to_uint8(self.model_inputs(ids)["condition"][:, : self.condition.image_channels])

    def measured(self, blocks: Iterable[np.ndarray], scores: dict, means: bool = True) -> Iterator[np.ndarray]:
        """Yield the first N of these samples, and add the distance from the true images to ``scores`` at the end.

        Args:
            blocks: samples in order, uint8 (B, C, H, W): N of them, or ``total``.
            scores: dictionary to add means over images to: ``psnr`` in dB, ``ssim`` from 11 pixels on, and ``detail``,
                the energy of fine structure as a share of that of the true images. If there are further samples,
                ``psnr_mean8`` and ``ssim_mean8`` are those of the mean of eight samples of an input, and ``spread`` is
                the standard deviation of a pixel between them, in grey levels.
            means: whether there are further samples.
        """
        single, position, energies = [], 0, np.zeros(2)
        shape = (2, self.mean_count * means, *self.true.shape[1:])
        sums = np.zeros(shape, np.float32)  # float32 holds the sums of eight squares of 8 bits exactly
        for block in blocks:
            ids = position + np.arange(len(block))
            if self.condition.kind == "inpaint":
                block = self.condition.keep_known(block, self.model_inputs(ids)["condition"])
            position += len(block)
            numbers, head = self.numbers(ids), block[ids < self.count]
            true = self.true[numbers[: len(head)]]
            single += list(map(similarity, head, true))
            energies += [_fine_energy(head), _fine_energy(true)]
            for image, k, number in zip(block, numbers, ids, strict=True):
                if means and (number >= self.count or number < self.mean_count):
                    sums[:, k] += image, np.square(image, dtype=np.float32)
            if len(head):
                yield head
        if not single:  # only the main process has samples
            return
        scores |= _mean(single) | {"detail": float(energies[0] / max(energies[1], 1e-9))}
        if means:
            average, squares = sums / REPEATS
            scores["spread"] = float(np.sqrt(np.maximum(squares - average**2, 0).mean() * REPEATS / (REPEATS - 1)))
            average = np.rint(average).astype(np.uint8)
            found = _mean([similarity(image, true) for image, true in zip(average, self.true, strict=False)])
            scores |= {f"{name}_mean{REPEATS}": value for name, value in found.items()}


def _fine_energy(images: np.ndarray) -> float:
    """Return the energy of images (B, C, H, W) at more than half of the highest frequency, summed over all."""
    spectrum = np.fft.fft2(images.astype(np.float32) / 255, norm="ortho")
    frequencies = [np.abs(np.fft.fftfreq(side)) for side in images.shape[2:]]
    fine = np.maximum(frequencies[0][:, None], frequencies[1]) > 0.25  # the highest frequency is 0.5 periods per pixel
    return float((np.abs(spectrum) ** 2)[..., fine].sum())


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([entry[name] for entry in found])) for name in (found[0] if found else ())}
