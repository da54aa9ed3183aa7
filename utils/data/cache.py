"""Decoded images in memory, so that the input costs nothing per step."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import UserError
from .images import BadImage, PreparedImages, augment, flips

logger = logging.getLogger(__name__)


class Cache:
    """All prepared images in memory: one tensor, on the device if it fits there, or a list if sizes differ."""

    def __init__(self, images: PreparedImages, accelerator):
        self.seed, self.random_flip = images.seed, images.random_flip
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
                        if images.max_bad_images is None:
                            raise images.error(image)
                        skipped += 1
                        logger.warning(f"skipped ({skipped} so far): {image}")
                        images.check_count(skipped)
                        image = None
                    prepared.append(image)
                    labels.append(rows["label"][k] if "label" in rows else 0)
                progress.update(len(jobs))
        progress.close()
        good = [index for index, image in enumerate(prepared) if image is not None]
        if not good:
            raise UserError(f"{images.name} has no readable image")
        for index in [index for index, image in enumerate(prepared) if image is None]:
            instead = next((other for other in good if other > index), good[0])  # as PreparedImages does
            prepared[index], labels[index] = prepared[instead], labels[instead]
        self.labels = torch.tensor(labels)
        self.images, self.square = prepared, None
        if all(image.shape[1] == image.shape[2] for image in prepared):
            self.square = torch.from_numpy(np.stack(prepared))
            self.images = None
            on_gpu = accelerator.device.type == "cuda"
            if on_gpu and self.square.nbytes < torch.cuda.mem_get_info(accelerator.device)[0] / 4:
                self.square = self.square.to(accelerator.device)

    def __len__(self):
        return len(self.labels)

    def take(self, indices: np.ndarray, sample_ids: np.ndarray) -> torch.Tensor:
        """uint8 (B, C, S, S): the images at ``indices``, cropped and flipped for their sample ids."""
        if self.square is None:
            pairs = zip(indices, sample_ids, strict=True)
            augmented = [augment(self.images[i], k, self.seed, self.random_flip) for i, k in pairs]
            return torch.from_numpy(np.stack(augmented))
        images = self.square[torch.from_numpy(indices).to(self.square.device, non_blocking=True)]
        if self.random_flip:
            mirrored = torch.from_numpy(flips(self.seed, sample_ids)).to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images
