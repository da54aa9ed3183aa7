"""The fault matrix: faults of a run, after which nothing may be lost. Tests name the code that protects the run."""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from children import finish
from conftest import TINY, count_files, equal_weights, interrupt, parse, reset_accelerate, scalars, slow, tiny, train
from PIL import Image
from safetensors.torch import load_file, save_file

import distill_few_steps
import finetune_faces
import train_autoencoder
import train_basic
import train_conditional
import train_ddpm
import train_flow
import train_latent
import train_paired
import train_unet2d
from utils import UserError, printable
from utils.exits import run_script
from utils.monitoring.curves import MetricLogger
from utils.saved import net_folder
from utils.signals import StopSignal
from utils.training.checkpoints import MANIFEST, CheckpointError, verify_checkpoint
from utils.training.loop import Run
from utils.training.losses import RecentLosses

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCRIPTS = {"basic": train_basic, "unet2d": train_unet2d, "ddpm": train_ddpm, "faces": finetune_faces}
SCRIPTS |= {
    "conditional": train_conditional,
    "flow": train_flow,
    "few-steps": distill_few_steps,
    "paired": train_paired,
    "autoencoder": train_autoencoder,
    "latent": train_latent,
}
FLAGS = ["--report_to=tensorboard", "--random_flip", "--train_batch_size=4", "--lr_scheduler=constant"]
MOUNT = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
TMPFS = shutil.which("unshare") is not None and subprocess.run(MOUNT, capture_output=True).returncode == 0


def start(name, folder, *flags, file_limit=None):
    """Start a script in a child process."""
    script = SCRIPTS[name]
    flags = tiny(*FLAGS, *flags, f"--output_dir={folder}", script=script)
    return children.start(Path(script.__file__), *flags, log=folder.with_suffix(".log"), file_limit=file_limit)


def folders(folder, pattern):
    """Return names and inodes, because a folder that is made again under its name has another inode."""
    found = set()
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):  # just renamed
            found.add((path.name, path.stat().st_ino))
    return found


def wait_until(folder, pattern, child, before, seconds=60):
    """Wait until there is a new folder inside the folder."""
    deadline = time.monotonic() + seconds
    while not folders(folder, pattern) - before:
        assert child.is_alive() and time.monotonic() < deadline, child.log.read_text()[-2000:]
        time.sleep(0.001)


def flags_of(name, needs):
    return [*needs(SCRIPTS[name]), *(["--learning_rate=1e-3"] if name in ("faces", "few-steps") else [])]


# ----------------------------------------------------------------------------------------------------- killed and full


@pytest.mark.parametrize(
    "name, kills, steps",
    [("ddpm", 3, 12), slow("ddpm", 20, 40), *(slow(name, 3, 30) for name in SCRIPTS if name != "ddpm")],
)
def test_kill_9_at_random_moments_loses_nothing(tmp_path, needs, name, kills, steps):
    """Protection: ``os.rename(staging, final)`` after the manifest in ``checkpoints.save_checkpoint``, randomness by
    sample number, ``purge_step`` in ``trackers``."""
    flags = ["--checkpointing_steps=1", f"--max_train_steps={steps}", "--sample_steps=7", *flags_of(name, needs)]
    code, said = finish(start(name, tmp_path / "straight", *flags))
    assert code == 0, said
    rng, saving, folder = random.Random(0), 0, tmp_path / "run"
    for _ in range(kills):
        before, leftovers = folders(folder, "checkpoint-*"), folders(folder, ".tmp-checkpoint-*")
        child = start(name, folder, *flags)
        wait_until(folder, ".tmp-checkpoint-*", child, leftovers)
        if rng.random() < 0.5:  # in the middle of a step, or of a later save
            wait_until(folder, "checkpoint-*", child, before)
        time.sleep(rng.random() * 0.04)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, child.log.read_text()[-2000:]
        saving += bool(folders(folder, ".tmp-checkpoint-*") - leftovers)
        for path in folder.glob("checkpoint-*"):
            verify_checkpoint(path)
    assert saving >= kills // 4  # otherwise the kills were not during a save
    code, said = finish(start(name, folder, *flags))
    assert code == 0 and said.count("Resuming from") >= kills // 2, said
    assert not list(folder.glob(".tmp*"))
    weights = (net_folder(folder) / Path(WEIGHTS).name).relative_to(folder)
    for path in (weights, f"checkpoint-{steps}/training_state/model.safetensors"):
        assert equal_weights(folder / path, tmp_path / "straight" / path)
    optimizers = [
        torch.load(path / f"checkpoint-{steps}/training_state/optimizer.bin", weights_only=True)["state"]
        for path in (folder, tmp_path / "straight")
    ]
    for key, values in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][key][part]) for part, value in values.items())
    losses = scalars(folder, "loss/train")
    assert list(losses) == list(range(1, steps + 1))  # strictly increasing, none twice
    assert losses == scalars(tmp_path / "straight", "loss/train")


