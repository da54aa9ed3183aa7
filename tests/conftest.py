"""Every test runs offline, on a CPU, with a fresh accelerate state."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}

import signal

import pytest
from accelerate.state import AcceleratorState, GradientState

import train_ddpm

TINY = [
    "--dataset_name=digits", "--unet=tiny", "--train_batch_size=8", "--max_train_steps=6", "--lr_warmup_steps=2",
    "--checkpointing_steps=3", "--sample_steps=1000", "--num_samples=4", "--num_inference_steps=2",
    "--report_to=none", "--logging_steps=1",
]  # fmt: skip


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    reset_accelerate()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def parse(*flags):
    """Arguments of a tiny run on the embedded digits; another source of images or weights replaces the tiny one."""
    flags = [str(flag) for flag in flags]
    other_model = any("name_or_path" in flag for flag in flags)
    other_data = any(flag.startswith("--train_data_dir") for flag in flags)
    tiny = [flag for flag in TINY if not ((other_model and "unet" in flag) or (other_data and "dataset_name" in flag))]
    return train_ddpm.parse_args([*tiny, *flags])


def train(output_dir, *flags):
    """Run train_ddpm.py in this process; returns its exit code."""
    reset_accelerate()
    return train_ddpm.main(parse("--output_dir", output_dir, *flags))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A finished run with TensorBoard events, sample grids and class curves, to look at; do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "ddpm"
    code = train(folder, "--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2")
    assert code == 0
    return folder
