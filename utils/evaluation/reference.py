"""Real images that samples are compared with: those that a model was trained on, and held-out ones."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .. import randomness
from ..data.columns import Column, Layout
from ..data.images import PreparedImages, choose_range, given_range
from ..data.pixels import GREY_MODES, MODES, BadImage, high_bit_values
from ..pictures import to_uint8
from ..sources.columns import NoLabels
from ..sources.named_images import NamedImages
from ..sources.sources import ImageSource, NoSuchSplit, check_disjoint
from .copies import Copies
from .metrics import check_count

logger = logging.getLogger(__name__)

BLOCK = 250  # images


@dataclass(frozen=True)
class Preparation:
    """Settings to prepare real images like the images that a model was trained on.

    Attributes:
        shape: (C, H, W) of the prepared images.
        center_crop: True if images of another shape were cropped in the middle, False if at a random position.
        random_flip: True if training mirrored half of the images; None if that is unknown.
        image_range: values that became black and white, see ``data.pixels.to_eight_bits``.
    """

    shape: tuple[int, int, int]
    center_crop: bool = False
    random_flip: bool | None = None
    image_range: tuple[float, float] | None = None

    def __str__(self):
        channels, height, width = self.shape
        grey, centre, mirrored = " grey" * (channels == 1), ", centre" * self.center_crop, ", mirrored"
        return f"{height}x{width}{grey}{centre}{mirrored * bool(self.random_flip)}"


class Reference:
    """The reference split and the held-out split, prepared like the images that a model was trained on.

    Without ``held_out_split``, the split ``test`` is held out. If there is no such split, half of the reference split
    is held out, but no more images than samples. These images are the same in every run. Samples are then compared
    with the rest. If the reference split has fewer than 100 images, nothing is held out.

    Args:
        args: flags ``reference``, ``reference_split``, ``held_out_split``, ``image_column``, ``label_column``,
            ``image_range``, ``center_crop``, ``random_flip``, ``num_samples``, ``seed``.

    Attributes:
        image_range: values that become black and white if the record of a model's run has none.
        mode: ``L`` for grey images, otherwise ``RGB``.
        held_out_split: name of the held-out split, or None.

    Raises:
        UserError: a split does not exist, has too few images, or shares images with the other split, or an image cannot
            be read.
    """

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self._parts, self._features = args, accelerator, {}, {}
        self._copies, self._labels, self._sources = {}, {}, {}
        self._sources[args.reference_split] = self._open(args.reference_split, "--reference_split")
        self.held_out_split = self._find_held_out()
        for split, images in self._sources.items():
            check_count(len(images), f"{args.reference}, {split}")
        probe_images = [*_probe_images(self._sources[args.reference_split])]
        self.image_range = choose_range(args.image_range, high_bit_values(probe_images))
        self.mode = "L" if all(image.mode in GREY_MODES for image in probe_images) else "RGB"
        sizes = {image.size for image in probe_images}
        self.size = sizes.pop()[::-1] if len(sizes) == 1 else None  # (H, W) if all images have the same size

    def _find_held_out(self) -> str | None:
        split = self.args.held_out_split or "test"
        if self.args.held_out_split or split not in self._source(self.args.reference_split, "").split_names:
            try:
                images = self._open(split, "--held_out_split")
                check_disjoint(self._sources[self.args.reference_split], images)
                self._sources[split] = images
                return split
            except NoSuchSplit:
                if self.args.held_out_split:
                    raise
        return self._hold_out(self.args.reference_split)

    def _open(self, split: str, flag: str, **options) -> NamedImages:
        whole, indices = self._parts.get(split, (split, None))
        images = NamedImages(self._source(whole, flag, **options), self.accelerator)
        images.advice = "Repair or remove the file"
        if self.args.reference_split in self._sources:
            images.white = self._sources[self.args.reference_split].white  # so that all splits are scaled alike
        return images if indices is None else images.select(indices, split)

    def _hold_out(self, split: str) -> str | None:
        """Hold out half of a split, but no more images than samples.

        Return the name of that part, or None if the split has too few images.
        """
        length = len(self._sources[split])
        start = f"{self.args.reference} has no separate split named test"
        if length < 100:
            logger.warning(
                f"{start}, and {length} images are too few to hold some out. There is no floor and no measure of "
                "copying. For both, name held-out images with --held_out_split"
            )
            return None
        order, count = (
            randomness.shuffled_indices(0, np.arange(length), length),
            min(length // 2, self.args.num_samples),
        )
        whole, name = self._sources[split], f"{count} of {split}"
        self._parts = {split: (split, np.sort(order[count:])), name: (split, np.sort(order[:count]))}
        self._sources = {part: whole.select(indices, part) for part, (_, indices) in self._parts.items()}
        logger.warning(
            f"{start}, so {count} of its {length} images are held out. If a model was trained on all of them, its "
            "copies are not found. In that case, name other images with --held_out_split"
        )
        return name

    def _source(self, split: str, flag: str, **options) -> ImageSource:
        flags = {"name": "--reference", "split": flag}
        options |= dict(image_column=self.args.image_column, value_range=given_range(self.args.image_range))
        return ImageSource(self.args.reference, split, flags=flags, **options)

    def preparation(self, shape: tuple[int, int, int], record: dict) -> Preparation:
        """Return the preparation of a run's images: from the flags, otherwise from its record ({} if it has none)."""
        flags, args = record.get("arguments", {}), self.args
        center_crop = flags.get("center_crop", False) if args.center_crop is None else args.center_crop
        random_flip = flags.get("random_flip") if args.random_flip is None else args.random_flip
        known = "scaled_from" in record and args.image_range == "auto"
        image_range = tuple(record["scaled_from"] or ()) or None if known else self.image_range
        return Preparation(tuple(shape), center_crop, random_flip, image_range)

    def images(self, split: str) -> NamedImages:
        """Return the images of a split."""
        return self._sources[split]

    def prepared(
        self, split: str, preparation: Preparation, mirrored: bool = False, columns: dict[str, Column] | None = None
    ) -> PreparedImages:  # fmt: skip
        """Return a split's images, prepared.

        Args:
            split: name of the split.
            preparation: preparation of the images.
            mirrored: True to mirror images even if it is unknown whether training mirrored them.
            columns: further columns of the split. Their channels follow those of the images.
        """
        flip = bool(preparation.random_flip) or (mirrored and preparation.random_flip is None)
        images, layout = self._sources[split], None
        if columns:
            flag = "--held_out_split" if split == self.held_out_split else "--reference_split"
            images = self._open(split, flag, columns=columns)
            layout = Layout(columns, [*images.iter_probe_rows()])
        return PreparedImages(
            images, MODES[preparation.shape[0]], preparation.shape[1:], preparation.center_crop, flip,
            self.args.seed, image_range=preparation.image_range, layout=layout,
        )  # fmt: skip

    def blocks(
        self, preparation: Preparation, count: int, split: str | None = None, columns: dict[str, Column] | None = None
    ) -> Iterator[tuple]:  # fmt: skip
        """Yield images of a split (default: the reference split), shuffled and prepared as in training."""
        return self.prepared(split or self.args.reference_split, preparation, columns=columns).shown(count)

    def features(self, extract, preparation: Preparation, count: int) -> np.ndarray:
        """Return features of ``count`` images of the reference, or of all if there are fewer: float32 (N, D)."""
        return self._extracted(extract, preparation, count)[0]

    def labelled(self, extract, preparation: Preparation, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return features as ``features`` does, the images' labels (-1: no label), and the names of the classes."""
        features, indices = self._extracted(extract, preparation, count)
        labels, names = self.labels()
        return features, labels[indices], names

    def labels(self, split: str | None = None, flag: str = "--reference_split") -> tuple[np.ndarray, list[str]]:
        """Return the labels of a split (default: the reference split) by row, and the names of the classes.

        An image without a label has -1. If no column holds labels, all are -1 and there are no names.

        Args:
            split: name of the split.
            flag: flag that names the split, for messages.

        Raises:
            UserError: several columns may hold labels, or ``--label_column`` does not exist.
        """
        split = split or self.args.reference_split
        if split not in self._labels:  # opened once for all models
            try:
                images = self._open(split, flag, label_column=self.args.label_column, find_labels=True)
                labels = np.array([-1 if label is None else label for label in images.labels()])
                self._labels[split] = labels, images.label_names
            except NoLabels:
                self._labels[split] = np.full(len(self._sources[split]), -1), []
        return self._labels[split]

    def _extracted(self, extract, preparation: Preparation, count: int) -> tuple[np.ndarray, np.ndarray]:
        count = min(count, len(self._sources[self.args.reference_split]))
        found = self._features.get((extract.name, preparation))
        if found is None or len(found[0]) < count:
            blocks = [(extract(images), indices) for images, indices, _ in self.blocks(preparation, count)]
            found = self._features[extract.name, preparation] = tuple(map(np.concatenate, zip(*blocks, strict=True)))
        return found[0][:count], found[1][:count]

    def copies(self, preparation: Preparation) -> Copies:
        """Return the detector of copies of training images. Its distances are measured once."""
        if preparation not in self._copies:
            self._copies = {preparation: Copies(self, preparation)}  # only one is kept, because it is large
        return self._copies[preparation]

    def noise(self, shape: tuple[int, int, int], count: int) -> Iterator[np.ndarray]:
        """Yield uniform noise of this shape in blocks, because computing it needs 20 times its memory."""
        block = max(1, 2**22 // int(np.prod(shape)))
        for ids in np.array_split(np.arange(count), -(-count // block)):
            yield to_uint8(randomness.sample_noise(self.args.seed, "ceiling", ids, shape, "cpu", "uniform"))


def _probe_images(images: NamedImages):
    """Yield some of the images, evenly spread and decoded one after the other; raise if one is damaged."""
    for image in images.iter_probe_images():
        if isinstance(image, BadImage):
            raise BadImage(f"{image}. {images.advice}")
        yield image