def test_a_write_that_fails_halfway_leaves_the_older_checkpoint(tmp_path):
    """Protection: ``on_all_processes``, and the staging folder of ``save_checkpoint``. The system refuses to let
    a file grow over a limit, like a quota or a full disk."""
    adamw = "--optimizer=adamw"  # the state of AdamW is twice as large as the weights
    assert finish(start("ddpm", tmp_path / "straight", adamw))[0] == 0
    assert finish(start("ddpm", tmp_path / "run", adamw, "--max_train_steps=3"))[0] == 0
    code, said = finish(start("ddpm", tmp_path / "run", adamw, file_limit=1_500_000))
    assert code == 1
    assert re.search(
        r"error: .*checkpoint-6 cannot be saved: .*The checkpoint needs about \d+ MiB, and \d+ MiB of its disk", said
    )
    assert said.rstrip().endswith("the same command resumes from the newest")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]
    verify_checkpoint(tmp_path / "run" / "checkpoint-3")
    assert finish(start("ddpm", tmp_path / "run", adamw))[0] == 0
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "straight" / WEIGHTS)


FULL_DISK = """
mount -t tmpfs -o size=9m none "$1" && shift
"$@" ; echo "exit code $?"
ls -A "$FOLDER"
mount -o remount,size=90m none "$(dirname "$FOLDER")"
"$@" ; echo "exit code $?"
"""


@pytest.mark.skipif(not TMPFS, reason="needs a kernel that lets this user mount a tmpfs")
@pytest.mark.slow
def test_a_full_disk_and_the_same_command_when_there_is_space(tmp_path):
    """Protection: ``_space`` in ``checkpoints.save_checkpoint``."""
    folder = tmp_path / "disk" / "run"
    (tmp_path / "disk").mkdir()
    command = [sys.executable, ROOT / "train_basic.py", *TINY, f"--output_dir={folder}", "--optimizer=adamw"]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", tmp_path / "disk", *command],
        env={**os.environ, "FOLDER": str(folder)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    first, second = result.stdout.split("exit code ")[1:]
    assert first.startswith("1") and second.startswith("0"), result.stderr
    assert first.split()[1:6] == [".lock", "checkpoint-3", "done.json", "training_args.json", "Finished,"]
    assert re.search(
        r"checkpoint-6 cannot be saved: .*the disk is full. The checkpoint needs about \d+ MiB, and \d+", result.stderr
    )
    assert "Resuming from" in result.stderr and "checkpoint-3" in result.stderr


READ_ONLY = """
mount -t tmpfs none "$1" && mkdir "$1/run" && mount -o remount,ro none "$1" && shift && exec "$@"
"""


@pytest.mark.slow
@pytest.mark.skipif(not TMPFS, reason="needs a kernel that lets this user mount a tmpfs")
def test_a_folder_that_cannot_be_written_to_is_said_before_training(tmp_path):
    """Protection: ``os.access`` in ``output_dir._inspect``."""
    folder = tmp_path / "disk" / "run"
    (tmp_path / "disk").mkdir()
    command = [sys.executable, ROOT / "train_basic.py", *TINY, f"--output_dir={folder}"]
    command = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", tmp_path / "disk", *command]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("run cannot be written to. Choose another folder")


# ------------------------------------------------------------------------------------------------------------- signals


def at_moment(monkeypatch, moment, number):
    """Send the signal to this process at a given moment."""
    import utils.diffusion.sampling
    import utils.evaluation.denoising_loss
    import utils.evaluation.while_training
    import utils.training.checkpoints

    where = {
        "step": (Run, "end_of_step", 4),
        "saving": (utils.training.checkpoints, "_write_manifest", 1),
        "sampling": (
            utils.diffusion.sampling.randomness,
            "sample_generators",
            2,
        ),  # after the image drawn before training
        "validation": (utils.evaluation.denoising_loss, "output_for", 2),
        "evaluation": (utils.evaluation.while_training, "frechet_distance", 1),
    }
    owner, name, wanted = where[moment]
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == wanted:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize(
    "moment, number",
    [
        ("step", signal.SIGUSR1),
        ("saving", signal.SIGTERM),
        slow("sampling", signal.SIGHUP),
        ("validation", signal.SIGINT),
        slow("evaluation", signal.SIGTERM),
        *(slow(moment, number) for moment in ("step", "saving", "evaluation") for number in (signal.SIGINT,)),
        *(slow(moment, number) for moment in ("step", "sampling", "validation") for number in (signal.SIGTERM,)),
    ],
)
def test_a_signal_at_any_moment_saves_and_the_same_command_resumes(tmp_path, monkeypatch, capsys, moment, number):
    """Protection: ``StopSignal`` and the line ``if stop:`` of the scripts."""
    flags = ["--dataset_split=train[:40]", "--validation_split=train[40:48]", "--validation_steps=2"]
    flags += ["--evaluate_steps=2", "--num_evaluation_samples=10", "--features=pixels", "--sample_steps=2"]
    with monkeypatch.context() as patch:
        at_moment(patch, moment, number)
        assert train(tmp_path / "run", *flags) == 128 + number
    said = capsys.readouterr().out
    step = int(re.search(rf"Stopped by {number.name} after (\d) of 6 optimizer steps", said)[1])
    assert 2 <= step < 6 and "The same command resumes from there" in said
    verify_checkpoint(tmp_path / "run" / f"checkpoint-{step}")
    assert train(tmp_path / "run", *flags) == 0
    train(tmp_path / "straight", *flags)
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "straight" / WEIGHTS)


