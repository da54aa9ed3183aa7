"""Conversion of a Pillow image to a uint8 array of the training size.

Pillow's ``convert`` silently turns 16-bit images white and float images black. It drops alpha, so the colours of
transparent pixels become visible. Here value ranges are scaled and alpha is composited over white.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image

from .. import UserError, randomness

MODES = {1: "L", 3: "RGB"}  # Pillow's names, by number of channels
HIGH_BIT_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a value
GREY_MODES = ("1", "L", "LA", "La", *HIGH_BIT_MODES)


class BadImage(UserError):
    """An image that cannot be used. The message names it."""


def to_eight_bits(
    image: Image.Image, mode: str, name: str, image_range: tuple[float, float] | None = None,
    on_clip: Callable[[str], None] = lambda message: None,
) -> Image.Image:  # fmt: skip
    """Convert to 8 bits per channel.

    Args:
        image: image in any Pillow mode.
        mode: ``L`` or ``RGB``, the mode of the result.
        name: name of the image in errors.
        image_range: values that become black and white, for images with more than 8 bits. None is the range of the
            file's format: 16-bit values are divided by 257; mode ``I`` counts as 16 bits if its values fit, else as 31;
            floats count as in [0, 1], or as in [0, 255] if one exceeds 1.
        on_clip: function that is called with a message about values outside of ``image_range``, if there are any.

    Raises:
        BadImage: values are not finite or, without ``image_range``, negative or floats above 255.
    """
    if image.mode in HIGH_BIT_MODES:
        values = np.asarray(image, dtype=np.float64)
        found = values.min(), values.max()
        low, high = image_range or _full_range(image.mode, found[1])
        if not np.isfinite(values).all() or (image_range is None and not (low <= found[0] and found[1] <= high)):
            expected = "floats in [0, 1] or [0, 255]" if image.mode == "F" else "integers from 0 up"
            advice = "Rescale the file" + ", or give --image_range LOW,HIGH" * bool(np.isfinite(values).all())
            raise BadImage(f"{name}: values from {found[0]:g} to {found[1]:g}. Expected {expected}. {advice}")
        outside = int(((values < low) | (values > high)).sum())
        if outside:
            on_clip(f"{name}: {outside} of {values.size} values are outside of {low:g} to {high:g}, and are clipped")
        values = (values.clip(low, high) - low) * (255 / (high - low))
        image = Image.fromarray(np.rint(values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image.convert("LA" if image.mode == "La" else image.mode).convert(mode)
    except ValueError as error:
        raise BadImage(f"{name}: mode {image.mode} cannot be converted to {mode}. Convert the file") from error


def grey_if_palette_is(image: Image.Image) -> Image.Image:
    """Convert an image with a palette of greys, as in GIF, to grey, and return others unchanged."""
    if image.mode != "P" or image.palette is None:
        return image
    mode, palette = image.palette.mode, np.frombuffer(image.palette.tobytes(), np.uint8)
    colours = palette.reshape(-1, len(mode))[:, :3] if mode in ("RGB", "RGBA") else np.arange(3)[None]
    if (colours != colours[:, :1]).any():
        return image
    return image.convert("LA" if image.has_transparency_data else "L")


def _full_range(mode: str, high: float) -> tuple[float, float]:
    """Return the range of a format with more than 8 bits, given the largest value of one or several images."""
    if mode == "F":
        return 0, 1 if high <= 1.001 else 255  # 1.0000001 is 1 with a rounding error
    return 0, 65535 if high <= 65535 else 2**31 - 1


def high_bit_values(images: Iterable[Image.Image]) -> list[tuple[str, np.ndarray]]:
    """Return mode and values of each image with more than 8 bits: all, or the extremes and about 100,000 others."""
    found = []
    for image in images:
        if image.mode in HIGH_BIT_MODES:
            values = np.asarray(image, np.float64).ravel()
            values = values[np.isfinite(values)]
            step = values.size // 100_000
            if step > 1:
                values = np.concatenate([values[::step], [values.min(), values.max()]])
            found.append((image.mode, values))
    return found


def full_range(probed: Sequence[tuple[str, np.ndarray]]) -> tuple[float, float] | None:
    """Return the range of the format of images with more than 8 bits.

    Args:
        probed: modes and values of images, see ``high_bit_values``.

    Returns:
        None if no image has more than 8 bits, or if floats and integers, or negative values, are among them.
    """
    probed = [(mode, values) for mode, values in probed if values.size]
    if len({mode == "F" for mode, _ in probed}) != 1 or min(values.min() for _, values in probed) < 0:
        return None
    return 0.0, float(max(_full_range(mode, values.max())[1] for mode, values in probed))


def float_range(probed: Sequence[tuple[str, np.ndarray]]) -> tuple[float, float] | None:
    """Return the range of the format of float images: [0, 1] or [0, 255].

    None is returned if there are none, or if images of other modes or negative values are among them.
    """
    return full_range(probed) if all(mode == "F" and values.size for mode, values in probed) else None


def used_range(probed: Sequence[tuple[str, np.ndarray]]) -> tuple[float, float] | None:
    """Return the range of the values of images with more than 8 bits.

    Args:
        probed: modes and values of images, see ``high_bit_values``.

    Returns:
        Lowest and highest value, without outliers: at most one value in ten thousand at each end. None if no image has
        more than 8 bits, if all values are equal, or if at least half of the format's range is used.
    """
    modes, values = {mode for mode, _ in probed}, np.concatenate([values for _, values in probed] or [np.empty(0)])
    if not values.size or values.min() == values.max():
        return None
    low, high = float(values.min()), float(values.max())
    most = np.quantile(values, 1e-4, method="higher"), np.quantile(values, 1 - 1e-4, method="lower")
    if 0 < most[1] - most[0] < (high - low) / 4:  # hot pixels are clipped and counted
        low, high = map(float, most)
    if low >= 0 and high <= 255 and modes == {"I"}:  # 8-bit values, stored in a table or a wider format
        return 0.0, 255.0
    limit = max(_full_range(mode, high)[1] for mode in modes)
    return None if low >= 0 and limit / 2 <= high - low <= limit else (low, high)


def cover_size(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the width and height of an image after it is resized to just cover (H, W)."""
    (width, height), (target_height, target_width) = image_size, size
    if width * target_height >= height * target_width:
        return max(target_width, round(width * target_height / height)), target_height
    return target_width, max(target_height, round(height * target_width / width))


