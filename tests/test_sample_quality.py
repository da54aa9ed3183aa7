"""utils/evaluation/sample_quality.py: evaluation while training, and the best model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import equal_weights, interrupt, scalars, train
from diffusers import DDPMPipeline

from utils import UserError
from utils.evaluation.sample_quality import SampleQuality
from utils.training.checkpoints import CheckpointError

FLAGS = ["--evaluate_steps=2", "--num_evaluation_samples=20", "--features=pixels", "--report_to=tensorboard"]


def test_a_run_is_evaluated_and_its_best_model_kept(tmp_path, capsys):
    assert train(tmp_path / "run", *FLAGS, "--keep_best") == 0
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
    train(tmp_path / "run", *FLAGS, "--keep_best")
    record = tmp_path / "run" / "best" / "evaluation.json"
    record.write_text(json.dumps({"step": step, "fd_pixels_N20": 0.0}))
    interrupt(tmp_path / "run", "checkpoint-3")
    train(tmp_path / "run", *FLAGS, "--keep_best")
    assert (json.loads(record.read_text())["fd_pixels_N20"] == 0) is kept


@pytest.fixture
def quality(tmp_path, accelerator):
    args = SimpleNamespace(
        features="pixels", features_model_name_or_path=None, num_evaluation_samples=30, output_dir=tmp_path, seed=0,
        keep_best=True, evaluate_steps=1,
    )  # fmt: skip
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return SampleQuality(args, accelerator, SimpleNamespace(examples=lambda count: images[:count]), first_step=0)


def uniform_images(seed, high=256):
    """What a script's ``draw`` does."""
    return lambda count: np.random.default_rng(seed).integers(0, high, (count, 1, 4, 4), dtype=np.uint8)


def test_a_failure_to_keep_the_best_leaves_the_one_before(quality, tmp_path):
    quality.log(uniform_images(0, high=50), 1)
    quality.keep(lambda folder: (folder / "model").write_text("first"))
    quality.log(uniform_images(1), 2)

    def fail(folder):
        raise OSError("No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        quality.keep(fail)
    assert (tmp_path / "best" / "model").read_text() == "first"
    quality.log(uniform_images(0, high=50), 3)  # worse than the second, as good as the first
    quality.keep(fail)
    quality.log(lambda count: None, 4)  # interrupted
    quality.keep(fail)


def test_a_kill_between_two_renames_is_repaired(quality, tmp_path, accelerator):
    quality.log(uniform_images(0), 1)
    quality.keep(lambda folder: (folder / "model").write_text("first"))
    (tmp_path / "best").rename(tmp_path / "best-previous")
    again = SampleQuality(quality.args, accelerator, SimpleNamespace(examples=lambda n: torch.zeros(30, 1, 4, 4)), 1)
    assert (tmp_path / "best" / "model").read_text() == "first" and again.best == quality.best


def test_too_few_samples_are_said(quality, accelerator, caplog):
    quality.args.num_evaluation_samples = 20
    SampleQuality(quality.args, accelerator, SimpleNamespace(examples=lambda n: torch.zeros(n, 1, 4, 4)), 0)
    assert "20 images for 16 features" in caplog.text
    with pytest.raises(UserError, match="--evaluate_steps: 1 images; expected at least 6"):
        SampleQuality(quality.args, accelerator, SimpleNamespace(examples=lambda n: torch.zeros(1, 1, 4, 4)), 0)
