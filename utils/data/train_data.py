"""Training images, from the flags to batches on the device.

Order, crops and flips are functions of (seed, sample id), see ``randomness``. They are the same with and without the
cache, with any number of workers, after a resume, and for any split of a global batch into processes and micro-steps.
"""

import itertools
import logging
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import PIL
import psutil
import torch
from accelerate.utils import broadcast_object_list, gather_object

from .. import UserError, counted, optional, randomness
from ..args import size_of
from ..signals import STOP_SIGNALS
from .cache import Cache
from .clusters import FILE, FITTED, Clusters, features_of, find_clusters, load_clusters, make_clusters
from .columns import Column, Layout
from .images import PreparedImages, choose_range
from .latents import Encoder, LatentCache, RandomCropsError
from .own_images import INSPECTED, MAX_CLASSES, Images, embedded_digits, translate_labels
from .pixels import GREY_MODES, MODES, BadImage, cover_size, float_range, high_bit_values

logger = logging.getLogger(__name__)

MAX_DEFAULT_RESOLUTION = 64  # pixels
CACHE_LIMIT, FILE_LIMIT = 4 * 2**30, 32 * 2**30  # bytes of decoded images in memory and in a file, per machine
NOT_CACHED = (
    "The images are cropped at random, so their latents are not cached, and each step encodes images. --center_crop "
    "allows the cache"
)
DECODING = 2  # version of the conversion from a file to training pixels, so that older caches are not used


def load_train_data(
    args, accelerator, pretrained_config=None, own_images: Images | None = None, conditional: bool = False,
    columns: dict[str, Column] | None = None,
):  # fmt: skip
    """Prepare the training images that the flags name, or the embedded digits if there is no ``utils/sources/``.

    Args:
        args: the flags.
        accelerator: accelerator of this process.
        pretrained_config: config of a pretrained model. Its ``sample_size`` is the default of ``--resolution``, and its
            ``out_channels`` (1 or 3) those of ``--image_mode`` auto.
        own_images: images to use instead, see ``own_images.OwnImages``.
        conditional: True if the images need class labels. Without ``--label_column`` the only column of labels is used.
        columns: additional tensors of each row, by their name in a batch; ``own_images`` have their own.

    Returns:
        A ``TrainData``.

    Raises:
        UserError: see ``sources``. Also, the data set has fewer images than a global batch, or labels that a
            conditional model cannot learn from.
    """
    sources = optional.find("sources")
    if columns and (own_images or not sources):
        raise UserError("columns= is for images by name, with utils/sources/. Give OwnImages(..., columns=) instead")
    if own_images is None:
        own_images = sources.load(args, accelerator, conditional, columns or {}) if sources else embedded_digits()
    elif sources:
        sources.refuse_for_own_images(args)
    if args.max_bad_images:
        own_images.max_bad_images = args.max_bad_images
    size, image_mode = None, None
    if pretrained_config:
        size, image_mode = size_of(pretrained_config.sample_size), MODES[pretrained_config.out_channels]
    train_data = TrainData(own_images, args, accelerator, size, image_mode)
    if accelerator.num_processes > 1:
        found = gather_object([(f"process {accelerator.process_index} on {platform.node()}", train_data.settings)])
        for process, settings in found[1:]:
            if settings != found[0][1]:
                raise UserError(f"{process} has other images than {found[0][0]}: {settings} instead of {found[0][1]}")
    if conditional:
        _check_classes(own_images)
        names = train_data.label_names
        shown = ", ".join(names[:10]) + " ..." * (len(names) > 10)
        logger.info(f"{counted(len(names), 'class')}: {shown}")
    return train_data


