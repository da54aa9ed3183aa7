"""train_basic.py and the parts that train_unet2d.py shares: files of a run, resuming, bad input."""

import json

import pytest
import torch
import yaml
from conftest import equal_weights, events, scalars, slow, train
from PIL import Image
from safetensors.torch import load_file

import train_basic
import train_unet2d
from utils import UserError
from utils.diffusion.linear_mix import LinearMixScheduler

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCRIPTS = pytest.mark.parametrize("script", [train_basic, train_unet2d], ids=["basic", "unet2d"])


@pytest.fixture(scope="module", params=[train_basic, train_unet2d], ids=["basic", "unet2d"])
def finished(request, tmp_path_factory):
    """Return the folder of a finished run of each script; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = ["--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2"]
    assert train(folder, *flags, script=request.param) == 0
    return folder


def test_pictures_are_in_the_folder_and_in_tensorboard(finished):
    assert Image.open(finished / "samples.png").size[1] == 2 * 68 + 4 + 24  # a line of text below
    assert Image.open(finished / "denoising.png").height == 3 * 68 + 4
    assert Image.open(finished / "walk.png").height == 10 * 68 + 4
    for name in ("samples", "denoising", "walk"):
        pictures = events(finished).Images(name)
        assert [picture.step for picture in pictures] == [2, 4, 6]
        assert pictures[0].encoded_image_string != pictures[2].encoded_image_string


def test_curves_are_in_tensorboard(finished):
    tags = set(events(finished).Tags()["scalars"])
    assert {"loss/train", "optimizer/learning_rate", "optimizer/ema_decay", "system/images_per_second"} <= tags
    assert {f"loss_by_timestep/{k * 250}-{k * 250 + 249}" for k in range(4)} <= tags
    assert any(tag.startswith("loss_per_label/") for tag in tags)
    assert list(scalars(finished, "loss/train")) == [2, 4, 6]


def test_the_folder_and_every_checkpoint_bring_their_code(finished):
    for folder in (finished, finished / "checkpoint-3", finished / "checkpoint-6"):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == ["linear_mix", "LinearMixPipeline"]
        assert (folder / "linear_mix.py").is_file() and (folder / "scheduler" / "linear_mix.py").is_file()
    assert equal_weights(finished / WEIGHTS, finished / "checkpoint-6" / WEIGHTS)
    raw = load_file(finished / "checkpoint-6" / "training_state" / "model.safetensors")
    averaged = load_file(finished / WEIGHTS)
    assert raw.keys() == averaged.keys() and any(not torch.equal(raw[key], averaged[key]) for key in raw)


def test_the_card_says_how_to_load_it_and_that_code_runs(finished):
    card = (finished / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["diffusers", "unconditional-image-generation"]
    assert "DiffusionPipeline.from_pretrained('run', trust_remote_code=True)" in card
    assert "`linear_mix.py`" in card and "`scheduler/linear_mix.py`" in card and "Read it first" in card
    assert str(finished) not in card


@pytest.mark.parametrize("script", [train_basic, slow(train_unet2d)], ids=["basic", "unet2d"])
def test_the_loss_falls_and_a_finished_run_is_left_alone(tmp_path, script, capsys):
    flags = ["--report_to=tensorboard", "--max_train_steps=60", "--logging_steps=10", "--checkpointing_steps=100"]
    train(tmp_path / "run", *flags, script=script)
    losses = scalars(tmp_path / "run", "loss/train")
    assert losses[60] < 0.5 * losses[10]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(tmp_path / "run", *flags, script=script) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert "DiffusionPipeline.from_pretrained" in capsys.readouterr().out


@SCRIPTS
def test_noise_and_target_are_float32_images_in_any_precision(tmp_path, monkeypatch, script):
    seen = []
    original = LinearMixScheduler.add_noise

    def add_noise(self, clean, noise, timesteps):
        result = original(self, clean, noise, timesteps)
        seen.append((clean, noise, timesteps, result))
        return result

    monkeypatch.setattr(LinearMixScheduler, "add_noise", add_noise)
    train(tmp_path / "run", "--mixed_precision=bf16", "--max_train_steps=2", script=script)
    for clean, noise, timesteps, result in seen:
        assert {tensor.dtype for tensor in (clean, noise, timesteps, result)} == {torch.float32}
        assert noise.abs().max() <= 1 and clean.abs().max() <= 1
    amounts = seen[0][2]
    assert len(amounts.unique()) == 8 and amounts.min() >= 0 and amounts.max() < 1000


@SCRIPTS
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--resolution=10"], r"needs multiples of 4\. Try --resolution 8"),
        (["--dataset_name=./missing"], "there is no such file or folder"),
        (["--mixed_precision=fp16"], "fp16 needs a GPU"),
        (["--resume_from_checkpoint=checkpoint-7"], "there is no such folder"),
        (["--learning_rate=1e30", "--max_grad_norm=0", "--lr_warmup_steps=1"], "expected finite numbers"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(tmp_path, script, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *flags, script=script)


def test_a_folder_of_another_script_is_refused(tmp_path):
    train(tmp_path / "run", "--max_train_steps=1", script=train_basic)
    before = (tmp_path / "run" / "training_args.json").read_bytes()
    with pytest.raises(UserError, match="holds a run of another script"):
        train(tmp_path / "run", "--max_train_steps=1", script=train_unet2d)
    with pytest.raises(UserError, match="holds a run of another script"):
        train(tmp_path / "run", "--max_train_steps=1")
    assert (tmp_path / "run" / "training_args.json").read_bytes() == before


def test_colour_images_of_a_folder(tmp_path):
    for k in range(9):
        Image.new("RGB", (20, 12), (20 * k, 40, 90)).save(tmp_path / f"{k}.png")
    train(tmp_path / "out" / "run", f"--train_data_dir={tmp_path}", "--max_train_steps=1", script=train_basic)
    config = json.loads((tmp_path / "out" / "run" / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"]) == (3, [12, 20])
    assert Image.open(tmp_path / "out" / "run" / "walk.png").mode == "RGB"
