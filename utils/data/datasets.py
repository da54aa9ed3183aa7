"""Images to train on, from the flags to batches on the device.

Order, crops and flips are functions of (seed, sample id), see ``randomness``: the same with and without the cache, with
any number of workers, after a resume, and for any split of a global batch into processes and micro-steps.
"""

import hashlib
import itertools
import logging
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import PIL
import psutil
import torch
from accelerate.utils import gather_object
from PIL import Image

from .. import UserError, randomness, rollbacks
from ..args import size_of
from ..pictures import from_uint8
from ..signals import STOP_SIGNALS
from .feeds import Cache, Stream, read_ahead
from .images import INSPECTED, PreparedImages, choose_range, find_file, locate, spread_over
from .pixels import GREY_MODES, MODES, BadImage, covering, decode_image, deep_values, left_out
from .sources import ImageSource, data_license, load_source

logger = logging.getLogger(__name__)

MAX_DEFAULT_RESOLUTION = 64  # pixels
CACHE_LIMIT, FILE_LIMIT = 4 * 2**30, 32 * 2**30  # bytes of decoded images in memory and in a file, per machine
DECODING = 1  # counts the ways in which the pixels of a file became those to train on
QUICK = 1.0  # seconds of decoding that are not worth a file


def load_train_data(args, accelerator, made_for=None, own_images=None, conditional: bool = False) -> "TrainData":
    """Everything between the flags and the batches.

    Args:
        args: the flags of ``args.add_common_arguments``.
        accelerator: says which process this is, and where batches go.
        made_for: config of a pretrained model, whose ``sample_size`` and ``in_channels`` (1 or 3) count where
            ``--resolution`` is not given and ``--image_mode`` is auto.
        own_images: take these instead of what the flags name, see ``own_images.OwnImages``.
        conditional: the images need class labels; without ``--label_column`` the only such column is taken.

    Raises:
        UserError: see ``load_source``; also an empty data set, or one with fewer images than a global batch.
    """
    if own_images is not None:
        if args.streaming or args.validation_split or args.label_column or args.max_train_samples:
            raise UserError(
                "own images are neither streamed nor split: leave out --streaming, --validation_split, --label_column "
                "and --max_train_samples, and give the script the images and labels that it should have"
            )
        dataset, name = own_images, "own images"
    else:
        source = replace(ImageSource.from_args(args), find_labels=conditional)
        dataset, name = load_source(source, accelerator)
    size, image_mode = (size_of(made_for.sample_size), MODES[made_for.in_channels]) if made_for else (None, None)
    train_data = TrainData(dataset, name, args, accelerator, size, image_mode)
    if accelerator.num_processes > 1:
        found = gather_object([(f"process {accelerator.process_index} on {platform.node()}", train_data.settings)])
        for process, settings in found[1:]:
            if settings != found[0][1]:
                raise UserError(f"{process} has other images than {found[0][0]}: {settings} instead of {found[0][1]}")
    return train_data


def reading(args) -> dict:
    """How the flags want images to be read, as ``PreparedImages`` takes it."""
    return dict(
        interpolation=args.interpolation, center_crop=args.center_crop, random_flip=args.random_flip, seed=args.seed,
        max_bad_images=args.max_bad_images if args.bad_images == "skip" else None,
        advice="--bad_images skip goes on without it", shuffle_buffer_size=args.shuffle_buffer_size,
    )  # fmt: skip


