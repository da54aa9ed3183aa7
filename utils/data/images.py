"""The images of a source by row, prepared for training: uint8 (C, H, W).

The channels of a row's second images and masks follow those of its image, so that they are cropped, flipped and cached
with it.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image

from .. import UserError, counted
from .columns import Layout
from .own_images import Images, label_of
from .pixels import GREY_MODES, BadImage, all_crops, augment, float_range, prepare_image, to_eight_bits, used_range

logger = logging.getLogger(__name__)

CHUNK = 250  # images in a block
PARTS_LIMIT = 2**28  # bytes of crops among which copies are searched for


def given_range(text: str) -> tuple[float, float] | None:
    """Return the values that become black and white by ``--image_range``, or None for full and auto."""
    return None if text in ("auto", "full") else tuple(map(float, text.split(",")))


def choose_range(text: str, probed: Sequence[tuple[str, np.ndarray]], say: bool = True) -> tuple[float, float] | None:
    """Return the values that become black and white by ``--image_range``, or None for the range of the format.

    Args:
        probed: modes and values of some images, see ``pixels.high_bit_values``.
    """
    if given := given_range(text):
        return given
    used = used_range(probed) if text == "auto" else None
    if used and used != (0, 255) and say:
        given = f"{used[0]:g},{used[1]:g}"
        logger.warning(
            f"The images have more than 8 bits per value. {used[0]:g} becomes black and {used[1]:g} white. "
            f"--image_range {given} does the same. --image_range full uses the range of their format"
        )
    return used or float_range(probed)  # one image alone does not determine the range of floats


class PreparedImages(torch.utils.data.Dataset):
    """Decoded and prepared images by row. It has no accelerator, so that it can be pickled for workers.

    Args:
        images: source of the images.
        mode: ``L`` or ``RGB``.
        size: (H, W), pixels.
        center_crop: True to crop the middle of images of another aspect ratio, instead of a random part.
        random_flip: True to mirror half of the images.
        seed: seed of crops, flips and the choice of ``examples``.
        refuse_colour: True to treat an image that is not grey as an error.
        image_range: values that become black and white, see ``pixels.to_eight_bits``.
        layout: layout of the columns of ``images``. By default the columns are omitted.
    """

    def __init__(
        self, images: Images, mode: str, size: tuple[int, int], center_crop: bool = False, random_flip: bool = False,
        seed: int = 0, refuse_colour: bool = False, image_range: tuple[float, float] | None = None,
        layout: Layout | None = None,
    ):  # fmt: skip
        self.images, self.mode, self.size, self.seed = images, mode, size, seed
        self.center_crop, self.random_flip, self.refuse_colour = center_crop, random_flip, refuse_colour
        self.image_range, self.clipped = image_range, 0
        self.layout = layout or Layout({}, [])
        self.channels = len(mode) + sum(self.layout.channels.values())

    def examples(self, count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return random images, cropped in the middle, uint8 (N, C, H, W), and their values, see ``values``.

        They are the same on every process. If there are fewer than ``count``, all are returned. Those of a stream come
        from its shuffle buffer. Bad images are omitted if they may be skipped.

        Raises:
            BadImage: an image cannot be read.
        """
        found = [(image, values) for _, image, values in self._chosen(count, center_crop=True)]
        if not found:
            raise UserError(f"{self.images.name}: no readable image found. Expected a data set of images")
        images, values = zip(*found, strict=True)
        return np.stack(images), {name: np.array([entry[name] for entry in values]) for name in values[0]}

    def _chosen(self, count: int, center_crop: bool) -> Iterator[tuple[int, np.ndarray, dict]]:
        """Yield index, image and values of random rows, the same on every process. Bad rows are skipped if allowed."""
        rows = iter(self.images.examples(count, self.seed))
        with ThreadPoolExecutor() as pool:
            while chunk := list(itertools.islice(rows, CHUNK)):
                attempt = partial(self.attempt, center_crop=center_crop)
                for (index, _), found in zip(chunk, pool.map(attempt, [row for _, row in chunk]), strict=True):
                    if not isinstance(found, BadImage):
                        yield index, *found
                    elif not self.images.max_bad_images:
                        self.check(1, found)

    def shown(self, count: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield random images as training shows them, cropped and mirrored at random, in blocks.

        Yields:
            Images uint8 (B, C, H, W), their indices (B,), and their labels (B,), -1 for none.
        """
        chosen = self._chosen(count, center_crop=False)
        while block := list(itertools.islice(chosen, CHUNK)):
            images = [augment(image, index, self.size, self.seed, self.random_flip) for index, image, _ in block]
            indices, labels = zip(*((index, values["label"]) for index, _, values in block), strict=True)
            yield np.stack(images), np.array(indices), np.array(labels)

    def crops(self, count: int, most: int) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the possible training crops of random images: uint8 (P, C, H, W), with the image's index.

        Args:
            count: number of images.
            most: maximum number of crop positions in an image, evenly spaced. With ``random_flip`` each crop is also
                yielded mirrored.
        """
        for index, image, _ in self._chosen(count, center_crop=False):
            yield all_crops(image, self.size, most, self.random_flip), index

    def all_parts(self, count: int, limit: int = PARTS_LIMIT) -> np.ndarray:
        """Return the possible training crops of random images, in at most ``limit`` bytes: uint8 (M, C, H, W)."""
        count = min(count, self.images.length or count)
        most = max(1, limit // (2 * count * self.channels * self.size[0] * self.size[1]))
        return np.concatenate([parts for parts, _ in self.crops(count, most)])

    def parts(self, row: dict, most: int) -> np.ndarray:
        """Return the possible training crops of one row, see ``crops``."""
        return all_crops(self.prepared(row), self.size, most, self.random_flip)

    def values(self, row: dict) -> dict[str, np.ndarray]:
        """Return the values of a row besides images and masks: ``label``, int64, -1 for none, and float32 vectors."""
        return {"label": np.int64(label_of(row)), **self.layout.vectors(row)}

    def prepared(self, row: dict, center_crop: bool = False) -> np.ndarray:
        """Decode a row to uint8 (C, H, W), of at least the training size, or of exactly that size if it is cropped."""
        image, where = row["image"]()
        if self.refuse_colour and image.mode not in GREY_MODES:
            raise UserError(
                f"{where} has colour (mode {image.mode}), but all images inspected before training are grey. "
                "Choose with --image_mode L or --image_mode RGB"
            )
        size, center_crop = image.size, center_crop or self.center_crop
        image = to_eight_bits(image, self.mode, where, self.image_range, self._count_clipped)
        planes = [(image, Image.Resampling.BICUBIC), *self.layout.planes(row, size, self._count_clipped)]
        prepared = [prepare_image(plane, self.size, center_crop, resample) for plane, resample in planes]
        return np.concatenate(prepared) if len(prepared) > 1 else prepared[0]

    def _count_clipped(self, message: str) -> None:
        self.clipped += 1
        if self.clipped in (1, 10, 100) or self.clipped % 1000 == 0:
            logger.warning(f"values were clipped in {counted(self.clipped, 'image')} so far: {message}")

    def attempt(self, row: dict, center_crop: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]] | BadImage:
        """Return ``prepared`` and ``values`` of a row or, for a bad image, the error, so that threads do not raise."""
        try:
            return self.prepared(row, center_crop), self.values(row)
        except BadImage as error:
            return error

    def check(self, bad: int, problem: BadImage | str) -> None:
        """Log the latest of ``bad`` unreadable images. Raise UserError if there are more than may be skipped."""
        limit = self.images.max_bad_images
        if not limit:
            raise BadImage(f"{problem}. {self.images.advice}" if self.images.advice else str(problem))
        logger.warning(f"skipped ({bad} so far): {problem}")
        if bad > limit:
            raise UserError(
                f"more than --max_bad_images {limit} images are unreadable. The lines above name them. "
                "Repair or remove the files, or raise the limit"
            )

    def item(self, found: tuple, sample_id: int, bad: list) -> dict:
        """Return an item: a row that was read, cropped and flipped for a sample id, and the bad rows before it."""
        image = augment(found[0], sample_id, self.size, self.seed, self.random_flip)
        return {"image": image, "values": found[1], "sample_id": sample_id, "bad": bad}

    def blank(self, bad: list) -> dict:
        """Return an item that reports bad rows and has a blank image."""
        values = {"label": np.int64(0), **{name: np.zeros(s, np.float32) for name, s in self.layout.shapes.items()}}
        return {"image": np.zeros((self.channels, *self.size), np.uint8), "values": values, "sample_id": 0, "bad": bad}

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Return the image at an index, cropped and flipped for a sample id. The next good image replaces a bad one."""
        index, sample_id = key
        bad = []
        for candidate in range(index, index + self.images.length):
            candidate %= self.images.length
            row = self.images[candidate]
            found = self.attempt(row)
            if not isinstance(found, BadImage):
                return self.item(found, sample_id, bad)
            bad.append((candidate, str(found)))
            if len(bad) > self.images.max_bad_images:  # the main process raises the error
                return self.blank(bad)
        raise UserError(f"{self.images.name} has no readable image")
