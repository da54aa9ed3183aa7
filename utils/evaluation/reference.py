"""The real images that samples are compared with: what a model was trained on, and what it has not seen."""

import logging

import numpy as np

from .. import randomness
from ..data.images import PreparedImages, choose_range
from ..data.nearest import nearest_distances
from ..data.pixels import GREY_MODES, MODES, BadImage, deep_values
from ..pictures import to_uint8
from ..sources.named_images import NamedImages
from ..sources.sources import ImageSource, NoSuchSplit, check_disjoint
from .features import load_extractor
from .metrics import check_count

logger = logging.getLogger(__name__)

MEMORY = 2**30  # bytes of a split's images at most


class Reference:
    """Both splits of the reference, at the size and in the mode of whatever they are compared with.

    Without ``held_out_split``, what is held out is the split ``test``; where there is none, a tenth of the reference,
    always the same, which is not compared with then; and of fewer than 100 images nothing.

    Args:
        args: ``reference``, ``reference_split``, ``held_out_split``, ``image_column``, ``label_column``,
            ``image_range``, ``seed``.

    Attributes:
        image_range: values that become black and white, see ``data.pixels.to_eight_bits``.
        held_out_split: its name, or None where nothing is held out.
        held_out: uint8 (N, C, H, W), at the images' own size, or None.

    Raises:
        UserError: a split is not there, has too few images, or shares some with the other; they cannot be read.
    """

    def __init__(self, args, accelerator):
        self.args, self.accelerator, self._prepared, self._baselines, self._parts = args, accelerator, {}, {}, {}
        self._sources = {args.reference_split: self._open(args.reference_split, "--reference_split")}
        self.held_out_split = self._find_held_out()
        for split, images in self._sources.items():
            check_count(len(images), f"{args.reference}, {split}")
        shown = _look(self._sources[args.reference_split])
        self.image_range = choose_range(args.image_range, deep_values(shown))
        first = next(_look(self._sources[self.held_out_split or args.reference_split]))
        mode = "L" if first.mode in GREY_MODES else "RGB"
        self._shape = (len(mode), first.height, first.width)
        self.held_out = self.resized(self._shape, self.held_out_split) if self.held_out_split else None

    def _find_held_out(self) -> str | None:
        split = self.args.held_out_split or "test"
        if self.args.held_out_split or split not in self._source(self.args.reference_split, "").split_names:
            try:
                self._sources[split] = self._open(split, "--held_out_split")
                compared = self._source(self.args.reference_split, "--reference_split")
                check_disjoint(compared, self._source(split, "--held_out_split"), self.accelerator)
                return split
            except NoSuchSplit:
                if self.args.held_out_split:
                    raise
        return self._hold_out(self.args.reference_split)

    def _open(self, split: str, flag: str, **options) -> NamedImages:
        whole, indices = self._parts.get(split, (split, None))
        images = NamedImages(self._source(whole, flag, **options), self.accelerator)
        return images if indices is None else images.select(indices, split)

    def _hold_out(self, split: str) -> str | None:
        """Take a tenth of the reference away. Returns its name; None if there are too few images."""
        name, length = f"a tenth of {split}", len(self._sources[split])
        start = f"{self.args.reference} has no other split test"
        if length < 100:
            logger.warning(
                f"{start}, and {length} images are too few to hold some out: there is no floor and no measure of "
                "copying. --held_out_split names images that were not trained on"
            )
            return None
        order, count = randomness.shuffled_indices(0, np.arange(length), length), length // 10
        whole = self._sources[split]
        self._parts = {split: (split, np.sort(order[count:])), name: (split, np.sort(order[:count]))}
        self._sources = {part: whole.select(indices, part) for part, (_, indices) in self._parts.items()}
        logger.warning(
            f"{start}: {count} of its {length} images are held out. A model that was trained on all has seen them: its "
            "copies are not found. --held_out_split names images that it has not seen"
        )
        return name

    def _source(self, split: str, flag: str, **options) -> ImageSource:
        flags = {"name": "--reference", "split": flag}
        return ImageSource(self.args.reference, split, image_column=self.args.image_column, flags=flags, **options)

    def _load(self, split: str, size: tuple[int, int], mode: str) -> np.ndarray:
        if (split, size, mode) not in self._prepared:
            images = self._sources[split]
            prepared = PreparedImages(
                images, mode, size, center_crop=True, seed=self.args.seed, image_range=self.image_range
            )
            limit = MEMORY // (size[0] * size[1] * len(mode))
            if limit < len(images):
                logger.warning(f"{self.args.reference}, {split}: of {len(images)} images, {limit} at random are used")
            self._prepared[split, size, mode], _ = prepared.examples(limit)
        return self._prepared[split, size, mode]

    def resized(self, shape: tuple[int, int, int], split: str | None = None) -> np.ndarray:
        """Images of a split (default: the reference), shuffled, of this (C, H, W); uint8 (N, C, H, W)."""
        return self._load(split or self.args.reference_split, tuple(shape[1:]), MODES[shape[0]])

    def labelled(
        self, shape: tuple[int, int, int], flag: str = "--reference_split", split: str | None = None
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images of a split (default: the reference) as by ``resized``, their labels (-1: none) and the classes' names.

        Args:
            flag: what the user knows the split as.

        Raises:
            UserError: it has no class labels.
        """
        split = split or self.args.reference_split
        labelled = self._open(split, flag, label_column=self.args.label_column, find_labels=True)
        drawn = randomness.shuffled_indices(self.args.seed, np.arange(len(labelled)), len(labelled))
        images = self.resized(shape, split)
        labels = np.array([-1 if label is None else label for label in labelled.labels()])
        return images, labels[drawn][: len(images)], labelled.label_names

    def noise(self, count: int) -> np.ndarray:
        """Uniform noise in the shape of the images, made in parts: what it is made from is 20 times as large."""
        parts = np.array_split(np.arange(count), -(-count // 100))
        noise = (randomness.sample_noise(self.args.seed, "ceiling", p, self._shape, "cpu", "uniform") for p in parts)
        return np.concatenate([to_uint8(part) for part in noise])

    def copies(self, images: np.ndarray) -> tuple[float | None, tuple[np.ndarray, np.ndarray]]:
        """How many of the images are nearer to a training image than real ones are.

        An image's ratio is its distance to the nearest training image over that to the nearest held-out one. The rate
        is the share of images whose ratio is below the lowest hundredth of that of the held-out images themselves:
        about 0.01 is what real images have.

        Returns:
            The rate; the eight images with the lowest ratio and their nearest training images, uint8. If nothing is
            held out, None and the eight that are nearest to training images.
        """
        train, pixels, trained, unseen, threshold = self._baseline(images)
        to_train, indices = nearest_distances(pixels(images), trained)
        if unseen is None:
            closest = np.argsort(to_train)[:8]
            return None, (images[closest], train[indices[closest]])
        held_out = self.resized(images.shape[1:], self.held_out_split)
        same = len(images) <= len(held_out) and np.array_equal(images, held_out[: len(images)])  # the floor
        ratios = to_train / np.maximum(nearest_distances(pixels(images), unseen, skip_first=same)[0], 1e-12)
        closest = np.argsort(ratios)[:8]
        return float((ratios < threshold).mean()), (images[closest], train[indices[closest]])

    def _baseline(self, images: np.ndarray) -> tuple:
        """What images of this shape are compared with; the distances of all real images are measured once."""
        if images.shape[1:] not in self._baselines:
            shape = images.shape[1:]
            train, pixels, unseen, threshold = self.resized(shape), load_extractor("pixels"), None, None
            train = np.concatenate([train, train[..., ::-1]])  # as it may have been shown with --random_flip
            trained = pixels(train)
            if self.held_out_split:
                unseen = pixels(self.resized(shape, self.held_out_split))
                to_unseen = nearest_distances(unseen, unseen, skip_first=True)[0]
                ratios = nearest_distances(unseen, trained)[0] / np.maximum(to_unseen, 1e-12)
                threshold = np.quantile(ratios, 0.01)
            self._baselines[shape] = train, pixels, trained, unseen, threshold
        return self._baselines[images.shape[1:]]


def _look(images: NamedImages):
    """Some of the images, evenly spread, decoded one after the other; a bad one is an error."""
    for image in images.look():
        if isinstance(image, BadImage):
            raise image
        yield image
