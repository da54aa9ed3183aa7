"""train_ddpm.py in this process: the files of a run, and things that it must not depend on."""

import fcntl
import gc
import inspect
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from children import ROOT
from conftest import equal_weights, events, interrupt, parse, scalars, train
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import train_conditional
import train_ddpm
from utils import UserError
from utils.args import SAMPLERS
from utils.diffusion import unets
from utils.diffusion.pretrained import zero_init
from utils.publishing.model_card import write_card
from utils.training import checkpoints
from utils.training.loop import Run

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------------------------------------------- files of a run


def test_the_output_folder_is_a_pipeline(finished_run):
    pipeline = DDPMPipeline.from_pretrained(finished_run, use_safetensors=True)
    assert pipeline.unet.config.sample_size == 8 and pipeline.unet.config.in_channels == 1
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"  # the sampler of the samples
    image = pipeline(num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (8, 8, 1) and np.isfinite(image).all()
    assert not [*finished_run.rglob("*.bin"), *finished_run.rglob(".tmp*")] or all(
        "training_state" in str(path) for path in finished_run.rglob("*.bin")
    )


def test_every_checkpoint_is_a_pipeline_with_the_averaged_weights(finished_run):
    assert {path.name for path in finished_run.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    last = finished_run / "checkpoint-6"
    DDPMPipeline.from_pretrained(last, use_safetensors=True)(num_inference_steps=1)
    assert equal_weights(last / WEIGHTS, finished_run / WEIGHTS)
    raw, averaged = load_file(last / "training_state" / "model.safetensors"), load_file(last / WEIGHTS)
    assert raw.keys() == averaged.keys()
    assert not torch.equal(raw["conv_in.weight"], averaged["conv_in.weight"])


def test_tensorboard_has_every_curve_and_picture(finished_run):
    tags = events(finished_run).Tags()
    expected = {"loss/train", *(f"optimizer/{name}" for name in ("grad_norm", "learning_rate", "ema_decay"))}
    expected |= {"system/images_per_second", "system/peak_memory_gib"}
    expected |= {f"loss_by_timestep/{k * 250}-{k * 250 + 249}" for k in range(4)}
    assert expected <= set(tags["scalars"])
    assert any(tag.startswith("loss_per_label/") for tag in tags["scalars"])
    losses = scalars(finished_run, "loss/train")
    assert list(losses) == [2, 4, 6] and all(0 < value < 3 for value in losses.values())
    rates = scalars(finished_run, "optimizer/learning_rate")
    assert rates[2] == pytest.approx(1e-3 * 1 / 2)  # the second of two warm-up steps
    pictures = events(finished_run).Images("samples")
    assert [picture.step for picture in pictures] == [2, 4, 6]
    assert pictures[0].encoded_image_string[:4] == b"\x89PNG"


def test_loss_by_timestep_and_label_average_to_the_loss(tmp_path):
    train(
        tmp_path / "run",
        "--report_to=tensorboard",
        "--label_column=label",
        "--max_train_steps=1",
        "--weighting_scheme=uniform",
    )
    loss = scalars(tmp_path / "run", "loss/train")[1]
    data = events(tmp_path / "run")
    bins = [data.Scalars(tag)[0].value for tag in data.Tags()["scalars"] if tag.startswith("loss_by_timestep")]
    assert np.mean(bins) == pytest.approx(loss, rel=1e-4)  # stratified: two of eight samples in each


def test_grids_card_and_arguments(finished_run):
    for path in ("samples.png", "samples/step-000002.png", "samples/step-000004.png"):
        assert Image.open(finished_run / path).size[1] == 2 * 68 + 4 + 24  # a line of text below
    card = (finished_run / "README.md").read_text()
    import yaml

    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "diffusers" and "ddpm" in metadata["tags"]
    assert "![samples](samples.png)" in card and str(finished_run) not in card
    record = json.loads((finished_run / "training_args.json").read_text())
    assert record["finished_at_step"] == 6 and record["arguments"]["learning_rate"] == 1e-3
    assert record["images"] == 1797 and record["versions"]["torch"].startswith("2.")


def test_the_last_lines_name_only_what_is_there(tmp_path, finished_run, photos, capsys):
    def lines():
        flags = ["--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2"]
        assert train(tmp_path / "run", *flags) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]

    shutil.copytree(finished_run, tmp_path / "run")
    assert lines() == ["samples", "pipeline", "curves", "train", "your"]
    shutil.rmtree(tmp_path / "run" / "logs")
    assert lines() == ["samples", "pipeline", "train", "your"]
    train(tmp_path / "own", f"--train_data_dir={photos}", "--max_train_steps=1")
    assert "your images" not in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path):
    """Return a folder of twelve images with a private name."""
    folder = tmp_path / "aunt-marys-photos"
    folder.mkdir()
    for k in range(12):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{k}.png")
    return folder


