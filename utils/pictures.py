"""Images as arrays and as pictures: the two ranges they are kept in, grids, and where pictures go."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


def from_uint8(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 images of any shape as float32 in [-1, 1], on the device that they are on."""
    return torch.as_tensor(images).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Floats in [-1, 1], clipped, as uint8 on the CPU; the same shape."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def make_grid(images: np.ndarray, min_cell: int = 64, captions: Sequence[str] = ()) -> Image.Image:
    """Lay images out in rows, with gaps, small ones enlarged without smoothing.

    Args:
        images: uint8 (N, C, H, W) with C of 1 or 3.
        min_cell: pixels; smaller images are enlarged by a whole factor to at least about this.
        captions: one for each row, to its left; without them the grid is as square as it gets.
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


def save_samples(picture: Image.Image, path: Path, accelerator, args, step: int) -> None:
    """``save_picture`` for a grid of samples, with a line below it that says how they were drawn.

    Args:
        args: ``num_inference_steps``, ``seed`` and, where the script has them, ``sampler`` and ``guidance_scale``.
    """
    save_picture(picture, path, accelerator, step, "samples", f"step {step}, {how_drawn(args)}")


def how_drawn(args) -> str:
    """Sampler, calls, seed and guidance of a run's samples, as far as its flags have them."""
    flags = vars(args)
    parts = [flags.get("sampler"), f"{args.num_inference_steps} calls", f"seed {args.seed}"]
    if "label_dropout" in flags:  # elsewhere guidance steers other samples than these
        parts.append(f"guidance {args.guidance_scale:g}")
    return ", ".join(part for part in parts if part)


def save_picture(picture: Image.Image, path: Path, accelerator, step: int, name: str, caption: str = "") -> None:
    """Write a picture as PNG and to the trackers, on the main process.

    Args:
        path: of the PNG; its folder is made.
        step: optimizer steps done, the trackers' x-axis.
        name: in the trackers.
        caption: a line below it.
    """
    if not accelerator.is_main_process:
        return
    if caption:
        font = ImageFont.load_default(size=16)
        width = max(picture.width, int(font.getlength(caption)) + 8)
        larger = Image.new(picture.mode, (width, picture.height + 24))
        larger.paste(picture)
        ImageDraw.Draw(larger).text((4, picture.height + 12), caption, fill="white", font=font, anchor="lm")
        picture = larger
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    pixels = np.atleast_3d(np.asarray(picture))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # accelerate's has no log_images
            import trackio

            tracker.log({name: trackio.Image(picture, caption=caption)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step=step)
