"""A copy of train_ddpm.py and utils/ in an empty folder: it runs, can be cut down and changed, and still resumes."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, equal_weights, interrupt, parse, reset_accelerate, slow, train
from PIL import Image

import train_ddpm
from utils import UserError
from utils.training.checkpoints import STATE, _write_manifest

ROOT = Path(__file__).parent.parent
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCRIPTS = (
    "train_basic.py",
    "train_unet2d.py",
    "train_ddpm.py",
    "finetune_faces.py",
    "train_conditional.py",
    "train_flow.py",
    "distill_few_steps.py",
)
DRIVER = """
import json, shutil, sys
from pathlib import Path
from safetensors.torch import load_file
import torch
from accelerate.state import AcceleratorState, GradientState
import {script} as script

def train(folder, *flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(script.parse_args([*sys.argv[1:], f"--output_dir={{folder}}", *flags]))
    return load_file(f"{{folder}}/checkpoint-6/training_state/model.safetensors")

straight = train("straight")
train("cut")
shutil.rmtree("cut/checkpoint-6")  # as if killed after step 3
Path("cut/samples.png").unlink()
resumed = train("cut")
assert straight.keys() == resumed.keys()
assert all(torch.equal(straight[name], resumed[name]) for name in straight), "not bit for bit"
print("RESUMED", json.loads(Path("cut/training_args.json").read_text()).get("ran"))
"""


def names_in(*nodes):
    return {node.id for tree in nodes for node in ast.walk(tree) if isinstance(node, ast.Name)}


def without_wing(text, *wings):
    """The script without the statements that name what comes from these wings; what they assign is gone, too."""
    gone, lines = set(), set()

    def delete(node):
        lines.update(range(node.lineno, node.end_lineno + 1))
        gone.update(
            name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        )
        gone.update([node.name] if isinstance(node, ast.FunctionDef) else [])

    def deleted(node):
        """Delete a statement, or what of its body names what is gone; whether nothing is left of it."""
        if isinstance(node, ast.ImportFrom):
            if any((node.module or "").startswith(f"utils.{wing}") for wing in wings):
                gone.update(alias.asname or alias.name for alias in node.names)
                delete(node)
                return True
            return False
        body = getattr(node, "body", None)
        if body is None:
            used = names_in(node)
        else:
            used = names_in(*(part for part in ast.iter_child_nodes(node) if part not in body))
        if used & gone or (body and all([deleted(statement) for statement in body])):
            delete(node)
            return True
        return False

    for node in ast.parse(text).body:
        deleted(node)
    return "".join(line for k, line in enumerate(text.splitlines(keepends=True), 1) if k not in lines)


def copy(folder, script="train_ddpm.py", without=(), edits=()):
    """An empty folder with a script and utils/, less these wings, with pieces of the script's text replaced."""
    folder.mkdir()
    shutil.copytree(ROOT / "utils", folder / "utils", ignore=shutil.ignore_patterns("__pycache__", *without))
    text = without_wing((ROOT / script).read_text(), *without)
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in {script}: {old}"
        text = text.replace(old, new)
    (folder / script).write_text(text)
    return text


def run_copy(folder, script, *flags):
    """Train in the copy, cut short and resume; compare. Returns what was printed."""
    (folder / "driver.py").write_text(DRIVER.format(script=script.removesuffix(".py")))
    result = subprocess.run(
        [sys.executable, "driver.py", *TINY, *flags],
        cwd=folder, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "RESUMED" in result.stdout, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    "without", [("publishing", "evaluation"), slow(()), slow(("publishing",)), slow(("evaluation",))], ids=str
)
def test_a_copy_trains_and_resumes_without_the_wings_that_it_does_not_need(tmp_path, without):
    text = copy(tmp_path / "copy", without=without)
    assert ("hub" in text.split("def main")[1]) is ("publishing" not in without)
    assert ("quality" in text.split("def main")[1]) is ("evaluation" not in without)
    flags = [] if "evaluation" in without else ["--evaluate_steps=3", "--num_evaluation_samples=10"]
    run_copy(tmp_path / "copy", "train_ddpm.py", "--unet=tiny", *flags)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("wing", ["publishing", "evaluation"])
def test_every_script_is_whole_without_a_wing(script, wing):
    """No name is left undefined, and the loop is still there."""
    text = without_wing((ROOT / script).read_text(), wing)
    assert f"utils.{wing}" not in text and "accelerator.backward(loss)" in text and "run.finish(" in text
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F821", "--stdin-filename=x.py", "-"],
        input=text, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


DATA = (
    "    train_data = load_train_data(args, accelerator, pretrained and pretrained.unet.config)  # or own_images=...\n"
)
UNET = '        unet = zero_init(UNet2DModel(**shape, dropout=args.dropout or 0.0, **UNETS[args.unet or "small"]))\n'
LABELS = [
    ("model(noisy_images, timesteps).sample", 'model(noisy_images, timesteps, class_labels=batch["labels"]).sample'),
    (
        "args.sample_batch_size, args.seed, stop_signal.requested,\n",
        "args.sample_batch_size, args.seed, stop_signal.requested,\n"
        "            model_inputs=lambda sample_ids: dict(class_labels=torch.from_numpy(sample_ids % 10)),\n",
    ),
]
OWN_EVERYTHING = [  # an array, a transformer, SGD, a schedule of torch's, and another loss
    (
        DATA,
        "    import numpy as np\n    from utils.data.own_images import OwnImages\n"
        "    array = np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32)\n"
        "    own_images = OwnImages(array, labels=np.arange(60) % 10)\n"
        "    train_data = load_train_data(args, accelerator, own_images=own_images)\n",
    ),
    (
        UNET,
        "        from diffusers import DiTTransformer2DModel\n"
        "        unet = DiTTransformer2DModel(\n"
        "            num_attention_heads=2, attention_head_dim=8, num_layers=2, patch_size=2, norm_num_groups=2,\n"
        "            num_embeds_ada_norm=10, **shape,\n        )\n",
    ),
    (
        "make_optimizer(args, unet)",
        "torch.optim.SGD(unet.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=0.01)",
    ),
    ("lr_scheduler = get_scheduler(\n", "lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(\n"),
    (
        "args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps\n",
        "optimizer, max_train_steps\n",
    ),
    ("F.mse_loss(", "F.huber_loss("),
    *LABELS,
]


def test_own_images_model_loss_optimizer_and_schedule_resume_bit_for_bit(tmp_path):
    copy(tmp_path / "copy", edits=OWN_EVERYTHING)
    said = run_copy(tmp_path / "copy", "train_ddpm.py")
    ran = said.split("RESUMED")[1]
    assert "DiTTransformer2DModel" in ran and "SGD(lr=" in ran and "CosineAnnealingLR(T_max=6" in ran
    card = (tmp_path / "copy" / "cut" / "README.md").read_text()
    assert "SGD(lr=" in card and "CosineAnnealingLR" in card and "DiTTransformer2DModel" in card


@pytest.mark.slow
def test_a_unet_with_classes_resumes_bit_for_bit(tmp_path):
    classes = UNET.replace("**UNETS", "num_class_embeds=10, **UNETS")
    copy(tmp_path / "copy", edits=[(UNET, classes), *LABELS])
    run_copy(tmp_path / "copy", "train_ddpm.py", "--unet=tiny", "--label_column=label")


def test_a_model_that_cannot_draw_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.DPMSolverMultistepScheduler, "step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run")
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