def test_the_card_names_no_private_folder(tmp_path, photos, monkeypatch):
    flags = [f"--dataset_name={photos}", "--max_train_steps=1"]
    monkeypatch.setattr(train_ddpm, "MASKS", str(photos / "0.png"), raising=False)  # a constant of a copied script
    train(tmp_path / "run", *flags)
    card = (tmp_path / "run" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert "# DDPM trained on 12 own images" in card and "## People" in card
    assert "aunt" not in card and "aunt" not in str([record["public_arguments"], record["public_constants"]])
    shutil.move(photos, tmp_path / "gone")  # a path cannot be recognised any more
    with pytest.raises(UserError):
        train(tmp_path / "run", *flags)
    write_card(tmp_path / "run", tmp_path / "run", dataset_name="Our cats")
    assert "trained on Our cats" in (tmp_path / "run" / "README.md").read_text()


def test_a_folder_named_like_an_embedded_set_is_not_it(tmp_path, photos, monkeypatch):
    photos.rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    train(tmp_path / "run", "--train_data_dir=digits", "--max_train_steps=1")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "trained on 12 own images" in card and "## People" in card and "CC BY" not in card


@pytest.mark.slow
def test_the_command_on_the_card_reproduces_the_weights(tmp_path, photos):
    (tmp_path / "run.yaml").write_text("max_train_steps: 2\nrandom_flip: true\nuse_ema: false\nunet: tiny\n")
    flags = [f"--train_data_dir={photos}", f"--config={tmp_path / 'run.yaml'}", "--train_batch_size=4"]
    flags += ["--num_samples=2", "--num_inference_steps=1", "--report_to=none"]
    command = [sys.executable, "train_ddpm.py", *flags, "--output_dir", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = (tmp_path / "run" / "README.md").read_text().splitlines()
    (line,) = [line.strip() for line in lines if line.startswith("    accelerate launch")]
    assert "--mixed_precision" in line and "aunt" not in line and "output_dir" not in line
    again = [part.replace("own images", str(photos)) for part in shlex.split(line)]
    again += ["--output_dir", str(tmp_path / "again")]
    subprocess.run([str(Path(sys.executable).parent / again[0]), *again[1:]], cwd=ROOT, check=True)
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "again" / WEIGHTS)


def test_the_same_command_again_does_nothing(tmp_path, capsys):
    train(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train(tmp_path / "run") == 0
    assert "This run is already finished, after 6 optimizer steps" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_a_finished_run_saves_again_what_is_missing_from_its_pipeline(tmp_path):
    folder = tmp_path / "run"
    train(folder)
    before = (folder / WEIGHTS).read_bytes()
    for name in ("unet", WEIGHTS, "scheduler"):
        remove = shutil.rmtree if (folder / name).is_dir() else Path.unlink
        remove(folder / name)
        assert train(folder) == 0
        assert (folder / WEIGHTS).read_bytes() == before
        DDPMPipeline.from_pretrained(folder)


def test_a_finished_run_draws_again_what_is_missing_or_asked_for_otherwise(tmp_path, capsys):
    train(tmp_path / "run")
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    (tmp_path / "run" / "samples.png").unlink()
    train(tmp_path / "run")
    assert (tmp_path / "run" / "samples.png").is_file()
    train(tmp_path / "run", "--num_samples=9")
    assert Image.open(tmp_path / "run" / "samples.png").size[1] == 3 * 68 + 4 + 24  # a line of text below
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before
    assert "already finished" not in capsys.readouterr().out


def test_a_signal_while_drawing_stops_the_drawing(tmp_path, monkeypatch, capsys):
    original = DPMSolverMultistepScheduler.step

    def step(self, model_output, timestep, sample, generator=None):
        steps.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, model_output, timestep, sample, generator=generator)

    steps = []
    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", step)
    assert train(tmp_path / "run", "--num_inference_steps=20") == 130
    assert len(steps) == 1
    monkeypatch.undo()
    assert "The same command resumes" in capsys.readouterr().out
    assert not (tmp_path / "run" / "samples.png").exists()
    assert train(tmp_path / "run", "--num_inference_steps=20") == 0
    assert (tmp_path / "run" / "samples.png").is_file()


def test_one_process_trains_again_and_again_as_a_notebook_does(tmp_path):
    """Another precision works, too. No thread, open file or tensor of a run is left."""

    def left():
        gc.collect()
        files = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        return threading.active_count(), len(files), tensors

    seen = []
    for index, precision in enumerate(("no", "bf16", "no")):
        flags = ["--validation_split=train[1700:]", "--dataset_split=train[:1700]", "--report_to=tensorboard"]
        args = parse("--output_dir", tmp_path / str(index), *flags, f"--mixed_precision={precision}")
        train_ddpm.main(args)
        seen.append(left())
    assert seen[1] == seen[2]
    with open(tmp_path / "0" / ".lock", "w") as file:  # another process may resume
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_with_the_noise_of_another_version_resumes_with_a_warning(tmp_path, capsys):
    train(tmp_path / "run")
    interrupt(tmp_path / "run", keep="checkpoint-3")
    checkpoint = tmp_path / "run" / "checkpoint-3"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["randomness"] -= 1
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    checkpoints._write_manifest(checkpoint)
    assert train(tmp_path / "run") == 0
    assert "checkpoint-3 was saved by a version that drew other noise" in capsys.readouterr().err


def test_a_foreign_folder_and_changed_settings_are_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years of work")
    with pytest.raises(UserError, match="is not empty, and is not the output of these scripts"):
        train(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    train(tmp_path / "run", "--max_train_steps=1")
    with pytest.raises(
        UserError, match=r"learning_rate was 0\.001, is 0\.5; prediction_type was not given, is 'sample'"
    ):
        train(tmp_path / "run", "--learning_rate=0.5", "--prediction_type=sample")


# -------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "flags",
    [
        ["--checkpointing_steps=4"],  # a checkpoint in the middle of an epoch
        ["--checkpointing_steps=3"],  # a checkpoint at the end of an epoch
        ["--checkpointing_steps=4", "--gradient_accumulation_steps=2", "--train_batch_size=4"],
        ["--checkpointing_steps=4", "--cache_images=never", "--dataloader_num_workers=0"],
        ["--checkpointing_steps=4", "--cache_images=never", "--dataloader_num_workers=2"],
        ["--checkpointing_steps=4", "--mixed_precision=bf16", "--autoguidance=0.4"],
    ],
)
def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(train_ddpm, "DROPOUT", 0.3)
    monkeypatch.setattr(train_ddpm, "SNR_GAMMA", 5)
    flags = [*flags, "--max_train_samples=24", "--random_flip", "--report_to=tensorboard"]
    flags += ["--sample_steps=2", "--checkpoints_total_limit=5"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, *flags)
    train(resumed, *flags)
    keep = flags[0].replace("--checkpointing_steps=", "checkpoint-")
    interrupt(resumed, keep)
    torch.manual_seed(99)
    train(resumed, *flags)
    assert not list(resumed.glob(".tmp*"))
    assert equal_weights(straight / WEIGHTS, resumed / WEIGHTS)  # EMA
    state = "checkpoint-6/training_state"
    assert equal_weights(straight / state / "model.safetensors", resumed / state / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin"):
        first, second = (torch.load(folder / state / name, weights_only=True) for folder in (straight, resumed))
        assert str(first) == str(second)
        if name == "optimizer.bin":
            for key, values in first["state"].items():
                assert all(torch.equal(value, second["state"][key][part]) for part, value in values.items())
    assert scalars(straight, "loss/train") == scalars(resumed, "loss/train")
    assert np.array_equal(*(np.asarray(Image.open(folder / "samples.png")) for folder in (straight, resumed)))


def test_workers_and_cache_do_not_change_the_weights(tmp_path):
    train(tmp_path / "cached", "--random_flip", "--cache_images=always")
    train(tmp_path / "workers", "--random_flip", "--cache_images=never", "--dataloader_num_workers=2")
    assert equal_weights(tmp_path / "cached" / WEIGHTS, tmp_path / "workers" / WEIGHTS)


def test_a_longer_run_continues_a_finished_one(tmp_path):
    train(tmp_path / "run", "--lr_scheduler=constant")
    train(tmp_path / "long", "--lr_scheduler=constant", "--max_train_steps=9")
    train(tmp_path / "run", "--lr_scheduler=constant", "--max_train_steps=9")
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "long" / WEIGHTS)


def test_an_extended_run_resumes_with_the_rates_of_the_longer_schedule(tmp_path, capsys):
    flags = ["--report_to=tensorboard", "--lr_warmup_steps=0"]
    train(tmp_path / "run", *flags)
    train(tmp_path / "run", *flags, "--max_train_steps=12")
    assert (
        "The learning rate changes from 0 to 0.0005, because its schedule has another length" in capsys.readouterr().err
    )
    rates = scalars(tmp_path / "run", "optimizer/learning_rate")
    assert rates[6] == pytest.approx(1e-3 * 1 / 6) and rates[7] == pytest.approx(1e-3 * 6 / 12)


def test_going_back_to_an_older_checkpoint_sets_the_newer_aside(tmp_path):
    train(tmp_path / "run", "--max_train_steps=9", "--checkpoints_total_limit=3")
    before = (tmp_path / "run" / WEIGHTS).read_bytes()
    flags = ["--max_train_steps=9", "--checkpoints_total_limit=1"]
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    del record["finished_at_step"]
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(record))
    train(tmp_path / "run", *flags, f"--resume_from_checkpoint={tmp_path}/run/checkpoint-3")
    names = {path.name for path in (tmp_path / "run").glob("*checkpoint-*")}
    assert names == {"checkpoint-9", "abandoned-checkpoint-6", "abandoned-checkpoint-9"}
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == before