def test_a_closed_terminal_or_pipe_costs_no_checkpoint(tmp_path):
    """Protection: ``process.Lasting``, and ``suppress`` in ``StopSignal``. ``2>&1 | tee log`` closes it so."""
    flags = tiny(f"--output_dir={tmp_path / 'run'}", "--max_train_steps=2000", "--checkpointing_steps=2000")
    command = [sys.executable, train_ddpm.__file__, *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        while b"Training:" not in child.stdout.read1(4096):
            assert child.poll() is None
        child.stdout.close()
        time.sleep(0.5)
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == 128 + signal.SIGHUP
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    verify_checkpoint(checkpoint)


DEAF = f"""
import sys, time, types
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from utils.exits import run_script
from utils.signals import StopSignal
StopSignal(types.SimpleNamespace(is_main_process=True, process_index=0, num_processes=1))
Path(sys.argv[1]).touch()
time.sleep(60)  # a step that does not end
time.sleep(60)
"""


def test_a_second_signal_exits_at_once_and_a_repeated_one_does_not(tmp_path):
    """Protection: ``GRACE`` and ``os._exit`` in ``StopSignal``."""
    child = children.start(DEAF, tmp_path / "ready", log=tmp_path / "log")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    for _ in range(2):  # as a launcher does
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.2)
    assert child.is_alive()
    time.sleep(StopSignal.GRACE)
    os.kill(child.pid, signal.SIGTERM)
    child.join(5)
    assert child.exitcode == 143


