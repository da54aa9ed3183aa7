"""Conditions of train_paired.py, the autoencoder that is the identity, windows, and holes that any model fills."""

import itertools

import numpy as np
import pytest
import torch
from conftest import slow
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from utils import UserError
from utils.diffusion.conditions import Condition, GuidedByCondition, arrange
from utils.diffusion.few_steps import make_few_step_sampler
from utils.diffusion.flow import FlowScheduler, make_sampler
from utils.diffusion.identity import identity_autoencoder, is_identity
from utils.diffusion.inpainting import RESAMPLINGS, check_inpainting, inpaint_batch
from utils.diffusion.linear_mix import LinearMixScheduler
from utils.diffusion.schedulers import output_for
from utils.diffusion.windows import Windows, _starts
from utils.pictures import from_uint8


def photo(height=24, width=32, channels=3, count=2):
    """Return smooth images with some edges, uint8 (N, C, H, W)."""
    y, x = np.mgrid[:height, :width]
    waves = [
        128 + 90 * np.sin(x / (3 + c) + y / 5 + k) + 30 * (x > 9 + k) for k in range(count) for c in range(channels)
    ]
    return np.clip(waves, 0, 255).astype(np.uint8).reshape(count, channels, height, width)


# -------------------------------------------------------------------------------- an autoencoder that changes nothing


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(4, 4), (13, 31), (28, 28), (64, 48)], ids=str)
def test_the_identity_returns_what_it_is_given_at_every_size(channels, size):
    autoencoder = identity_autoencoder(channels)
    for images in (torch.rand(2, channels, *size) * 2 - 1, torch.ones(1, channels, *size)):
        assert (autoencoder.decode(images).sample - images).abs().max() < 2e-5
        assert (autoencoder.encode(images).latent_dist.mode() - images).abs().max() < 2e-5
        assert (autoencoder.encode(images).latent_dist.sample() - images).abs().max() < 3e-5


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_the_identity_in_half_precision_rounds_and_no_more(dtype, limit):
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(dtype)
    decoded = identity_autoencoder(3).to(dtype).decode(images).sample
    assert decoded.dtype == dtype and (decoded - images).abs().max() < limit


