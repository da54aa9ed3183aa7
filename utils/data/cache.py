"""Decoded images in memory, so that the input costs nothing per step."""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm.auto import tqdm

from .. import UserError
from .images import SKIP_HINT, BadImage, augment, check_bad_count, flips

logger = logging.getLogger(__name__)


class Cache:
    """All prepared images in memory: one tensor, on the device if it fits there, or a list if sizes differ."""

    def __init__(self, images, resolution: int, accelerator):
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
                        if images.args.bad_images == "error":
                            raise BadImage(f"{image}. {SKIP_HINT}")
                        skipped += 1
                        logger.warning(f"skipped ({skipped} so far): {image}")
                        check_bad_count(skipped, images.args)
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
        if all(image.shape[1:] == (resolution, resolution) for image in prepared):
            self.square = torch.from_numpy(np.stack(prepared))
            self.images = None
            on_gpu = accelerator.device.type == "cuda"
            if on_gpu and self.square.nbytes < torch.cuda.mem_get_info(accelerator.device)[0] / 4:
                self.square = self.square.to(accelerator.device)

    def __len__(self):
        return len(self.labels)

    def take(self, indices: np.ndarray, sample_ids: np.ndarray, args) -> torch.Tensor:
        """uint8 (B, C, S, S): the images at ``indices``, cropped and flipped for their sample ids."""
        if self.square is None:
            augmented = [augment(self.images[i], n, args) for i, n in zip(indices, sample_ids, strict=True)]
            return torch.from_numpy(np.stack(augmented))
        images = self.square[torch.from_numpy(indices).to(self.square.device, non_blocking=True)]
        if args.random_flip:
            mirrored = torch.from_numpy(flips(args.seed, sample_ids)).to(images.device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images