def test_a_signal_that_is_ignored_stays_ignored():
    """Protection: ``signal.SIG_IGN`` in ``StopSignal``; ``nohup`` works that way."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal(types.SimpleNamespace(is_main_process=True, process_index=0, num_processes=1))
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------ weights and states


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """Protection: ``_check_finite`` in ``checkpoints.save_checkpoint``; losses and gradients were finite here."""
    from utils.training.ema import EMA

    original = EMA.step

    def step(self, parameters):
        parameters = list(parameters)
        original(self, parameters)
        if self.optimization_step == 6:
            with torch.no_grad():
                parameters[3].view(-1)[0] = float("inf")

    monkeypatch.setattr(EMA, "step", step)
    with pytest.raises(CheckpointError, match=r"checkpoint-6 cannot be saved: .* holds numbers that are not finite"):
        train(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-3"]


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_that_fp16_skips_are_counted_and_shown(capsys, caplog, processes):
    """Protection: ``overflows`` in ``MetricLogger.logged``. (A scaler needs a GPU, so the test sets its results.)"""
    logged = []
    fake = types.SimpleNamespace(
        device=torch.device("cpu"), num_processes=processes, mixed_precision="fp16", is_main_process=True, log_with=[],
        reduce=lambda values, how: values, gather=lambda values: values,
    )  # fmt: skip
    run = types.SimpleNamespace(
        accelerator=fake, train_data=types.SimpleNamespace(label_names=[]), output_dir=Path("nowhere"), args=None,
        num_train_timesteps=1000, learning_rate=1e-3, ema_decay=0.9, images_per_second=1.0, log=logged.append,
        model=torch.nn.Identity(),
    )  # fmt: skip
    curves, recent = MetricLogger("none"), RecentLosses(fake)
    curves.started(run)
    for step, norm in enumerate([float("inf"), 1.0, float("nan"), float("inf")], start=1):
        recent.add(torch.ones(4))
        recent.step(torch.tensor(norm))
        assert all(fine for *_, fine in recent.unseen(step))
        if step % 2 == 0:
            run.global_step = step
            curves.logged(run, *recent.means())
            recent.clear()
    assert [values["optimizer/skipped_steps"] for values in logged] == [1, 3]
    assert logged[0]["optimizer/grad_norm"] == 1 and "optimizer/grad_norm" not in logged[1]
    assert "fp16 overflowed in 2 of the last 2 steps" in caplog.text and "3 so far" in caplog.text


@pytest.mark.parametrize("gone", ["random_states_0.pkl", "optimizer.bin", "scheduler.bin", "model.safetensors"])
def test_missing_state_is_loud(tmp_path, gone):
    """Protection: the manifest; accelerate alone ignores a missing random state silently."""
    train(tmp_path / "run", "--max_train_steps=3")
    (tmp_path / "run" / "checkpoint-3" / "training_state" / gone).unlink()
    with pytest.raises(UserError, match=f"is not a complete checkpoint: training_state/{gone} is missing"):
        train(tmp_path / "run", f"--resume_from_checkpoint={tmp_path}/run/checkpoint-3")


@pytest.mark.parametrize(
    "flags, difference",
    [
        (["--train_batch_size=16"], "global_batch_size was 8, is 16"),
        (["--resolution=12"], "resolution was not given, is 12"),
        (["--prediction_type=epsilon"], "prediction_type was not given, is 'epsilon'"),
        (["--dataset_name=faces"], "the images differ from those of digits"),
        (["--max_train_samples=50"], "max_train_samples was not given, is 50"),
        (["--unet=small"], "unet was 'tiny', is 'small'"),
        (["--seed=1"], "seed was 0, is 1"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(tmp_path, finished_run, flags, difference):
    """Protection: ``check_settings`` in ``output_dir``."""
    shutil.copytree(finished_run, tmp_path / "run")
    interrupt(tmp_path / "run", "checkpoint-3")
    before = count_files(tmp_path / "run" / "checkpoint-3")
    given = ["--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2", *flags]
    if flags == ["--dataset_name=faces"]:
        given += ["--dataset_split=train"]
    with pytest.raises(UserError, match=re.escape(difference)):
        train(tmp_path / "run", *given)
    assert count_files(tmp_path / "run" / "checkpoint-3") == before


def test_a_run_resumes_with_another_geometry_of_the_same_batch(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    interrupt(tmp_path / "run", "checkpoint-3")
    flags = ["--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2"]
    assert train(tmp_path / "run", *flags, "--train_batch_size=2", "--gradient_accumulation_steps=4") == 0
    first, second = (load_file(folder / WEIGHTS) for folder in (tmp_path / "run", finished_run))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


# -------------------------------------------------------------------------------------------------------- bad images


def test_hundreds_of_mutated_files_in_the_loader(tmp_path, accelerator):
    """Protection: ``except Exception`` in ``decoding.decode_image``. Files are skipped by name, equally with and
    without workers, or refused by name. There is no crash and no hang."""
    from utils.data.train_data import load_train_data

    rng = np.random.default_rng(0)
    clean = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(300):
        path = folder / f"{k:03}.{('png', 'jpg', 'gif', 'webp')[k % 4]}"
        clean.save(path)
        if k % 10:
            content = np.frombuffer(path.read_bytes(), np.uint8).copy()
            where = rng.integers(0, len(content), size=rng.integers(1, 12))
            content[where] = rng.integers(0, 256, size=len(where))
            path.write_bytes(content.tobytes()[: rng.integers(0, len(content) + 1)])
    seen = []
    for flags in (["--cache_images=always"], ["--cache_images=never", "--dataloader_num_workers=2"]):
        flags += [f"--train_data_dir={folder}", "--max_bad_images=300", "--image_mode=L"]
        data = load_train_data(parse(*flags, "--resolution=8", "--max_train_steps=40"), accelerator)
        seen.append(torch.cat([batch["images"] for batch in data.batches(range(0, 40))]))
    assert torch.equal(*seen) and len(seen[0]) == 320
    with pytest.raises(UserError, match=r"images/\d\d\d\.(png|jpg|gif|webp) \(image \d+ of .*--max_bad_images N skips"):
        flags = [f"--train_data_dir={folder}", "--image_mode=L", "--resolution=8", "--cache_images=always"]
        load_train_data(parse(*flags), accelerator).prepare()
    with pytest.raises(UserError, match="more than --max_bad_images 5 images are unreadable"):
        load_train_data(parse(*flags, "--max_bad_images=5"), accelerator).prepare()


@pytest.mark.parametrize("side", [9_500, 13_400])  # 90 and 180 megapixels: where Pillow warns, and where it raises
def test_a_decompression_bomb_is_refused_by_name(tmp_path, accelerator, side):
    """Protection: ``MAX_IMAGE_PIXELS`` in ``decoding.decode_image``."""
    from utils.data.train_data import load_train_data

    Image.new("1", (side, side)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"bomb\.png .*more than 89 megapixels, which might be an attack"):
        load_train_data(parse(f"--train_data_dir={tmp_path}", "--train_batch_size=1"), accelerator)


def test_files_that_go_away_after_the_start_are_named(tmp_path, accelerator):
    from utils.data.train_data import load_train_data

    for k in range(8):
        Image.new("L", (8, 8), k * 30).save(tmp_path / f"{k}.png")
    for flags in (["--dataloader_num_workers=0"], ["--dataloader_num_workers=2"]):
        data = load_train_data(parse(f"--train_data_dir={tmp_path}", "--cache_images=never", *flags), accelerator)
        (tmp_path / "3.png").rename(tmp_path / "gone")
        with pytest.raises(UserError, match=r"3\.png \(image 3 of .*No such file.*--max_bad_images N skips"):
            list(data.batches(range(0, 2)))
        (tmp_path / "gone").rename(tmp_path / "3.png")


def test_one_pixel_is_an_image(tmp_path, accelerator):
    from utils.data.train_data import load_train_data

    for k in range(8):
        Image.new("L", (1, 1), 200).save(tmp_path / f"{k}.png")
    data = load_train_data(parse(f"--train_data_dir={tmp_path}", "--resolution=8"), accelerator)
    (batch,) = data.batches(range(0, 1))
    assert torch.allclose(batch["images"], torch.tensor(200 / 127.5 - 1))


# ------------------------------------------------------------------------------------------------------ hostile input


class Executes:
    """Pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path, name):
    """Protection: ``weights_only`` and, for files that accelerate would load otherwise, the manifest."""
    train(tmp_path / "run", "--max_train_steps=3")
    folder = tmp_path / "run" / "checkpoint-3"
    planted = folder / "training_state" / name
    planted.write_bytes(pickle.dumps(Executes(tmp_path / "executed")))
    flags = [f"--resume_from_checkpoint={folder}", "--max_train_steps=6"]
    with pytest.raises(UserError, match=f"damaged: training_state/{name}"):
        train(tmp_path / "run", *flags)
    from utils.training.checkpoints import _write_manifest

    (folder / MANIFEST).unlink()
    _write_manifest(folder)  # an attacker may also update the manifest
    with contextlib.suppress(UserError):  # accelerate ignores a random state that it cannot read
        train(tmp_path / "run", *flags)
    assert not (tmp_path / "executed").exists()


