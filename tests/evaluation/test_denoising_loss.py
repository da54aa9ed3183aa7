"""utils/evaluation/denoising_loss.py: every measurement uses the same triples. Also the nearest training images."""

import numpy as np
import pytest
import torch
from conftest import scalars, slow, train
from diffusers import DDPMScheduler

import train_basic
import train_conditional
import train_flow
from utils import UserError
from utils.data.nearest import show_nearest
from utils.diffusion.flow import FlowScheduler
from utils.diffusion.linear_mix import LinearMixScheduler
from utils.evaluation import while_training
from utils.evaluation.denoising_loss import DenoisingLoss


class Knows:
    """Model that predicts the true images, up to an error."""

    training = True

    def __init__(self, images, scheduler, error=0.0):
        self.images, self.scheduler, self.error, self.calls, self.asked = images, scheduler, error, 0, []

    def __call__(self, noisy, timesteps):
        self.asked.append((noisy, timesteps))
        errors = torch.full_like(noisy, self.error)
        return type("Output", (), {"sample": self.answer(noisy, timesteps) + errors})

    def answer(self, noisy, timesteps):
        alpha_bar = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        return (noisy - alpha_bar.sqrt() * self.images[0]) / (1 - alpha_bar).sqrt()

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


@pytest.fixture
def setup():
    scheduler = DDPMScheduler()
    images = torch.linspace(-1, 1, 16).view(1, 1, 4, 4).repeat(5, 1, 1, 1)  # the same image five times
    return images, scheduler


def test_a_perfect_model_has_no_loss_and_errors_are_squared(accelerator, setup):
    images, scheduler = setup
    loss = DenoisingLoss(images, scheduler, seed=0, batch_size=3)
    assert loss.measure(Knows(images, scheduler), accelerator)["loss"] < 1e-6
    measured = loss.measure(Knows(images, scheduler, error=0.5), accelerator)
    assert list(measured) == ["loss", "0-249", "250-499", "500-749", "750-999"]
    assert all(value == pytest.approx(0.25, rel=1e-2) for value in measured.values())


def test_every_measurement_asks_the_same_whatever_the_batch_size(accelerator, setup):
    images, scheduler = setup
    asked = []
    for size in (3, 20):
        model = Knows(images, scheduler)
        DenoisingLoss(images, scheduler, seed=0, batch_size=size).measure(model, accelerator)
        assert model.training
        asked.append([torch.cat(part) for part in zip(*model.asked, strict=True)])
    assert torch.equal(asked[0][0], asked[1][0]) and torch.equal(asked[0][1], asked[1][1])
    timesteps = asked[0][1]
    assert len(timesteps) == 20 and torch.bincount(timesteps // 250).tolist() == [5, 5, 5, 5]


def test_linear_mixing_is_asked_with_uniform_noise(accelerator, setup):
    images, scheduler = setup[0], LinearMixScheduler()
    model = Knows(images, scheduler, error=0.1)
    model.answer = lambda noisy, timesteps: images[:1].expand_as(noisy)
    measured = DenoisingLoss(images, scheduler, seed=0).measure(model, accelerator)
    assert measured["loss"] == pytest.approx(0.01, rel=1e-3)
    assert all(noisy.abs().max() <= 1 for noisy, _ in model.asked)  # image and noise are both in [-1, 1]


def test_straight_paths_have_a_loss_where_hardly_any_noise_is(accelerator):
    images, scheduler = torch.rand(64, 1, 4, 4) * 2 - 1, FlowScheduler()
    model = Knows(images, scheduler)
    model.answer = lambda noisy, timesteps: torch.zeros_like(noisy)
    measured = DenoisingLoss(images, scheduler, seed=0).measure(model, accelerator)  # some timesteps are drawn below 1
    assert all(1 < value < 1.7 for value in measured.values())  # the mean square of noise - image is 1 + 1/3
    asked = torch.cat([timesteps for _, timesteps in model.asked])
    assert asked.min() >= 1 and (asked != asked.round()).any()


@pytest.mark.parametrize("script", [train_basic, train_conditional, slow(train_flow)])
def test_training_scripts_validate(tmp_path, monkeypatch, script):
    monkeypatch.setattr(while_training, "NUM_VALIDATION_IMAGES", 6)
    flags = ["--dataset_split=train[:100]", "--validation_split=train[100:]", "--validation_steps=4"]
    flags += ["--report_to=tensorboard"]
    assert train(tmp_path / "run", *flags, script=script) == 0
    for name in ("train", "held_out"):
        curve = scalars(tmp_path / "run", f"loss/validation_{name}")
        assert list(curve) == [4, 6]
        assert curve[6] < curve[4] < 3
        assert scalars(tmp_path / "run", f"loss_by_timestep_validation/{name}_0-249")[6] > 0


def test_a_validation_split_that_is_trained_on_is_refused(tmp_path):
    with pytest.raises(UserError, match="shares images"):
        train(tmp_path / "run", "--dataset_split=train[:100]", "--validation_split=train[90:]", script=train_basic)
    assert not (tmp_path / "run" / "training_args.json").exists()
    flags = ["--dataset_split=train[:100]+train[200:300]", "--validation_split=train[150:220]", "--max_train_steps=1"]
    with pytest.raises(UserError, match="shares images"):  # a sample may come from any rows
        train(tmp_path / "run", *flags, "--max_train_samples=100", script=train_basic)
    flags[1] = "--validation_split=train[150:200]"
    assert train(tmp_path / "run", *flags, "--max_train_samples=100", script=train_basic) == 0


def test_nearest_images_are_found_and_shown():
    training = np.random.default_rng(0).integers(0, 256, (6, 3, 64, 64), dtype=np.uint8)
    samples = training[[4, 2]]
    for shown, parts in ((samples, training), (samples, np.concatenate([training, training[:, :, ::-1]]))):
        picture = np.asarray(show_nearest(shown, parts)).astype(int)
        assert picture.shape[0] == 2 * 68 + 4
        assert np.array_equal(picture[4:68, -68:-4], picture[72:136, -68:-4])  # the second sample is above its copy
        assert np.array_equal(picture[4:68, -136:-72], picture[72:136, -136:-72])  # and so is the first
