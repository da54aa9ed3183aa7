"""Training images from a stream, for sets that do not fit on the disk."""

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets.distributed import split_dataset_by_node

from .. import UserError
from ..data.images import PreparedImages
from ..data.pixels import BadImage
from .sources import row_key

SHUFFLE_BUFFER_SIZE, SHUFFLE_BUFFER_BYTES = 10_000, 2**30  # at most this many images, and this many bytes


class Stream:
    """Micro-batches from a stream: the shards of this process, shuffled in a buffer and decoded by threads.

    A resumed run reads past the images that it has already used, without decoding them. Threads decode the images,
    because ``datasets`` distributes shards among DataLoader workers, so the order would depend on their number.

    Args:
        prepared: images of a ``NamedImages``.
        batches: sample ids (B,) of each micro-batch.
        images_per_step: number of images of this process in an optimizer step.
        process_index: index of this process.
        num_processes: number of processes.
        threads: number of threads that decode.
    """

    def __init__(
        self, prepared: PreparedImages, batches: Iterator[np.ndarray], images_per_step: int, process_index: int,
        num_processes: int, threads: int,
    ):  # fmt: skip
        self.prepared, self.images_per_step, self.threads = prepared, images_per_step, max(1, threads)
        first = next(batches, None)
        self.batches = itertools.chain([] if first is None else [first], batches)
        self.shard = split_dataset_by_node(prepared.images.dataset, process_index, num_processes)
        self.global_batch_size = images_per_step * num_processes
        self.number = 0 if first is None else int(first[0]) // self.global_batch_size  # number of the global batch
        self.used = self.number * images_per_step
        self.length = math.inf  # number of images of this process, known after the first epoch

    def _rows(self) -> Iterator[tuple[dict, object]]:
        """Yield rows with functions that decode them, and the encoded images."""
        shard = self.shard.shuffle(seed=self.prepared.seed, buffer_size=self.prepared.images.buffer_size)
        count, epoch = 0, 0
        while True:
            shard.set_epoch(epoch)
            before = count
            for row in shard:
                if count >= self.used:
                    yield self.prepared.images.add_decoders(row, count), row["image"]
                count += 1
            if count == before:
                raise UserError(f"{self.prepared.images.name}: the stream holds no images for this process")
            epoch, self.length = epoch + 1, count - before

    def __iter__(self) -> Iterator[list[dict]]:
        rows, bad, known, unreadable, prepared = self._rows(), [], set(), 0, self.prepared
        with ThreadPoolExecutor(self.threads) as pool:
            for sample_ids in self.batches:
                before, self.number = self.number, int(sample_ids[0]) // self.global_batch_size
                for _ in range(max(0, self.number - before - 1) * self.images_per_step):  # skip global batches
                    next(rows)
                items = []
                while len(items) < len(sample_ids):
                    wanted = [next(rows) for _ in range(len(sample_ids) - len(items))]
                    chosen, encoded = zip(*wanted, strict=True)
                    for record, found in zip(encoded, pool.map(prepared.attempt, chosen), strict=True):
                        unreadable = unreadable + 1 if isinstance(found, BadImage) else 0
                        if unreadable > self.length:
                            raise UserError(f"no image of the stream can be read any more. The last one: {found}")
                        if unreadable:
                            key = row_key(record)  # Positions differ between epochs
                            bad += [(key, str(found))] if key not in known else []
                            known.add(key)
                            if len(known) > prepared.images.max_bad_images:
                                yield [prepared.blank(bad)]
                                return
                            continue
                        items.append(prepared.item(found, int(sample_ids[len(items)]), bad))
                        bad = []
                yield items


def read_ahead(iterable: Iterable) -> Iterator:
    """Yield the items of an iterable. A thread prepares each item while the previous one is used."""
    iterator, end = iter(iterable), object()
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, iterator, end)
        while (ready := item.result()) is not end:
            item = pool.submit(next, iterator, end)
            yield ready
