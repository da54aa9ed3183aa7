"""utils/evaluation/while_training.py: evaluation while training, and the best model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import equal_weights, interrupt, scalars, train
from diffusers import DDPMPipeline

from utils import UserError
from utils.evaluation.while_training import SampleQuality
from utils.pictures import to_uint8
from utils.training.checkpoints import CheckpointError

FLAGS = ["--evaluate_steps=2", "--num_evaluation_samples=20", "--features=pixels", "--report_to=tensorboard"]


def test_a_run_is_evaluated_and_its_best_model_kept(tmp_path, capsys):
    assert train(tmp_path / "run", *FLAGS) == 0
    assert "Drawing and comparing 20 samples took" in capsys.readouterr().err
    distances = scalars(tmp_path / "run", "metrics/fd_pixels_N20")
    assert list(distances) == [2, 4, 6] and min(distances.values()) > 0
    assert list(scalars(tmp_path / "run", "metrics/kid_pixels_N20")) == [2, 4, 6]
    record = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert record["fd_pixels_N20"] == pytest.approx(min(distances.values()), rel=1e-6)
    assert distances[record["step"]] == min(distances.values())
    assert DDPMPipeline.from_pretrained(tmp_path / "run" / "best", use_safetensors=True).unet.config.sample_size == 8
    if record["step"] == 6:
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert equal_weights(tmp_path / "run" / "best" / weights, tmp_path / "run" / weights)


def test_evaluating_changes_nothing_in_training(tmp_path):
    train(tmp_path / "plain")
    train(tmp_path / "evaluated", *FLAGS, "--validation_split=train[50:60]", "--dataset_split=train[:50]")
    train(tmp_path / "half", "--dataset_split=train[:50]")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert equal_weights(tmp_path / "evaluated" / weights, tmp_path / "half" / weights)
    assert not equal_weights(tmp_path / "plain" / weights, tmp_path / "half" / weights)


@pytest.mark.parametrize("step, kept", [(2, True), (5, False)])
def test_a_resumed_run_remembers_the_best_before_it_and_forgets_what_came_later(tmp_path, step, kept):
    train(tmp_path / "run", *FLAGS)
    record = tmp_path / "run" / "best" / "evaluation.json"
    record.write_text(json.dumps({"step": step, "fd_pixels_N20": 0.0}))
    interrupt(tmp_path / "run", "checkpoint-3")
    train(tmp_path / "run", *FLAGS)
    assert (json.loads(record.read_text())["fd_pixels_N20"] == 0) is kept


class FakeRun:
    """Run with the attributes that ``SampleQuality`` needs."""

    def __init__(self, folder, accelerator, images):
        self.output_dir, self.accelerator, self.global_step = folder, accelerator, 0
        self.args, self.train_data = SimpleNamespace(seed=0), SimpleNamespace(shown=lambda count: to_uint8(images))
        self.log = lambda values: None

    def measure(self, quality, step, draw, save):
        self.global_step, self.draw, self.save = step, draw, save
        quality.measure()


@pytest.fixture
def fake_run(tmp_path, accelerator):
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return FakeRun(tmp_path, accelerator, images)


def uniform_images(seed, high=256):
    """Draw like a script's ``draw``."""
    return lambda count: np.random.default_rng(seed).integers(0, high, (count, 1, 4, 4), dtype=np.uint8)


def keep_first(folder):
    (folder / "model").write_text("first")


def fail(folder):
    raise OSError("No space left on device")


def test_a_failure_to_keep_the_best_leaves_the_one_before(fake_run, tmp_path):
    quality = SampleQuality(fake_run, "pixels", 30, 1)
    fake_run.measure(quality, 1, uniform_images(0, high=50), keep_first)
    with pytest.raises(CheckpointError, match="No space left"):
        fake_run.measure(quality, 2, uniform_images(1), fail)
    assert (tmp_path / "best" / "model").read_text() == "first"
    fake_run.measure(quality, 3, uniform_images(0, high=50), fail)  # no better than the first, so not kept


def test_a_kill_between_two_renames_is_repaired(fake_run, tmp_path):
    quality = SampleQuality(fake_run, "pixels", 30, 1)
    fake_run.measure(quality, 1, uniform_images(0), keep_first)
    (tmp_path / "best").rename(tmp_path / "best-previous")
    again = SampleQuality(fake_run, "pixels", 30, 1)
    assert (tmp_path / "best" / "model").read_text() == "first" and again.best == quality.best


def test_too_few_samples_are_reported(tmp_path, accelerator, caplog):
    SampleQuality(FakeRun(tmp_path, accelerator, torch.zeros(20, 1, 4, 4)), "pixels", 20, 1)
    assert "20 images are fewer than twice the 16 features" in caplog.text
    with pytest.raises(UserError, match=r"--evaluate_steps: 1 images\. Expected at least 6"):
        SampleQuality(FakeRun(tmp_path, accelerator, torch.zeros(1, 1, 4, 4)), "pixels", 20, 1)
