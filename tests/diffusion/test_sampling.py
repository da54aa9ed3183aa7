"""utils/diffusion/sampling.py: image k is always the same, and sampling does not affect training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from utils.diffusion.illustrations import show_denoising, show_walk
from utils.diffusion.linear_mix import LinearMixScheduler
from utils.diffusion.pipelines import slerp
from utils.diffusion.sampling import sample_images
from utils.diffusion.schedulers import SAMPLER_CLASSES, make_sampler
from utils.pictures import with_caption
from utils.randomness import sample_noise


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
        assert np.abs(alone.astype(int) - together).max() <= 1  # rounding may differ
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
    torch.manual_seed(123)  # with active dropout, another seed would change the images
    assert (draw(accelerator, unet, 5) == first).all()


def test_images_start_from_a_picture_and_keep_more_of_it_the_weaker_the_noise(accelerator):
    unet, picture = model(), torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    for name in (*SAMPLER_CLASSES, "linear mix"):
        sampler = LinearMixScheduler() if name == "linear mix" else make_sampler(name, DDPMScheduler())
        oracle = Oracle(torch.zeros(1, 8, 8))
        options = dict(init_images=picture, strength=0.3)
        assert sample_images(oracle, sampler, accelerator, 3, (1, 8, 8), 10, 2, 0, **options).shape == (3, 1, 8, 8)
        assert len(oracle.seen) == 2 * 3  # two batches, three of ten steps
        start, timestep = oracle.seen[0]
        assert timestep.max() < 350
        assert np.corrcoef(start[0].flatten(), picture.flatten())[0, 1] > 0.25
    sampler = make_sampler("ddim", DDPMScheduler())
    full = sample_images(unet, sampler, accelerator, 3, (1, 8, 8), 10, 2, 0, init_images=picture, strength=1.0)
    assert np.abs(full.astype(int) - draw(accelerator, unet, 2, count=3, name="ddim")).mean() > 0
    two = sample_images(unet, sampler, accelerator, 2, (1, 8, 8), 10, 2, 0, init_images=-picture, strength=0.1)
    # init_images holds one picture for each image, or one for all
    assert (two[0].mean(0)[0] > two[0].mean(0)[-1]).all()


def test_interpolated_noise_draws_the_ends_and_between(accelerator):
    unet, sampler = model(), make_sampler("ddim", DDPMScheduler())
    first, second = (sample_noise(0, "samples", np.array([k]), (1, 8, 8)) for k in (0, 3))

    def between(numbers):
        fractions = torch.from_numpy(numbers / 4).float()
        return slerp(first.expand(len(numbers), -1, -1, -1), second.expand(len(numbers), -1, -1, -1), fractions)

    walk = sample_images(unet, sampler, accelerator, 5, (1, 8, 8), 4, 2, 0, noise=between)
    plain = draw(accelerator, unet, 5, name="ddim")
    assert np.abs(walk[0].astype(int) - plain[0]).max() <= 1 and np.abs(walk[4].astype(int) - plain[3]).max() <= 1
    assert np.abs(walk[2].astype(int) - plain[0]).max() > 10


def test_a_line_of_text_goes_below_a_picture():
    assert with_caption(Image.new("RGB", (300, 20)), "step 3").size == (300, 44)
    assert with_caption(Image.new("L", (30, 20)), "step 3, a long caption").width > 100


class Oracle(torch.nn.Module):
    """Model that predicts the same image for any input."""

    def __init__(self, image):
        super().__init__()
        self.image, self.seen = image, []

    def forward(self, sample, timestep):
        self.seen.append((sample.clone(), torch.as_tensor(timestep).clone()))
        return SimpleNamespace(sample=self.image.expand(len(sample), -1, -1, -1))


def test_sampling_starts_from_the_noise_of_the_scheduler(accelerator):
    oracle = Oracle(torch.linspace(-1, 1, 64).view(1, 8, 8))
    images = sample_images(oracle, LinearMixScheduler(), accelerator, 3, (1, 8, 8), 4, 3, 0)
    start = oracle.seen[0][0]
    assert start.abs().max() <= 1 and start.std() > 0.5  # uniform
    assert (images[0] == ((oracle.image + 1) * 127.5).round().byte().numpy()).all()
    sample_images(oracle, DDPMScheduler(), accelerator, 3, (1, 8, 8), 4, 3, 0)
    assert oracle.seen[4][0].abs().max() > 2  # normal


def test_denoising_picture_goes_from_clean_to_noise():
    oracle = Oracle(torch.zeros(1, 8, 8))
    clean = torch.full((4, 1, 8, 8), 0.5)
    picture = show_denoising(oracle, LinearMixScheduler(), clean, seed=0)
    noisy, timesteps = oracle.seen[0]
    assert timesteps.tolist() == [0, pytest.approx(1000 / 3), pytest.approx(2000 / 3), 1000]
    assert torch.equal(noisy[0], clean[0]) and noisy[3].std() > 0.4
    assert picture.height == 3 * 68 + 4 and picture.width > 4 * 68 + 4 + 50  # captions


def test_the_picture_of_trajectories_shows_the_first_samples_step_by_step(accelerator):
    unet, scheduler = model(), LinearMixScheduler()
    picture = np.asarray(show_walk(unet, scheduler, 3, (1, 8, 8), 5, 0, "cpu"))
    assert unet.training
    images = sample_images(unet, scheduler, accelerator, 3, (1, 8, 8), 5, 3, 0)
    assert picture.shape[0] == 10 * 68 + 4
    last = picture[9 * 68 + 4 : 9 * 68 + 68 : 8, -3 * 68 :: 8]  # the last row, with one of each eight equal pixels
    assert (last[:, :8] == images[0, 0]).all()
