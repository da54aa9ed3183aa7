"""sample.py: models of ours and of diffusers, images that do not depend on batches, and resuming."""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import children
import datasets
import numpy as np
import pytest
from conftest import exit_code, train
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import sample
import train_basic
from utils import UserError
from utils.diffusion.unets import UNETS

ROOT = Path(__file__).parents[2]


def draw(model, output_dir, *flags):
    flags = ["--num_samples=5", "--num_inference_steps=3", *map(str, flags)]
    return exit_code(sample.main, sample.parse_args([str(model), f"--output_dir={output_dir}", *flags]))


def images(folder, count=5):
    return np.stack([np.asarray(Image.open(folder / "images" / f"{k:06}.png")) for k in range(count)]).astype(int)


@pytest.fixture(scope="session")
def basic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("basic") / "run"
    train(folder, "--max_train_steps=1", script=train_basic)
    return folder


def test_our_pipelines_and_the_grid_of_training_are_drawn_again(tmp_path, finished_run, basic):
    assert draw(finished_run, tmp_path / "ddpm", "--num_inference_steps=2", "--num_samples=4") == 0
    drawn, grid = (Image.open(path) for path in (tmp_path / "ddpm" / "grid.png", finished_run / "samples.png"))
    grid = np.asarray(grid.crop((0, 0, *drawn.size)))  # without the line of text
    assert np.abs(grid.astype(int) - np.asarray(drawn)).max() <= 1
    assert draw(basic, tmp_path / "basic", "--num_inference_steps=2", "--num_samples=4") == 0
    assert (tmp_path / "basic" / "grid.png").is_file()


def test_a_model_alone_and_other_schedulers_work(tmp_path, finished_run):
    assert draw(finished_run / "unet", tmp_path / "unet", "--sampler=ddim") == 0
    unet = UNet2DModel.from_pretrained(finished_run / "unet")
    DDPMPipeline(unet, EulerDiscreteScheduler()).save_pretrained(tmp_path / "euler")
    assert draw(tmp_path / "euler", tmp_path / "drawn") == 0
    assert images(tmp_path / "drawn").std() > 0


@pytest.mark.parametrize("flags", [["--sample_batch_size=2"], ["--mixed_precision=no"]])
def test_images_do_not_depend_on_the_batch(tmp_path, finished_run, flags):
    draw(finished_run, tmp_path / "one")
    draw(finished_run, tmp_path / "two", *flags)
    assert np.abs(images(tmp_path / "one") - images(tmp_path / "two")).max() <= 1


def test_two_processes_draw_what_one_draws(tmp_path, finished_run):
    draw(finished_run, tmp_path / "one")
    flags = [f"--output_dir={tmp_path}/two", "--num_samples=5", "--num_inference_steps=3", "--sample_batch_size=2"]
    code, said = children.run(ROOT / "sample.py", finished_run, *flags, processes=2)
    assert code == 0, said
    assert np.abs(images(tmp_path / "one") - images(tmp_path / "two")).max() <= 1


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path, finished_run, monkeypatch, capsys):
    calls, stop_at = [], 5
    original = DPMSolverMultistepScheduler.step

    @functools.wraps(original)
    def step(self, *arguments, **options):
        calls.append(1)
        if len(calls) == stop_at:  # in the second batch
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", step)
    assert draw(finished_run, tmp_path / "run", "--sample_batch_size=2") == 130
    assert "Stopped with 2 of 5 images. The same command resumes." in capsys.readouterr().out
    assert not (tmp_path / "run" / "grid.png").exists() and not list((tmp_path / "run").rglob("*.tmp"))
    calls.clear()
    stop_at = None
    assert draw(finished_run, tmp_path / "run", "--sample_batch_size=2") == 0
    assert len(calls) == 2 * 3  # two batches, the three images that were missing
    with pytest.raises(UserError, match="mixed_precision was 'no', is 'bf16'"):
        draw(finished_run, tmp_path / "run", "--mixed_precision=bf16")
    draw(finished_run, tmp_path / "straight")
    assert np.abs(images(tmp_path / "run") - images(tmp_path / "straight")).max() <= 1
    assert draw(finished_run, tmp_path / "run", "--num_samples=7") == 0  # more images of the same run
    assert len(list((tmp_path / "run" / "images").iterdir())) == 7


def test_formats_and_film(tmp_path, finished_run):
    draw(finished_run, tmp_path / "npz", "--format=npz", "--gif")
    array = np.load(tmp_path / "npz" / "images.npz")["images"]
    assert array.shape == (5, 8, 8, 1) and (array[..., 0] == images(tmp_path / "npz")).all()
    film = Image.open(tmp_path / "npz" / "walk.gif")
    assert film.n_frames == 3 and film.size == (2 * 208, 140)  # three steps; noisy and predicted side by side
    walk = Image.open(tmp_path / "npz" / "walk.png")
    assert walk.height == 6 * 68 + 4 and 3 * 68 < walk.width < 6 * 68  # six captioned rows of three steps
    draw(finished_run, tmp_path / "parquet", "--format=parquet")
    rows = datasets.load_dataset(str(tmp_path / "parquet"), data_files="images.parquet", split="train")
    assert (np.asarray(rows[4]["image"]) == images(tmp_path / "parquet")[4]).all()


