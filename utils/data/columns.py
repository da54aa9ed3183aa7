"""Additional tensors of each row besides its image: a second image, a mask, a vector.

    columns = {"depth": Column(Path("depth_maps")), "text": Column("embedding", kind="vector")}
    train_data = load_train_data(args, accelerator, columns=columns)

A batch then has ``batch["depth"]`` and ``batch["text"]``. Second images and masks are resized, cropped and flipped like
the image of their row. For images in Python, use ``OwnImages(array, columns={"depth": Column(other)})``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import UserError
from ..pictures import from_uint8
from .pixels import GREY_MODES, MODES, BadImage, full_range, high_bit_values, to_eight_bits, used_range

logger = logging.getLogger(__name__)

KINDS = ("image", "mask", "vector")
TAKEN = ("images", "label", "labels", "sample_ids")  # names that every batch has


@dataclass(frozen=True)
class Column:
    """An additional tensor of each row.

    Args:
        source: name of a column of the data set, or ``Path`` of a folder of files with the same names as the images.
            In ``OwnImages``, an array or tensor, a ``Dataset`` or a function from an index to a value.
        kind: ``image``: float32 (B, C, H, W) in [-1, 1], with any number of channels; ``mask``: int64 (B, H, W), values
            from 0 to 255 without scaling or interpolation; ``vector``: float32 (B, ...), unchanged. Images are kept
            with 8 bits per value.
        value_range: values that become -1 and 1, for images with more than 8 bits per value. The default is (0, 1) for
            arrays of floats. For files it is the range of some of them.
        channels: number of channels of images. The default is that of some of them. With 3, grey files are converted.
    """

    source: str | Path | np.ndarray | torch.Tensor | torch.utils.data.Dataset | Callable
    kind: str = "image"
    value_range: tuple[float, float] | None = None
    channels: int | None = None

    @property
    def resample(self) -> Image.Resampling:
        return Image.Resampling.NEAREST if self.kind == "mask" else Image.Resampling.BICUBIC


def check_columns(columns: dict[str, Column]) -> None:
    """Refuse values other than ``Column``, names that every batch has, and unknown kinds.

    Raises:
        UserError: one of these was found.
    """
    for name, column in columns.items():
        if not isinstance(column, Column):
            raise UserError(f"columns: {name!r} is {column!r:.80}. Expected a Column, such as Column({column!r:.80})")
        if name in TAKEN:
            raise UserError(f"columns: every batch already has the name {name!r}. Choose another name")
        if column.kind not in KINDS:
            raise UserError(f"columns: {name!r} has the kind {column.kind!r}. Expected {', '.join(KINDS)}")
        if column.channels not in (None, 1, 3):
            raise UserError(f"columns: {name!r} has channels={column.channels}. Expected 1 or 3")
        if column.kind == "vector" and isinstance(column.source, Path):
            raise UserError(f"columns: {name!r} is a vector from a folder. Expected a column of numbers, or an array")


def condition_columns(args) -> dict[str, Column]:
    """Return the column ``condition`` that ``--condition_dir`` or ``--condition_column`` names, or {} without them.

    Raises:
        UserError: there is no such folder.
    """
    if args.condition_dir and not Path(args.condition_dir).is_dir():
        raise UserError(f"--condition_dir {args.condition_dir}: there is no such folder. Expected second pictures")
    source = args.condition_column or (args.condition_dir and Path(args.condition_dir))
    return {"condition": Column(source)} if source else {}


class Layout:
    """The shapes and value ranges of a source's columns, found from some of its rows.

    Args:
        columns: columns by name.
        rows: some rows. The entry ``column:NAME`` is a function that returns a value and its name for messages.

    Attributes:
        channels: number of channels of each image and mask.
        shapes: shape of each vector.

    Raises:
        UserError: the number of channels of a column varies between rows.
    """

    def __init__(self, columns: dict[str, Column], rows: list[dict]):
        self.columns, self.channels, self.shapes, self.ranges = columns, {}, {}, {}
        for name, column in columns.items():
            values = [self._value(row, name) for row in rows]
            if column.kind == "vector":
                self.shapes[name] = np.asarray(values[0][0]).shape
            elif column.kind == "mask":
                self.channels[name] = 1
            else:
                found = {_channels(value) for value, _ in values}
                if len(found) > 1 and found != {1, 3}:
                    raise UserError(
                        f"{values[0][1]}: {name} has {sorted(found)} channels. Expected the same number in each row"
                    )
                self.channels[name] = column.channels or max(found)
                probed = high_bit_values(v for v, _ in values if isinstance(v, Image.Image))
                used = used_range(probed)
                self.ranges[name] = column.value_range or used or full_range(probed)
                if used and not column.value_range:
                    low, high = used
                    logger.warning(
                        f"{name}: values from {low:g} to {high:g} become -1 and 1. Column(..., value_range=({low:g}, "
                        f"{high:g})) sets the same range"
                    )

    @property
    def settings(self) -> dict:
        """Settings that must be the same when a run resumes."""
        shapes = {**self.channels, **{name: list(shape) for name, shape in self.shapes.items()}}
        ranges = {name: [list(found)] for name, found in self.ranges.items() if found}
        return {name: [column.kind, shapes[name], *ranges.get(name, [])] for name, column in self.columns.items()}

    def planes(
        self, row: dict, size: tuple[int, int], on_clip: Callable[[str], None] = lambda message: None
    ) -> list[tuple[Image.Image, Image.Resampling]]:
        """Return each channel of a row's second images and masks, at the size (width, height) of the row's image.

        Args:
            on_clip: function for messages about clipped values, see ``pixels.to_eight_bits``.
        """
        planes = []
        for name, channels in self.channels.items():
            column, (value, where) = self.columns[name], self._value(row, name)
            array = _eight_bits(value, where, column, channels, self.ranges.get(name), on_clip)
            if len(array) != channels:
                raise BadImage(f"{where} has {len(array)} channels. Expected {channels}, as in the other rows")
            height, width = array.shape[1:]
            enlarged, reduced = round(width * size[1] / height), round(size[0] * height / size[1])
            if abs(enlarged - size[0]) > 1 and abs(reduced - width) > 1:  # sides of small pictures are rounded more
                raise BadImage(
                    f"{where} has {width} x {height} pixels beside an image of {size[0]} x {size[1]}. Expected the "
                    "same aspect ratio, so that both can be cropped alike (arrays are (C, H, W) or (H, W))"
                )
            for plane in map(Image.fromarray, array):
                planes.append((plane if plane.size == size else plane.resize(size, column.resample), column.resample))
        return planes

    def vectors(self, row: dict) -> dict[str, np.ndarray]:
        """Return a row's vectors, float32.

        Raises:
            BadImage: a vector is missing, or its shape differs from that of the others.
        """
        found = {}
        for name, shape in self.shapes.items():
            value, where = self._value(row, name)
            try:
                found[name] = np.asarray(value, np.float32)
            except (TypeError, ValueError) as error:
                raise BadImage(f"{where}: expected numbers of shape {shape}, got {value!r:.80}") from error
            if value is None or found[name].shape != shape or not np.isfinite(found[name]).all():
                raise BadImage(f"{where}: expected finite numbers of shape {shape}, got {value!r:.80}")
        return found

    def _value(self, row: dict, name: str) -> tuple:
        """Return a column's value in a row, and its name for messages."""
        try:
            value, where = row[f"column:{name}"]()
        except BadImage as error:
            raise BadImage(f"column {name}: {error}") from error
        return value, f"column {name} of {where}"

    def split(self, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split a batch, uint8 (B, sum of channels, H, W) with the images first, into tensors by name."""
        image_channels = stacked.shape[1] - sum(self.channels.values())
        parts = stacked.split([image_channels, *self.channels.values()], dim=1)
        batch = {"images": from_uint8(parts[0])}
        for name, part in zip(self.channels, parts[1:], strict=True):
            batch[name] = part[:, 0].long() if self.columns[name].kind == "mask" else from_uint8(part)
        return batch


def _channels(value) -> int:
    if isinstance(value, Image.Image):
        return 1 if value.mode in GREY_MODES else 3
    value = np.asarray(value)
    return 1 if value.ndim == 2 else len(value) if value.ndim == 3 else 0


def _eight_bits(value, where: str, column: Column, channels: int, image_range, on_clip) -> np.ndarray:
    """Return a second image or a mask as uint8 (C, H, W)."""
    if column.kind == "mask":
        array = np.asarray(value)
        if array.ndim != 2 or array.dtype.kind not in "iub" or array.min() < 0 or array.max() > 255:
            values = f", from {array.min()} to {array.max()}" if array.size and array.dtype.kind in "iufb" else ""
            found = f"shape {array.shape}, {array.dtype}{values}"
            raise BadImage(f"{where}: a mask of {found}. Expected (H, W), integers from 0 to 255")
        return array.astype(np.uint8)[None]
    if isinstance(value, Image.Image):
        if channels == 1 and value.mode not in GREY_MODES:
            raise BadImage(f"{where} has colour (mode {value.mode}), but the second pictures of training are grey")
        array = np.asarray(to_eight_bits(value, MODES[channels], where, image_range, on_clip))
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    array = np.asarray(value)
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3 or not array.size:
        raise BadImage(f"{where} has the shape {array.shape}. Expected (C, H, W) or (H, W)")
    return array if array.dtype == np.uint8 else scale_to_eight_bits(array, where, column.value_range or (0.0, 1.0))


def scale_to_eight_bits(array: np.ndarray, where: str, value_range: tuple[float, float]) -> np.ndarray:
    """Return floats in ``value_range``, from black to white, as uint8.

    Raises:
        BadImage: values are outside of the range, or are not floats.
    """
    low, high = value_range
    if not np.issubdtype(array.dtype, np.floating):
        raise BadImage(f"{where} has the type {array.dtype}. Expected uint8, or floats from {low:g} to {high:g}")
    if not (array.min() >= low and array.max() <= high):  # also refuses NaN
        raise BadImage(
            f"{where} has values from {array.min():g} to {array.max():g}. Expected {low:g} to {high:g}. "
            "Give value_range=(black, white)"
        )
    return np.rint((array.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
