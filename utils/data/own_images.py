"""Images in Python as training data, and the interface of all sources of images.

    own_images = OwnImages(array)
    train_data = load_train_data(args, accelerator, own_images=own_images)

The images are an array, a torch ``Dataset`` or a function of an index. Order, crops, cache, checks and resuming work
as for any other source.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from .. import UserError, randomness
from .columns import Column, check_columns, scale_to_eight_bits
from .pixels import BadImage, channels_last, grey_if_palette_is

INSPECTED = 64  # images that are inspected to find the properties of a data set
MAX_CLASSES = 1000


class Images:
    """Rows of images by index.

    In a row, ``image`` is a function that returns a Pillow image and its name for messages. A row may have ``label``,
    an int, or None if it is unknown. ``column:NAME`` is a function that returns a column's value and its name for
    messages.

    Attributes:
        name: name for messages.
        columns: additional tensors of each row, by name, see ``columns``.
        sample: description of the chosen subset of the images; None for all.
        length: number of images; None for a stream.
        label_names: names of the classes; empty without labels.
        license: licence of the images, as far as it is known.
        fingerprint: hash of the images, set by ``iter_probe_images``; None if they have none.
        max_bad_images: number of unreadable images that may be skipped.
        advice: advice to the user about an unreadable image.
    """

    name, length, label_names, license, fingerprint = "own images", 0, [], "not stated", None
    max_bad_images, advice, columns, sample = 0, "", {}, None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        """Return a row."""
        raise NotImplementedError

    def rows(self, indices: range) -> list[dict]:
        """Return several rows, faster than one by one where that is possible."""
        return [self[index] for index in indices]

    def labels(self) -> list[int | None]:
        """Return the class of each image."""
        raise NotImplementedError

    def iter_probe_images(self) -> Iterator[Image.Image | BadImage]:
        """Yield some of the images, evenly spaced, each decoded or as the error that names it.

        A hash of their pixels and columns becomes the fingerprint of the data, unless an image changes when read again.
        """
        digest, repeatable = hashlib.sha256(str(self.length).encode()), True
        for index in evenly_spaced(self.length):
            try:
                (image, _), (again, _) = self[index]["image"](), self[index]["image"]()
            except BadImage as error:
                yield error
                continue
            repeatable = repeatable and image == again
            digest.update(image.tobytes())
            for column in self.columns:
                digest.update(content_of(self[index][f"column:{column}"]()[0]))
            yield image
        self.fingerprint = digest.hexdigest()[:16] if repeatable else None

    def iter_probe_rows(self) -> Iterator[dict]:
        """Yield the rows of ``iter_probe_images``."""
        return (self[index] for index in evenly_spaced(self.length))

    def examples(self, count: int, seed: int) -> Iterator[tuple[int, dict]]:
        """Yield ``count`` random rows, or all if there are fewer, each with its index."""
        for index in randomness.shuffled_indices(seed, np.arange(min(count, self.length)), self.length).tolist():
            yield index, self[index]

    def held_out(self, split: str, flag: str) -> "Images":
        """Load the split of the same data set that a flag names.

        Raises:
            UserError: there is no such split, it shares images with this one, or the data set has no splits.
        """
        raise UserError(f"{flag} {split}: {self.name} are in Python and have no splits. Leave the flag out")

    def another(self, name: str, flag: str) -> "Images":
        """Load the other images that a flag names.

        Raises:
            UserError: see ``held_out``.
        """
        raise UserError(
            f"{flag} {name}: images by name need utils/sources/, and training images by name. Leave the flag out"
        )

    def cache_file(self, facts: tuple, folder: str | None, seconds: float):
        """Return the path of a file for the decoded images. For images in Python, return None."""
        return None


class OwnImages(Images):
    """Images in Python.

    Args:
        images: an array or tensor (N, C, H, W), (N, H, W, C) or (N, H, W); a torch ``Dataset`` with items that are
            images, tuples that begin with one, or dictionaries with ``image``; or a function from an index to an image.
            An image is a Pillow image, or an array or tensor (C, H, W), (H, W, C) or (H, W) with C of 1 or 3. Several
            threads or processes may read images at once.
        length: number of images, which a function needs.
        labels: class of each image, from 0 up. Each of up to 50 classes gets a loss curve.
        label_names: names of the classes; by default their numbers.
        value_range: values of black and white in images of floats, which are converted to uint8. By default, 0 and 1.
        name: name for messages and the model's page.
        columns: additional tensors of each row, by name. Arrays are (N, C, H, W) or (N, H, W).

    Raises:
        UserError: the length is missing, or labels or columns do not fit.
    """

    def __init__(
        self, images: np.ndarray | torch.Tensor | torch.utils.data.Dataset | Callable, length: int | None = None,
        labels: Sequence[int] | None = None, label_names: Sequence[str] | None = None,
        value_range: tuple[float, float] = (0.0, 1.0), name: str = "own images",
        columns: dict[str, Column] | None = None,
    ):  # fmt: skip
        if length is None and not hasattr(images, "__len__"):
            raise UserError("own images: a function from an index to an image needs length=, the number of images")
        self.length, self.name, self._labels = len(images) if length is None else length, name, None
        self.get = images.__getitem__ if hasattr(images, "__getitem__") else images
        self.value_range, self.columns = value_range, columns or {}
        check_columns(self.columns)
        for key, column in self.columns.items():
            if isinstance(column.source, (str, Path)):
                raise UserError(f"own images: {key} comes from {column.source}. Expected an array, Dataset or function")
            if hasattr(column.source, "__len__") and len(column.source) != self.length:
                raise UserError(
                    f"own images: {len(column.source)} values of {key} for {self.length} images. Expected one per image"
                )
        if labels is not None:
            self._labels = [int(label) for label in labels]
            self.label_names = list(label_names or map(str, range(max(self._labels, default=0) + 1)))
            known = set(range(len(self.label_names)))
            if len(self._labels) != self.length or not set(self._labels) <= known:
                raise UserError(
                    f"own images: {len(self._labels)} labels, {sorted(set(self._labels))[:10]} among them, for "
                    f"{self.length} images. Expected one label per image, from 0 to {len(self.label_names) - 1}"
                )

    def __getitem__(self, index: int) -> dict:
        row = {"image": partial(self._image, index)}
        row |= {f"column:{name}": partial(self._value, name, index) for name in self.columns}
        return row if self._labels is None else {**row, "label": self._labels[index]}

    def labels(self) -> list[int]:
        return self._labels

    def _value(self, name: str, index: int):
        source = self.columns[name].source
        where = f"{self.name.removesuffix('s')} {index}"
        value = source[index] if hasattr(source, "__getitem__") else source(index)
        value = value["image"] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else value
        if value is None:
            raise BadImage(f"{where}: expected a value, got None")
        value = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value
        return value if isinstance(value, Image.Image) else np.asarray(value), where

    def _image(self, index: int) -> tuple[Image.Image, str]:
        where = f"{self.name.removesuffix('s')} {index}"
        try:
            image = self.get(index)
        except (OSError, SyntaxError) as error:  # the file is unreadable; other errors are not due to one image
            raise BadImage(f"{where}: {type(error).__name__}: {error}") from error
        image = image["image"] if isinstance(image, dict) else image[0] if isinstance(image, tuple) else image
        if isinstance(image, Image.Image):
            try:
                image.load()
            except Exception as error:  # Pillow's decoders may raise any exception, and decode only now
                raise BadImage(f"{where}: {type(error).__name__}: {error}") from error
            return grey_if_palette_is(ImageOps.exif_transpose(image)), where
        array = channels_last(np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image), where)
        if array.dtype != np.uint8:
            array = scale_to_eight_bits(array, where, self.value_range)
        return Image.fromarray(np.ascontiguousarray(array)), where


def embedded_digits() -> OwnImages:
    """Load 1,797 handwritten digits, 8x8, 17 levels of grey (Alpaydin & Kaynak 1998), from scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return OwnImages(np.rint(digits.images * (255 / 16)).astype(np.uint8), labels=digits.target, name="digits")


def embedded_faces() -> OwnImages:
    """Load 100 grey faces, 25x25, crops of Labeled Faces in the Wild, from scikit-image."""
    from skimage.data import lfw_subset

    faces = np.rint(lfw_subset()[:100] * 255).astype(np.uint8)
    return OwnImages(faces, labels=np.zeros(100, int), label_names=["face"], name="faces")


def evenly_spaced(length: int) -> list[int]:
    """Return evenly spaced indices of the images to inspect, among ``length`` images."""
    return sorted({int(index) for index in np.linspace(0, length - 1, INSPECTED)})


def content_of(value) -> bytes:
    """Return the content of a value as bytes, for a fingerprint."""
    return value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()


def label_of(row: dict) -> int:
    """Return the class of a row, or -1 if it has none."""
    return -1 if row.get("label") is None else row["label"]


def translate_labels(labels: np.ndarray, names: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """Translate labels (N,) of the classes ``names`` to numbers of the classes ``known``, or -1 for others."""
    return np.array([*(known.index(name) if name in known else -1 for name in names), -1])[labels]