def test_the_identity_is_saved_tiled_and_known_again(tmp_path):
    identity_autoencoder(3).save_pretrained(tmp_path)
    autoencoder = AutoencoderKL.from_pretrained(tmp_path)
    assert is_identity(autoencoder) and not is_identity(AutoencoderKL())
    assert (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size < 100_000
    autoencoder.enable_tiling()
    autoencoder.tile_sample_min_size = autoencoder.tile_latent_min_size = 16
    images = torch.rand(1, 3, 40, 40) * 2 - 1
    assert (autoencoder.decode(images).sample - images).abs().max() < 2e-5


# -------------------------------------------------------------------------------------------------- conditions by kind


def test_a_smaller_picture_is_that_of_pillow_and_comes_back_as_large_as_the_image():
    images = photo()
    condition = Condition("lowres:4", 3)
    small = condition.pictures({"images": from_uint8(images)})
    for picture, image in zip(small, images, strict=True):
        expected = Image.fromarray(image.transpose(1, 2, 0)).resize((8, 6), Image.Resampling.BICUBIC)
        assert np.abs((picture.numpy().transpose(1, 2, 0) + 1) * 127.5 - np.asarray(expected)).max() < 1.6
        larger = expected.resize((32, 24), Image.Resampling.BICUBIC)
        found = condition.input_of(condition.picture_from(expected))[0]
        assert np.abs((found.numpy().transpose(1, 2, 0) + 1) * 127.5 - np.asarray(larger)).max() < 1.6
    levels = (small + 1) * 127.5
    assert torch.allclose(levels, levels.round(), atol=1e-4)  # a file of 8 bits can hold these values


def test_grey_is_that_of_pillow():
    images = photo()
    grey = Condition("gray", 3).pictures({"images": from_uint8(images)})
    expected = np.asarray(Image.fromarray(images[0].transpose(1, 2, 0)).convert("L"))
    assert grey.shape == (2, 1, 24, 32) and np.abs((grey[0, 0].numpy() + 1) * 127.5 - expected).max() <= 1.01
    assert Condition("gray", 3).input_of(grey).shape == (2, 3, 24, 32)


def test_an_outline_surrounds_a_square():
    images = torch.full((1, 1, 16, 16), -1.0)
    images[..., 4:12, 4:12] = 1
    lines = Condition("outline", 1).pictures({"images": images})[0, 0] > 0
    assert lines[4, 8] and lines[8, 4] and not lines[8, 8] and not lines[1, 1]


def test_boxes_depend_on_the_sample_alone_and_vary():
    images, condition = torch.ones(500, 1, 16, 24), Condition("inpaint", 1, seed=3)
    ids = np.arange(500) + 1000
    whole = condition.pictures({"images": images, "sample_ids": ids})
    parts = [condition.pictures({"images": images[:1], "sample_ids": ids[k : k + 1]}) for k in range(500)]
    assert torch.equal(whole, torch.cat(parts))
    colour, hole = whole[:, 0], whole[:, 1]
    assert (
        set(hole.unique().tolist()) == {0.0, 1.0} and (colour[hole == 1] == 0).all() and (colour[hole == 0] == 1).all()
    )
    shares = hole.mean(dim=(1, 2))
    assert 0.06 <= shares.min() < 0.2 and 0.35 < shares.max() <= 0.5625  # a quarter to three quarters of each side
    assert (hole.mean(dim=0) > 0).all()  # no place is always known
    other = Condition("inpaint", 1, seed=4).pictures({"images": images, "sample_ids": ids})
    assert not torch.equal(other, whole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["lowres:2", "gray", "inpaint", "outline", "paired"])
def test_a_saved_picture_gives_the_same_input(tmp_path, kind, channels):
    images = from_uint8(photo(channels=channels))
    batch = {"images": images, "condition": images.flip(2)}
    condition = Condition(kind, channels)
    pictures = condition.pictures(batch)
    condition.save_picture(pictures[0], tmp_path / "p.png")
    again = condition.picture_from(Image.open(tmp_path / "p.png"))
    inputs = condition.model_inputs(batch)["condition"]
    assert inputs.shape == (2, condition.channels, 24, 32)
    assert torch.allclose(condition.input_of(again)[0], inputs[0], atol=1e-4)
    assert condition.show(pictures).shape == (2, channels, 24, 32)


def test_known_pixels_are_kept_to_the_bit():
    images = photo()
    condition = Condition("inpaint", 3)
    inputs = condition.model_inputs({"images": from_uint8(images)})["condition"]
    samples = 255 - np.concatenate([images, images])
    kept, hole = condition.keep_known(samples, inputs), inputs[:, -1:].numpy() > 0.5
    for k in range(4):
        assert np.array_equal(kept[k], np.where(hole[k % 2], samples[k], images[k % 2]))
    assert Condition("gray", 3).keep_known(samples, inputs) is samples


def test_guidance_moves_away_from_the_null_condition():
    def model(noisy, timesteps, condition):
        return UNet2DOutput(sample=condition[:, :1] + 10 * condition[:, 1:])

    model.eval = model.train = lambda *_: None
    condition = Condition("inpaint", 1, may_be_left_out=True)
    inputs, noisy = torch.full((2, 2, 4, 4), 0.5), torch.zeros(2, 1, 4, 4)
    found = {s: GuidedByCondition(model, condition, s)(noisy, torch.zeros(2), inputs).sample for s in (0, 1, 3)}
    with_it, without = 0.5 + 10 * 0.5, 0 + 10 * 1.0  # the null condition is grey, and a hole everywhere
    assert (found[0] == without).all() and (found[1] == with_it).all()
    assert (found[3] == without + 3 * (with_it - without)).all()
    with pytest.raises(UserError, match="always given its condition in training"):
        GuidedByCondition(model, Condition("inpaint", 1), 2.0)


def test_pictures_are_arranged_by_input():
    images = photo(8, 8, 1, 3)
    samples = np.stack([np.full((1, 8, 8), k, np.uint8) for k in range(7)])
    shown, captions = arrange(images, samples, from_uint8(images))
    assert captions == ["input", "samples", "", "true image"]
    assert shown[3:9, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5] and np.array_equal(shown[9:], images)
    assert arrange(images, samples[:3], None)[1] == ["input", "samples"]


# -------------------------------------------------------------------------------------------------------------- windows


def test_windows_cover_everything_and_agree_with_a_model_of_pixels():
    seen = []

    def model(noisy, timesteps, condition):
        seen.append(tuple(noisy.shape[2:]))
        return UNet2DOutput(sample=2 * noisy + condition)

    model.eval = model.train = lambda *_: None
    noisy, condition = torch.randn(2, 1, 40, 16), torch.randn(2, 1, 40, 16)
    found = Windows(model, (16, 16))(noisy, torch.zeros(2), condition).sample
    assert torch.allclose(found, 2 * noisy + condition, atol=1e-5) and set(seen) == {(16, 16)} and len(seen) == 4
    for length, side in [(16, 16), (17, 16), (40, 16), (100, 24)]:
        starts = _starts(length, side)
        assert starts[0] == 0 and starts[-1] == length - side
        assert all(b - a <= side // 2 for a, b in itertools.pairwise(starts))


# -------------------------------------------------------------------------------------------- holes, in any other model


def schedulers():
    kinds = ("epsilon", "sample", "v_prediction")
    made = {kind: DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind) for kind in kinds}
    made |= {kind: make_sampler("euler", FlowScheduler(1000, kind)) for kind in ("flow_prediction",)}
    return made | {"flow, image": make_sampler("dpmsolver++", FlowScheduler(1000, "sample", 3.0))}


class Perfect:
    """A model of images that are all equal."""

    training, eval, train = False, lambda self: self, lambda self, mode=True: self

    def __init__(self, scheduler, image):
        self.scheduler, self.image, self.count = scheduler, image, 0

    def __call__(self, noisy, timesteps):
        self.count += 1
        images = self.image.expand_as(noisy)
        return UNet2DOutput(sample=output_for(self.scheduler, images, noisy, timesteps.view(-1, 1, 1, 1)))


@pytest.mark.parametrize("name", schedulers())
def test_a_hole_is_filled_by_what_the_model_draws_and_the_rest_stays(name):
    scheduler, image = schedulers()[name], torch.full((1, 1, 8, 8), 0.25)
    known, hole = torch.rand(1, 1, 8, 8) * 2 - 1, torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    hole[..., 2:5, 3:] = True
    model = Perfect(scheduler, image)
    images = inpaint_batch(model, scheduler, np.arange(3), known, hole, 6, 0, torch.device("cpu"))
    assert torch.equal(images, torch.where(hole, images, known.expand(3, -1, -1, -1)))
    assert (images - image).abs().masked_select(hole).max() < 2e-3
    assert model.count == 5 * RESAMPLINGS + 1
    one = inpaint_batch(Perfect(scheduler, image), scheduler, np.arange(1, 2), known, hole, 6, 0, torch.device("cpu"))
    assert torch.allclose(one[0], images[1], atol=1e-5)


@pytest.mark.parametrize("name", ["v_prediction", slow("flow_prediction")])
def test_the_noise_of_each_step_has_the_variance_of_its_timestep(name):
    """For a perfect model of images of white noise, samples at every noise level are normal, with a known variance."""
    scheduler, levels = schedulers()[name], []

    class White(Perfect):
        def __call__(self, noisy, timesteps):
            from utils.diffusion.schedulers import signal_and_noise

            signal, noise = (value.item() for value in signal_and_noise(scheduler, timesteps[0], noisy))
            levels.append((noisy.std().item(), (0.04 * signal**2 + noise**2) ** 0.5))
            images = 0.04 * signal / (0.04 * signal**2 + noise**2) * noisy  # the best prediction
            return UNet2DOutput(sample=output_for(scheduler, images, noisy, timesteps.view(-1, 1, 1, 1)))

    known = 0.2 * torch.randn(1, 1, 64, 64)
    hole = torch.rand(1, 1, 64, 64) > 0.5
    inpaint_batch(White(scheduler, None), scheduler, np.arange(4), known, hole, 50, 0, torch.device("cpu"))
    found, expected = np.array(levels).T
    assert np.abs(found / expected - 1).max() < 0.1, np.c_[found, expected]


def test_models_that_cannot_fill_holes_are_refused():
    for scheduler in (LinearMixScheduler(), make_few_step_sampler(DDPMScheduler(), 50)):
        with pytest.raises(UserError, match=r"--mask: model (was trained with uniform noise|draws in too few steps)"):
            check_inpainting(scheduler, "model")
