"""Images, from bytes to uint8 arrays of the training size: one at a time, and those of a data set by their row.

Pillow's ``convert`` turns 16-bit images white and float images black without a word, drops alpha and with it uncovers
what transparent pixels hide. Here ranges are scaled, alpha is laid over white and EXIF rotation is applied.
"""

import io
import logging
import os

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps

from .. import UserError, randomness

logger = logging.getLogger(__name__)

FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "box", "nearest")}
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class BadImage(UserError):
    """An image that cannot be used; the message names it."""


def decode_image(source: bytes | str | Image.Image, name: str) -> Image.Image:
    """Open, fully load and upright an image.

    Args:
        source: the file's bytes, or its path; an image that is open already is returned as it is.
        name: what to call it in errors (a path, or a row of a data set).

    Returns:
        The first frame, in the mode of the file, rotated as its EXIF orientation says.

    Raises:
        BadImage: empty, truncated, not an image, or over Pillow's limit of 89 megapixels.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # where Pillow only warns
            raise Image.DecompressionBombError
        image.load()
        return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise BadImage(f"{name}: more than {limit}, which is taken for an attack; shrink the file") from error
    except Exception as error:  # Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ValueError ...
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source) if os.path.exists(source) else None
        if size == 0:
            reason = "the file is empty"
        else:  # Pillow names the memory buffer, which helps nobody
            reason = str(error).split(" <_io")[0].split(" '")[0] or type(error).__name__
        raise BadImage(f"{name}: {reason}. Expected a complete image file that Pillow reads") from error


def to_eight_bits(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Convert to 8 bits per channel by the range of the file's format.

    Args:
        image: in any Pillow mode. 16-bit values are divided by 257; mode ``I`` counts as 16 bits if it fits, else as
            31; float values are taken as [0, 1], or as [0, 255] where one exceeds 1.
        mode: ``L`` or ``RGB``, the mode of the result.
        name: what to call the image in errors.

    Raises:
        BadImage: float values that are not finite, negative or above 255; negative integers.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        if image.mode == "F":
            limit, scale, expected = (255, 255 if high <= 1 else 1, "floats in [0, 1] or [0, 255]")
        else:
            limit = 65535 if high <= 65535 else 2**31 - 1
            scale, expected = 255 / limit, "integers from 0 up"
        if not (low >= 0 and high <= limit):  # also refuses NaN
            raise BadImage(f"{name}: values from {low:g} to {high:g}; expected {expected}. Rescale the file")
        image = Image.fromarray(np.rint(values * scale).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def prepare_image(image: Image.Image, resolution: int, interpolation: str, center_crop: bool) -> np.ndarray:
    """Resize the shorter side to ``resolution`` pixels; crop the middle, or leave the longer side for a random crop.

    Returns:
        uint8 (C, H, W) with min(H, W) == resolution.
    """
    shorter = min(image.size)
    size = tuple(max(resolution, round(side * resolution / shorter)) for side in image.size)
    if image.size != size:
        image = image.resize(size, FILTERS[interpolation], reducing_gap=3.0)
    if center_crop:
        left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
        image = image.crop((left, top, left + resolution, top + resolution))
    array = np.array(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def augment(image: np.ndarray, sample_id: int, seed: int, random_flip: bool) -> np.ndarray:
    """Random crop to a square and, with ``random_flip``, a mirroring; a function of (seed, sample id).

    Args:
        image: uint8 (C, H, W).
        sample_id: of the sample that the image is for.

    Returns:
        uint8 (C, S, S) with S = min(H, W); may share memory with ``image``.
    """
    size = min(image.shape[1:])
    top, left = 0, 0
    if image.shape[1] != image.shape[2]:
        room = max(image.shape[1:]) - size
        offset = int(randomness.uniform(seed, "crop", np.array(sample_id)) * (room + 1))
        top, left = (offset, 0) if image.shape[1] > image.shape[2] else (0, offset)
    image = image[:, top : top + size, left : left + size]
    if random_flip and flips(seed, np.array(sample_id)):
        image = image[:, :, ::-1]
    return np.ascontiguousarray(image)


def flips(seed: int, sample_ids: np.ndarray) -> np.ndarray:
    """Whether each sample is mirrored: bool, the shape of ``sample_ids``."""
    return randomness.uniform(seed, "flip", sample_ids) < 0.5


def label_of(row: dict) -> int:
    """The class of a row; -1 where it has none."""
    return -1 if row.get("label") is None else row["label"]


def locate(row: dict, source: str, index: int) -> tuple[bytes | str | Image.Image, str]:
    """Bytes or path of a row's image, or the image itself, and its name for messages."""
    where = f"image {index} of {source}"
    if callable(row["image"]):  # see ``own_images.OwnImages``
        return row["image"](), where
    record = row["image"] or {"bytes": b"", "path": None}
    if record["path"]:
        where = f"{record['path']} ({where})"
    source = record["path"] if record["bytes"] is None else record["bytes"]
    if isinstance(source, str) and "://" in source:  # streamed from the Hub, or inside an archive
        try:
            with xopen(source, "rb") as stream:
                source = stream.read()
        except Exception as error:  # whatever the file system behind it raises
            raise BadImage(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
    return source, where


class PreparedImages(torch.utils.data.Dataset):
    """Decoded and prepared images by row. Knows nothing of processes, so that it travels to workers.

    Args:
        dataset: rows with ``image``, not decoded, and perhaps ``label``; a stream has no length.
        name: of the data set, for messages.
        mode: ``L`` or ``RGB``.
        resolution: of the shorter side, pixels.
        interpolation: see ``FILTERS``.
        center_crop: cut the middle out of images that are not square, instead of a random part.
        random_flip: mirror half of the images.
        seed: of crops, flips and the choice of ``examples``.
        max_bad_images: unreadable images to pass over; None: the first one is an error.
        advice: what the user can do about an unreadable image, for the error.
        refuse_colour: whether an image that is not grey is an error.
    """

    def __init__(
        self, dataset, name: str, mode: str, resolution: int, interpolation: str = "bicubic", center_crop: bool = False,
        random_flip: bool = False, seed: int = 0, max_bad_images: int | None = None, advice: str = "",
        refuse_colour: bool = False,
    ):  # fmt: skip
        self.dataset, self.name, self.mode, self.resolution = dataset, name, mode, resolution
        self.interpolation, self.center_crop, self.random_flip, self.seed = (
            interpolation,
            center_crop,
            random_flip,
            seed,
        )
        self.max_bad_images, self.advice, self.refuse_colour = max_bad_images, advice, refuse_colour

    def examples(self, count: int, with_labels: bool = False) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Some of the images, cut in the middle: uint8 (N, C, H, W); with their labels, int64 (N,), if asked for.

        The same ones on every process: of a stream the first, otherwise ``count`` at random, or all if there are fewer.
        Bad images are left out if they may be passed over.

        Raises:
            BadImage: one cannot be read.
        """
        if hasattr(self.dataset, "__len__"):
            drawn = np.arange(min(count, len(self.dataset)))
            indices = randomness.shuffled_indices(self.seed, drawn, len(self.dataset)).tolist()
            rows = ((index, self.dataset[index]) for index in indices)
        else:
            rows = enumerate(self.dataset.take(count))
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
        """uint8 (C, H, W), the shorter side at the training resolution, the longer one too if it is cropped."""
        source, where = locate(row, self.name, index)
        image = decode_image(source, where)
        if self.refuse_colour and image.mode not in GREY_MODES:
            raise UserError(
                f"{where} has colour (mode {image.mode}), but the images looked at before training were all grey. "
                "Choose with --image_mode L or --image_mode RGB"
            )
        image = to_eight_bits(image, self.mode, where)
        return prepare_image(image, self.resolution, self.interpolation, center_crop or self.center_crop)

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
                image = augment(self.prepared(row, candidate), sample_id, self.seed, self.random_flip)
                return {"image": image, "label": label_of(row), "sample_id": sample_id, "bad": bad}
            except BadImage as error:
                bad.append((candidate, str(error)))
                if self.too_many(len(bad)):  # the main process raises the error
                    blank = np.zeros((len(self.mode), self.resolution, self.resolution), np.uint8)
                    return {"image": blank, "label": 0, "sample_id": sample_id, "bad": bad}
        raise UserError(f"{self.name} has no readable image")
