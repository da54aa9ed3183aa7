"""Conversion of a row of a data set to a Pillow image: from bytes, paths, files in archives, and arrays."""

import io
import os
from pathlib import Path

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps

from ..data.pixels import DEEP_MODES, BadImage, channels_last, grey_if_palette_is

MAX_ASPECT = 100  # longer side over shorter
OVERSHOOT = 0.5  # share of the range of floats by which a resize may have exceeded it


def decode_image(source: bytes | str | Image.Image, name: str) -> Image.Image:
    """Open an image, load it fully and rotate it upright.

    Args:
        source: bytes or path of the file. An open image is returned unchanged.
        name: name of the image in errors (a path, or a row of a data set).

    Returns:
        The first frame, in the mode of the file, rotated as its EXIF orientation says.

    Raises:
        BadImage: the file is empty, truncated, not an image, or over Pillow's limit of 89 megapixels, or one side is
            more than a hundred times the other.
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
        raise BadImage(f"{name}: more than {limit}, which might be an attack. Shrink the file") from error
    except Exception as error:  # Pillow's decoders raise anything: OSError, SyntaxError, struct.error, ValueError ...
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
    """Return the content of a file that ``decode_image`` drops: further pictures, and lower bits, as messages."""
    if isinstance(source, Image.Image):
        return []
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        several = ["only the first of several pictures is used"] if getattr(image, "is_animated", False) else []
        wide = image.mode not in DEEP_MODES and any(";16" in str(tile) for tile in image.tile)
        return several + ["of 16 bits a colour, Pillow keeps the upper 8. Scale the files to 8 bits"] * wide


def open_row(
    row: dict, source: str, index: int, white: float | tuple[float, float] | None = None
) -> tuple[bytes | str | Image.Image, str]:
    """Return the bytes or path of a row's image, or the image itself, and its name for messages.

    Args:
        row: row with ``image``: {bytes, path}, bytes, a path (also relative to the table ``source``), or an array.
        source: name of the data set, or path of a table.
        index: index of the row, for messages.
        white: white value of arrays of floats in colour, see ``from_values``.
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
    if "://" in file:  # streamed from the Hub, or inside an archive
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
    """Make an image of the numbers in a table: whole numbers, floats in [0, 1] or [0, 255], or booleans.

    Args:
        where: name of the array in errors.
        white: value of floats in colour that becomes white, 1 or 255, or a pair for black and white. None finds it from
            this image alone.

    Raises:
        BadImage: the array has another shape or, in colour, other values.
    """
    array = channels_last(array, where)
    if array.dtype.kind not in "iufb":
        raise BadImage(f"{where} consists of {array.dtype}. Expected numbers")
    array = array * np.uint8(255) if array.dtype.kind == "b" else array
    whole, low, high = array.dtype.kind != "f", array.min(), array.max()
    if array.ndim == 2 and array.dtype != np.uint8:  # scaled as files with more than 8 bits are
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
    """Return whether floats up to this value have the range [0, 1] and not [0, 255]."""
    return high <= 1 + OVERSHOOT
