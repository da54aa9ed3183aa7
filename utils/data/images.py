"""The images of a data set by their row: where each is, and how it becomes one to train on."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image

from .. import UserError, randomness
from .pixels import GREY_MODES, BadImage, augment, decode_image, from_values, prepare_image, to_eight_bits, used_range

logger = logging.getLogger(__name__)

INSPECTED = 64  # images that are looked at to find out what a data set is like


def label_of(row: dict) -> int:
    """The class of a row; -1 where it has none."""
    return -1 if row.get("label") is None else row["label"]


def locate(row: dict, source: str, index: int) -> tuple[bytes | str | Image.Image, str]:
    """Bytes or path of a row's image, or the image itself, and its name for messages.

    Args:
        row: its ``image`` is {bytes, path}, bytes, a path (also relative to the table that is ``source``), an array,
            or a function that makes the image, see ``own_images.OwnImages``.
    """
    record, where = row["image"], f"image {index} of {source}"
    if callable(record):
        return record(), where
    if isinstance(record, (list, np.ndarray)):
        try:
            return from_values(np.asarray(record), where), where
        except ValueError as error:  # rows of different lengths
            raise BadImage(f"{where}: {error}. Expected an array (H, W), (H, W, 3) or (3, H, W)") from error
    if not isinstance(record, dict):
        record = {"bytes": None, "path": record} if isinstance(record, str) else {"bytes": record or b"", "path": None}
    file, content = record.get("path"), record.get("bytes")
    if file:
        where = f"{file} ({where})"
    if content is not None or file is None:
        return content or b"", where
    if "://" in file:  # streamed from the Hub, or inside an archive
        try:
            with xopen(file, "rb") as stream:
                return stream.read(), where
        except Exception as error:  # whatever the file system behind it raises
            raise BadImage(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
    return find_file(file, source), where


def find_file(file: str, source: str) -> str:
    """A path in the table ``source``, which may be relative to it, or to the folder that we are in."""
    beside = Path(source).expanduser().parent / file
    return str(beside) if beside.exists() else file


def spread_over(length: int) -> list[int]:
    """The indices of the images that are looked at, of so many."""
    return sorted({int(index) for index in np.linspace(0, length - 1, INSPECTED)})


def choose_range(text: str, deep: Sequence[tuple[str, np.ndarray]], say: bool = True) -> tuple[float, float] | None:
    """The values that become black and white by ``--image_range``, None for the format's.

    Args:
        deep: of the images looked at, see ``pixels.deep_values``.
    """
    if text not in ("auto", "full"):
        low, high = text.split(",")
        return float(low), float(high)
    used = used_range(deep) if text == "auto" else None
    if used and used != (0, 255) and say:
        said = f"{used[0]:g},{used[1]:g}"
        logger.warning(
            f"The images have more than 8 bits and values from {used[0]:g} to {used[1]:g}: these become black and "
            f"white. --image_range {said} says so; --image_range full takes the range of their format"
        )
    return used


class PreparedImages(torch.utils.data.Dataset):
    """Decoded and prepared images by row. Knows nothing of processes, so that it travels to workers.

    Args:
        dataset: rows with ``image``, not decoded, and perhaps ``label``; a stream has no length.
        name: of the data set, for messages.
        mode: ``L`` or ``RGB``.
        size: (H, W), pixels.
        interpolation: see ``FILTERS``.
        center_crop: cut the middle out of images of another shape, instead of a random part.
        random_flip: mirror half of the images.
        seed: of crops, flips and the choice of ``examples``.
        max_bad_images: unreadable images to pass over; None: the first one is an error.
        advice: what the user can do about an unreadable image, for the error.
        refuse_colour: whether an image that is not grey is an error.
        image_range: see ``to_eight_bits``.
        shuffle_buffer_size: rows of a stream that ``examples`` are chosen from.
    """

    def __init__(
        self, dataset, name: str, mode: str, size: tuple[int, int], interpolation: str = "bicubic",
        center_crop: bool = False, random_flip: bool = False, seed: int = 0, max_bad_images: int | None = None,
        advice: str = "", refuse_colour: bool = False, image_range: tuple[float, float] | None = None,
        shuffle_buffer_size: int = 10_000,
    ):  # fmt: skip
        self.dataset, self.name, self.mode, self.size, self.seed = dataset, name, mode, size, seed
        self.interpolation, self.center_crop, self.random_flip = interpolation, center_crop, random_flip
        self.max_bad_images, self.advice, self.refuse_colour = max_bad_images, advice, refuse_colour
        self.image_range, self.clipped, self.shuffle_buffer_size = image_range, 0, shuffle_buffer_size

    def examples(self, count: int, with_labels: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Some of the images, cut in the middle: uint8 (N, C, H, W); with their labels, int64 (N,), if asked for.

        The same ones on every process, at random, of a stream from its shuffle buffer; all if there are fewer.
        Bad images are left out if they may be passed over.

        Raises:
            BadImage: one cannot be read.
        """
        if hasattr(self.dataset, "__len__"):
            drawn = np.arange(min(count, len(self.dataset)))
            indices = randomness.shuffled_indices(self.seed, drawn, len(self.dataset)).tolist()
            rows = ((index, self.dataset[index]) for index in indices)
        else:
            shuffled = self.dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer_size)  # it may be sorted
            rows = enumerate(shuffled.take(count))
        images, labels = [], []
        for index, row in rows:
            try:
                images.append(self.prepared(row, index, center_crop=True))
                labels.append(label_of(row))
            except BadImage as error:
                if self.max_bad_images is None:
                    self.check(1, error)
        if not images:
            raise UserError(f"{self.name}: no readable image found; expected a data set of images")
        return (np.stack(images), np.array(labels)) if with_labels else np.stack(images)

    def prepared(self, row: dict, index: int, center_crop: bool = False) -> np.ndarray:
        """uint8 (C, H, W), of this size at least, and exactly if it is cropped."""
        source, where = locate(row, self.name, index)
        image = decode_image(source, where)
        if self.refuse_colour and image.mode not in GREY_MODES:
            raise UserError(
                f"{where} has colour (mode {image.mode}), but the images looked at before training were all grey. "
                "Choose with --image_mode L or --image_mode RGB"
            )
        image = to_eight_bits(image, self.mode, where, self.image_range, self._count_clipped)
        return prepare_image(image, self.size, self.interpolation, center_crop or self.center_crop)

    def _count_clipped(self, message: str) -> None:
        self.clipped += 1
        if self.clipped in (1, 10, 100) or self.clipped % 1000 == 0:
            logger.warning(f"clipped in {self.clipped} images read so far; {message}")

    def attempt(self, job: tuple[dict, int]) -> np.ndarray | BadImage:
        """``prepared`` for a pool of threads: a bad image is returned as the error that names it."""
        try:
            return self.prepared(*job)
        except BadImage as error:
            return error

    def too_many(self, bad: int) -> bool:
        """Whether so many unreadable images are more than may be passed over."""
        return bad > (self.max_bad_images or 0)

    def check(self, bad: int, problem: BadImage | str) -> None:
        """Log the latest of so many unreadable images; raise UserError if they are more than may be passed over."""
        if self.max_bad_images is None:
            raise BadImage(f"{problem}. {self.advice}" if self.advice else str(problem))
        logger.warning(f"skipped ({bad} so far): {problem}")
        if self.too_many(bad):
            raise UserError(
                f"more than --max_bad_images {self.max_bad_images} images are unreadable; the lines above name them. "
                "Repair or remove the files, or raise the limit"
            )

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """The image at an index, cropped and flipped for a sample id; instead of a bad one the next good one."""
        index, sample_id = key
        bad = []
        for candidate in range(index, index + len(self.dataset)):
            candidate %= len(self.dataset)
            row = self.dataset[candidate]
            try:
                image = augment(self.prepared(row, candidate), sample_id, self.size, self.seed, self.random_flip)
                return {"image": image, "label": label_of(row), "sample_id": sample_id, "bad": bad}
            except BadImage as error:
                bad.append((candidate, str(error)))
                if self.too_many(len(bad)):  # the main process raises the error
                    blank = np.zeros((len(self.mode), *self.size), np.uint8)
                    return {"image": blank, "label": 0, "sample_id": sample_id, "bad": bad}
        raise UserError(f"{self.name} has no readable image")
