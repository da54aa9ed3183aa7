"""Training images that are decoded once, into memory or into a file."""

import logging
import math
import os
import shutil
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm.auto import tqdm

from .. import UserError
from .images import PreparedImages
from .pixels import BadImage, augment, flips

logger = logging.getLogger(__name__)

ROWS = 128  # encoded images read at once; this many photographs take about a gigabyte


class Cache:
    """All prepared images, decoded once, in memory or in a file that all processes of this machine map.

    Their pixels are concatenated. If all images have the training size, they form one tensor, which is on the device if
    it fits there.

    Args:
        folder: folder of the file, None for memory. An existing file is used. A missing one is written atomically by
            one process, while the others wait.

    Raises:
        OSError: the file cannot be written or read, or its file system has no locks.
    """

    content, doing = "decoded images", "Decoding images"

    def __init__(self, images: PreparedImages, accelerator, folder: Path | None = None):
        self.seed, self.random_flip, self.size = images.seed, images.random_flip, images.size
        self.channels = images.channels
        if folder is None:
            parts = []
            table = self._decode(images, accelerator.is_main_process, parts.append)
            self.pixels = np.concatenate(parts)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            table = self._read_table(images, folder) or self._write(images, folder)
            self.pixels = np.memmap(folder / "pixels", np.uint8, "r")
        self.starts, self.shapes = table["starts"], table["shapes"]
        values = {"label": table["labels"], **{name: table[f"vector {name}"] for name in images.layout.shapes}}
        self.values, self.stacked = {name: torch.from_numpy(array) for name, array in values.items()}, None
        if (self.shapes == self.size).all():
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # the tensor is never written to
                flat = torch.from_numpy(self.pixels)
            self.stacked = self._as_rows(flat.view(len(np.unique(self.starts)), -1))
            row_size = flat.numel() // len(self.stacked)
            on_gpu = accelerator.device.type == "cuda"
            if on_gpu and self.stacked.nbytes < torch.cuda.mem_get_info(accelerator.device)[0] / 4:
                self.stacked = self.stacked.to(accelerator.device)
            self.places = torch.from_numpy(self.starts // row_size).to(self.stacked.device)

    def _as_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the rows from which ``gather`` selects, one for each image, given the stored bytes (N, bytes)."""
        return stored.view(-1, self.channels, *self.size)

    def _stored(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Return the bytes to keep of each image uint8 (C, H, W): uint8, 1-d."""
        return [image.ravel() for image in images]

    def _decode(self, images: PreparedImages, show: bool, write) -> dict[str, np.ndarray]:
        """Pass the bytes of each image to ``write``, and return the table of images.

        The next good image replaces a bad one.
        """
        starts, shapes, values, bad, position, total = [], [], [], [], 0, images.images.length
        blank_values = images.blank([])["values"]
        progress = tqdm(total=total, desc=self.doing, unit="image", delay=2, disable=not show)
        with ThreadPoolExecutor() as pool, progress:
            for first in range(0, total, ROWS):
                rows = images.images.rows(range(first, min(first + ROWS, total)))
                results = list(pool.map(images.attempt, rows))
                stored = iter(self._stored([found[0] for found in results if not isinstance(found, BadImage)]))
                for k, found in enumerate(results):
                    starts.append(position)
                    if isinstance(found, BadImage):
                        bad.append(first + k)
                        images.check(len(bad), found)
                        shapes.append((0, 0))
                        values.append(blank_values)
                    else:
                        (image, entry), data = found, next(stored)
                        values.append(entry)
                        write(data)
                        shapes.append(image.shape[1:])
                        position += data.size
                progress.update(len(rows))
        table = dict(starts=np.array(starts), shapes=np.array(shapes), labels=np.array([v["label"] for v in values]))
        table |= {f"vector {name}": np.array([entry[name] for entry in values]) for name in images.layout.shapes}
        good = table["shapes"][:, 0] > 0
        if not good.any():
            raise UserError(f"{images.images.name} has no readable image")
        following = np.append(np.flatnonzero(good), np.flatnonzero(good)[0])
        instead = following[np.searchsorted(following[:-1], np.arange(total))]  # as in PreparedImages
        table = {name: values[instead] for name, values in table.items()}
        return table | dict(bad=np.array(bad, int), clipped=images.clipped, size=position)

    def _write(self, images: PreparedImages, folder: Path) -> dict[str, np.ndarray]:
        staging = folder.with_name(f".tmp-{folder.name}")
        lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"), fallback_to_soft=False)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.info(f"Another process is writing the {self.content} to {folder}. Waiting for it.")
            lock.acquire()
        try:
            if table := self._read_table(images, folder):  # another process has written the file meanwhile
                return table
            for leftover in (staging, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir()
            try:
                with open(staging / "pixels", "wb") as pixels, open(staging / "table.npz", "wb") as file:
                    table = self._decode(images, True, pixels.write)
                    np.savez(file, **table)
                    for written in (pixels, file):
                        written.flush()
                        os.fsync(written.fileno())
                staging.rename(folder)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
        finally:
            lock.release()
        logger.info(f"The {self.content} are kept in {folder}, {table['size'] / 2**20:.0f} MiB, for the next run.")
        return table

    def _read_table(self, images: PreparedImages, folder: Path) -> dict[str, np.ndarray] | None:
        """Return the table of a file, or None if the file is incomplete or some of its bad images were repaired."""
        try:
            with np.load(folder / "table.npz") as file:
                table = dict(file)
            if (folder / "pixels").stat().st_size != table["size"]:
                return None
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            return None
        bad = [images.attempt(images.images[int(index)]) for index in table["bad"]]
        if not all(isinstance(image, BadImage) for image in bad):
            return None  # some images have been repaired
        logger.info(f"Using the {self.content} in {folder}, {table['size'] / 2**20:.0f} MiB.")
        for count, image in enumerate(bad, 1):
            images.check(count, image)
        if table["clipped"]:
            logger.warning(f"Values were clipped in {table['clipped']} of these images. See --image_range")
        return table

    def gather(self, indices: np.ndarray, sample_ids: np.ndarray) -> torch.Tensor:
        """Return the images at ``indices``, cropped and flipped for their sample ids: uint8 (B, C, H, W)."""
        if self.stacked is None:
            pairs = zip(map(self._image, indices), sample_ids, strict=True)
            return torch.from_numpy(
                np.stack([augment(image, k, self.size, self.seed, self.random_flip) for image, k in pairs])
            )
        images = self.stacked[self._rows(indices)]
        if self.random_flip:
            mirrored = torch.from_numpy(flips(self.seed, sample_ids)).to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def _rows(self, indices: np.ndarray) -> torch.Tensor:
        """Return the rows of ``stacked`` that hold the images at ``indices``. A bad image has the row of another."""
        return self.places[torch.from_numpy(indices).to(self.stacked.device, non_blocking=True)]

    def _image(self, index: int) -> np.ndarray:
        shape = (self.channels, *self.shapes[index])
        return self.pixels[self.starts[index] :][: math.prod(shape)].reshape(shape)