class TrainData:
    """Batches of training images by optimizer step, and the properties of the images.

    Sample ids number the samples of the whole run, 0, 1, 2 ..., over all processes. Global batch n of size G has the
    ids n G to n G + G - 1. Order, crops, flips, noise and timesteps are functions of them, see ``randomness``.

    Attributes:
        images: source of the images.
        name: name of the source.
        length: number of images; None for a stream.
        size: (H, W) of the images, pixels.
        sample_size: ``size`` for a model's config, one number for squares.
        image_range: values that become black and white, see ``pixels.to_eight_bits``.
        channels: 1 or 3.
        label_names: names of the classes; empty without labels.
        image_shape: (C, H, W).
        model_shape: shape for a UNet's config.
        global_batch_size: images per optimizer step, over all processes and micro-steps.
        settings: settings that must be the same when a run resumes.
        license: licence of the images, as far as it is known.
    """

    def __init__(self, images: Images, args, accelerator, size=None, image_mode=None):
        self.images, self.args, self.accelerator = images, args, accelerator
        self.name, self.length, self.label_names = images.name, images.length, images.label_names
        self.global_batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        if self.length is not None and self.length < self.global_batch_size:
            factor = self.global_batch_size // args.train_batch_size  # micro-steps x processes
            fitting = f"Try --train_batch_size {self.length // factor}, or" if self.length >= factor else "Please"
            raise UserError(
                f"{self.name} has {self.length} images, fewer than one global batch of {self.global_batch_size} "
                f"({args.train_batch_size} x {factor} micro-steps and processes). {fitting} add images"
            )
        self.settings = dict(data=self.name, images=self.length, global_batch_size=self.global_batch_size)
        if images.sample:
            self.settings["sample"] = images.sample
        self._inspect(size, image_mode)
        self.sample_size = self.size[0] if self.size[0] == self.size[1] else self.size
        self.image_shape = (self.channels, *self.size)
        self.model_shape = dict(sample_size=self.sample_size, in_channels=self.channels, out_channels=self.channels)
        self.license = images.license
        self.settings["image_shape"] = list(self.image_shape)
        rows = itertools.islice(images.iter_probe_rows(), INSPECTED) if images.columns else []
        self.layout = Layout(images.columns, list(rows))
        if images.columns:
            self.settings["columns"] = self.layout.settings
        self._prepared = PreparedImages(
            images, self.mode, self.size, args.center_crop, args.random_flip, args.seed, self._refuse_colour,
            self.image_range, self.layout,
        )  # fmt: skip
        self.bytes_per_image *= self._prepared.channels / self.channels
        self._encoder = self._clusters = None  # see ``encode_with`` and ``cluster``

    def _inspect(self, size: tuple[int, int] | None, image_mode: str | None) -> None:
        """Find mode, size and range from some of the images, which are the same on every process."""
        sizes, modes, probed, seconds = [], set(), [], []  # images are not kept, because they may be large
        start = time.perf_counter()
        for image in self.images.iter_probe_images():
            if isinstance(image, BadImage):
                if not self.images.max_bad_images:
                    raise BadImage(f"{image}. {self.images.advice}" if self.images.advice else str(image))
            else:
                seconds.append(time.perf_counter() - start)
                sizes.append(image.size)
                modes.add(image.mode)
                probed += high_bit_values([image])
            start = time.perf_counter()
        if not sizes:
            raise UserError(f"{self.name}: no readable image found. Expected a data set of images")
        self._decoding_seconds = float(np.median(seconds)) * (self.length or 0)
        self.settings["fingerprint"] = self.images.fingerprint
        self._choose_mode(modes, image_mode)
        self._choose_size(sizes, size)
        self.image_range = choose_range(self.args.image_range, probed)
        chosen = self.image_range and probed and self.image_range != float_range(probed)
        self.settings["scaled_from"] = list(self.image_range) if chosen else None

    def _choose_mode(self, modes: set[str], image_mode: str | None) -> None:
        grey = modes <= set(GREY_MODES)
        chosen = image_mode if self.args.image_mode == "auto" else self.args.image_mode
        self.mode = chosen or ("L" if grey else "RGB")
        self._refuse_colour = chosen is None and grey  # only some images were inspected
        self.channels = len(self.mode)
        if self.mode == "L" and not grey and self.args.image_mode == "auto":
            logger.warning("The pretrained model is grey, so these colour images are converted to grey")

    def _choose_size(self, sizes: list[tuple[int, int]], size: tuple[int, int] | None) -> None:
        shorter = min(min(width_height) for width_height in sizes)
        self.size = size_of(self.args.resolution) or size
        if size and self.size != size:
            logger.warning(
                f"The pretrained model was trained on {size[0]} x {size[1]} pixels, but these images have {self.size[0]} x "
                f"{self.size[1]}. Its noise schedule is kept, but the same noise hides less of larger images "
                "(train_flow.py: --flow_shift)"
            )
        if self.size is None:
            # Multiples of 4 suit a UNet that halves the size twice. For deeper nets, check_fit may refuse them
            side, ratio = max(4, min(shorter, MAX_DEFAULT_RESOLUTION) // 4 * 4), 1.0
            if len({*sizes}) == 1:  # The aspect ratio is kept if all images have the same size and it is at most 4
                ratio = max(sizes[0]) / shorter if max(sizes[0]) <= 4 * shorter else 1.0
            longer = max(side, round(side * ratio / 4) * 4)
            self.size = (side, longer) if sizes[0][0] > sizes[0][1] else (longer, side)
            logger.info(
                f"Training at {self.size[0]} x {self.size[1]} pixels, height x width (the smallest side found: "
                f"{shorter}). See --resolution"
            )
        small = sum(width < self.size[1] or height < self.size[0] for width, height in sizes)
        if 0 < small < len(sizes):  # if all images are smaller, enlarging was intended
            logger.warning(
                f"{small} of {len(sizes)} inspected images are smaller than {self.size[0]} x {self.size[1]} pixels "
                f"(smallest side {shorter}) and will be enlarged. --resolution sets the size"
            )
        kept = [self.size if self.args.center_crop else cover_size(width_height, self.size) for width_height in sizes]
        self._crops_at_random = any(tuple(part) != tuple(self.size) for part in kept)
        self.bytes_per_image = self.channels * float(np.mean([width * height for width, height in kept]))

    def prepare(self) -> Cache | None:
        """Fill the cache now, instead of in ``batches``, and keep the clusters. A finished run does not call this."""
        cache = self._cache
        if self._clusters and self.accelerator.is_main_process:
            self._clusters.save(self._clusters_file)
        return cache

    def encode_with(self, encoder: Encoder) -> None:
        """Add ``latents`` to batches, float32 (B, *encoder.shape), drawn from the encoder's distribution by sample id.

        Means and deviations of all images are cached in the place of images, see ``--cache_images``. Without a cache,
        and for images that are cropped at random or have partners, images are encoded as they come.

        Up to rounding, the latents are the same with and without a cache. The digest of the encoder becomes one of the
        ``settings``.

        Args:
            encoder: encoder, on its device.
        """
        self._encoder = encoder
        self.settings["autoencoder"] = f"{encoder.fingerprint} x {encoder.scale:g}"

    def cluster(self, count: int, folder: Path, pretrained: str | None = None) -> None:
        """Make clusters of the images, and give each image its cluster as its class, see ``clusters``.

        The cluster depends on the image as it is trained, cropped and mirrored. ``prepare`` writes the clusters to a
        file, and their digest becomes one of the ``settings``. Call it on all processes.

        Args:
            count: number of clusters.
            folder: folder of the run. If it has clusters of these images, they are used, as when a run resumes.
            pretrained: pretrained model. If its folder has clusters, they are used.

        Raises:
            UserError: see ``clusters.make_clusters``. Another reason is that the clusters of a file do not fit.
        """
        if self._encoder:
            raise ValueError("cluster() after encode_with(). Batches from a cache of latents have no images to cluster")
        self._clusters_file = file = Path(folder, FILE)
        fingerprint = self.settings["fingerprint"] or ""
        clusters = load_clusters(file) if file.is_file() else None
        if clusters and clusters.fingerprint != fingerprint:  # the folder had other images before
            clusters = None
        if not clusters and (file := find_clusters(self.args.resume_from_checkpoint, pretrained)):
            clusters = load_clusters(file)
        if not clusters:
            size = FITTED if self.length else min(FITTED, self.images.buffer_size)
            blocks = (images[:, : self.channels] for images, _, _ in self._prepared.shown(size))
            points = [features_of(torch.from_numpy(images) / 127.5 - 1).numpy() for images in blocks]
            clusters = make_clusters(np.concatenate(points), count, fingerprint)
        shape = (count, features_of(torch.zeros(1, *self.image_shape)).shape[1])
        if clusters.arrays["weight"].shape != shape:
            raise UserError(
                f"--clusters {count}: the clusters in {file} are {len(clusters.names)}, of "
                f"{clusters.arrays['weight'].shape[1]} values each. These images have {shape[1]} values. Give the "
                "--clusters, --resolution and --image_mode of that run, or another --pretrained_model_name_or_path"
            )
        self._clusters = Clusters(**broadcast_object_list([clusters.arrays])[0])
        self.label_names, self.settings["clusters_digest"] = self._clusters.names, self._clusters.digest

    @cached_property
    def _cache(self) -> Cache | None:
        """Cache of latents or decoded images: a file if they take seconds, otherwise memory, or None for no cache."""
        encoder = self._encoder
        if encoder and not self.layout.channels and self._crops_at_random:
            logger.info(NOT_CACHED)
        elif encoder and not self.layout.channels:
            variants = 1 + self.args.random_flip
            start = time.perf_counter()
            mean, deviation = encoder.distribution(self._normalized(np.zeros((1, *self.image_shape), np.uint8)))
            seconds = self._decoding_seconds + variants * (time.perf_counter() - start) * (self.length or 0)
            size = 4 * mean[0].numel() * (1 if deviation is None else 2) * variants
            make = partial(LatentCache, encoder=encoder, normalize=self._normalized)
            facts = (encoder.fingerprint, encoder.scale, encoder.shape, self.args.random_flip)
            try:
                if cache := self._make_cache(make, size, seconds, facts):
                    return cache
            except RandomCropsError:  # the images that were inspected needed no crop
                logger.info(NOT_CACHED)
        return self._make_cache(Cache, self.bytes_per_image, self._decoding_seconds)

    def _normalized(self, images: np.ndarray) -> torch.Tensor:
        """Return images uint8 (B, C, H, W) as in a batch, on the device."""
        return self.layout.split(torch.from_numpy(images).to(self.accelerator.device))["images"]

    def _make_cache(self, make, bytes_per_image: float, seconds: float, facts: tuple = ()) -> Cache | None:
        """Make a cache, or return None for no cache.

        Args:
            make: function that makes the cache.
            bytes_per_image: bytes that it keeps of an image.
            seconds: time that its content takes.
            facts: values that its content depends on, besides the prepared images.
        """
        wish = self.args.cache_images
        if self.length is None or wish == "never":
            return None
        needed, always = self.length * bytes_per_image, wish == "always"
        how = (self.mode, self._refuse_colour, self.size, self.args.center_crop, self.image_range, *facts)
        if self.images.columns:
            how = (*how, self.layout.settings, self.layout.ranges, self.images.columns)
        folder, content = None if wish in ("auto", "always") else wish, (LatentCache if facts else Cache).content
        file = self.images.cache_file((how, PIL.__version__, DECODING), folder, seconds)
        if file:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(file.parent).free
                if always or folder or file.is_dir() or needed < min(FILE_LIMIT, free / 2):
                    return make(self._prepared, self.accelerator, file)
                logger.info(f"{needed / 2**30:.1f} GiB of {content} are too much for {file.parent}. See --cache_images")
            except OSError as error:
                logger.warning(
                    f"{file.parent} cannot keep the {content} ({error}), so they are computed in each run and process. "
                    "--cache_images DIR names another folder"
                )
        needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps its own copy
        if not always and needed > min(CACHE_LIMIT, psutil.virtual_memory().available / 2):
            logger.info(
                f"{needed / 2**30:.1f} GiB of {content} are too much to keep in memory, so they are computed when used."
            )
            return None
        return make(self._prepared, self.accelerator)

    def batches(self, numbers: Iterable[int]) -> Iterator[dict]:
        """Yield this process's micro-batches of global batches, given their ascending numbers from 0.

        Yields:
            ``images`` float32 (B, C, H, W) in [-1, 1] on the device; ``sample_ids`` int64 (B,) NumPy array; if the
            images have labels, ``labels`` int64 (B,) on the device, -1 for none; and ``columns``. With an encoder also
            ``latents``, see ``encode_with``. If they come from a cache, there are no ``images``.
        """
        source = self._stream if self.length is None else self._from_cache if self._cache else self._from_loader
        cached = isinstance(self._cache, LatentCache)
        for sample_ids, stored, values in source(self._sample_ids(numbers)):
            batch = {
                "sample_ids": sample_ids,
                **self._batch(None if cached else stored, values, self.accelerator.device),
            }
            if self._encoder:
                if cached:
                    moments = stored.to(self.accelerator.device, non_blocking=True).unbind(dim=1)
                else:
                    moments = [part for part in self._encoder.distribution(batch["images"]) if part is not None]
                batch["latents"] = self._draw(moments, sample_ids)
            yield batch

    def _draw(self, moments: Sequence[torch.Tensor], sample_ids: np.ndarray) -> torch.Tensor:
        """Draw latents, given their mean and perhaps their standard deviation, (B, *shape) each."""
        mean, *deviation = moments
        if not deviation:
            return mean
        noise = randomness.sample_noise(self.args.seed, "latents", sample_ids, mean.shape[1:], mean.device)
        return mean + deviation[0] * noise

    def _batch(self, images: torch.Tensor | None, values: dict[str, torch.Tensor], device) -> dict[str, torch.Tensor]:
        batch = {} if images is None else self.layout.split(images.to(device, non_blocking=True))
        for name, value in values.items():
            if name != "label" or self.label_names:
                batch["labels" if name == "label" else name] = value.to(device, non_blocking=True)
        if self._clusters and "images" in batch:
            batch["labels"] = self._clusters.assign(batch["images"])
        return batch

    def examples(self, count: int, images: Images | None = None) -> dict[str, torch.Tensor]:
        """Return images for display and comparison, cropped in the middle: a batch on the CPU without ``sample_ids``.

        Args:
            count: maximum number of images.
            images: images other than the training images. They are prepared in the same way, with the same classes.
        """
        prepared = self._prepared
        if images:
            prepared = PreparedImages(
                images, self.mode, self.size, seed=self.args.seed, image_range=self.image_range, layout=self.layout
            )
        found, values = prepared.examples(count)
        if (
            images and images.label_names and not self._clusters
        ):  # by name, because string labels are numbered separately in each split
            values["label"] = translate_labels(values["label"], images.label_names, self.label_names)
        values = {name: torch.from_numpy(value) for name, value in values.items()}
        return self._batch(torch.from_numpy(found), values, torch.device("cpu"))

    def examples_to_show(self, count: int) -> dict[str, torch.Tensor]:
        """Return held-out images if ``--validation_split`` names some, or else training images, see ``examples``."""
        return self.examples(count, self.held_out)

    @cached_property
    def held_out(self) -> Images | None:
        """Return the images that ``--validation_split`` names, or None without it."""
        split = vars(self.args).get("validation_split")
        return self.images.held_out(split, "--validation_split") if split else None

    def typical_labels(self) -> np.ndarray:
        """Return labels for samples, as frequent as in the training images and in random order: int64 (L,).

        Clusters are equally frequent, and so are the classes of a stream.
        """
        labels = np.zeros(0, np.int64)
        if self.length and self.label_names and not self._clusters:
            labels = np.array([-1 if label is None else label for label in self.images.labels()])
            labels = labels[randomness.shuffled_indices(self.args.seed, np.arange(self.length), self.length)]
        labels = labels[labels >= 0]
        return labels if len(labels) else np.arange(len(self.label_names))

    def crops(self, count: int) -> np.ndarray:
        """Return the possible training crops of random images, to find copies of them: uint8 (M, C, H, W)."""
        return self._prepared.all_parts(count)[:, : self.channels]

    def shown(self, count: int) -> np.ndarray:
        """Return random images as training shows them, cropped and mirrored at random: uint8 (N, C, H, W)."""
        blocks = [images[:, : self.channels] for images, _, _ in self._prepared.shown(count)]
        return np.concatenate(blocks) if blocks else np.zeros((0, *self.image_shape), np.uint8)

    def _sample_ids(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Yield the sample ids of each micro-batch of these global batches: number x size + position in it."""
        size = self.args.train_batch_size
        for number in numbers:
            for micro_step in range(self.args.gradient_accumulation_steps):
                chunk = micro_step * self.accelerator.num_processes + self.accelerator.process_index
                yield number * self.global_batch_size + chunk * size + np.arange(size)

    def _from_cache(self, batches):
        for sample_ids in batches:
            indices = randomness.shuffled_indices(self.args.seed, sample_ids, self.length)
            images = self._cache.gather(indices, sample_ids)
            chosen = torch.from_numpy(indices)
            yield sample_ids, images, {name: values[chosen] for name, values in self._cache.values.items()}

    def _from_loader(self, batches):
        def keys():
            for sample_ids in batches:
                indices = randomness.shuffled_indices(self.args.seed, sample_ids, self.length)
                yield list(zip(indices.tolist(), sample_ids.tolist(), strict=True))

        workers = self.args.dataloader_num_workers
        loader = torch.utils.data.DataLoader(
            self._prepared,
            batch_sampler=keys(),
            num_workers=workers,
            worker_init_fn=leave_signals_to_the_main_process,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # so that the loader does not advance the global generator
        )
        yield from self._checked(loader)

    def _stream(self, batches):
        yield from self._checked(
            map(
                collate,
                self.images.stream(self._prepared, batches, self.global_batch_size, self.args.dataloader_num_workers),
            )
        )

    def _checked(self, loader):
        """Raise a worker's error as this process's own, and count the skipped images."""
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
                    self._prepared.check(len(skipped), message)
            yield batch["sample_ids"].numpy(), batch["images"], batch["values"]


def _check_classes(images: Images) -> None:
    """Refuse labels that a conditional model cannot learn from.

    Raises:
        UserError: there are no labels, too many classes, or classes without an image.
    """
    name, names = images.name, images.label_names
    if not names:
        raise UserError(f"{name}: no class labels. Give OwnImages labels=, one for each image")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{name} has {len(names)} classes. Expected at most {MAX_CLASSES}")
    if images.length is not None:
        labels = np.array(images.labels())
        empty = [label for code, label in enumerate(names) if not (labels == code).any()]
        if empty:
            raise UserError(
                f"{name} has no image of {len(empty)} of its {len(names)} classes: {', '.join(empty[:10])}. Take more "
                "images (--dataset_split, --max_train_samples), or another --label_column"
            )


def leave_signals_to_the_main_process(worker_id: int) -> None:
    """Ignore stop signals in a worker, because its death would prevent the last checkpoint.

    Workers receive them, because a launcher sends signals to the whole process group.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate(items: list[dict]) -> dict:
    return {
        "images": torch.from_numpy(np.stack([item["image"] for item in items])),
        "values": {
            name: torch.from_numpy(np.stack([item["values"][name] for item in items])) for name in items[0]["values"]
        },
        "sample_ids": torch.tensor([item["sample_id"] for item in items]),
        "bad": [entry for item in items for entry in item["bad"]],
    }