def prepare_image(
    image: Image.Image, size: tuple[int, int], center_crop: bool, resample=Image.Resampling.BICUBIC
) -> np.ndarray:
    """Resize an image so that it covers ``size``, and crop the middle or keep the longer side for a random crop.

    Args:
        size: (H, W).

    Returns:
        Array uint8 (C, h, w) with h == H and w >= W, or h >= H and w == W.
    """
    height, width = size
    covered = cover_size(image.size, size)
    if center_crop and max(covered[0] / width, covered[1] / height) > 4:  # only the part that is kept is enlarged
        room = [
            max(0, side - 4 * -(-side * kept // whole)) // 2
            for side, whole, kept in zip(image.size, covered, (width, height), strict=True)
        ]
        image = image.crop((room[0], room[1], image.width - room[0], image.height - room[1]))
        covered = cover_size(image.size, size)
    if image.size != covered:
        image = image.resize(covered, resample, reducing_gap=3.0)
    if center_crop:
        left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    array = np.array(image, dtype=np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def augment(image: np.ndarray, sample_id: int, size: tuple[int, int], seed: int, random_flip: bool) -> np.ndarray:
    """Crop an image at random and, with ``random_flip``, mirror it half of the time, by functions of (seed, sample id).

    Args:
        image: uint8 (C, h, w), see ``prepare_image``.
        sample_id: id of the sample that uses the image.
        size: (H, W).

    Returns:
        Array uint8 (C, H, W), which may share memory with ``image``.
    """
    room = image.shape[1] - size[0], image.shape[2] - size[1]
    top, left = 0, 0
    if any(room):
        share = randomness.uniform(seed, "crop", np.array(sample_id))
        top, left = (int(share * (pixels + 1)) if pixels else 0 for pixels in room)
    image = image[:, top : top + size[0], left : left + size[1]]
    if random_flip and flips(seed, np.array(sample_id)):
        image = image[:, :, ::-1]
    return np.ascontiguousarray(image)


def all_crops(image: np.ndarray, size: tuple[int, int], most: int, mirrored: bool) -> np.ndarray:
    """Return the crops of an image that ``augment`` may return.

    Args:
        image: uint8 (C, h, w), see ``prepare_image``.
        size: (H, W).
        most: maximum number of positions, evenly spaced. A single one is in the middle.
        mirrored: True to return each crop also mirrored.

    Returns:
        Array uint8 (P, C, H, W).
    """
    room = max(image.shape[1] - size[0], image.shape[2] - size[1])
    places = sorted({round(place) for place in np.linspace(0, room, min(most, room + 1))}) if most > 1 else [room // 2]
    tall = image.shape[1] > size[0]
    parts = [image[:, p : p + size[0]] if tall else image[:, :, p : p + size[1]] for p in places]
    parts += [part[:, :, ::-1] for part in parts] if mirrored else []
    return np.stack(parts)


def flips(seed: int, sample_ids: np.ndarray) -> np.ndarray:
    """Return whether each sample is mirrored: bool, in the shape of ``sample_ids``."""
    return randomness.uniform(seed, "flip", sample_ids) < 0.5


def channels_last(array: np.ndarray, where: str) -> np.ndarray:
    """Turn an array (H, W), (C, H, W) or (H, W, C) with C of 1 or 3 into one of (H, W) or (H, W, 3).

    Raises:
        BadImage: the array has another shape.
    """
    shape = array.shape
    if array.ndim == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise BadImage(f"{where} has the shape {shape}. Expected C of 1 or 3 and H and W above 0")
    return array
