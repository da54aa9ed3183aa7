"""Further tensors of each row beside its image: a second image, a mask, a vector.

    columns = {"depth": Column(Path("depth_maps")), "text": Column("embedding", kind="vector")}
    train_data = load_train_data(args, accelerator, columns=columns)

A batch then has ``batch["depth"]`` and ``batch["text"]``. Second images and masks are resized, cropped and flipped as
the image of their row. With images that are in Python: ``OwnImages(array, columns={"depth": Column(other)})``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import UserError
from ..pictures import from_uint8
from .pixels import GREY_MODES, MODES, BadImage, deep_values, to_eight_bits, used_range

KINDS = ("image", "mask", "vector")
TAKEN = ("images", "labels", "sample_ids")  # by the batch itself


@dataclass(frozen=True)
class Column:
    """One such tensor.

    Args:
        source: name of a column of the data set; a ``Path``, of a folder of files with the same names as the images; in
            ``OwnImages`` an array or tensor, a ``Dataset`` or a function from an index to a value.
        kind: ``image``: float32 (B, C, H, W) in [-1, 1], of any number of channels; ``mask``: int64 (B, H, W), values
            from 0 to 255 that are neither scaled nor mixed; ``vector``: float32 (B, ...) as it is.
        value_range: black and white in arrays of floats, for the kind ``image``.
    """

    source: str | Path | np.ndarray | torch.Tensor | torch.utils.data.Dataset | Callable
    kind: str = "image"
    value_range: tuple[float, float] = (0.0, 1.0)

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling.NEAREST if self.kind == "mask" else Image.Resampling.BICUBIC


def check_columns(columns: dict[str, Column]) -> None:
    """Refuse names that a batch has anyway, and kinds that there are not.

    Raises:
        UserError: says which.
    """
    for name, column in columns.items():
        if name in TAKEN:
            raise UserError(f"columns: {name!r} is what every batch has; choose another name")
        if column.kind not in KINDS:
            raise UserError(f"columns: {name!r} is of kind {column.kind!r}; expected {', '.join(KINDS)}")


class Layout:
    """What the columns of a source are like, found from some of its rows: how they lie beside an image's channels.

    Args:
        columns: by name.
        rows: some rows; a column's entry is ``column:NAME``, a function that returns a value and its name for messages.

    Attributes:
        channels: number of channels of each image and mask.
        shapes: shape of each vector.

    Raises:
        UserError: a column has another number of channels in each row.
    """

    def __init__(self, columns: dict[str, Column], rows: list[dict]):
        self.columns, self.channels, self.shapes, self.ranges = columns, {}, {}, {}
        for name, column in columns.items():
            values = [row[f"column:{name}"]() for row in rows]
            if column.kind == "vector":
                self.shapes[name] = np.asarray(values[0][0]).shape
            elif column.kind == "mask":
                self.channels[name] = 1
            else:
                found = {_channels(value) for value, _ in values}
                if len(found) > 1 and found != {1, 3}:
                    raise UserError(
                        f"{values[0][1]}: {name} has {sorted(found)} channels; expected as many in each row"
                    )
                self.channels[name] = max(found)
                self.ranges[name] = used_range(deep_values(v for v, _ in values if isinstance(v, Image.Image)))

    @property
    def settings(self) -> dict:
        """What a resumed run must not find changed."""
        shapes = {**self.channels, **{name: list(shape) for name, shape in self.shapes.items()}}
        return {name: [column.kind, shapes[name]] for name, column in self.columns.items()}

    def planes(self, row: dict, size: tuple[int, int]) -> list[tuple[Image.Image, Image.Resampling]]:
        """Return each channel of a row's second images and masks, at its image's size (width, height)."""
        planes = []
        for name, channels in self.channels.items():
            column, (value, where) = self.columns[name], row[f"column:{name}"]()
            array = _eight_bits(value, where, column, channels, self.ranges.get(name))
            if len(array) != channels:
                raise BadImage(f"{where} has {len(array)} channels; expected {channels}, as the others")
            height, width = array.shape[1:]
            if abs(round(width * size[1] / height) - size[0]) > 1:
                raise BadImage(
                    f"{where} has {width} x {height} pixels beside an image of {size[0]} x {size[1]}; expected the "
                    "same shape, so that both can be cut alike"
                )
            for plane in map(Image.fromarray, array):
                planes.append((plane if plane.size == size else plane.resize(size, column.resample), column.resample))
        return planes

    def vectors(self, row: dict) -> dict[str, np.ndarray]:
        """Return a row's vectors, float32.

        Raises:
            BadImage: one is missing, or of another shape than the others.
        """
        found = {}
        for name, shape in self.shapes.items():
            value, where = row[f"column:{name}"]()
            found[name] = np.asarray(value, np.float32)
            if value is None or found[name].shape != shape or not np.isfinite(found[name]).all():
                raise BadImage(f"{where}: expected finite numbers of shape {shape}, got {value!r:.80}")
        return found

    def split(self, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the tensors of a batch, uint8 (B, sum of channels, H, W), that begins with the images."""
        image_channels = stacked.shape[1] - sum(self.channels.values())
        parts = stacked.split([image_channels, *self.channels.values()], dim=1)
        batch = {"images": from_uint8(parts[0])}
        for name, part in zip(self.channels, parts[1:], strict=True):
            batch[name] = part[:, 0].long() if self.columns[name].kind == "mask" else from_uint8(part)
        return batch


def _channels(value) -> int:
    if isinstance(value, Image.Image):
        return 1 if value.mode in GREY_MODES else 3
    return 1 if value.ndim == 2 else len(value)


def _eight_bits(value, where: str, column: Column, channels: int, image_range) -> np.ndarray:
    """Return a second image or a mask as uint8 (C, H, W)."""
    if column.kind == "mask":
        array = np.asarray(value)
        if array.ndim != 2 or array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 255:
            raise BadImage(
                f"{where}: a mask of shape {array.shape}, {array.dtype}; expected (H, W), integers from 0 to 255"
            )
        return array.astype(np.uint8)[None]
    if isinstance(value, Image.Image):
        if channels == 1 and value.mode not in GREY_MODES:
            raise BadImage(f"{where} has colour (mode {value.mode}), those looked at before training were all grey")
        array = np.asarray(to_eight_bits(value, MODES[channels], where, image_range))
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    array = value[None] if value.ndim == 2 else value
    if array.ndim != 3 or not array.size:
        raise BadImage(f"{where} has the shape {array.shape}; expected (C, H, W) or (H, W)")
    return array if array.dtype == np.uint8 else scale_to_eight_bits(array, where, column.value_range)


def scale_to_eight_bits(array: np.ndarray, where: str, value_range: tuple[float, float]) -> np.ndarray:
    """Return floats from black to white as uint8.

    Raises:
        BadImage: other values, or no floats.
    """
    low, high = value_range
    if not np.issubdtype(array.dtype, np.floating):
        raise BadImage(f"{where} is of {array.dtype}; expected uint8, or floats from {low:g} to {high:g}")
    if not (array.min() >= low and array.max() <= high):  # also refuses NaN
        raise BadImage(
            f"{where} has values from {array.min():g} to {array.max():g}; expected {low:g} to {high:g}. "
            "Give value_range=(black, white)"
        )
    return np.rint((array.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
