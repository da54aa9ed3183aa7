"""utils/sampling.py: image k is image k, and training does not notice."""

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from utils.sampling import sample_images, save_grid
from utils.schedulers import make_sampler


def model(dropout=0.5):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, dropout=dropout,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def draw(accelerator, unet, batch_size, count=5, name="ddpm", seed=0):
    sampler = make_sampler(name, DDPMScheduler())
    return sample_images(unet, sampler, accelerator, count, (1, 8, 8), 4, batch_size, seed)


def test_images_do_not_depend_on_the_batch_size(accelerator):
    unet = model()
    for name in ("ddpm", "dpmsolver++"):
        alone, together = (draw(accelerator, unet, size, name=name) for size in (1, 5))
        assert together.shape == (5, 1, 8, 8) and together.dtype == np.uint8
        assert np.abs(alone.astype(int) - together).max() <= 1  # rounding
        assert np.abs(together[0].astype(int) - together[1]).max() > 20
    assert np.abs(draw(accelerator, unet, 5, seed=1).astype(int) - draw(accelerator, unet, 5)).max() > 20


def test_weights_mode_gradients_and_random_state_stay_as_they_were(accelerator):
    unet = model()
    unet(torch.randn(1, 1, 8, 8), 3).sample.sum().backward()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in unet.parameters()]
    state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = draw(accelerator, unet, 5)
    assert unet.training
    assert torch.equal(state, torch.get_rng_state()) and (python_state == np.random.get_state()[1]).all()
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, unet.parameters(), strict=True))
    torch.manual_seed(123)  # dropout would show
    assert (draw(accelerator, unet, 5) == first).all()


def test_grid_is_written_as_a_picture(accelerator, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (9, 3, 64, 64), dtype=np.uint8)
    save_grid(images, tmp_path / "new" / "grid.png", accelerator, step=1)
    assert Image.open(tmp_path / "new" / "grid.png").size == (3 * 68 + 4, 3 * 68 + 4)