def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path, monkeypatch, caplog):
    import fcntl

    import filelock

    acquire = filelock.FileLock.acquire
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(
        filelock.FileLock, "acquire", lambda self, timeout, **rest: acquire(self, timeout=min(timeout, 1))
    )
    with open(tmp_path / "run" / ".lock", "w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing to it"):
            train(tmp_path / "run")
    assert train(tmp_path / "run", "--max_train_steps=1") == 0


def test_bad_checkpoints_stop_the_run_before_anything_is_touched(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        train(tmp_path / "run", f"--resume_from_checkpoint={tmp_path}/checkpoint-7")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    train(tmp_path / "run", "--max_train_steps=3")
    (tmp_path / "run" / "checkpoint-3" / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"is damaged: unet/diffusion_pytorch_model\.safetensors"):
        train(tmp_path / "run", f"--resume_from_checkpoint={tmp_path}/run/checkpoint-3")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, number, code):
    original = Run.end_of_step

    def end_of_step(self, *arguments):  # in the middle of the fifth step
        if self.global_step == 4:
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(Run, "end_of_step", end_of_step)
    assert train(tmp_path / "stopped") == code
    assert "Stopped by" in (said := capsys.readouterr().out) and "5 of 6" in said and "The same command" in said
    assert (tmp_path / "stopped" / "checkpoint-5").is_dir()
    monkeypatch.undo()
    assert train(tmp_path / "stopped") == 0
    train(tmp_path / "straight")
    assert equal_weights(tmp_path / "stopped" / WEIGHTS, tmp_path / "straight" / WEIGHTS)