# ------------------------------------------------------------------------------------------- settings that come and go


def forget(folder, *flags, **added):
    """Make an interrupted run of one of an older script, which had not these flags, and had others."""
    interrupt(folder, "checkpoint-3")
    for path, key in ((folder / "training_args.json", "arguments"), (folder / "checkpoint-3" / STATE, "settings")):
        record = json.loads(path.read_text())
        for flag in flags:
            del record[key][flag]
        record[key] |= added
        path.write_text(json.dumps(record))
    (folder / "checkpoint-3" / "manifest.json").unlink()
    _write_manifest(folder / "checkpoint-3")


def test_a_new_flag_at_its_default_goes_on_with_an_old_run(tmp_path, capsys):
    train(tmp_path / "run")
    forget(tmp_path / "run", "snr_gamma", "lr_scheduler", bygone=7)
    assert train(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "is of a run without lr_scheduler, snr_gamma; what runs did before there were these counts" in said
    assert "settings that this script does not have: bygone (it was 7); they are ignored" in said
    assert "Resuming from" in said


def test_a_new_flag_at_another_value_is_refused(tmp_path):
    train(tmp_path / "run")
    forget(tmp_path / "run", "snr_gamma")
    with pytest.raises(UserError, match=r"snr_gamma was None, is 5\.0"):
        train(tmp_path / "run", "--snr_gamma=5")


# ------------------------------------------------------------------------------------------------- the output folder


def test_latest_in_an_empty_folder_starts_a_run(tmp_path, capsys):
    assert train(tmp_path / "run", "--resume_from_checkpoint=latest", "--max_train_steps=1") == 0
    said = capsys.readouterr().err
    assert "has no complete checkpoint" in said and "Starting a new run" in said


def test_the_log_of_the_command_may_lie_in_the_output_folder(tmp_path):
    for name in ("log", "train.log", "slurm-17.out"):
        (tmp_path / name).write_text("started\n")
    assert train(tmp_path, "--max_train_steps=1") == 0


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def refuse(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(tmp_path / "run", "--max_train_steps=1") == 0
    assert "knows no locks" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- notebooks, and updates


def test_a_script_can_be_used_from_a_notebook(tmp_path, capsys):
    from accelerate import notebook_launcher

    assert train_ddpm.main(parse(f"--output_dir={tmp_path}/cell", "--max_train_steps=1")) is None
    reset_accelerate()
    notebook_launcher(train_ddpm.main, (parse(f"--output_dir={tmp_path}/launched", "--max_train_steps=1"),), 1)
    assert capsys.readouterr().out.count("Finished, after 1 optimizer steps") == 2
    assert equal_weights(tmp_path / "cell" / WEIGHTS, tmp_path / "launched" / WEIGHTS)


PLAIN = """
import sys
import huggingface_hub.utils._http
del huggingface_hub.utils._http.default_client_factory  # as if an update had taken it away
import train_ddpm
train_ddpm.main(train_ddpm.parse_args(sys.argv[1:]))
print("IMPORTED", [name for name in ("matplotlib", "sklearn", "skimage") if name in sys.modules])
"""


def test_a_plain_run_depends_on_nothing_that_it_does_not_use(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(8):
        Image.new("L", (8, 8), 30 * k).save(tmp_path / "images" / f"{k}.png")
    flags = [flag for flag in TINY if not flag.startswith("--dataset_name")]
    flags += ["--unet=tiny", f"--train_data_dir={tmp_path}/images", f"--output_dir={tmp_path}/run"]
    result = subprocess.run([sys.executable, "-c", PLAIN, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "IMPORTED []" in result.stdout, result.stdout
