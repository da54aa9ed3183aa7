"""Samples that are kept while they are drawn: hours of drawing survive a stop, and a mistake in what is measured."""

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

BLOCK = 250  # images of a file, or somewhat more


class KeptSamples:
    """Samples that a folder holds, and the others drawn. Use it on all processes.

    Args:
        folder: for files of some hundred images each, complete or not there.
        count: number of samples.
        batch_size: images that are drawn at once, by each process.
        facts: all that a sample depends on beside its number; samples of other facts are not touched.
        draw: called on all processes with a first number and how many; returns uint8 (N, C, H, W) on the main one.
        announce: called before anything is drawn with the number of images that are missing.

    Attributes:
        images_per_second: of the drawing, now or earlier; known after ``blocks``.
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
        """Yield the samples in order, uint8 (B, C, H, W); other processes than the main one draw, and yield nothing."""
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
    """SHA-256 of what JSON makes of them: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(configured) -> list:
    """Class and settings of a model or scheduler of diffusers, without what it keeps for itself."""
    return [type(configured).__name__, {key: v for key, v in configured.config.items() if not key.startswith("_")}]