def test_a_loss_that_is_not_finite_stops_and_is_never_saved(tmp_path):
    with pytest.raises(UserError, match=r"step \d+: loss (nan|inf).*lower --learning_rate"):
        train(tmp_path / "run", "--learning_rate=1e30", "--lr_warmup_steps=1", "--max_grad_norm=0", "--logging_steps=4")
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert all(value.isfinite().all() for value in load_file(folder / "training_state/model.safetensors").values())


# ------------------------------------------------------------------------------------------------------ mathematics


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_loss_falls_for_every_target(tmp_path, monkeypatch, prediction_type):
    monkeypatch.setattr(train_ddpm, "SNR_GAMMA", 5)
    flags = ["--report_to=tensorboard", "--max_train_steps=40", "--logging_steps=10", "--checkpointing_steps=100"]
    train(tmp_path / "run", *flags, f"--prediction_type={prediction_type}")
    losses = scalars(tmp_path / "run", "loss/train")
    assert losses[40] < 0.8 * losses[10]
    assert DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config.prediction_type == prediction_type


@pytest.mark.parametrize(
    ("script", "flags", "scale"),
    [(train_ddpm, [], 1), (train_conditional, ["--unet=tiny", "--model_guidance=0.3"], 0.7)],
)
def test_autoguidance_moves_the_target_away_from_the_earlier_output(tmp_path, monkeypatch, script, flags, scale):
    seen, mse_loss, forward = {}, torch.nn.functional.mse_loss, UNet2DModel.forward

    def spy_loss(output, target, **options):
        seen[weight].append((*inputs, output.detach(), target))
        return mse_loss(output, target, **options)

    def spy_forward(self, *given, **options):
        if self.training and torch.is_grad_enabled():
            inputs[:] = given
        return forward(self, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", spy_loss)
    monkeypatch.setattr(UNet2DModel, "forward", spy_forward)
    for weight in (0.0, 0.4):
        seen[weight], inputs = [], []
        options = ["--max_train_steps=10", "--checkpoints_total_limit=9", f"--autoguidance={weight}"]
        train(tmp_path / str(weight), *flags, *options, script=script)
    for plain, guided in zip(seen[0.0][:7], seen[0.4][:7], strict=True):
        assert torch.equal(plain[-1], guided[-1])
    *given, output, target = seen[0.4][7]
    assert torch.equal(output, seen[0.0][7][-2])
    earlier = UNet2DModel.from_pretrained(tmp_path / "0.4" / "checkpoint-3" / "unet")  # averaged after 0.3 of the steps
    moved = scale * 0.4 * (output - earlier(*given).sample)
    assert torch.allclose(target - seen[0.0][7][-1], moved, atol=1e-5) and moved.abs().max() > 1e-2


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_noise_is_mixed_in_float32_in_any_precision(tmp_path, monkeypatch, precision):
    seen = []
    original = DDPMScheduler.add_noise

    def add_noise(self, clean, noise, timesteps):
        result = original(self, clean, noise, timesteps)
        seen.append((clean.dtype, noise.dtype, result.dtype))
        return result

    monkeypatch.setattr(DDPMScheduler, "add_noise", add_noise)
    train(tmp_path / "run", f"--mixed_precision={precision}", "--max_train_steps=1")
    assert seen == [(torch.float32,) * 3]


def test_each_equal_part_of_the_timesteps_has_one_sample(tmp_path, monkeypatch):
    seen = []
    original = UNet2DModel.forward

    def forward(self, sample, timestep, *arguments, **options):
        if self.training:
            seen.append(timestep.clone())
        return original(self, sample, timestep, *arguments, **options)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    train(tmp_path / "run", "--weighting_scheme=uniform", "--train_batch_size=50", "--gradient_accumulation_steps=2")
    timesteps = torch.cat(seen)
    assert timesteps.min() >= 0 and timesteps.max() <= 999 and len(timesteps) == 600
    per_step = timesteps.view(6, 100) // 10  # a hundred strata of ten timesteps, a hundred samples a step
    assert all(len(set(row.tolist())) == 100 for row in per_step)
    assert len(set(timesteps.tolist())) > 400  # they vary within their part


def test_each_flag_of_the_objective_changes_the_result(tmp_path):
    train(tmp_path / "plain", "--max_train_steps=5")
    for flag in (
        "--beta_schedule=sigmoid", "--weighting_scheme=uniform", "--optimizer=adamw", "--seed=1",
        "--max_grad_norm=0.01",
        "--lr_scheduler=cosine", "--lr_warmup_steps=0", "--no-use_ema", "--ema_max_decay=0.1",
    ):  # fmt: skip
        folder = tmp_path / flag.strip("-").split("=")[0]
        train(folder, "--max_train_steps=5", flag)
        assert not equal_weights(tmp_path / "plain" / WEIGHTS, folder / WEIGHTS), flag


def test_each_constant_of_the_objective_changes_the_result_and_is_compared(tmp_path, monkeypatch):
    train(tmp_path / "plain", "--max_train_steps=5")
    changes = dict(LOGIT_MEAN=0, LOGIT_STD=0.5, SNR_GAMMA=1, DROPOUT=0.2)
    changes["NOISE"] = {**train_ddpm.NOISE, "num_train_timesteps": 100, "rescale_betas_zero_snr": True}
    for name, value in changes.items():
        with monkeypatch.context() as patch:
            patch.setattr(train_ddpm, name, value)
            train(tmp_path / name, "--max_train_steps=5")
            assert not equal_weights(tmp_path / "plain" / WEIGHTS, tmp_path / name / WEIGHTS), name
            with pytest.raises(UserError, match=rf"holds a run with other settings: {name}.* was .*, is "):
                train(tmp_path / "plain", "--max_train_steps=9")
    for line in (r"betas=(0.9, 0.99)", "weight_decay=0.01"):  # of the optimizer, in the script
        source = inspect.getsource(train_ddpm)
        assert source.count(line) == 1
        names = {"__name__": "train_ddpm", "__file__": train_ddpm.__file__}
        exec(compile(source.replace(line, line.replace("0.9", "0.8").replace("0.01", "0.1")), "edited", "exec"), names)
        with pytest.raises(UserError, match=r"optimizer\['\w+'\] was .*, is "):
            names["main"](parse("--output_dir", tmp_path / "plain", "--max_train_steps=9"))


def test_flags_of_speed_and_memory_do_not_change_the_result(tmp_path):
    train(tmp_path / "plain", "--max_train_steps=3")
    train(tmp_path / "checkpointed", "--max_train_steps=3", "--gradient_checkpointing")
    train(tmp_path / "allowed", "--max_train_steps=3", "--sample_batch_size=1")
    first = load_file(tmp_path / "plain" / WEIGHTS)
    for other in ("checkpointed", "allowed"):
        second = load_file(tmp_path / other / WEIGHTS)
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


def test_epsilon_from_pure_noise_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ddpm.NOISE, "rescale_betas_zero_snr", True)
    with pytest.raises(UserError, match="rescale_betas_zero_snr needs the prediction type v_prediction or sample"):
        train(tmp_path / "run", "--prediction_type=epsilon", "--max_train_steps=1")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_sampler_draws_and_is_saved(tmp_path, sampler):
    train(tmp_path / "run", "--max_train_steps=1", f"--sampler={sampler}", "--num_inference_steps=3")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler
    solver = sampler == "ddim" or sampler.endswith("dpmsolver++")
    kind = "DPMSolverMultistepScheduler" if solver else "DDPMScheduler"
    assert type(scheduler).__name__ == kind  # DDPMPipeline cannot call UniPC
    assert scheduler.config.get("algorithm_type", sampler) == sampler.replace("ddim", "dpmsolver++")


