"""The first 20 losses of every script: they show an unintended change of the training.

After an intended change, write them again and check the differences in golden_losses.json:

    WRITE_GOLDEN_LOSSES=1 .venv/bin/python -m pytest -n 0 tests/scripts/test_golden_losses.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import scalars, train

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

FILE = Path(__file__).with_name("golden_losses.json")
SCRIPTS = {
    "train_basic": train_basic, "train_unet2d": train_unet2d, "train_ddpm": train_ddpm, "train_flow": train_flow,
    "train_conditional": train_conditional, "train_paired": train_paired, "finetune_faces": finetune_faces,
    "distill_few_steps": distill_few_steps, "train_autoencoder": train_autoencoder, "train_latent": train_latent,
}  # fmt: skip
TOLERANCE = 1e-4  # relative; AVX-512 and the plainest instructions differ by 1e-5, a beta1 of 0.91 by 5e-4
FLAGS = ["--report_to=tensorboard", "--max_train_steps=20", "--checkpointing_steps=99", "--mixed_precision=no"]


def first_losses(name, folder, *flags):
    """Return the losses of a script with its defaults on the embedded digits, but with a small batch and net."""
    script, start = SCRIPTS[name], []
    if name in ("finetune_faces", "distill_few_steps"):
        if not (folder / "base").exists():
            assert train(folder / "base", *FLAGS) == 0
        start = [f"--pretrained_model_name_or_path={folder / 'base'}"]
    elif name in ("train_conditional", "train_flow", "train_paired"):
        start = ["--unet=tiny"]
    elif name == "train_autoencoder":
        start = ["--downsampling=2"]
    elif name == "train_latent":
        if not (folder / "train_autoencoder").exists():
            first_losses("train_autoencoder", folder)
        start = ["--unet=tiny", f"--vae={folder / 'train_autoencoder'}"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(folder / name, *FLAGS, *start, *flags, script=script) == 0
    finally:
        torch.set_num_threads(threads)
    return [float(f"{loss:.6g}") for loss in scalars(folder / name, "loss/train").values()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_losses_are_those_of_before(folder, name):
    losses, known = first_losses(name, folder), json.loads(FILE.read_text()) if FILE.exists() else {}
    assert len(losses) == 20
    if os.environ.get("WRITE_GOLDEN_LOSSES"):
        FILE.write_text(json.dumps({**known, name: losses}, indent=1) + "\n")
    else:
        assert losses == pytest.approx(known[name], rel=TOLERANCE), "see the docstring above if the change was meant"


def test_a_small_change_of_recipe_is_seen(tmp_path, monkeypatch):
    from utils.training import optimizer

    def other_beta(*arguments, betas, **options):
        return make_optimizer(*arguments, betas=(0.91, betas[1]), **options)

    make_optimizer = optimizer.make_optimizer
    monkeypatch.setattr(optimizer, "make_optimizer", other_beta)
    losses, known = first_losses("train_ddpm", tmp_path), json.loads(FILE.read_text())
    assert losses != pytest.approx(known["train_ddpm"], rel=TOLERANCE)
