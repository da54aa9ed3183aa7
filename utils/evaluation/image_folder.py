"""Numbered images in a folder, drawn by all processes; an interrupted run goes on with what is missing."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from .. import UserError
from ..data.images import choose_range
from ..data.pixels import GREY_MODES, deep_values, prepare_image, to_eight_bits
from ..diffusion.unets import weights_digest
from ..pictures import from_uint8, make_grid
from ..sources import folders
from ..sources.decoding import decode_image
from ..sources.named_images import NamedImages
from ..sources.sources import ImageSource
from ..training.checkpoints import file_hash
from ..training.output_dir import inspect_together, read_arguments
from .kept_samples import digest_of, settings_of
from .metrics import check_count

logger = logging.getLogger(__name__)

SETTINGS = "sampling_args.json"
ALSO = ("walk.gif", "walk.png", "images.npz", "images.parquet")
# Flags that may change between two runs into one folder: they do not change image k
FREE = {"output_dir", "num_samples", "sample_batch_size", "format", "gif", "compile", "config", "trust_remote_code"}


class ImageFolder:
    """The images of one model, sampler and seed: ``images/000000.png`` and so on.

    Args:
        accelerator: call this on all processes.
        args: the flags of sample.py.
        num_inference_steps: model calls an image, given or not.
        model, sampler, space: whose weights and settings the images depend on, too.

    Raises:
        UserError: the folder holds something else, or images drawn with other settings.
    """

    def __init__(self, accelerator, args, num_inference_steps: int, model, sampler, space):
        self.accelerator, self.args, self.folder = accelerator, args, Path(args.output_dir)
        inspect_together(accelerator, self.folder, lambda: self._claim(num_inference_steps, model, sampler, space))

    def _claim(self, num_inference_steps, model, sampler, space) -> None:
        settings = {flag: value for flag, value in vars(self.args).items() if flag not in FREE}
        settings["num_inference_steps"] = num_inference_steps
        settings["weights"] = weights_digest(model)[:12]
        settings["scheduler"] = f"{type(sampler).__name__} {digest_of(settings_of(sampler))[:12]}"
        if space.fingerprint:
            settings["autoencoder"] = space.fingerprint
        if self.args.init_image:
            settings["init_image"] += f" {file_hash(Path(self.args.init_image))[:12]}"
        if self.args.interpolate:
            settings["interpolate"] = [*self.args.interpolate, f"in {self.args.num_samples} images"]
        path = self.folder / SETTINGS
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            names = sorted({*found, *settings})
            changed = [
                f"{n} was {found.get(n)!r}, is {settings.get(n)!r}" for n in names if found.get(n) != settings.get(n)
            ]
            if changed:
                raise UserError(
                    f"--output_dir {self.folder} holds images drawn otherwise: {'; '.join(changed)}. Give the old "
                    "values to go on with them, or another --output_dir"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"--output_dir {self.folder} is not empty, and not the output of sample.py. Choose another")
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def _path(self, sample_id: int) -> Path:
        return self.folder / "images" / f"{sample_id:06}.png"

    def missing(self) -> np.ndarray:
        """Numbers of the images that are not there yet, the same on every process. Call it before any is saved."""
        sample_ids = [sample_id for sample_id in range(self.args.num_samples) if not self._path(sample_id).is_file()]
        return np.array(broadcast_object_list([sample_ids])[0], dtype=np.int64)

    def save(self, sample_ids: np.ndarray, images: np.ndarray) -> None:
        """Write images, uint8 (N, C, H, W), each complete or not at all."""
        for sample_id, image in zip(sample_ids, images, strict=True):
            temporary = self._path(sample_id).with_suffix(".tmp")
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(temporary, format="PNG")
            os.replace(temporary, self._path(sample_id))

    def load(self, count: int) -> np.ndarray:
        """The first images, uint8 (N, C, H, W)."""
        images = [np.atleast_3d(Image.open(self._path(k))) for k in range(min(count, self.args.num_samples))]
        return np.stack(images).transpose(0, 3, 1, 2)

    def export(self, kind: str) -> None:
        """Write all images into ``images.npz`` (``images``, uint8 (N, H, W, C)) or ``images.parquet`` (a data set)."""
        if kind == "npz":
            np.savez_compressed(
                self.folder / "images.npz", images=self.load(self.args.num_samples).transpose(0, 2, 3, 1)
            )
            return
        import datasets

        paths = [{"bytes": self._path(k).read_bytes(), "path": None} for k in range(self.args.num_samples)]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": paths}, features=features).to_parquet(self.folder / "images.parquet")

    def print_stopped(self) -> None:
        """How to go on after a signal."""
        count = sum(self._path(k).is_file() for k in range(self.args.num_samples))
        self.accelerator.print(f"\nStopped with {count} of {self.args.num_samples} images. The same command goes on.")

    def print_finished(self) -> None:
        """Where everything is."""
        self.accelerator.print(
            f"\nDrawn: {self.args.num_samples} images of {self.args.model}."
            f"\n  images  {self.folder / 'images'}"
            f"\n  grid    {self.folder / 'grid.png'}"
            + "".join(f"\n  also    {path}" for path in sorted(self.folder.glob("*")) if path.name in ALSO)
        )


def load_image(path: str, shape: tuple[int, int, int], model: str) -> torch.Tensor:
    """A picture as a model takes it: float32 (1, C, H, W) in [-1, 1], resized and cut in the middle.

    Args:
        model: where it comes from; a picture with more than 8 bits is scaled as its training images were, if that is
            known, else by the range that it uses.

    Raises:
        UserError: it is not there, or not an image.
    """
    if not Path(path).is_file():
        raise UserError(f"--init_image {path}: there is no such file; expected a picture")
    image = decode_image(path, f"--init_image {path}")
    known, image_range = scaled_from(model)
    image_range = image_range if known else choose_range("auto", deep_values([image]), say=False)
    image = to_eight_bits(image, "L" if shape[0] == 1 else "RGB", path, image_range, logger.warning)
    return from_uint8(prepare_image(image, shape[1:], True))[None]


def scaled_from(model: str) -> tuple[bool, tuple[float, float] | None]:
    """Whether it is known how a model's training images were scaled, and the values that became black and white."""
    found = read_arguments(model)
    return "scaled_from" in found, found.get("scaled_from") and tuple(found["scaled_from"])


