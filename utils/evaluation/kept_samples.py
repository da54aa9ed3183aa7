"""Samples that are saved while they are drawn, so that a stop or a failed evaluation does not lose them."""

import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from .. import sync

BLOCK = 250  # number of images in a file, rounded up to whole batches


class KeptSamples:
    """Samples from a folder; missing samples are drawn. Use it on all processes.

    Args:
        folder: folder for files of a few hundred images each, written atomically.
        accelerator: ``Accelerator`` of this process.
        count: number of samples.
        batch_size: number of images that each process draws at once.
        facts: everything that a sample depends on besides its number. Samples with other facts are not touched.
        draw: function called on all processes with the first number and the number of samples; it returns uint8
            (N, C, H, W) on the main process.
        announce: function called with the number of missing samples before the first is drawn.

    Attributes:
        images_per_second: sampling speed over all runs that drew these samples, known after ``blocks``.
    """

    def __init__(
        self, folder: Path, accelerator, count: int, batch_size: int, facts: dict,
        draw: Callable[[int, int], np.ndarray], announce: Callable[[int], None] = lambda missing: None,
    ):  # fmt: skip
        self.folder, self.accelerator, self.count = folder / digest_of(facts)[:16], accelerator, count
        at_once = batch_size * accelerator.num_processes
        self.size = at_once * -(-BLOCK // at_once)
        self.draw, self.announce, self.images_per_second = draw, announce, 0.0

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the samples in order, uint8 (B, C, H, W), on the main process; the others draw and yield nothing."""
        ranges = [(first, min(first + self.size, self.count)) for first in range(0, self.count, self.size)]
        main, seconds = self.accelerator.is_main_process, 0.0
        missing = [place for place in ranges if self._read(*place) is None] if main else []
        missing = broadcast_object_list([missing])[0]
        self.announce(sum(last - first for first, last in missing))
        for first, last in ranges:
            if (first, last) in missing:
                start = time.perf_counter()
                images = self.draw(first, last - first)
                spent = time.perf_counter() - start
                if main:
                    self._write(first, last, images, spent)
            elif main:
                images, spent = self._read(first, last)
            if main:
                seconds += spent
                yield images
        self.images_per_second = self.count / max(seconds, 1e-9)

    def _file(self, first: int, last: int) -> Path:
        return self.folder / f"{first:07}-{last:07}.npz"

    def _read(self, first: int, last: int) -> tuple[np.ndarray, float] | None:
        try:
            with np.load(self._file(first, last)) as file:
                return file["images"], float(file["seconds"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
            return None

    def _write(self, first: int, last: int, images: np.ndarray, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(first, last)
        np.savez(staging := file.with_suffix(".tmp.npz"), images=images, seconds=seconds)
        sync(staging)
        os.replace(staging, file)


def digest_of(facts) -> str:
    """Return the SHA-256 of the JSON text of ``facts``: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
