"""Whether samples are copies of training images: by their distance to those, and to images that were held out."""

import logging

import numpy as np

from ..data.nearest import nearest_distances
from .features import load_extractor

logger = logging.getLogger(__name__)

BYTES = 2**28  # of the features of parts of a split's images
LOWEST_THRESHOLD = 0.01  # of the ratio: rounding alone stays below it
SAME = 0.02  # share of the usual distance between images below which two are the same image
SHOWN = 8


class Copies:
    """How many images are nearer to a training image than real ones are.

    An image's ratio is its distance to the nearest part of a training image over that to the nearest part of a held-out
    one. Parts are what training may show: every place that an image may be cut at, mirrored where it was. An image
    counts as a copy if its ratio is below the lowest hundredth of the ratios of the held-out images themselves: about
    0.01 is what real images have. Held-out images that are training images, too, are left out.

    Args:
        reference: a ``Reference``.
        how: a ``Preparation``.
    """

    def __init__(self, reference, how):
        self.reference, self.how, self.pixels = reference, how, load_extractor("pixels")
        self.trained, self.trained_groups = self._vectors(reference.args.reference_split)
        self.unseen = None
        self.clear()
        if reference.held_out_split:
            self._measure_held_out()

    def _vectors(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of the parts of a split's images (M, D); of each image index and rows, from and to (N, 3)."""
        vectors, groups, position = [], [], 0
        prepared = self.reference.prepared(split, self.how, mirrored=True)
        for parts, index in prepared.crops(len(self.reference.images(split)), self._most(split)):
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
                f"{known.sum()} of {len(known)} held-out images are training images, too: they are left out of the "
                "measure of copying, and the floor is lower for them"
            )
        if known.all():
            return
        kept = groups[~known]
        rows = np.concatenate([np.arange(start, stop) for _, start, stop in kept])
        ends = np.cumsum(kept[:, 2] - kept[:, 1])
        own = np.stack([ends - (kept[:, 2] - kept[:, 1]), ends], axis=1)
        self.unseen, self.unseen_rows = vectors[rows], dict(zip(kept[:, 0].tolist(), own, strict=True))
        # Of each one part, another place for each
        places = own[:, 0] + np.arange(len(own)) % (own[:, 1] - own[:, 0])
        points = self.unseen[places]
        ratios = nearest_distances(points, self.trained)[0] / self._to_unseen(points, own)
        self.threshold = max(float(np.quantile(ratios, 0.01)), LOWEST_THRESHOLD)

    def _to_unseen(self, points: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        return np.maximum(nearest_distances(points, self.unseen, own)[0], 1e-12)

    def clear(self) -> None:
        """Begin with other images."""
        self.ratios, self.closest = [], []

    def add(self, images: np.ndarray, indices: np.ndarray | None = None) -> None:
        """Measure images, uint8 (B, C, H, W).

        Args:
            indices: of held-out images, which are not compared with themselves; those left out are passed over.
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
        """The rate, None if nothing is held out; the images with the lowest ratio and their nearest training images."""
        samples = np.stack([image for _, _, image in self.closest])
        nearest = np.stack([self._part(row) for _, row, _ in self.closest])
        rate = None if self.unseen is None else float((np.concatenate(self.ratios) < self.threshold).mean())
        self.clear()
        return rate, (samples, nearest)

    def _part(self, row: int) -> np.ndarray:
        """Decode the part of a training image that is in this row."""
        split = self.reference.args.reference_split
        index, start, _ = self.trained_groups[np.searchsorted(self.trained_groups[:, 1], row, side="right") - 1]
        prepared = self.reference.prepared(split, self.how, mirrored=True)
        return prepared.parts(self.reference.images(split)[int(index)], self._most(split))[row - start]

    def _most(self, split: str) -> int:
        """How many places of an image are compared with: in ``BYTES``, mirrored or not."""
        channels, height, width = self.how.shape
        size = 4 * channels * min(height, 16) * min(width, 16)
        return max(1, BYTES // (2 * size * len(self.reference.images(split))))
