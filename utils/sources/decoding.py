"""Conversion of a row of a data set to a Pillow image: from bytes, paths, files in archives, and arrays."""

import io
import os
from pathlib import Path

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps

from ..data.pixels import HIGH_BIT_MODES, BadImage, channels_last, grey_if_palette_is

MAX_ASPECT = 100  # longer side over shorter
OVERSHOOT = 0.5  # share of the range by which floats may exceed it, as after a bicubic resize


def decode_image(source: bytes | str | Image.Image, name: str) -> Image.Image:
    """Open an image, load it fully and rotate it upright.

    Args:
        source: bytes or path of the file. An open image is returned unchanged.
        name: name of the image in errors (a path, or a row of a data set).

    Returns:
        The first frame, in the mode of the file, rotated according to its EXIF orientation.

    Raises:
        BadImage: the file is empty, truncated or not an image, exceeds Pillow's limit of 89 megapixels, or has one side
            that is more than a hundred times as long as the other.
    """
    if isinstance(source, Image.Image):
        return source
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow only warns
            raise Image.DecompressionBombError
        if max(image.size) > MAX_ASPECT * min(image.size):
            size = f"{image.width} x {image.height} pixels"
            raise BadImage(f"{name}: {size}. Expected sides that differ by a factor of {MAX_ASPECT} at most")
        image.load()
        return grey_if_palette_is(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise BadImage(f"{name}: more than {limit}, which might be an attack. Make the image smaller") from error
    except Exception as error:  # decoders raise errors of any class: OSError, SyntaxError, struct.error, ValueError ...
        size = len(source) if isinstance(source, bytes) else os.path.getsize(source) if os.path.exists(source) else None
        if size == 0:
            reason = "the file is empty"
        else:  # the name of the memory buffer, which Pillow adds, is removed
            reason = str(error).split(" <_io")[0].split(" '")[0] or type(error).__name__
        raise BadImage(f"{name}: {reason}. Expected a complete image file that Pillow reads") from error


def size_and_mode(source: bytes | str | Image.Image, name: str) -> tuple[tuple[int, int], str]:
    """Return width, height and mode of an image, from the first bytes of its file.

    Raises:
        BadImage: the file cannot be opened.
    """
    try:
        image = source if isinstance(source, Image.Image) else None
        with image or Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            turned = opened.getexif().get(0x0112, 1) > 4  # the orientation exchanges width and height
            mode = grey_if_palette_is(opened).mode
            return opened.size[::-1] if turned else opened.size, mode
    except Exception as error:  # as in ``decode_image``
        raise BadImage(f"{name}: {type(error).__name__}. Expected a complete image file that Pillow reads") from error


def dropped_content(source: bytes | str | Image.Image) -> list[str]:
    """Return a message for each part of a file that ``decode_image`` drops: further pictures, or the lower bits."""
    if isinstance(source, Image.Image):
        return []
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        several = ["only the first of several pictures is used"] if getattr(image, "is_animated", False) else []
        wide = image.mode not in HIGH_BIT_MODES and any(";16" in str(tile) for tile in image.tile)
        return several + ["Pillow keeps only the upper 8 of 16 bits per colour. Scale the files to 8 bits"] * wide


def open_row(
    row: dict, source: str, index: int, white: float | tuple[float, float] | None = None
) -> tuple[bytes | str | Image.Image, str]:
    """Return the bytes or path of a row's image, or the image itself, and its name for messages.

    Args:
        row: row with ``image``: {bytes, path}, bytes, a path (perhaps relative to the table ``source``), or an array.
        source: name of the data set, or path of a table.
        index: index of the row, for messages.
        white: value that becomes white in colour arrays of floats, see ``from_values``.
    """
    record, where = row["image"], f"image {index} of {source}"
    if isinstance(record, (list, np.ndarray)):
        try:
            return from_values(np.asarray(record), where, white), where
        except ValueError as error:  # rows of different lengths
            raise BadImage(f"{where}: {error}. Expected an array (H, W), (H, W, 3) or (3, H, W)") from error
    if not isinstance(record, dict):
        record = {"bytes": None, "path": record} if isinstance(record, str) else {"bytes": record or b"", "path": None}
    file, content = record.get("path"), record.get("bytes")
    if file:
        where = f"{file} ({where})"
    if content is not None or file is None:
        return content or b"", where
    if "://" in file:  # the file is on the Hub, or inside an archive
        try:
            with xopen(file, "rb") as stream:
                return stream.read(), where
        except Exception as error:  # file systems raise any exception
            raise BadImage(f"{where}: cannot be read: {type(error).__name__}: {error}") from error
    return find_file(file, source), where


def find_file(file: str, source: str) -> str:
    """Resolve a path in the table ``source``, which may be relative to the table or to the current folder."""
    beside = Path(source).expanduser().parent / file
    return str(beside) if beside.exists() else file


def from_values(array: np.ndarray, where: str, white: float | tuple[float, float] | None = None) -> Image.Image:
    """Make an image from the numbers in a table: whole numbers, floats in [0, 1] or [0, 255], or booleans.

    Args:
        where: name of the array in errors.
        white: value that becomes white in colour arrays of floats: 1 or 255, or a pair of the values for black and
            white. None derives it from this array alone.

    Raises:
        BadImage: the array does not have the shape of an image, or its colours are outside of the range.
    """
    array = channels_last(array, where)
    if array.dtype.kind not in "iufb":
        raise BadImage(f"{where} has values of type {array.dtype}. Expected numbers")
    array = array * np.uint8(255) if array.dtype.kind == "b" else array
    whole, low, high = array.dtype.kind != "f", array.min(), array.max()
    if array.ndim == 2 and array.dtype != np.uint8:  # scaled later, like files with more than 8 bits
        if whole and not -(2**31) <= low <= high < 2**31:
            raise BadImage(f"{where} has values from {low} to {high}. Expected values that fit into 32 bits")
        return Image.fromarray(array.astype(np.int32 if whole else np.float32))
    black = 0.0
    if isinstance(white, tuple):
        black, white = white
    elif whole or white is None:
        white = 255.0 if whole or not is_unit(high) else 1.0
    tolerance = white * OVERSHOOT if not whole else 0
    explicit = black != 0 or white not in (1.0, 255.0)
    if not (np.isfinite(low) and np.isfinite(high)) or (
        not explicit and not -tolerance <= low <= high <= white + tolerance
    ):
        raise BadImage(
            f"{where} has values from {low:g} to {high:g}. Expected 0 to {white:g}, or --image_range LOW,HIGH"
        )
    array = (array.astype(np.float64).clip(black, white) - black) * (255 / (white - black))
    return Image.fromarray(np.rint(array).astype(np.uint8))


def is_unit(high: float) -> bool:
    """Return whether floats with this maximum are in the range [0, 1], and not in [0, 255]."""
    return high <= 1 + OVERSHOOT