# ----------------------------------------------------------------------------------------------------------- models


def test_pretrained_weights_are_used_with_their_schedule(tmp_path, finished_run):
    flags = ["--learning_rate=0", "--max_train_steps=1", "--no-use_ema"]
    train(tmp_path / "run", *flags, f"--pretrained_model_name_or_path={finished_run}")
    assert equal_weights(tmp_path / "run" / WEIGHTS, finished_run / WEIGHTS)
    train(tmp_path / "other", "--max_train_steps=1", "--prediction_type=epsilon", "--beta_schedule=linear")
    train(tmp_path / "from_other", *flags, f"--pretrained_model_name_or_path={tmp_path}/other")
    config = DDPMPipeline.from_pretrained(tmp_path / "from_other").scheduler.config
    assert (config.prediction_type, config.beta_schedule) == ("epsilon", "linear")
    train(tmp_path / "sigmoid", "--max_train_steps=1", "--beta_schedule=sigmoid")
    again = [f"--pretrained_model_name_or_path={tmp_path}/sigmoid", "--beta_schedule=squaredcos_cap_v2"]
    train(tmp_path / "cosine", *flags, *again)
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "cosine").scheduler
    expected = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod, expected, atol=1e-6)


def test_a_config_that_makes_no_unet_is_refused(tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps({"block_out_channels": [48, 64, 64, 64]}))
    with pytest.raises(UserError, match="no UNet2DModel can be made from it"):
        train(tmp_path / "run", f"--model_config_name_or_path={tmp_path}/bad.json", "--resolution=8")