class TrainData:
    """Batches of training images, by optimizer step: what a script needs from its data, and all that it needs.

    Sample ids number the samples of the whole run, 0, 1, 2 ..., over all processes: optimizer step s takes the ids from
    s x global batch on, or later ones where ``rollbacks`` has left some out. Order, crops, flips, noise and timesteps
    follow from them, see ``randomness``.

    Attributes:
        name: of the source.
        length: number of images; None for a stream.
        size: (H, W) of the images, pixels.
        sample_size: the same for a model's config, one number for squares.
        image_range: values that become black and white, see ``pixels.to_eight_bits``.
        channels: 1 or 3.
        label_names: names of the classes, if ``--label_column`` is given.
        image_shape: (C, H, W).
        global_batch_size: images per optimizer step, over all processes and micro-steps.
        settings: what a resumed run must not find changed.
        license: of the images, as far as it is known.
    """

    def __init__(self, dataset, name: str, args, accelerator, size=None, image_mode=None):
        self.name, self.args, self.accelerator = name, args, accelerator
        self.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        label = dataset.features.get("label")
        self.label_names = label.names if label else []
        self.length = None if args.streaming else len(dataset)
        if self.length is not None and self.length < self.global_batch_size:
            factor = self.global_batch_size // args.train_batch_size  # micro-steps x processes
            fitting = f"try --train_batch_size {self.length // factor}, or" if self.length >= factor else "please"
            raise UserError(
                f"{name} has {self.length} images, fewer than one global batch of {self.global_batch_size} "
                f"({args.train_batch_size} x {factor} micro-steps and processes); {fitting} add images"
            )
        self.settings = dict(data=name, images=self.length, global_batch_size=self.global_batch_size)
        self._inspect(dataset, size, image_mode)
        self.sample_size = self.size[0] if self.size[0] == self.size[1] else self.size
        self.image_shape = (self.channels, *self.size)
        self.license = data_license(dataset, "" if args.train_data_dir else name)
        self.settings["image_shape"] = list(self.image_shape)
        self._images = PreparedImages(
            dataset, name, self.mode, self.size, refuse_colour=self._refuse_colour, image_range=self.image_range,
            **reading(args),
        )  # fmt: skip

    def _inspect(self, dataset, size: tuple[int, int] | None, image_mode: str | None) -> None:
        """Find mode, size, range and fingerprint from some of the images; the same ones on every process."""
        if self.length is None:
            rows = enumerate(dataset.take(INSPECTED))
        else:
            spread = spread_over(self.length)
            rows = zip(spread, dataset.select(spread), strict=True)
        sizes, modes, deep, unused = [], set(), [], {}  # not the images: they may be large
        digest, stamp = self._digests_of_names(dataset)
        seconds = []
        for index, row in rows:
            start = time.perf_counter()
            try:
                source, where = locate(row, self.name, index)
                image = decode_image(source, where)
                seconds.append(time.perf_counter() - start)
                sizes.append(image.size)
                modes.add(image.mode)
                deep += deep_values([image])
                for loss in left_out(source):
                    unused.setdefault(loss, []).append(where)
                if digest and isinstance(source, Image.Image):
                    digest.update(source.tobytes())
                elif digest:
                    digest.update(source if isinstance(source, bytes) else Path(source).read_bytes())
            except BadImage as error:
                if self.args.bad_images == "error":
                    raise BadImage(f"{error}. {reading(self.args)['advice']}") from None
        if not sizes:
            raise UserError(f"{self.name}: no readable image found; expected a data set of images")
        for loss, places in unused.items():
            logger.warning(f"{len(places)} of {len(sizes)} images looked at, such as {places[0]}: {loss}")
        self._decoding_seconds = float(np.median(seconds)) * (self.length or 0)
        self.settings["fingerprint"] = digest and digest.hexdigest()[:16]
        self._choose_mode(modes, image_mode)
        self._choose_size(sizes, size)
        self.image_range = choose_range(self.args.image_range, deep)
        self.settings["scaled_from"] = list(self.image_range) if self.image_range and deep else None
        if stamp:  # all that decoded images depend on
            how = (self.mode, self._refuse_colour, self.size, self.args.interpolation, self.args.center_crop)
            stamp.update(digest.digest() + repr((how, self.image_range, PIL.__version__, DECODING)).encode())
        self._stamp = stamp and f"{Path(self.name).name}-{stamp.hexdigest()[:16]}"

    def _digests_of_names(self, dataset):
        """Two hashes: of names and sizes of files, to be updated with the content of some; and of all that is known.

        By the second, decoded images are found again on this machine. None where there are no such.
        """
        if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
            return None, None
        digest = hashlib.sha256(str(self.length).encode())
        if self.length is None:
            return digest, None
        stamp = hashlib.sha256(dataset._fingerprint.encode())
        first = dataset[0]["image"]
        if isinstance(first, str) or (isinstance(first, dict) and not first.get("bytes")):
            records = [row if isinstance(row, str) else (row or {}).get("path") for row in dataset["image"][:]]
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

    def _choose_mode(self, modes: set[str], image_mode: str | None) -> None:
        grey = modes <= set(GREY_MODES)
        chosen = image_mode if self.args.image_mode == "auto" else self.args.image_mode
        self.mode = chosen or ("L" if grey else "RGB")
        self._refuse_colour = chosen is None and grey  # found to be grey from some images: the others had better be
        self.channels = len(self.mode)
        if self.mode == "L" and not grey and self.args.image_mode == "auto":
            logger.warning("The pretrained model is grey: these colour images are made grey, too")

    def _choose_size(self, sizes: list[tuple[int, int]], size: tuple[int, int] | None) -> None:
        shorter = min(min(width_height) for width_height in sizes)
        self.size = size_of(self.args.resolution) or size
        if self.size is None:
            # Multiples of 4, so that a UNet that halves twice fits; larger nets ask for more and say so.
            side, ratio = max(4, min(shorter, MAX_DEFAULT_RESOLUTION) // 4 * 4), 1.0
            if len({*sizes}) == 1:  # one shape for all: it is kept, if it is not a strip
                ratio = max(sizes[0]) / shorter if max(sizes[0]) <= 4 * shorter else 1.0
            longer = max(side, round(side * ratio / 4) * 4)
            self.size = (side, longer) if sizes[0][0] > sizes[0][1] else (longer, side)
            logger.info(
                f"Training at {self.size[0]} x {self.size[1]} pixels, height x width (the smallest side found: "
                f"{shorter}); see --resolution"
            )
        small = sum(width < self.size[1] or height < self.size[0] for width, height in sizes)
        if 0 < small < len(sizes):  # where all are smaller, it was meant
            logger.warning(
                f"{small} of {len(sizes)} images looked at are smaller than {self.size[0]} x {self.size[1]} pixels "
                f"(the smallest side is {shorter}) and will be enlarged. --resolution sets the size"
            )
        kept = [self.size if self.args.center_crop else covering(width_height, self.size) for width_height in sizes]
        self.bytes_per_image = self.channels * float(np.mean([width * height for width, height in kept]))

    def prepare(self) -> Cache | None:
        """Decode the images that are to be kept; ``batches`` does it otherwise. A finished run needs none."""
        return self._cache

    @cached_property
    def _cache(self) -> Cache | None:
        """The images, decoded once: in a file where that takes seconds, otherwise in memory; None: as they come."""
        if self.args.streaming or self.args.cache_images == "never":
            return None
        needed, always = self.length * self.bytes_per_image, self.args.cache_images == "always"
        if self._stamp and (self.args.image_cache_dir or self._decoding_seconds > QUICK):
            parent = Path(self.args.image_cache_dir or datasets.config.HF_DATASETS_CACHE / "prepared-images")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                file = parent / self._stamp
                if always or file.is_dir() or needed < min(FILE_LIMIT, shutil.disk_usage(parent).free / 2):
                    return Cache(self._images, self.accelerator, file)
                logger.info(f"{needed / 2**30:.1f} GiB of decoded images are too many for {parent}; see --cache_images")
            except OSError as error:
                logger.warning(
                    f"{parent} cannot keep the decoded images ({error}): they are decoded in each run and process. "
                    "--image_cache_dir names another folder"
                )
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps its own copy
        if not always and needed > min(CACHE_LIMIT, psutil.virtual_memory().available / 2):
            logger.info(f"{needed / 2**30:.1f} GiB of images are too many to keep in memory; decoding as they come.")
            return None
        return Cache(self._images, self.accelerator)

    def batches(self, first_step: int, last_step: int) -> Iterator[dict]:
        """This process's micro-batches of the optimizer steps ``first_step`` up to but not including ``last_step``.

        Yields:
            ``images`` float32 (B, C, H, W) in [-1, 1] on the device; ``sample_ids`` int64 (B,) NumPy array;
            ``labels`` int64 (B,) on the device, if ``--label_column`` is given.
        """
        numbers = rollbacks.global_batches(rollbacks.read_together(self.accelerator, self.args.output_dir))
        numbers = itertools.islice(numbers, first_step, last_step)
        source = self._stream if self.length is None else self._from_cache if self._cache else self._from_loader
        for sample_ids, images, labels in source(self._sample_ids(numbers)):
            images = from_uint8(images.to(self.accelerator.device, non_blocking=True))
            batch = {"sample_ids": sample_ids, "images": images}
            if self.label_names:
                batch["labels"] = labels.to(self.accelerator.device, non_blocking=True)
            yield batch

    def examples(self, count: int, with_labels: bool = False) -> torch.Tensor | tuple[torch.Tensor, np.ndarray]:
        """Training images to show and to compare with, float32 in [-1, 1], on the CPU; see ``PreparedImages``."""
        images, labels = self._images.examples(count, with_labels=True)
        return (from_uint8(images), labels) if with_labels else from_uint8(images)

    def _sample_ids(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Sample ids of each micro-batch of these global batches: number x size + place in it."""
        size = self.args.train_batch_size
        for number in numbers:
            for micro_step in range(self.args.gradient_accumulation_steps):
                chunk = micro_step * self.accelerator.num_processes + self.accelerator.process_index
                yield number * self.global_batch_size + chunk * size + np.arange(size)

    def _from_cache(self, batches):
        for sample_ids in batches:
            indices = randomness.shuffled_indices(self.args.seed, sample_ids, self.length)
            images = self._cache.take(indices, sample_ids)
            yield sample_ids, images, self._cache.labels[torch.from_numpy(indices)]

    def _from_loader(self, batches):
        def keys():
            for sample_ids in batches:
                indices = randomness.shuffled_indices(self.args.seed, sample_ids, self.length)
                yield list(zip(indices.tolist(), sample_ids.tolist(), strict=True))

        workers = self.args.dataloader_num_workers
        loader = torch.utils.data.DataLoader(
            self._images,
            batch_sampler=keys(),
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_main_process,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its seed is not drawn from the global generator, which stays as it was
        )
        yield from self._checked(loader)

    def _stream(self, batches):
        yield from self._checked(map(collate, read_ahead(Stream(self._images, batches, self.args, self.accelerator))))

    def _checked(self, loader):
        """Turn what went wrong in a worker into this process's error, and count the skipped images."""
        skipped, loaded = set(), iter(loader)
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except UserError as error:  # torch puts a worker's traceback before the message
                raise UserError(str(error).strip().split("UserError: ")[-1]) from None
            for index, message in batch["bad"]:
                if index not in skipped:
                    skipped.add(index)
                    self._images.check(len(skipped), message)
            yield batch["sample_ids"].numpy(), batch["images"], batch["labels"]


def leave_signals_to_the_main_process(worker_id: int) -> None:
    """A launcher signals the whole process group; a worker that dies of it would take the last checkpoint along."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[dict]) -> dict:
    return {
        "images": torch.from_numpy(np.stack([item["image"] for item in items])),
        "labels": torch.tensor([item["label"] for item in items]),
        "sample_ids": torch.tensor([item["sample_id"] for item in items]),
        "bad": [entry for item in items for entry in item["bad"]],
    }
