"""Samples that are kept while they are drawn: hours of drawing survive a stop, and a mistake in what is measured."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from .. import sync

BLOCK = 250  # images of a file, or somewhat more


def draw_kept(
    folder: Path, accelerator, count: int, shape: tuple[int, int, int], batch_size: int, facts: dict,
    draw: Callable[[int, int], np.ndarray], announce: Callable[[int], None] = lambda missing: None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """The samples that ``folder`` holds, and the others of ``count`` drawn. Call it on all processes.

    Args:
        folder: for files of some hundred images each, complete or not there.
        shape: (C, H, W) of one image.
        batch_size: images that are drawn at once, by each process.
        facts: all that a sample depends on beside its number; samples of other facts are not touched.
        draw: called on all processes with a first number and how many; returns uint8 (N, C, H, W) on the main one.
        announce: called before anything is drawn with the number of images that are missing.

    Returns:
        uint8 (count, C, H, W), filled on the main process only; and images per second of the drawing, now or earlier.
    """
    place = folder / digest_of(facts)[:16]
    images, seconds = np.empty((count, *shape), np.uint8), 0.0
    at_once = batch_size * accelerator.num_processes
    size = at_once * -(-BLOCK // at_once)
    ranges = [(first, min(first + size, count)) for first in range(0, count, size)]
    missing = []
    for first, last in ranges if accelerator.is_main_process else ():
        try:
            with np.load(place / f"{first:07}-{last:07}.npz") as file:
                images[first:last] = file["images"]
                seconds += float(file["seconds"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            missing.append((first, last))
    missing = broadcast_object_list([missing])[0]
    announce(sum(last - first for first, last in missing))
    for first, last in missing:
        start = time.perf_counter()
        drawn = draw(first, last - first)
        if accelerator.is_main_process:
            images[first:last] = drawn
            seconds += (spent := time.perf_counter() - start)
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"{first:07}-{last:07}.npz"
            np.savez(staging := file.with_suffix(".tmp.npz"), images=drawn, seconds=spent)
            sync(staging)
            os.replace(staging, file)
    return images, count / max(seconds, 1e-9)


def digest_of(facts) -> str:
    """SHA-256 of what JSON makes of them: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(configured) -> list:
    """Class and settings of a model or scheduler of diffusers, without what it keeps for itself."""
    return [type(configured).__name__, {key: v for key, v in configured.config.items() if not key.startswith("_")}]
