"""The script as users start it: launchers, two processes, signals, and loading with only diffusers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import torch
from conftest import TINY, interrupt, scalars, slow
from safetensors.torch import load_file

from utils.saved import net_folder

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "train_ddpm.py")
STAGES = pytest.mark.parametrize("script", ["train_basic.py", slow("train_unet2d.py")])
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", SCRIPT]
ONE = [*LAUNCH, "--quiet", "--config_file", str(ROOT / "accelerate_config.yaml"), SCRIPT]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
STRANGER = """
from diffusers import {name}
pipeline = {name}.from_pretrained("run", use_safetensors=True{options})
pipeline(batch_size=2, num_inference_steps=2).images[1].save("sample.png")
"""


def tiny(script, folder):
    """Return flags of a tiny run of the script into the folder."""
    flags = [flag for flag in TINY if "inference" not in flag or "autoencoder" not in str(script)]
    return [*flags, *(["--unet=tiny"] if script == SCRIPT else []), f"--output_dir={folder}"]


def changed(**changes):
    """Return the environment with changes; None removes a variable."""
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


def start(command, folder, *flags, **changes):
    """Start a launcher in a child, in any working directory, with ``changes`` to the environment."""
    flags, log = [*tiny(command[-1], folder), *flags], folder.with_suffix(".log")
    return children.launch(command, *flags, log=log, folder=folder.parent, environment=changed(**changes))


def start_anew(command, folder, *flags, **changes):
    """Start a launcher as a user does, in new processes."""
    return subprocess.Popen(
        [*command, *tiny(command[-1], folder), *map(str, flags)], cwd=folder.parent, env=changed(**changes),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def run_script(script, folder, *flags, processes=1):
    """Run a script in this number of processes, without a launcher, which would take longer than the training."""
    return children.run(Path(script), *tiny(script, folder), *flags, processes=processes, folder=folder.parent)


def run(command, folder, *flags, **changes):
    folder.with_suffix(".log").unlink(missing_ok=True)
    return children.ended(start(command, folder, *flags, **changes))


def run_anew(command, folder, *flags, **changes):
    process = start_anew(command, folder, *flags, **changes)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def close(first, second, tolerance=1e-4):
    first, second = (load_file(net_folder(folder) / Path(WEIGHTS).name) for folder in (first, second))
    return all(torch.allclose(first[key], second[key], atol=tolerance) for key in first)


def test_two_processes_equal_one_with_accumulation_and_resume_each_other(tmp_path):
    flags = [
        "--report_to=tensorboard",
        "--random_flip",
        "--num_samples=5",
        "--learning_rate=1e-4",
        "--autoguidance=0.4",
    ]
    flags += ["--dataset_split=train[:1000]", "--validation_split=train[1000:]"]
    flags += ["--validation_steps=3", "--evaluate_steps=3", "--num_evaluation_samples=33", "--features=pixels"]
    code, output = run_script(SCRIPT, tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert code == 0, output
    code, output = run_script(SCRIPT, tmp_path / "two", *flags, processes=2)
    assert code == 0, output
    assert output.count("Finished, after 6 optimizer steps") == 1
    one, two = scalars(tmp_path / "one", "loss/train"), scalars(tmp_path / "two", "loss/train")
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    assert all(abs(one[step] - two[step]) < 1e-4 for step in one)
    assert scalars(tmp_path / "one", "optimizer/learning_rate") == scalars(tmp_path / "two", "optimizer/learning_rate")
    for curve in ("loss/validation_held_out", "metrics/fd_pixels_N33"):
        one, two = scalars(tmp_path / "one", curve), scalars(tmp_path / "two", curve)
        assert list(one) == [3, 6] and one == pytest.approx(two, rel=1e-2)
    assert (tmp_path / "two" / "best" / "model_index.json").is_file()
    assert close(tmp_path / "one", tmp_path / "two")
    state = tmp_path / "two" / "checkpoint-6" / "training_state"
    assert (state / "random_states_0.pkl").is_file() and (state / "random_states_1.pkl").is_file()

    # Each run loses its last checkpoint, and resumes from the previous one with the other number of processes
    for name in ("one", "two"):
        interrupt(tmp_path / name, "checkpoint-3")
        shutil.move(tmp_path / name / WEIGHTS, tmp_path / f"{name}.safetensors")
    code, output = run_script(SCRIPT, tmp_path / "two", *flags, "--gradient_accumulation_steps=2")
    assert code == 0 and "was saved by 2 processes, but this run has 1" in output, output
    code, output = run_script(SCRIPT, tmp_path / "one", *flags, processes=2)
    assert code == 0 and "was saved by 1 process, but this run has 2" in output, output
    assert close(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    "script, flag",
    [
        slow("conditional", "--class_dropout_prob=0.4"),
        slow("paired", "--condition_dropout_prob=0.4"),
        slow("autoencoder", "--downsampling=2"),
        ("latent", "--class_conditional"),
    ],
)
def test_two_processes_of_another_script_learn_what_one_learns(tmp_path, script, flag, finished_autoencoder):
    """Labels, dropped labels, masks, and the noise of latents depend on the sample's id."""
    flags = ["--learning_rate=1e-4", flag, "--max_train_steps=3", "--num_samples=10", "--random_flip"]
    flags += ["--unet=tiny"] if script != "autoencoder" else []
    flags += [f"--vae={finished_autoencoder}"] if script == "latent" else []
    script = str(Path(SCRIPT).with_name(f"train_{script}.py"))
    code, output = run_script(script, tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert code == 0, output
    code, output = run_script(script, tmp_path / "two", *flags, processes=2)
    assert code == 0, output
    assert close(tmp_path / "one", tmp_path / "two")


SLOW_RANK = """
from utils.data.train_data import TrainData
original = TrainData.batches
def batches(self, *steps):
    for batch in original(self, *steps):
        time.sleep(0.2 * self.accelerator.process_index)
        yield batch
TrainData.batches = batches
"""


@pytest.mark.slow
def test_a_process_that_is_slower_than_the_others_is_seen(tmp_path):
    """Protection: ``MetricLogger._forward_ended``. All processes wait, so a whole step takes each the same time."""
    flags = [*TINY, "--unet=tiny", f"--output_dir={tmp_path / 'run'}", "--report_to=tensorboard", "--logging_steps=2"]
    code, output = children.run(children.patched(SLOW_RANK), *flags, processes=2, folder=tmp_path)
    assert code == 0, output
    slowest, fastest = (scalars(tmp_path / "run", f"system/{name}_seconds") for name in ("slowest", "fastest"))
    assert list(slowest) == list(fastest) == [2, 4, 6]
    for step in (4, 6):  # before the first step, processes also wait for other things
        assert 0.2 < slowest[step] < 1 and slowest[step] - fastest[step] > 0.15


def test_two_processes_resume_bit_for_bit(tmp_path):
    flags = ["--cache_images=never", "--dataloader_num_workers=0", "--checkpoints_total_limit=3"]
    code, output = run_script(SCRIPT, tmp_path / "straight", *flags, processes=2)
    assert code == 0, output
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    interrupt(tmp_path / "cut", "checkpoint-3")
    (tmp_path / "cut" / WEIGHTS).unlink()
    code, output = run_script(SCRIPT, tmp_path / "cut", *flags, processes=2)
    assert code == 0 and "Resuming from" in output, output
    assert close(tmp_path / "straight", tmp_path / "cut", tolerance=0)


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    code, output = run(TORCHRUN, tmp_path / "run", ACCELERATE_USE_CPU="false")
    assert code != 0
    assert "2 processes were started, but they form no process group" in output and "ACCELERATE_USE_CPU=true" in output
    assert not (tmp_path / "run" / "training_args.json").exists()


def test_accelerate_launch_uses_the_config_and_a_stranger_loads_the_result(tmp_path):
    code, output = run_anew(ONE, tmp_path / "run", "--max_train_steps=2", OMP_NUM_THREADS=None)
    assert code == 0, output
    cores = len(os.sched_getaffinity(0))
    assert f"1 x CPU, {cores} threads, bf16" in output  # although accelerate has set OMP_NUM_THREADS to 1
    assert output.splitlines()[-5].startswith("Finished, after 2 optimizer steps")
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["mixed_precision"] == "bf16"
    loaded_by_a_stranger(tmp_path, "DDPMPipeline")


def loaded_by_a_stranger(folder, name, options=""):
    """Load ``run`` and draw with it in a process that has only diffusers."""
    code, said = children.run(
        STRANGER.format(name=name, options=options),
        folder=folder,
    )  # fmt: skip
    assert code == 0, said
    assert (folder / "sample.png").is_file()


@STAGES
def test_the_first_stages_are_launched_and_a_stranger_loads_the_result(tmp_path, script):
    code, output = run([*ONE[:-1], str(ROOT / script)], tmp_path / "run", "--max_train_steps=2", OMP_NUM_THREADS="1")
    assert code == 0, output
    assert "1 x CPU, 1 thread, bf16" in output  # the number that the user has set
    assert output.splitlines()[-5].startswith("Finished, after 2 optimizer steps")
    loaded_by_a_stranger(tmp_path, "DiffusionPipeline", ", trust_remote_code=True")


@STAGES
def test_the_first_stages_do_the_same_on_two_processes(tmp_path, script):
    flags = ["--report_to=tensorboard", "--random_flip", "--num_samples=5", "--learning_rate=1e-4"]
    code, output = run_script(ROOT / script, tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert code == 0, output
    code, output = run_script(ROOT / script, tmp_path / "two", *flags, processes=2)
    assert code == 0 and output.count("Finished, after 6 optimizer steps") == 1, output
    assert close(tmp_path / "one", tmp_path / "two")
    losses = scalars(tmp_path / "one", "loss/train"), scalars(tmp_path / "two", "loss/train")
    assert list(losses[0]) == list(losses[1]) == [1, 2, 3, 4, 5, 6]
    assert all(abs(losses[0][step] - losses[1][step]) < 1e-4 for step in losses[0])


@pytest.mark.slow
def test_fine_tuning_does_the_same_on_two_processes(tmp_path, finished_run):
    flags = [f"--pretrained_model_name_or_path={finished_run}", "--method=lora", "--learning_rate=1e-3"]
    flags += ["--report_to=tensorboard", "--dataset_split=train[7:]", "--validation_split=train[:7]", "--num_samples=5"]
    code, output = run_script(ROOT / "finetune_faces.py", tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert code == 0, output
    code, output = run_script(ROOT / "finetune_faces.py", tmp_path / "two", *flags, processes=2)
    assert code == 0 and output.count("Finished, after 6 optimizer steps") == 1, output
    assert close(tmp_path / "one", tmp_path / "two", tolerance=1e-3)
    for tag in ("loss/train", "loss/validation_held_out"):
        one, two = scalars(tmp_path / "one", tag), scalars(tmp_path / "two", tag)
        assert list(one) == list(two) and all(abs(one[step] - two[step]) < 1e-3 for step in one)


@pytest.mark.slow
def test_distilling_does_the_same_on_two_processes(tmp_path, finished_run):
    flags = [f"--pretrained_model_name_or_path={finished_run}", "--learning_rate=1e-4", "--max_train_steps=3"]
    flags += ["--num_samples=5", "--random_flip"]
    script = ROOT / "distill_few_steps.py"
    code, output = run_script(script, tmp_path / "one", *flags, "--gradient_accumulation_steps=2")
    assert code == 0, output
    code, output = run_script(script, tmp_path / "two", *flags, processes=2)
    assert code == 0 and output.count("Finished, after 3 optimizer steps") == 1, output
    assert close(tmp_path / "one", tmp_path / "two")


def test_a_mistake_is_one_line_without_a_traceback(tmp_path):
    flags = [f"--output_dir={tmp_path / 'run'}", "--dataset_name=./missing"]
    code, output = children.run(Path(SCRIPT), *flags, folder=tmp_path)
    assert code == 1
    assert output.strip().splitlines()[-1] == "error: --dataset_name ./missing: there is no such file or folder"
    assert "Traceback" not in output


def test_engines_that_cut_up_the_weights_are_refused(tmp_path):
    for engine in ("FSDP", "DeepSpeed"):
        environment = os.environ | {f"ACCELERATE_USE_{engine.upper()}": "true"}
        flags = [*TINY, "--unet=tiny", f"--output_dir={tmp_path / 'run'}"]
        code, output = children.run(Path(SCRIPT), *flags, folder=tmp_path, environment=environment)
        assert code == 1 and f"error: the accelerate configuration asks for {engine}. It is not supported" in output
        assert "Traceback" not in output and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_fsdp_is_refused_where_accelerate_only_ignores_it(tmp_path):
    """On a CPU, only the command line of the launcher shows that FSDP was asked for."""
    command = [*LAUNCH, "--num_processes=1", "--use_fsdp", SCRIPT]  # on a CPU, where accelerate only ignores it
    code, output = run_anew(command, tmp_path / "run")
    assert code != 0 and "error: the accelerate configuration asks for FSDP" in output, output


@pytest.mark.parametrize(
    "command, number, workers",
    [
        (TWO, signal.SIGTERM, 2),
        slow(ONE, signal.SIGTERM, 0),
        slow(ONE, signal.SIGTERM, 2),
        slow(ONE, signal.SIGINT, 0),
        slow(TWO, signal.SIGTERM, 0),
        slow(TORCHRUN, signal.SIGTERM, 0),
        slow(TORCHRUN, signal.SIGINT, 0),
    ],
)
def test_a_signal_to_the_launcher_stops_everything_and_the_same_command_resumes(tmp_path, command, number, workers):
    """Protection: ``prctl`` in ``hardware.set_up_process``, because ``accelerate launch`` with one process passes no
    signal on; ``StopSignal.check`` for several."""
    cache = "always" if workers == 0 else "never"
    flags = [f"--cache_images={cache}", f"--dataloader_num_workers={workers}"]
    flags += ["--max_train_steps=400", "--checkpointing_steps=1000", "--no-use_ema", "--num_train_epochs=1"]
    process = start(command, tmp_path / "run", *flags, PYTHONUNBUFFERED="1")
    wait_for_training(tmp_path / "run")
    os.kill(process.pid, number)
    code, output = children.ended(process)  # no process is left that trains
    assert code not in (0, None)
    assert "Stopped by SIG" in output, output
    step = saved_step(tmp_path / "run")
    assert 0 < step < 400
    code, output = run(command, tmp_path / "run", *flags, f"--max_train_steps={step + 10}")
    assert code == 0 and f"{step} optimizer steps done" in output, output


def wait_for_training(folder):
    deadline = time.monotonic() + 120
    while not (folder / "training_args.json").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)


def saved_step(folder):
    """Return the number of the only checkpoint."""
    (saved,) = folder.glob("checkpoint-*")
    assert (saved / "manifest.json").is_file()
    return int(saved.name.split("-")[1])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_slurm_job_saves_and_queues_itself_again(tmp_path, processes):
    """Protection: ``trap`` in configs/slurm.sbatch."""
    (tmp_path / "bin").mkdir()
    programs = {"scontrol": 'echo "$@" > requeued', "accelerate": f'exec {" ".join(LAUNCH)} "${{@:2}}"'}
    for name, line in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "accelerate_config.yaml").write_text((ROOT / "accelerate_config.yaml").read_text())
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    environment["PROCESSES"] = str(processes)
    flags = ["--max_train_steps=400", "--checkpointing_steps=1000"]
    command = ["bash", str(ROOT / "configs" / "slurm.sbatch"), SCRIPT]
    job = start_anew(command, tmp_path / "run", *flags, **environment)
    wait_for_training(tmp_path / "run")
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode not in (0, None), output
    assert (tmp_path / "requeued").read_text() == "requeue 17\n", output
    assert "Stopped by SIGTERM" in output
    step = saved_step(tmp_path / "run")
    (tmp_path / "requeued").unlink()
    code, output = run_anew(command, tmp_path / "run", *flags, f"--max_train_steps={step + 5}", **environment)
    assert code == 0 and f"{step} optimizer steps done" in output, output
    assert not (tmp_path / "requeued").exists()


RANK_FAILS = """
import accelerate
original = accelerate.Accelerator.save_state
def save_state(self, folder):
    if self.process_index == 1 and "checkpoint-6" in folder:
        raise OSError(28, "No space left on device")
    return original(self, folder)
accelerate.Accelerator.save_state = save_state
"""


@pytest.mark.slow
def test_a_failure_in_saving_on_one_rank_stops_all_with_its_message(tmp_path):
    """Protection: ``checkpoints.on_all_processes``, ``exits.run_script``: no rank waits for others to exit.
    Afterwards, torchrun resumes the run and trains to the end."""
    (tmp_path / "driver.py").write_text(children.patched(RANK_FAILS))
    began = time.monotonic()
    code, output = run([*TORCHRUN[:-1], str(tmp_path / "driver.py")], tmp_path / "run", "--unet=tiny")
    assert code not in (0, None)
    assert "checkpoint-6 cannot be saved: process 1: OSError: [Errno 28] No space left on device" in output, output
    assert time.monotonic() - began < 60  # a rank that waits would wait for two hours
    assert saved_step(tmp_path / "run") == 3
    code, output = run(TORCHRUN, tmp_path / "run")
    assert code == 0 and "3 optimizer steps done" in output, output
    assert (tmp_path / "run" / WEIGHTS).is_file()
