"""Images that are not square, in every script and every tool."""

import json

import numpy as np
import pytest
from conftest import exit_code, train
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image

import evaluate
import finetune_faces
import sample
import train_basic
import train_conditional
import train_ddpm
import train_flow
import train_unet2d
from utils import UserError

FLAGS = ["--max_train_steps=1", "--resolution=8x16", "--random_flip", "--train_batch_size=4"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Twenty wide pictures of two classes."""
    folder = tmp_path_factory.mktemp("wide")
    for k in range(20):
        place = folder / "ab"[k % 2] / f"{k:02}.png"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (20, 36), dtype=np.uint8)).save(place)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory, wide):
    folder = tmp_path_factory.mktemp("model") / "run"
    assert train(folder, "--train_data_dir", wide, *FLAGS) == 0
    return folder


def size_of(folder):
    return json.loads((folder / "unet" / "config.json").read_text())["sample_size"]


@pytest.mark.parametrize(
    "script", [train_basic, train_unet2d, train_conditional, train_flow], ids=lambda script: script.__name__
)
def test_every_script_trains_on_them_and_its_pipeline_draws_them(tmp_path, wide, script, capsys):
    conditional = script is train_conditional
    small = ["--unet=tiny", "--num_samples=2"] if script in (train_conditional, train_flow) else []
    assert train(tmp_path / "run", "--train_data_dir", wide, *FLAGS, *small, script=script) == 0
    assert size_of(tmp_path / "run") == [8, 16]
    custom = {"custom_pipeline": str(tmp_path / "run")} if conditional else {}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run", trust_remote_code=True, **custom)
    said = capsys.readouterr().out
    assert ("([0], num_inference_steps=" if conditional else "(num_inference_steps=") in said
    drawn = pipeline(**({"class_labels": ["b"]} if conditional else {}), num_inference_steps=2).images[0]
    assert drawn.size == (16, 8)
    start = f"--pretrained_model_name_or_path={tmp_path / 'run'}"
    if conditional:
        assert "DiffusionPipeline.from_pretrained" in (tmp_path / "run" / "README.md").read_text()
        again = [start, "--train_data_dir", wide, "--max_train_steps=1", "--train_batch_size=4"]
        assert train(tmp_path / "again", *again, script=script) == 0
    flags = [f"--output_dir={tmp_path / 'drawn'}", "--num_samples=2", "--num_inference_steps=2"]
    assert exit_code(sample.main, sample.parse_args([str(tmp_path / "run"), *flags])) == 0
    assert Image.open(tmp_path / "drawn" / "images" / "000001.png").size == (16, 8)


def test_ddpm_pipeline_draws_them_and_training_continues_from_it(tmp_path, wide, model):
    assert size_of(model) == [8, 16]
    assert DDPMPipeline.from_pretrained(model)(num_inference_steps=2).images[0].size == (16, 8)
    start = f"--pretrained_model_name_or_path={model}"
    assert train(tmp_path / "ddpm", "--train_data_dir", wide, start, "--max_train_steps=1", "--train_batch_size=4") == 0
    flags = [start, "--train_data_dir", wide, "--max_train_steps=1", "--train_batch_size=4"]
    assert train(tmp_path / "faces", *flags, script=finetune_faces) == 0
    assert size_of(tmp_path / "ddpm") == size_of(tmp_path / "faces") == [8, 16]


def test_the_tools_know_them(tmp_path, wide, model):
    def draw(name, *flags):
        flags = [f"--output_dir={tmp_path / name}", "--num_samples=10", "--num_inference_steps=2", *flags]
        assert exit_code(sample.main, sample.parse_args([str(model), *flags])) == 0

    draw("film", "--gif", "--interpolate", "0", "1")
    draw("started", f"--init_image={wide / 'a' / '00.png'}", "--strength=0.5", "--guidance_color=red")
    assert (tmp_path / "film" / "walk.gif").is_file()
    flags = [str(model), str(tmp_path / "film"), f"--reference={wide}", "--features=pixels"]
    flags += ["--reference_split=train[:10]", "--held_out_split=train[10:]"]
    flags += ["--num_samples=10", "--num_inference_steps=2", f"--output_dir={tmp_path / 'evaluation'}"]
    assert exit_code(evaluate.main, evaluate.parse_args([*flags, "--validation_loss"])) == 0
    rows = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    assert [row["N"] for row in rows] == [10] * 4


def test_a_side_that_does_not_fit_is_refused_with_the_nearest_that_does(tmp_path, wide):
    with pytest.raises(UserError, match=r"images of 10 x 16 pixels: .* multiples of 4\. Try --resolution 8x16"):
        train(tmp_path / "run", "--train_data_dir", wide, "--resolution=10x16", "--train_batch_size=4")
    for flag in ("--resolution=8x", "--resolution=2", "--resolution=8x16x3", "--resolution=axb"):
        with pytest.raises(SystemExit):
            train_ddpm.parse_args([flag])
