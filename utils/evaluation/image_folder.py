"""Numbered images in a folder, drawn by all processes; an interrupted run resumes with the missing images."""

import logging
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from .. import UserError, randomness, read_record, write_record
from ..data.images import PreparedImages
from ..data.pixels import GREY_MODES, prepare_image
from ..diffusion.unets import weights_digest
from ..pictures import from_uint8, make_grid
from ..sources import folders
from ..sources.decoding import open_row, size_and_mode
from ..sources.named_images import NamedImages
from ..sources.sources import ImageSource
from ..training.checkpoints import file_hash
from ..training.output_dir import config_of, inspect_together, read_arguments
from .given_images import check_same_size, open_picture, read_picture
from .kept_samples import digest_of
from .metrics import check_count

logger = logging.getLogger(__name__)

SETTINGS = "sampling_args.json"
EXTRA_FILES = ("walk.gif", "walk.png", "images.npz", "images.parquet")
# These flags may differ between two runs that write to one folder, because they do not change image k
MAY_CHANGE = {
    "output_dir",
    "num_samples",
    "sample_batch_size",
    "format",
    "gif",
    "compile",
    "config",
    "trust_remote_code",
}


class ImageFolder:
    """The images of one model, sampler and seed: ``images/000000.png`` and so on.

    Args:
        accelerator: ``Accelerator`` of this process. All processes create this object together.
        args: flags of sample.py.
        num_inference_steps: number of sampling steps, given or by default.
        model, sampler, space: model, sampler and image space; the images depend on their weights and settings.
        given: hash of the pictures that are given to a model with a condition.

    Raises:
        UserError: the folder holds other files, or images drawn with other settings.
    """

    def __init__(self, accelerator, args, num_inference_steps: int, model, sampler, space, given: str | None = None):
        self.accelerator, self.args, self.folder = accelerator, args, Path(args.output_dir)
        inspect_together(
            accelerator, self.folder, lambda: self._prepare(num_inference_steps, model, sampler, space, given)
        )

    def _prepare(self, num_inference_steps, model, sampler, space, given) -> None:
        settings = {flag: value for flag, value in vars(self.args).items() if flag not in MAY_CHANGE}
        settings["num_inference_steps"] = num_inference_steps
        settings["mixed_precision"], settings["randomness"] = self.accelerator.mixed_precision, randomness.VERSION
        settings["weights"] = weights_digest(model)[:12]
        settings["scheduler"] = f"{type(sampler).__name__} {digest_of(config_of(sampler))[:12]}"
        if space.fingerprint:
            settings["autoencoder"] = space.fingerprint
        if self.args.init_image:
            files = [Path(name) for name in (self.args.init_image, self.args.mask) if name]
            settings["init_image"] = file_hash(*files)[:12]
        if given:
            settings["given_images"] = given
        for flag in ("mask", "condition_image", "true_image"):  # names of files may be private, and this file be shared
            settings[flag] = bool(settings[flag])
        if self.args.interpolate:
            settings["interpolate"] = [*self.args.interpolate, f"in {self.args.num_samples} images"]
        path = self.folder / SETTINGS
        if path.is_file():
            found = read_record(path)
            names = sorted({*found, *settings})
            changed = [
                f"{n} of the model changed" if n in ("weights", "scheduler") else
                f"{n} was {found.get(n)!r}, is {settings.get(n)!r}" for n in names if found.get(n) != settings.get(n)
            ]  # fmt: skip
            if changed:
                raise UserError(
                    f"--output_dir {self.folder} holds images drawn with other settings: {', '.join(changed)}. Give "
                    "the old values to resume, or choose another --output_dir"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(
                f"--output_dir {self.folder} is not empty, and is not the output of sample.py. Choose another folder"
            )
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_record(path, settings)

    def _path(self, sample_id: int) -> Path:
        return self.folder / "images" / f"{sample_id:06}.png"

    def missing(self) -> np.ndarray:
        """Return the numbers of the missing images, the same on every process. Call it before any image is saved."""
        sample_ids = [sample_id for sample_id in range(self.args.num_samples) if not self._path(sample_id).is_file()]
        return np.array(broadcast_object_list([sample_ids])[0], dtype=np.int64)

    def save(self, sample_ids: np.ndarray, images: np.ndarray) -> None:
        """Write images, uint8 (N, C, H, W), each of them atomically."""
        for sample_id, image in zip(sample_ids, images, strict=True):
            temporary = self._path(sample_id).with_suffix(".tmp")
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(temporary, format="PNG")
            os.replace(temporary, self._path(sample_id))

    def load(self, sample_ids: Iterable[int]) -> np.ndarray:
        """Return the images with these numbers, as far as they were asked for, uint8 (N, C, H, W)."""
        images = [np.atleast_3d(Image.open(self._path(k))) for k in sample_ids if k < self.args.num_samples]
        return np.stack(images).transpose(0, 3, 1, 2)

    def export(self, kind: str) -> None:
        """Write all images into ``images.npz`` (``images``, uint8 (N, H, W, C)) or ``images.parquet`` (a data set)."""
        if kind == "npz":
            self._write_npz()
            return
        import datasets
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        schema = datasets.Features({"image": datasets.Image()}).arrow_schema
        with ParquetWriter(self.folder / "images.parquet", schema) as writer:
            for first in range(0, self.args.num_samples, 250):  # all images together may not fit into memory
                numbers = range(first, min(first + 250, self.args.num_samples))
                rows = [{"bytes": self._path(k).read_bytes(), "path": None} for k in numbers]
                writer.write_table(pyarrow.Table.from_pydict({"image": rows}, schema=schema))

    def _write_npz(self) -> None:
        """Write one image after another, because all images together may not fit into memory."""
        shape = (self.args.num_samples, *self.load([0]).transpose(0, 2, 3, 1).shape[1:])
        header = dict(descr="|u1", fortran_order=False, shape=shape)
        with (
            zipfile.ZipFile(self.folder / "images.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("images.npy", "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for k in range(self.args.num_samples):
                file.write(np.asarray(Image.open(self._path(k))).tobytes())

    def print_stopped(self) -> None:
        """Print how to resume after a signal."""
        count = sum(self._path(k).is_file() for k in range(self.args.num_samples))
        self.accelerator.print(f"\nStopped with {count} of {self.args.num_samples} images. The same command resumes.")

    def print_finished(self) -> None:
        """Print where the files are."""
        self.accelerator.print(
            f"\nDrew {self.args.num_samples} images with {self.args.model}."
            f"\n  images  {self.folder / 'images'}"
            f"\n  grid    {self.folder / 'grid.png'}"
            + "".join(f"\n  also    {path}" for path in sorted(self.folder.glob("*")) if path.name in EXTRA_FILES)
        )


def load_image(path: str, flag: str, shape: tuple[int, int, int], model: str) -> torch.Tensor:
    """Return a picture as model input: float32 (1, C, H, W) in [-1, 1], resized and cropped in the middle.

    Args:
        path: image file.
        flag: flag that names it, for messages.
        shape: (C, H, W) of the model's images.
        model: folder or Hub id of the model, see ``given_images.read_picture``.

    Raises:
        UserError: the file does not exist or is not an image.
    """
    image = read_picture(path, flag, "L" if shape[0] == 1 else "RGB", model)
    return from_uint8(prepare_image(image, shape[1:], True))[None]


def load_hole(mask: str, picture: str, size: tuple[int, int], model: str) -> torch.Tensor:
    """Return where a mask is white, as bool (1, 1, H, W), resized and cropped like its picture.

    Args:
        mask, picture: image files of the same size.
        size: (H, W) of the model's images.
        model: folder or Hub id of the model.

    Raises:
        UserError: a file is not an image, the sizes differ, or nothing is white.
    """
    check_same_size(open_picture(mask, "--mask"), open_picture(picture, "--init_image"))
    hole = load_image(mask, "--mask", (1, *size), model) > 0
    if not hole.any():
        raise UserError(f"--mask {mask}: no part of it is white. Expected white in the hole to fill")
    return hole


class SampleFolder:
    """Samples from all splits of a folder, in random order.

    Args:
        folder: folder of images, or output folder of sample.py.
        accelerator: ``Accelerator`` of this process.
        resolution: (H, W) to resize the images to; None to keep their size.
        seed: seed of the random order.

    Attributes:
        shape: (C, H, W) of the samples.
        record: record of the run that trained the model, if it is known, see ``output_dir.read_arguments``.

    Raises:
        UserError: there are too few images, one cannot be opened, or their sizes differ.
    """

    def __init__(self, folder: str, accelerator, resolution: tuple[int, int] | None, seed: int):
        self.record, self.seed = {}, seed
        settings = Path(folder) / SETTINGS
        if settings.is_file():
            self.record = read_arguments(read_record(settings).get("model", ""))
        if (Path(folder) / "images").is_dir():  # the output of sample.py
            folder = str(Path(folder) / "images")
        splits = "+".join(folders.load_folder(Path(folder))) or "train"
        source = ImageSource(folder, splits, is_folder=True, flags={"name": "folder", "split": "split"})
        self.images = NamedImages(source, accelerator)
        self.images.advice = "Repair or remove the file"
        check_count(len(self.images), folder)
        sizes, modes = set(), set()
        for index, row in enumerate(self.images.dataset):
            size, mode = size_and_mode(*open_row(row, folder, index))
            sizes.add(size)
            modes.add(mode)
        if len(sizes) > 1 and not resolution:
            first, second = sorted(sizes)[:2]
            found = f"images of {len(sizes)} sizes, such as {first} and {second}"
            raise UserError(f"{folder}: {found}. Expected one size. Give --resolution to resize them")
        self.mode = "L" if modes <= set(GREY_MODES) else "RGB"
        self.shape = (len(self.mode), *(resolution or sizes.pop()[::-1]))

    def __len__(self) -> int:
        return len(self.images)

    def blocks(self, count: int, image_range: tuple[float, float] | None) -> Iterator[np.ndarray]:
        """Yield ``count`` samples in blocks, uint8 (B, C, H, W); resized images are cropped in the middle.

        Args:
            count: number of samples.
            image_range: see ``data.pixels.to_eight_bits``.
        """
        prepared = PreparedImages(
            self.images, self.mode, self.shape[1:], center_crop=True, seed=self.seed, image_range=image_range
        )
        for images, _, _ in prepared.shown(count):
            yield images


def save_trajectories(frames: list[list[np.ndarray]], path: Path) -> None:
    """Save a picture of three trajectories: the model's input at ten steps, and below it the predicted image.

    Args:
        frames: images as for ``save_gif``, of two kinds: inputs and predictions.
        path: file to write.
    """
    shown = sorted({round(k) for k in np.linspace(0, len(frames) - 1, 10)})
    images = [frames[step][kind][k] for k in range(min(3, len(frames[0][0]))) for kind in (0, 1) for step in shown]
    make_grid(np.stack(images), captions=["given", "predicted"] * (len(images) // len(shown) // 2)).save(path)


def save_gif(frames: list[list[np.ndarray]], path: Path) -> None:
    """Save an animation of sampling trajectories.

    Args:
        frames: images of one or several kinds at each step, uint8 (N, C, H, W), shown side by side.
        path: file to write.
    """
    pictures = []
    for kinds in frames:
        grids = [make_grid(images).convert("RGB") for images in kinds]
        picture = Image.new("RGB", (sum(grid.width for grid in grids), grids[0].height))
        for k, grid in enumerate(grids):
            picture.paste(grid, (k * grid.width, 0))
        pictures.append(picture)
    durations = [100] * (len(pictures) - 1) + [2000]  # milliseconds; the last frame stays longer
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
