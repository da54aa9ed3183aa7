"""Images that are in Python already, to train on instead of a data set that flags name.

    own_images = OwnImages(array)
    train_data = load_train_data(args, accelerator, own_images=own_images)

An array, a torch ``Dataset`` or a function of an index. Order, crops, cache, checks and resuming are as for any source.
"""

from collections.abc import Callable, Sequence
from functools import partial

import datasets
import numpy as np
import torch
from PIL import Image

from .. import UserError
from .pixels import BadImage, channels_last


class OwnImages:
    """Images that are in Python already, in the place of a ``datasets.Dataset``.

    Args:
        images: an array or tensor (N, C, H, W), (N, H, W, C) or (N, H, W); a torch ``Dataset`` whose items are images,
            tuples that begin with one, or dictionaries with ``image``; or a function from an index to an image. An
            image is a Pillow image, or an array or tensor (C, H, W), (H, W, C) or (H, W) with C of 1 or 3. It is asked
            for from several threads or processes at once.
        length: number of images; needed with a function.
        labels: class of each image, from 0 up; adds a loss curve for each.
        label_names: of the classes; by default their numbers.
        value_range: what black and white are in images of floats; uint8 images need none. Floats become 8 bits a value.

    Raises:
        UserError: no length, or labels that do not fit.
    """

    def __init__(
        self, images: np.ndarray | torch.Tensor | torch.utils.data.Dataset | Callable, length: int | None = None,
        labels: Sequence[int] | None = None, label_names: Sequence[str] | None = None,
        value_range: tuple[float, float] = (0.0, 1.0),
    ):  # fmt: skip
        if length is None and not hasattr(images, "__len__"):
            raise UserError("own images: a function from an index to an image needs length=, the number of images")
        self.length = len(images) if length is None else length
        self.get = images.__getitem__ if hasattr(images, "__getitem__") else images
        self.value_range, self.labels, self.features = value_range, None, {}
        if labels is not None:
            self.labels = [int(label) for label in labels]
            names = list(label_names or map(str, range(max(self.labels, default=0) + 1)))
            if len(self.labels) != self.length or not set(self.labels) <= set(range(len(names))):
                raise UserError(
                    f"own images: {len(self.labels)} labels, {sorted(set(self.labels))[:10]} among them, for "
                    f"{self.length} images; expected one label an image, from 0 to {len(names) - 1}"
                )
            self.features = {"label": datasets.ClassLabel(names=names)}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: int | slice) -> dict:
        """A row with ``image``, a function that makes the image, and perhaps ``label``; of a slice, lists of them."""
        if isinstance(key, slice):
            rows = [self[index] for index in range(*key.indices(self.length))]
            return {name: [row[name] for row in rows] for name in rows[0]}
        row = {"image": partial(self._image, key)}
        return row if self.labels is None else {**row, "label": self.labels[key]}

    def select(self, indices: Sequence[int]) -> list[dict]:
        """Rows, as those of a ``datasets.Dataset``."""
        return [self[index] for index in indices]

    def _image(self, index: int) -> Image.Image:
        where = f"own image {index}"
        try:
            image = self.get(index)
        except OSError as error:  # a file that cannot be read; what else goes wrong is not about one image
            raise BadImage(f"{where}: {type(error).__name__}: {error}") from error
        image = image["image"] if isinstance(image, dict) else image[0] if isinstance(image, tuple) else image
        if isinstance(image, Image.Image):
            return image
        array = channels_last(np.asarray(image.detach().cpu() if isinstance(image, torch.Tensor) else image), where)
        if array.dtype != np.uint8:
            low, high = self.value_range
            if not np.issubdtype(array.dtype, np.floating):
                raise BadImage(f"{where} is of {array.dtype}; expected uint8, or floats from {low:g} to {high:g}")
            if not (array.min() >= low and array.max() <= high):  # also refuses NaN
                raise BadImage(
                    f"{where} has values from {array.min():g} to {array.max():g}; expected {low:g} to {high:g}. "
                    "Say value_range=(black, white)"
                )
            array = np.rint((array.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(array))
