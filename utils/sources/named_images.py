"""Images that flags name, decoded by row, with a fingerprint."""

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..data.columns import check_columns
from ..data.own_images import INSPECTED, Images, content_of, evenly_spaced
from ..data.pixels import BadImage
from .decoding import decode_image, dropped_content, find_file, is_unit, open_row
from .sources import ImageSource, check_disjoint, data_license, load_source
from .streams import SHUFFLE_BUFFER_BYTES, SHUFFLE_BUFFER_SIZE, Stream, read_ahead

logger = logging.getLogger(__name__)

QUICK = 1.0  # seconds of decoding below which the decoded images are not written to a file


class NamedImages(Images):
    """The images of a data set.

    Args:
        source: description of the images, and the names of the flags.
        accelerator: accelerator of this process.
        max_bad_images: number of unreadable images that may be skipped.

    Attributes:
        dataset: ``datasets.Dataset`` or ``IterableDataset`` with the columns ``image``, not decoded, and perhaps
            ``label``.

    Raises:
        UserError: see ``sources.load_source``.
    """

    advice = "--max_bad_images N skips up to N such images"
    buffer_size = SHUFFLE_BUFFER_SIZE  # images in a stream's shuffle buffer; fewer if they are large

    def __init__(self, source: ImageSource, accelerator, max_bad_images: int = 0):
        self.source, self.accelerator, self.max_bad_images = source, accelerator, max_bad_images
        self.dataset, self.name = load_source(source, accelerator)
        label = self.dataset.features.get("label")
        self.label_names, self.columns = label.names if label else [], source.columns
        check_columns(self.columns)
        if source.max_samples and not source.streaming:
            self.sample = f"at random, seed {source.seed}"
        self.length = None if source.streaming else len(self.dataset)
        self.license = data_license(self.dataset, "" if source.is_folder else self.name)
        self._stamp = None

    def select(self, indices, name: str) -> "NamedImages":
        """Return a copy with only these rows, and with ``name`` as the name of its split."""
        images = object.__new__(NamedImages)
        images.__dict__ |= {
            **self.__dict__,
            "white": self.white,
            "dataset": self.dataset.select(indices),
            "length": len(indices),
        }
        images.source = replace(self.source, split=name)
        return images

    def __getstate__(self):  # a worker needs no accelerator
        return {**self.__dict__, "accelerator": None}

    def add_decoders(self, row: dict, index: int) -> dict:
        """Return the row with functions for its image and columns. Each returns the decoded value and its name."""
        decoders = {**row, "image": partial(self._decoded, row["image"], index)}
        for name, column in self.columns.items():
            key, decode = f"column:{name}", self._decoded
            if column.kind == "vector":
                decode = self._unchanged
            elif isinstance(row[key], (list, np.ndarray)):  # an array may have any number of channels
                decode = self._as_array
            decoders[key] = partial(decode, row[key], index)
        return decoders

    def _unchanged(self, value, index: int):
        return value, f"row {index} of {self.name}"

    def _as_array(self, value, index: int) -> tuple[np.ndarray, str]:
        where = f"row {index} of {self.name}"
        try:
            array = np.asarray(value)
        except ValueError as error:  # rows of different lengths
            raise BadImage(f"{where}: {error}") from error
        whole = array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255
        return array.astype(np.uint8) if whole else array, where

    def _decoded(self, record, index: int) -> tuple[Image.Image, str]:
        source, where = open_row({"image": record}, self.name, index, self.white)
        return decode_image(source, where), where

    def __getitem__(self, index: int) -> dict:
        return self.add_decoders(self.dataset[index], index)

    def rows(self, indices: range) -> list[dict]:
        rows = self.dataset.__getitems__(list(indices))
        return [self.add_decoders(row, index) for index, row in zip(indices, rows, strict=True)]

    def labels(self) -> list[int | None]:
        return self.dataset["label"][:]

    def iter_probe_images(self) -> Iterator[Image.Image | BadImage]:
        """Yield some of the images, and compute the fingerprint. Warn about content of the files that is not used."""
        digest, stamp = self._digests_of_names()
        unused, count, encoded = {}, 0, 0
        for index, row in self._probe_rows():
            try:
                source, where = open_row(row, self.name, index, self.white)
                image = decode_image(source, where)
            except BadImage as error:
                yield error
                continue
            count += 1
            encoded += len(source) if isinstance(source, bytes) else 0
            for loss in dropped_content(source):
                unused.setdefault(loss, []).append(where)
            if isinstance(source, Image.Image):
                digest.update(source.tobytes())
            else:
                digest.update(source if isinstance(source, bytes) else Path(source).read_bytes())
            for column in self.columns:
                digest.update(content_of(self.add_decoders(row, index)[f"column:{column}"]()[0]))
            yield image
        if encoded:
            self.buffer_size = max(100, min(SHUFFLE_BUFFER_SIZE, SHUFFLE_BUFFER_BYTES * count // encoded))
        for loss, places in unused.items():
            logger.warning(f"{len(places)} of {count} inspected images, such as {places[0]}: {loss}")
        self.fingerprint = digest.hexdigest()[:16]
        if stamp:
            stamp.update(digest.digest())
            self._stamp = stamp.hexdigest()

    @cached_property
    def white(self) -> float | tuple[float, float] | None:
        """Value that becomes white in all colour images of floats, see ``decoding.from_values``; None without any."""
        if self.source.value_range:
            return self.source.value_range
        records = [row["image"] for _, row in self._probe_rows() if isinstance(row["image"], (list, np.ndarray))]
        highs = []
        for record in records:
            with contextlib.suppress(ValueError):  # ``open_row`` reports rows of different lengths
                array = np.asarray(record)
                if array.dtype.kind == "f" and array.size and np.isfinite(array).all():
                    highs.append(float(array.max()))
        return (1.0 if is_unit(max(highs)) else 255.0) if highs else None

    def _probe_rows(self) -> Iterator[tuple[int, dict]]:
        if self.length is None:
            yield from enumerate(self.dataset.take(INSPECTED))
        else:
            indices = evenly_spaced(self.length)
            yield from zip(indices, self.dataset.select(indices), strict=True)

    def iter_probe_rows(self) -> Iterator[dict]:
        return (self.add_decoders(row, index) for index, row in self._probe_rows())

    def _digests_of_names(self):
        """Return a hash of the names and sizes of files, and a hash of all properties of the files.

        The caller updates the first with the content of some images. The second identifies decoded images on this
        machine. It is None for a stream.
        """
        digest = hashlib.sha256(str(self.length).encode())
        if self.length is None:
            return digest, None
        stamp = hashlib.sha256(self.dataset._fingerprint.encode())
        for name, column in self.columns.items():
            if isinstance(column.source, Path):
                for file in self.dataset[f"column:{name}"]:
                    status = os.stat(file)
                    digest.update(f"{name} {os.path.relpath(file, column.source)} {status.st_size}\n".encode())
                    stamp.update(f"{file} {status.st_size, status.st_mtime_ns}\n".encode())
        first = self.dataset[0]["image"]
        if isinstance(first, str) or (isinstance(first, dict) and not first.get("bytes")):
            records = [row if isinstance(row, str) else (row or {}).get("path") for row in self.dataset["image"][:]]
            files = [find_file(record or "", self.name) for record in records]
            folders = [os.path.dirname(os.path.abspath(file)) for file in files]
            unpacked = any("::" in file or file.startswith(str(datasets.config.HF_DATASETS_CACHE)) for file in files)
            root = None if unpacked else os.path.commonpath(folders)
            for file in files:
                name = os.path.relpath(file, root) if root else os.path.basename(file)
                status = os.stat(file) if os.path.isfile(file) else None
                digest.update(f"{name} {status and status.st_size}\n".encode())
                stamp.update(f"{file} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
        return digest, stamp

    def cache_file(self, facts: tuple, folder: str | None, seconds: float) -> Path | None:
        """Return the path of a file for the decoded images, or None if decoding is quick.

        Args:
            facts: values that the decoded images depend on, besides these images.
            folder: folder for the file. With a folder, there is a file even if decoding is quick.
            seconds: time that decoding takes.
        """
        if not self._stamp or (folder is None and seconds < QUICK):
            return None
        stamp = hashlib.sha256(f"{self._stamp} {facts!r}".encode())
        parent = Path(folder or datasets.config.HF_DATASETS_CACHE / "prepared-images")
        return parent / f"{Path(self.name).name}-{stamp.hexdigest()[:16]}"

    def examples(self, count: int, seed: int) -> Iterator[tuple[int, dict]]:
        if self.length is not None:
            yield from super().examples(count, seed)
            return
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=self.buffer_size)  # the stream may be sorted
        for index, row in enumerate(shuffled.take(count)):
            yield index, self.add_decoders(row, index)

    def stream(self, prepared, batches, global_batch_size: int, threads: int) -> Iterator[list[dict]]:
        """Yield the items of each micro-batch, see ``streams.Stream``."""
        processes = self.accelerator.num_processes
        per_step = global_batch_size // processes
        return read_ahead(Stream(prepared, batches, per_step, self.accelerator.process_index, processes, threads))

    def held_out(self, split: str, flag: str) -> "NamedImages":
        """Load another split of the same data set.

        Args:
            flag: flag that gives ``split``, for messages.

        Raises:
            UserError: see ``sources.load_source``, or the splits share images.
        """
        find = bool(self.label_names) and self.source.label_column is None
        flags = {**self.source.flags, "split": flag}
        source = replace(self.source, split=split, max_samples=None, find_labels=find, flags=flags)
        images = NamedImages(source, self.accelerator, self.max_bad_images)
        images.white = self.white  # so that both splits are scaled alike
        check_disjoint(self, images)
        return images

    def another(self, name: str, flag: str) -> "NamedImages":
        """Load another data set.

        Args:
            name: ``NAME`` or ``NAME:SPLIT``.
            flag: flag that gives ``name``, for messages.
        """
        name, _, split = name.partition(":") if not Path(name).exists() else (name, "", "")
        flags = {"name": flag, "split": flag}
        source = ImageSource(
            name, split or "train", columns=self.source.columns, flags=flags, value_range=self.source.value_range
        )
        return NamedImages(source, self.accelerator, self.max_bad_images)
