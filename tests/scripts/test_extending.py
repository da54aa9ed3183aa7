"""docs/extending.md: a script with each change trains, validates and draws, and resumes with the same bits."""

import json
import re
import shutil
from pathlib import Path

import children
import numpy as np
import pytest
from conftest import TINY
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {title: text for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
CHANGED = {  # changes that a resumed run refuses: the old text, the new one, and the message
    "A net": ("WIDTH = 48", "WIDTH = 32", "WIDTH was 48, is 32"),
    "A loss": ("default=0.1, help", "default=0.2, help", "huber_delta was 0.1, is 0.2"),
    "Noise": ("0.04 * ", "0.03 * ", "trained_betas"),
    "A condition": ("FACTOR = 2", "FACTOR = 4", "FACTOR was 2, is 4"),
    "Pairs, masks, vectors": ('PAIRS = "outlines"', 'PAIRS = "others"', "PAIRS was 'outlines', is 'others'"),
    "Latents": ('"outputs/autoencoder"', '"outputs/another"', "AUTOENCODER was 'outputs/autoencoder'"),
}
DRIVER = """
import importlib, json, shutil, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from utils import UserError
from utils.diffusion.pipelines import load_pipeline

def train(script, folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(script.parse_args([*flags, f"--output_dir={folder}"]))

said = {}
for title, (name, changed, flags) in json.loads(Path("cases.json").read_text()).items():
    script = importlib.import_module(name)
    weights = []
    for folder in ("straight", "cut"):
        train(script, f"{name}/{folder}", *flags)
        if folder == "cut":
            shutil.rmtree(f"{name}/cut/checkpoint-6")  # as if killed after step 3
            Path(f"{name}/cut/samples.png").unlink()
            train(script, f"{name}/{folder}", *flags)
        weights.append(load_file(f"{name}/{folder}/checkpoint-6/training_state/model.safetensors"))
    assert weights[0].keys() == weights[1].keys(), title
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), f"{title}: not bit for bit"
    assert json.loads(Path(f"{name}/cut/done.json").read_text())["validation"] == 6, title
    try:
        train(importlib.import_module(changed), f"{name}/cut", *flags, "--max_train_steps=9")
        said[title] = "trained on"
    except UserError as error:
        said[title] = str(error)
print("SAID", json.dumps(said))
"""


def change(text, section):
    """Apply the diff of a section to a script, in which the old lines of each hunk must occur exactly once."""
    (diff,) = re.findall(r"```diff\n(.*?)```", SECTIONS[section], re.S)
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        assert text.count(old) == 1, f"{section}: {text.count(old)} times in the script:\n{old}"
        text = text.replace(old, "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-")))
    return text


def test_a_change_has_fifteen_lines_at_most():
    for section in CHANGED:
        added = [line for line in SECTIONS[section].splitlines() if line.startswith("+") and len(line) > 1]
        assert 0 < len(added) <= 15, section


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """Return the folder in which each change was trained, and by section the messages that refuse changed constants."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(ROOT / "utils", folder / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "net.py").write_text(re.findall(r"```python\n(.*?)```", SECTIONS["A net"], re.S)[0])
    rng = np.random.default_rng(0)
    for k in range(48):
        for kind in ("images", "outlines", "others"):
            (folder / kind).mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / kind / f"{k:02}.png")
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    small = dict(in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2)
    for name in ("autoencoder", "another"):
        AutoencoderKL(**small, **blocks, scaling_factor=0.5).save_pretrained(folder / "outputs" / name)
    cases, flags = {}, [flag for flag in TINY if not flag.startswith("--dataset_name")]
    flags += ["--train_data_dir=images", "--dataset_split=train[:40]", "--validation_split=train[40:]", "--random_flip"]
    for number, (section, (old, new, _)) in enumerate(CHANGED.items()):
        text = (ROOT / "train_ddpm.py").read_text(encoding="utf-8")
        if section.startswith("Pairs"):
            text = change(text, "A condition")
        text = change(text, section)
        assert text.count(old) == 1
        (folder / f"script_{number}.py").write_text(text)
        (folder / f"changed_{number}.py").write_text(text.replace(old, new))
        cases[section] = (f"script_{number}", f"changed_{number}", [*flags, "--validation_steps=3", "--unet=tiny"])
    (folder / "cases.json").write_text(json.dumps(cases))
    code, said = children.run(DRIVER, folder=folder)
    assert code == 0 and "SAID " in said, said[-4000:]
    return folder, json.loads(said.split("SAID ")[1].splitlines()[0])


def test_each_change_trains_validates_draws_and_resumes_bit_for_bit(changed):
    _, said = changed
    for section, (_, _, expected) in CHANGED.items():
        assert expected in said[section] and "holds a run with other settings" in said[section], (
            section,
            said[section],
        )
