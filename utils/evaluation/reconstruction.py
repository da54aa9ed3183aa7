"""PSNR and SSIM of the reconstructions of an autoencoder, on training and held-out images."""

from collections.abc import Callable

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..diffusion.autoencoders import reconstruct
from ..pictures import to_uint8

MIN_SIDE = 11  # pixels, the window of the structural similarity


class Reconstruction:
    """Quality of reconstructions. The processes share the work, so call ``measure`` on all of them.

    Args:
        images: images (N, C, H, W) in [-1, 1], the same on every process.
        batch_size: images at once, per process.
    """

    def __init__(self, images: torch.Tensor, batch_size: int = 8):
        self.images, self.batch_size = images, batch_size

    def measure(
        self, model: torch.nn.Module, accelerator, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Return the means over images of ``psnr`` in dB and, from 11 pixels on, of ``ssim``.

        Args:
            model: autoencoder, see ``autoencoders.AutoencoderKL``.
            stop: function that is called before every batch; True interrupts the measurement.

        Raises:
            Interrupted: ``stop`` returned True.
        """
        sums = torch.zeros(3, device=accelerator.device, dtype=torch.float32)
        names = ("psnr", "ssim")
        mine = self.images[accelerator.process_index :: accelerator.num_processes]
        reconstructions = reconstruct(model, mine, accelerator.device, self.batch_size, stop) if len(mine) else mine
        for values in map(similarity, to_uint8(reconstructions), to_uint8(mine)):
            sums += torch.tensor([*(values.get(name, 0.0) for name in names), 1.0], device=sums.device)
        *totals, count = accelerator.reduce(sums, "sum").tolist()
        measured = names if np.min(self.images.shape[2:]) >= MIN_SIDE else names[:1]
        return {name: total / count for name, total in zip(measured, totals, strict=False)}


def similarity(image: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Return PSNR, and SSIM as in Wang et al. 2004, of two images, uint8 (C, H, W)."""
    same = np.array_equal(image, true)  # the PSNR would be infinite, and with it every mean
    psnr = 100.0 if same else peak_signal_noise_ratio(true, image, data_range=255)
    if min(image.shape[1:]) < MIN_SIDE:
        return {"psnr": psnr}
    ssim = structural_similarity(
        true, image, channel_axis=0, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return {"psnr": psnr, "ssim": ssim}
