"""Detection of copies: samples that are nearer to training images than to held-out images."""

import logging

import numpy as np

from ..data.nearest import nearest_distances
from .features import load_extractor

logger = logging.getLogger(__name__)

BYTES = 2**28  # memory for the features of a split's image parts
LOWEST_THRESHOLD = 0.01  # lower limit of the threshold: rounding errors stay below it
SAME = 0.02  # two images are the same if their distance is below this share of the median distance
SHOWN = 8  # pairs in the picture


class Copies:
    """Measure the share of images that are suspiciously near to a training image.

    An image's ratio is its distance to the nearest part of a training image, divided by its distance to the nearest
    part of a held-out image. Parts are all crops that training may show, also mirrored if training mirrors. An image
    counts as a copy if its ratio is below the first percentile of the held-out images' own ratios. Real images
    therefore have a rate of about 0.01. Held-out images that are also training images are left out.

    Args:
        reference: real images, a ``Reference``.
        preparation: preparation of the images, a ``Preparation``.
    """

    def __init__(self, reference, preparation):
        self.reference, self.preparation, self.pixels = reference, preparation, load_extractor("pixels")
        self.trained, self.trained_groups = self._vectors(reference.args.reference_split)
        self.unseen = None
        self.clear()
        if reference.held_out_split:
            self._measure_held_out()

    def _vectors(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Return features of a split's image parts (M, D), and each image's index, first row and end row (N, 3)."""
        vectors, groups, position = [], [], 0
        prepared = self.reference.prepared(split, self.preparation, mirrored=True)
        for parts, index in prepared.crops(len(self.reference.images(split)), self._max_crops(split)):
            vectors.append(self.pixels(parts))
            groups.append((index, position, position := position + len(parts)))
        return np.concatenate(vectors), np.array(groups)

    def _measure_held_out(self) -> None:
        vectors, groups = self._vectors(self.reference.held_out_split)
        first = vectors[groups[:, 1]]
        own = groups[:, 1:]
        to_train = nearest_distances(first, self.trained)[0]
        to_unseen = nearest_distances(first, vectors, own)[0]
        known = to_train <= SAME * np.median(to_unseen)
        if known.any():
            logger.warning(
                f"{known.sum()} of {len(known)} held-out images are also training images. They are left out of the "
                "measure of copying, and they lower the floor"
            )
        if known.all():
            return
        kept = groups[~known]
        rows = np.concatenate([np.arange(start, stop) for _, start, stop in kept])
        ends = np.cumsum(kept[:, 2] - kept[:, 1])
        own = np.stack([ends - (kept[:, 2] - kept[:, 1]), ends], axis=1)
        self.unseen, self.unseen_rows = vectors[rows], dict(zip(kept[:, 0].tolist(), own, strict=True))
        # Each image contributes one part. The position of the crop varies from image to image
        places = own[:, 0] + np.arange(len(own)) % (own[:, 1] - own[:, 0])
        points = self.unseen[places]
        ratios = nearest_distances(points, self.trained)[0] / self._to_unseen(points, own)
        self.threshold = max(float(np.quantile(ratios, 0.01)), LOWEST_THRESHOLD)

    def _to_unseen(self, points: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        return np.maximum(nearest_distances(points, self.unseen, own)[0], 1e-12)

    def clear(self) -> None:
        """Forget the measured images."""
        self.ratios, self.closest = [], []

    def add(self, images: np.ndarray, indices: np.ndarray | None = None) -> None:
        """Measure images, uint8 (B, C, H, W).

        Args:
            indices: indices of the images if they are held-out ones (B,), which are not compared with themselves.
                Images that were left out are skipped.
        """
        own = None
        if indices is not None and self.unseen is not None:
            known = [index in self.unseen_rows for index in indices.tolist()]
            images, indices = images[known], indices[known]
            own = np.array([self.unseen_rows[index] for index in indices.tolist()]).reshape(-1, 2)
        if not len(images):
            return
        points = self.pixels(images)
        ratios, rows = nearest_distances(points, self.trained)
        if self.unseen is not None:
            ratios = ratios / self._to_unseen(points, own)
        self.ratios.append(ratios)
        found = [(float(ratios[k]), int(rows[k]), images[k].copy()) for k in ratios.argsort()[:SHOWN]]
        self.closest = sorted([*self.closest, *found], key=lambda entry: entry[0])[:SHOWN]

    def result(self) -> tuple[float | None, tuple[np.ndarray, np.ndarray]]:
        """Return the rate of copies, and the images with the lowest ratios beside their nearest training images.

        The rate is None if nothing is held out.
        """
        samples = np.stack([image for _, _, image in self.closest])
        nearest = np.stack([self._part(row) for _, row, _ in self.closest])
        rate = None if self.unseen is None else float((np.concatenate(self.ratios) < self.threshold).mean())
        self.clear()
        return rate, (samples, nearest)

    def _part(self, row: int) -> np.ndarray:
        """Decode the part of a training image that this row of the features belongs to."""
        split = self.reference.args.reference_split
        index, start, _ = self.trained_groups[np.searchsorted(self.trained_groups[:, 1], row, side="right") - 1]
        prepared = self.reference.prepared(split, self.preparation, mirrored=True)
        return prepared.parts(self.reference.images(split)[int(index)], self._max_crops(split))[row - start]

    def _max_crops(self, split: str) -> int:
        """Return the number of crop positions per image that fit into ``BYTES``, together with mirrored parts."""
        channels, height, width = self.preparation.shape
        size = 4 * channels * min(height, 16) * min(width, 16)
        return max(1, BYTES // (2 * size * len(self.reference.images(split))))
