"""One image, from bytes to a uint8 array of the training size.

Pillow's ``convert`` turns 16-bit images white and float images black without a word, drops alpha and with it uncovers
what transparent pixels hide. Here ranges are scaled, alpha is laid over white and EXIF rotation is applied.
"""

import io
import os

import numpy as np
from PIL import Image, ImageOps

from .. import UserError, randomness

FILTERS = {name: Image.Resampling[name.upper()] for name in ("lanczos", "bicubic", "bilinear", "box", "nearest")}
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
SKIP_HINT = "--bad_images skip goes on without it"


class BadImage(UserError):
    """An image that cannot be used; the message names it."""


def check_bad_count(count: int, args) -> None:
    """Raise UserError above ``--max_bad_images`` skipped images."""
    if count > args.max_bad_images:
        raise UserError(
            f"more than --max_bad_images {args.max_bad_images} images are unreadable; the lines above name them. "
            "Repair or remove the files, or raise the limit"
        )


def decode_image(source: bytes | str, name: str) -> Image.Image:
    """Open, fully load and upright an image.

    Args:
        source: the file's bytes, or its path.
        name: what to call it in errors (a path, or a row of a data set).

    Returns:
        The first frame, in the mode of the file, rotated as its EXIF orientation says.

    Raises:
        BadImage: empty, truncated, not an image, or over Pillow's limit of 89 megapixels.
    """
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


def augment(image: np.ndarray, sample_id: int, args) -> np.ndarray:
    """Random crop to a square and, with ``--random_flip``, a mirroring; a function of (seed, sample id).

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
        offset = int(randomness.uniform(args.seed, "crop", np.array(sample_id)) * (room + 1))
        top, left = (offset, 0) if image.shape[1] > image.shape[2] else (0, offset)
    image = image[:, top : top + size, left : left + size]
    if args.random_flip and flips(args.seed, np.array(sample_id)):
        image = image[:, :, ::-1]
    return np.ascontiguousarray(image)


def flips(seed: int, sample_ids: np.ndarray) -> np.ndarray:
    """Whether each sample is mirrored: bool, the shape of ``sample_ids``."""
    return randomness.uniform(seed, "flip", sample_ids) < 0.5