def test_a_manifest_that_points_elsewhere_is_refused(tmp_path):
    """Protection: ``is_relative_to`` in ``checkpoints.verify_checkpoint``."""
    train(tmp_path / "run", "--max_train_steps=3")
    folder = tmp_path / "run" / "checkpoint-3"
    (tmp_path / "secret").write_text("x")
    manifest = json.loads((folder / MANIFEST).read_text())
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    for entry in ("../../secret", "link"):
        if entry == "link":
            (folder / "link").symlink_to(tmp_path / "secret")
        changed = {"files": {**manifest["files"], entry: [1, digest]}}
        (folder / MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(UserError, match=f"damaged: {re.escape(entry)} lies outside of the checkpoint"):
            train(tmp_path / "run", f"--resume_from_checkpoint={folder}")


@pytest.mark.parametrize("script", [train_ddpm, finetune_faces], ids=["ddpm", "faces"])
@pytest.mark.parametrize("kind", ["pickled weights", "code of a unet", "code of a pipeline"])
def test_code_of_a_pretrained_pipeline_is_never_run(tmp_path, finished_run, script, kind):
    """Protection: ``load_pretrained`` gives neither ``trust_remote_code`` nor ``use_safetensors=False``."""
    base = tmp_path / "base"
    shutil.copytree(finished_run, base)
    code = f"import os\nos.system('touch {tmp_path}/executed')\nfrom diffusers import DDPMPipeline, UNet2DModel\n"
    index = json.loads((base / "model_index.json").read_text())
    if kind == "pickled weights":
        (base / WEIGHTS).unlink()
        (base / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Executes(tmp_path / "executed")))
    elif kind == "code of a unet":
        (base / "unet" / "evil.py").write_text(code + "class Evil(UNet2DModel):\n    pass\n")
        index["unet"] = ["evil", "Evil"]
    else:
        (base / "pipeline.py").write_text(code + "class Evil(DDPMPipeline):\n    pass\n")
        index["_class_name"] = ["pipeline", "Evil"]
    (base / "model_index.json").write_text(json.dumps(index))
    with contextlib.suppress(UserError):
        train(tmp_path / "run", f"--pretrained_model_name_or_path={base}", script=script)
    assert not (tmp_path / "executed").exists()


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(tmp_path, capsys):
    """Protection: ``printable``."""
    (tmp_path / "images").mkdir()
    for k in range(8):
        (tmp_path / "images" / f"\x1b[2J\r{k}.png").write_bytes(b"not an image")
    args = parse(f"--train_data_dir={tmp_path}/images", f"--output_dir={tmp_path}/run")
    reset_accelerate()
    with pytest.raises(SystemExit) as stop:
        run_script(train_ddpm.main, lambda: args)
    said = capsys.readouterr()
    assert stop.value.code == 1
    assert "\x1b[2J" not in said.err + said.out and "\\x1b[2J\\r0.png" in said.err
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\nb\\u202e"