def test_interpolation_init_image_and_guidance(tmp_path, finished_run):
    draw(finished_run, tmp_path / "plain", "--sampler=ddim")
    draw(finished_run, tmp_path / "walk", "--sampler=ddim", "--interpolate", 1, 4)
    plain, walk = images(tmp_path / "plain"), images(tmp_path / "walk")
    assert np.abs(walk[0] - plain[1]).max() <= 1 and np.abs(walk[4] - plain[4]).max() <= 1
    Image.new("L", (30, 20), 255).save(tmp_path / "white.png")
    white = f"--init_image={tmp_path}/white.png"
    draw(finished_run, tmp_path / "init", "--num_inference_steps=10", white, "--strength=0.1")
    assert images(tmp_path / "init").mean() > 150
    draw(finished_run, tmp_path / "guided", "--sampler=ddim", "--guidance_color=white")
    assert images(tmp_path / "guided").mean() > images(tmp_path / "plain").mean() + 20


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "unipc"])
def test_a_model_with_a_learned_variance_is_drawn_with_by_its_mean(tmp_path, sampler):
    unet = UNet2DModel(8, in_channels=1, out_channels=2, **UNETS["tiny"])
    DDPMPipeline(unet, DDPMScheduler(variance_type="learned_range")).save_pretrained(tmp_path / "model")
    draw(tmp_path / "model", tmp_path / "out", f"--sampler={sampler}", "--num_inference_steps=2")
    assert images(tmp_path / "out").shape[1:3] == (8, 8)


def test_other_settings_and_foreign_folders_are_refused(tmp_path, finished_run):
    draw(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="holds images drawn with other settings: seed was 0, is 1"):
        draw(finished_run, tmp_path / "run", "--seed=1")
    on = shutil.copytree(finished_run, tmp_path / "trained-on")
    weights = load_file(on / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 1
    draw(on, tmp_path / "on")
    save_file(weights, on / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="holds images drawn with other settings: weights of the model changed"):
        draw(on, tmp_path / "on")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("two years of work")
    with pytest.raises(UserError, match=r"is not empty, and is not the output of sample\.py"):
        draw(finished_run, tmp_path / "thesis")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([""], "the name is empty. Expected a saved pipeline, or a Hub id"),
        (["./missing"], r"\./missing: there is no such folder\. Expected a saved pipeline, or a Hub id"),
        (["BASIC", "--sampler=ddim"], "was trained on linear mixing, which has its own"),
        (["DDPM", "--init_image=missing.png"], r"--init_image missing\.png: there is no such file"),
        (["TEN", "--num_inference_steps=11"], "there are only 10 noise levels"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(tmp_path, finished_run, basic, flags, message):
    DDPMPipeline(UNet2DModel.from_pretrained(finished_run / "unet"), DDPMScheduler(10)).save_pretrained(
        tmp_path / "ten"
    )
    model = {"BASIC": basic, "DDPM": finished_run, "TEN": tmp_path / "ten"}.get(flags[0], flags[0])
    with pytest.raises(UserError, match=message):
        draw(model, tmp_path / "out", *flags[1:])


def test_code_that_comes_with_a_model_is_not_run(tmp_path, basic):
    import shutil

    shutil.copytree(basic, tmp_path / "evil")
    for name in ("linear_mix.py", "unet/basic_unet.py", "scheduler/linear_mix.py"):
        (tmp_path / "evil" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert draw(tmp_path / "evil", tmp_path / "drawn") == 0
    index = json.loads((tmp_path / "evil" / "model_index.json").read_text())
    (tmp_path / "evil" / "model_index.json").write_text(json.dumps({**index, "unet": ["basic_unet", "EvilUNet"]}))
    with pytest.raises(UserError, match=r"its parts are EvilUNet and LinearMixScheduler\. Expected a model"):
        draw(tmp_path / "evil", tmp_path / "again")
    assert not (tmp_path / "ran").exists()


def test_an_interpolation_is_a_row_and_a_film(tmp_path, finished_run):
    draw(finished_run, tmp_path / "walk", "--interpolate", 0, 3, "--gif", "--num_inference_steps=4", "--num_samples=6")
    with Image.open(tmp_path / "walk" / "walk.gif") as film, Image.open(tmp_path / "walk" / "grid.png") as grid:
        assert film.n_frames > 6 and grid.width > 5 * grid.height
    assert not (tmp_path / "walk" / "walk.png").exists()
    drawn = images(tmp_path / "walk").astype(float)
    steps, whole = np.abs(np.diff(drawn, axis=0)).mean(axis=(1, 2)), np.abs(drawn[0] - drawn[-1]).mean()
    assert max(steps) < whole / 2  # a smooth path, although the pipeline's own sampler adds noise at every step
    assert sample.parse_args(["x", "--interpolate", "0", "3"]).num_samples == 8


@pytest.mark.parametrize("flag", ["--strength=0.9", "--guidance_mode=net"])
def test_a_flag_of_what_is_not_asked_for_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["x", flag])
    assert flag.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_a_scale_without_anything_to_be_guided_by_is_refused(tmp_path, finished_run):
    with pytest.raises(UserError, match="--guidance_scale: this model has no classes"):
        draw(finished_run, tmp_path / "drawn", "--guidance_scale=3")
