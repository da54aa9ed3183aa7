"""Every test runs offline, on a CPU, with a fresh accelerate state."""

import os
import tempfile

# Children share the caches of the libraries, so that one server can import for all of them
os.environ |= {"HF_HOME": tempfile.mkdtemp(prefix="tests-home-")}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ["OMP_NUM_THREADS"] = "1"  # so that results are the same here and in every child

import functools
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tensorboard.summary.writer import event_file_writer

import distill_few_steps
import finetune_faces
import train_autoencoder
import train_ddpm
import train_latent
from utils.data.cache import Cache
from utils.evaluation import while_training
from utils.signals import STOP_SIGNALS
from utils.sources import named_images, sources

TINY = [
    "--dataset_name=digits", "--train_batch_size=8", "--max_train_steps=6", "--lr_warmup_steps=2",
    "--checkpointing_steps=3", "--sample_steps=1000", "--num_samples=4", "--num_inference_steps=2",
    "--report_to=none", "--logging_steps=1",
]  # fmt: skip


# Digits are made once and not for each run, because encoding 1,797 PNG files takes a quarter of the time of a tiny run
sources._embedded = functools.cache(sources._embedded)
# TensorBoard sorts files by name: second, process, number. Tests make several a second, so numbers have four digits
event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)
_decode, _decoded = Cache._decode, {}


def _decode_once(self, images, show, write):
    """Decode like ``Cache._decode``, but decode the embedded digits of most tests only once for each preparation."""
    if images.images.name != "digits" or images.images.columns or type(self) is not Cache:
        return _decode(self, images, show, write)
    how = (images.images.dataset._fingerprint, images.mode, images.size, images.center_crop)
    if how not in _decoded:
        parts = []
        table = _decode(self, images, show, parts.append)
        _decoded[how] = table, np.concatenate(parts)
    table, pixels = _decoded[how]
    write(pixels)
    return table


Cache._decode = _decode_once
while_training.NUM_VALIDATION_IMAGES = 16  # With 64, a validation takes four times as long
named_images.QUICK = float("inf")  # decoded images stay in memory, so that they do not fill the user's cache


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    reset_accelerate()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def tiny(*flags, script=train_ddpm):
    """Return flags of a tiny run on the embedded digits, unless the flags name other images or weights."""
    flags = [str(flag) for flag in flags]
    other_data = any(flag.startswith("--train_data_dir") for flag in flags)
    base = [flag for flag in TINY if not (other_data and "dataset_name" in flag)]
    if script is train_autoencoder:  # it has no sampling steps
        base = [flag for flag in base if "num_inference_steps" not in flag]
    if script is train_ddpm and not any("name_or_path" in flag for flag in flags):
        base.append("--unet=tiny")
    return [*base, *flags]


def parse(*flags, script=train_ddpm):
    """Return the arguments of a tiny run."""
    return script.parse_args(tiny(*flags, script=script))


def exit_code(main, args):
    """Run a script's ``main`` in this process, with a fresh accelerate state, and return its exit code."""
    reset_accelerate()
    try:
        main(args)
    except SystemExit as request:
        return request.code
    return 0


def train(output_dir, *flags, script=train_ddpm):
    """Run a training script in this process, and return its exit code."""
    return exit_code(script.main, parse("--output_dir", output_dir, *flags, script=script))


def interrupt(folder, keep):
    """Make a finished run look killed after the checkpoint ``keep``."""
    for path in folder.glob("checkpoint-*"):
        if path.name != keep:
            shutil.rmtree(path)
    record = json.loads((folder / "training_args.json").read_text())
    del record["finished_at_step"]
    (folder / "training_args.json").write_text(json.dumps(record))
    (folder / ".tmp-checkpoint-5").mkdir()


def scalars(folder, tag):
    """Return a curve in TensorBoard as {step: value}."""
    return {event.step: event.value for event in events(folder).Scalars(tag)}


def events(folder):
    """Return the events of the run in ``folder``, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (runs,) = {path.parent for path in (folder / "logs").glob("*/events*")}
    return EventAccumulator(str(runs), size_guidance={"scalars": 0, "images": 0}).Reload()


def equal_weights(first, second):
    """Return whether two safetensors files hold the same tensors, bit for bit."""
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """Return the folder of a finished run with TensorBoard events, sample grids and class curves. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "ddpm"
    code = train(folder, "--report_to=tensorboard", "--sample_steps=2", "--label_column=label", "--logging_steps=2")
    assert code == 0
    return folder


@pytest.fixture(scope="session")
def finished_autoencoder(tmp_path_factory):
    """Return the folder of an autoencoder of digits: 8 x 8 pixels, 4 x 4 x 4 latents. Do not change it."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    assert train(folder, "--downsampling=2", "--max_train_steps=30", script=train_autoencoder) == 0
    return folder


@pytest.fixture(scope="session")
def needs(finished_run, finished_autoencoder):
    """Return a function from a script to the flags that it needs for a tiny run on digits."""
    flags = {
        script: [f"--pretrained_model_name_or_path={finished_run}"] for script in (finetune_faces, distill_few_steps)
    }
    flags |= {train_autoencoder: ["--downsampling=2"], train_latent: [f"--vae={finished_autoencoder}", "--unet=tiny"]}
    return lambda script: flags.get(script, [])


@pytest.fixture(scope="session")
def browser():
    """Return headless Chromium, or skip the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser test")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("there is no Chromium: no browser test")
    with playwright.sync_playwright() as session:
        yield session.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def slow(*values):
    """Return a case of a parametrized test that only `make test-all` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def count_files(folder):
    """Return every file below a folder, with its size and time."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def count(model):
    """Return the number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
