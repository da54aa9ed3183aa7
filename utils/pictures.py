"""Conversion of images between uint8 and [-1, 1], grids of images, and captions."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def from_uint8(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """Return uint8 images of any shape as float32 in [-1, 1], on the same device."""
    return torch.as_tensor(images).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Clip floats to [-1, 1] and return them as uint8 on the CPU, in the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def make_grid(images: np.ndarray, min_cell: int = 64, captions: Sequence[str] = ()) -> Image.Image:
    """Arrange images in rows with gaps, and enlarge small images without smoothing.

    Args:
        images: uint8 (N, C, H, W) with C of 1 or 3.
        min_cell: approximate height in pixels to which smaller images are enlarged, by a whole factor.
        captions: texts at the left of the rows. Without them, the grid is about as wide as it is high.
    """
    count, channels, height, width = images.shape
    factor = max(1, round(min_cell / height))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    height, width, gap = height * factor, width * factor, max(2, height * factor // 16)
    columns = int(np.ceil(np.sqrt(count))) if not captions else -(-count // len(captions))
    rows = -(-count // columns)
    font = ImageFont.load_default(size=16)
    margin = max((int(font.getlength(caption)) + 2 * gap for caption in captions), default=0)
    shape = (channels, rows * (height + gap) + gap, margin + columns * (width + gap) + gap)
    grid = np.full(shape, 96, dtype=np.uint8)
    for k, image in enumerate(images):
        y, x = (gap + (k // columns) * (height + gap), margin + gap + (k % columns) * (width + gap))
        grid[:, y : y + height, x : x + width] = image
    picture = Image.fromarray(grid[0] if channels == 1 else grid.transpose(1, 2, 0))
    for row, caption in enumerate(captions):
        middle = gap + row * (height + gap) + height // 2
        ImageDraw.Draw(picture).text((gap, middle), caption, fill="white", font=font, anchor="lm")
    return picture


def with_caption(picture: Image.Image, caption: str) -> Image.Image:
    """Return the picture with a line of text below it."""
    font = ImageFont.load_default(size=16)
    width = max(picture.width, int(font.getlength(caption)) + 8)
    larger = Image.new(picture.mode, (width, picture.height + 24))
    larger.paste(picture)
    ImageDraw.Draw(larger).text((4, picture.height + 12), caption, fill="white", font=font, anchor="lm")
    return larger


def label_log_axis(axes) -> None:
    """Label a logarithmic axis at 1, 2, 5, 10 ..., because a short axis has one label or none by default."""
    from matplotlib.ticker import LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