def test_own_config_starts_from_random_weights(tmp_path, finished_run):
    flags = ["--learning_rate=0", "--max_train_steps=1"]
    train(tmp_path / "run", *flags, f"--model_config_name_or_path={finished_run}/unet")
    config = UNet2DModel.load_config(tmp_path / "run" / "unet")
    assert config["block_out_channels"] == [16, 32, 32]
    assert not equal_weights(tmp_path / "run" / WEIGHTS, finished_run / WEIGHTS)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--pretrained_model_name_or_path=./missing"],
            r"\./missing: there is no such folder\. Expected a saved pipeline",
        ),
        (["--model_config_name_or_path=./missing"], "Expected a JSON file, a folder with config.json, or a Hub id"),
        (["--resolution=10"], r"needs multiples of 4\. Try --resolution 8"),
        (["--mixed_precision=fp16"], "fp16 needs a GPU"),
        (["--report_to=tensorbored"], "unknown tracker. Expected none, all"),
        (["--report_to=aim"], "its package is not installed"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *flags)


def test_colour_images_with_a_grey_pretrained_model_are_converted(tmp_path, finished_run):
    for k in range(9):
        Image.new("RGB", (20, 12), (k, 40, 90)).save(tmp_path / f"{k}.png")
    flags = [f"--train_data_dir={tmp_path}", "--max_train_steps=1"]
    train(tmp_path / "out" / "run", *flags, f"--pretrained_model_name_or_path={finished_run}")
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "run" / "unet")
    assert (unet.config.in_channels, unet.config.sample_size) == (1, 8)


