"""Training batches from a data set that fits on no disk."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets.distributed import split_dataset_by_node

from .. import UserError
from .images import BadImage, augment


class Stream:
    """Micro-batches from a stream: this process's shards, shuffled in a buffer, decoded by threads.

    A resumed run reads past the images that it has already used, without decoding them. Threads, not DataLoader
    workers: ``datasets`` deals shards to workers, so that the order would depend on their number.
    """

    def __init__(self, images, batches, args, accelerator):
        self.images, self.args = images, args
        first = next(batches, None)
        self.batches = itertools.chain([] if first is None else [first], batches)
        self.shard = split_dataset_by_node(images.dataset, accelerator.process_index, accelerator.num_processes)
        per_step = args.train_batch_size * args.gradient_accumulation_steps
        global_batch_size = per_step * accelerator.num_processes
        self.used = 0 if first is None else int(first[0]) // global_batch_size * per_step

    def _rows(self) -> Iterator[tuple[dict, int]]:
        shard = self.shard.shuffle(seed=self.args.seed, buffer_size=self.args.shuffle_buffer_size)
        count, epoch = 0, 0
        while True:
            shard.set_epoch(epoch)
            before = count
            for row in shard:
                if count >= self.used:
                    yield row, count
                count += 1
            if count == before:
                raise UserError(f"{self.images.name}: the stream holds no images for this process")
            epoch += 1

    def __iter__(self) -> Iterator[list[dict]]:
        rows, bad, bad_count = self._rows(), [], 0
        with ThreadPoolExecutor(max(1, self.args.dataloader_num_workers)) as pool:
            for sample_ids in self.batches:
                items = []
                while len(items) < len(sample_ids):
                    wanted = [next(rows) for _ in range(len(sample_ids) - len(items))]
                    for (row, index), image in zip(wanted, pool.map(self.images.attempt, wanted), strict=True):
                        if isinstance(image, BadImage):
                            bad.append((index, str(image)))
                            bad_count += 1
                            if self.images.too_many(bad_count):
                                yield [{"image": np.zeros(0), "label": 0, "sample_id": 0, "bad": bad}]
                                return
                            continue
                        sample_id = int(sample_ids[len(items)])
                        image = augment(image, sample_id, self.images.seed, self.images.random_flip)
                        items.append({"image": image, "label": row.get("label", 0), "sample_id": sample_id, "bad": bad})
                        bad = []
                yield items


def read_ahead(iterable: Iterable) -> Iterator:
    """The same items, each prepared in a thread while the one before is used."""
    iterator, end = iter(iterable), object()
    with ThreadPoolExecutor(1) as pool:
        item = pool.submit(next, iterator, end)
        while (ready := item.result()) is not end:
            item = pool.submit(next, iterator, end)
            yield ready
