"""Two ways to training images without a DataLoader: decoded in memory, or from a stream that fits on no disk."""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from tqdm.auto import tqdm

from .. import UserError
from .images import PreparedImages, label_of
from .pixels import BadImage, augment, flips


class Cache:
    """All prepared images in memory: one tensor, on the device if it fits there, or a list if sizes differ."""

    def __init__(self, images: PreparedImages, accelerator):
        self.seed, self.random_flip, self.size = images.seed, images.random_flip, images.size
        prepared, labels, skipped, total = [], [], 0, len(images.dataset)
        progress = tqdm(
            total=total, desc="Decoding images", unit="image", delay=2, disable=not accelerator.is_main_process
        )
        with ThreadPoolExecutor() as pool:
            for start in range(0, total, 1024):
                rows = images.dataset[start : start + 1024]
                jobs = [({"image": record}, start + k) for k, record in enumerate(rows["image"])]
                for k, image in enumerate(pool.map(images.attempt, jobs)):
                    if isinstance(image, BadImage):
                        skipped += 1
                        images.check(skipped, image)
                        image = None
                    prepared.append(image)
                    labels.append(label_of({"label": rows["label"][k]} if "label" in rows else {}))
                progress.update(len(jobs))
        progress.close()
        good = [index for index, image in enumerate(prepared) if image is not None]
        if not good:
            raise UserError(f"{images.name} has no readable image")
        for index in [index for index, image in enumerate(prepared) if image is None]:
            instead = next((other for other in good if other > index), good[0])  # as PreparedImages does
            prepared[index], labels[index] = prepared[instead], labels[instead]
        self.labels = torch.tensor(labels)
        self.images, self.stacked = prepared, None
        if all(image.shape[1:] == self.size for image in prepared):
            self.stacked = torch.from_numpy(np.stack(prepared))
            self.images = None
            on_gpu = accelerator.device.type == "cuda"
            if on_gpu and self.stacked.nbytes < torch.cuda.mem_get_info(accelerator.device)[0] / 4:
                self.stacked = self.stacked.to(accelerator.device)

    def take(self, indices: np.ndarray, sample_ids: np.ndarray) -> torch.Tensor:
        """uint8 (B, C, H, W): the images at ``indices``, cropped and flipped for their sample ids."""
        if self.stacked is None:
            pairs = zip(indices, sample_ids, strict=True)
            augmented = [augment(self.images[i], k, self.size, self.seed, self.random_flip) for i, k in pairs]
            return torch.from_numpy(np.stack(augmented))
        images = self.stacked[torch.from_numpy(indices).to(self.stacked.device, non_blocking=True)]
        if self.random_flip:
            mirrored = torch.from_numpy(flips(self.seed, sample_ids)).to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


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
                        image = augment(image, sample_id, self.images.size, self.images.seed, self.images.random_flip)
                        items.append({"image": image, "label": label_of(row), "sample_id": sample_id, "bad": bad})
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