def load_folder(folder: str, accelerator, image_range: tuple[float, float] | None, limit: int = 100_000) -> np.ndarray:
    """The images of a folder, of all its splits, uint8 (N, C, H, W).

    Args:
        image_range: see ``data.pixels.to_eight_bits``.

    Raises:
        UserError: there are none, some cannot be read, or they differ in size.
    """
    if (Path(folder) / "images").is_dir():  # what sample.py made
        folder = str(Path(folder) / "images")
    splits = "+".join(folders.load_folder(Path(folder))) or "train"
    source = ImageSource(folder, splits, is_folder=True, flags={"name": "folder", "split": "split"})
    found = NamedImages(source, accelerator)
    decoded = [found[index]["image"]() for index in range(min(limit, len(found)))]
    sizes = sorted({image.size for image, _ in decoded})
    if len(sizes) > 1:
        raise UserError(f"{folder}: images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[1]}; expected one size")
    mode, clipped = "L" if all(image.mode in GREY_MODES for image, _ in decoded) else "RGB", []
    images = [to_eight_bits(image, mode, where, image_range, clipped.append) for image, where in decoded]
    if clipped:
        logger.warning(f"{folder}: clipped in {len(clipped)} of {len(images)} images; {clipped[0]}")
    check_count(len(images), folder)
    return np.stack([np.atleast_3d(np.asarray(image)) for image in images]).transpose(0, 3, 1, 2)


def save_walk(frames: list[list[np.ndarray]], path: Path) -> None:
    """A picture of how three images arise: below what the model was given at ten steps, what it predicted from it.

    Args:
        frames: as for ``save_gif``, of two kinds.
    """
    shown = sorted({round(k) for k in np.linspace(0, len(frames) - 1, 10)})
    images = [frames[step][kind][k] for k in range(min(3, len(frames[0][0]))) for kind in (0, 1) for step in shown]
    make_grid(np.stack(images), captions=["given", "predicted"] * (len(images) // len(shown) // 2)).save(path)


def save_gif(frames: list[list[np.ndarray]], path: Path) -> None:
    """A film of how images arise.

    Args:
        frames: for each step, images of one or several kinds, uint8 (N, C, H, W), shown side by side.
    """
    pictures = []
    for kinds in frames:
        grids = [make_grid(images).convert("RGB") for images in kinds]
        picture = Image.new("RGB", (sum(grid.width for grid in grids), grids[0].height))
        for k, grid in enumerate(grids):
            picture.paste(grid, (k * grid.width, 0))
        pictures.append(picture)
    durations = [100] * (len(pictures) - 1) + [2000]  # milliseconds; the last frame stays
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