# -------------------------------------------------------------------------------------------------------- messages


def raised(error, *flags, capsys, script=train_ddpm):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main, lambda: parse(*flags, script=script))
    return stop.value.code, capsys.readouterr().err


def no_memory_on_a_cpu():
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), no_memory_on_a_cpu(), MemoryError()])
def test_out_of_memory_says_which_flags_with_which_values(capsys, error):
    """Protection: ``advice.memory``. The two flags keep the number of images per step, and so the learning rate."""
    flags = ["--train_batch_size=48", "--gradient_accumulation_steps=3", "--sample_batch_size=10"]
    code, said = raised(error, *flags, capsys=capsys)
    assert code == 1
    assert "--train_batch_size 24 --gradient_accumulation_steps 6" in said and "--gradient_checkpointing" in said
    assert "--sample_batch_size 5" in said
    code, said = raised(error, "--train_batch_size=7", capsys=capsys, script=train_basic)
    assert "--train_batch_size 1 --gradient_accumulation_steps 7" in said and "--gradient_checkpointing" not in said
    assert len(said.strip().splitlines()) == 1


def test_an_error_of_ours_keeps_its_traceback(capsys):
    code, said = raised(KeyError("oops"), capsys=capsys)
    assert code == 1 and "Traceback" in said
    code, said = raised(OSError(28, "No space left on device"), capsys=capsys)
    assert code == 1 and "Traceback" not in said and "the same command resumes from the newest checkpoint" in said


def test_a_safetensors_file_of_the_wrong_shape_is_refused_before_training(tmp_path, finished_run):
    base = tmp_path / "base"
    shutil.copytree(finished_run, base)
    weights = load_file(base / WEIGHTS)
    weights["conv_in.weight"] = torch.zeros(3, 3)
    save_file(weights, base / WEIGHTS)
    with pytest.raises(UserError, match="cannot be loaded as a DDPMPipeline"):
        train(tmp_path / "run", f"--pretrained_model_name_or_path={base}")