def test_a_checkpoint_of_another_network_is_refused_in_one_line(tmp_path, monkeypatch):
    train(tmp_path / "run")
    interrupt(tmp_path / "run", "checkpoint-3")
    wider = dict(unets.UNETS["tiny"], block_out_channels=(16, 32, 64))
    monkeypatch.setitem(unets.UNETS, "tiny", wider)  # as in an edited script
    with pytest.raises(UserError, match=r"block_out_channels'\] was \[16, 32, 32\], is \[16, 32, 64\]") as refused:
        train(tmp_path / "run")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


def test_a_new_unet_predicts_zero_and_its_blocks_pass_on_what_they_are_given():
    torch.manual_seed(0)
    config = dict(unets.UNETS["base"], block_out_channels=(32, 64, 64), attention_head_dim=32)
    unet, same = zero_init(UNet2DModel(sample_size=16, in_channels=1, out_channels=1, **config)), []

    def compare(block, inputs, output):
        same.append(torch.equal(output, inputs[0]))

    for block in (unet.down_blocks[0].resnets[0], unet.mid_block.resnets[0], *unet.mid_block.attentions):
        block.register_forward_hook(compare)
    assert not unet(torch.randn(2, 1, 16, 16), 500).sample.any() and same == [True] * 3


def test_presets_have_the_sizes_that_their_comments_name():
    import inspect
    import re

    source = inspect.getsource(unets)
    for name, config in unets.UNETS.items():
        with torch.device("meta"):
            unet = UNet2DModel(sample_size=64, in_channels=3, out_channels=3, **config)
        millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
        stated = float(re.search(rf'"{name}": dict\(  # ([\d.]+) M', source)[1])
        assert math.isclose(millions, stated, rel_tol=0.06), (name, millions)


def test_a_stream_trains_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    import datasets

    from utils.sources.sources import _embedded

    # After a stream of Parquet files, ``datasets`` sleeps, because some of its threads might outlive the interpreter
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)

    _embedded("digits").select(range(60)).to_parquet(tmp_path / "digits.parquet")
    flags = [f"--dataset_name={tmp_path}/digits.parquet", "--streaming"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "cut", *flags)
    interrupt(tmp_path / "cut", "checkpoint-3")
    train(tmp_path / "cut", *flags)
    assert equal_weights(tmp_path / "straight" / WEIGHTS, tmp_path / "cut" / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])  # the default compiles C++ for a minute
def test_a_compiled_model_learns_the_same_and_is_saved_the_same(tmp_path, monkeypatch, backend):
    if backend != "inductor":
        original = UNet2DModel.compile
        monkeypatch.setattr(UNet2DModel, "compile", lambda self: original(self, backend=backend))
    counters = torch._dynamo.utils.counters
    counters.clear()
    small = dict(block_out_channels=[32], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    (tmp_path / "small.json").write_text(json.dumps({**small, "layers_per_block": 1, "add_attention": False}))
    flags = [f"--model_config_name_or_path={tmp_path}/small.json", "--max_train_steps=2", "--report_to=tensorboard"]
    train(tmp_path / "plain", *flags)
    assert not counters["stats"]["unique_graphs"]
    train(tmp_path / "compiled", *flags, "--compile")
    assert counters["stats"]["unique_graphs"] == 1  # of a training step. Samples of other sizes are not compiled
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "compiled"))
    assert first.keys() == second.keys()
    first, second = (scalars(tmp_path / name, "loss/train") for name in ("plain", "compiled"))
    assert all(first[step] == pytest.approx(second[step], rel=1e-3) for step in (1, 2))
    DDPMPipeline.from_pretrained(tmp_path / "compiled")(num_inference_steps=1)
