"""A copy of a script and utils/ in an empty folder: it runs, can be cut down and changed, and still resumes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import children
import pytest
from conftest import TINY, equal_weights, interrupt, parse, reset_accelerate, slow, train
from PIL import Image

import train_ddpm
from utils import UserError
from utils.training.checkpoints import STATE, _write_manifest

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCRIPTS = (
    "train_basic.py",
    "train_unet2d.py",
    "train_ddpm.py",
    "finetune_faces.py",
    "train_conditional.py",
    "train_flow.py",
    "train_paired.py",
    "distill_few_steps.py",
    "train_autoencoder.py",
    "train_latent.py",
)
FOLDERS = ("sources", "monitoring", "resilience", "evaluation", "publishing")  # each of them may be deleted
FLAGS_OF = {  # a flag that goes with each
    "sources": "--train_data_dir", "monitoring": "--report_to", "resilience": "--max_rollbacks",
    "evaluation": "--evaluate_steps", "publishing": "--push_to_hub",
}  # fmt: skip
DRIVER = """
import hashlib, json, shutil, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
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
digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in straight.values())).hexdigest()
print("RESUMED", digest, json.loads(Path("cut/training_args.json").read_text()).get("ran"))
"""


def copy(folder, script="train_ddpm.py", without=(), edits=()):
    """Write a script, with pieces of its text replaced, and utils/ without these folders into a folder."""
    folder.mkdir()
    shutil.copytree(ROOT / "utils", folder / "utils", ignore=shutil.ignore_patterns("__pycache__", *without))
    text = (ROOT / script).read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{text.count(old)} times in {script}: {old}"
        text = text.replace(old, new)
    (folder / script).write_text(text)


def known(flags, without):
    """Return the flags that are left without these folders."""
    gone = [
        name for folder, name in (("sources", "--dataset_name"), ("monitoring", "--report_to")) if folder in without
    ]
    return [flag for flag in flags if not flag.startswith(tuple(gone) or "-x")]


def run_copy(folder, script, *flags, without=()):
    """Train in the copy, interrupt and resume it, compare, and return the output."""
    flags = [*known(TINY, without), *flags]
    code, said = children.run(DRIVER.format(script=script.removesuffix(".py")), *flags, folder=folder)
    assert code == 0 and "RESUMED" in said, said[-3000:]
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the digest of the final weights of a copy with all folders."""
    folder = tmp_path_factory.mktemp("whole") / "copy"
    copy(folder)
    return run_copy(folder, "train_ddpm.py", "--unet=tiny").split("RESUMED ")[1].split()[0]


@pytest.mark.parametrize("without", [("sources",), *(slow((folder,)) for folder in FOLDERS[1:]), FOLDERS], ids="+".join)
def test_a_folder_is_deleted_and_nothing_else(tmp_path, whole, without):
    """The unchanged script trains, resumes and ends with the same bits. Only the folder's flags are gone."""
    copy(tmp_path / "copy", without=without)
    assert (tmp_path / "copy" / "train_ddpm.py").read_bytes() == (ROOT / "train_ddpm.py").read_bytes()
    flags = ["--evaluate_steps=3", "--num_evaluation_samples=10", "--features=pixels"]
    said = run_copy(
        tmp_path / "copy", "train_ddpm.py", "--unet=tiny", *([] if "evaluation" in without else flags), without=without
    )
    assert said.split("RESUMED ")[1].split()[0] == whole
    assert (tmp_path / "copy" / "straight" / "README.md").is_file() == ("publishing" not in without)
    assert (tmp_path / "copy" / "straight" / "best").is_dir() == ("evaluation" not in without)
    code, usage = children.run(tmp_path / "copy" / "train_ddpm.py", "--help", folder=tmp_path / "copy")
    assert code == 0
    for folder, flag in FLAGS_OF.items():
        assert (f"{flag} " in usage) == (folder not in without), flag
    code, said = children.run(tmp_path / "copy" / "train_ddpm.py", FLAGS_OF[without[0]], folder=tmp_path / "copy")
    assert code == 2 and f"there is no flag {FLAGS_OF[without[0]]}." in said


ALL = """
import importlib, sys
from pathlib import Path
sys.path.insert(0, str(Path.cwd()))
from accelerate.state import AcceleratorState, GradientState
base, *flags = sys.argv[1:]
for name in {scripts}:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script = importlib.import_module(name.removesuffix(".py"))
    start = [f"--pretrained_model_name_or_path={{base}}"] if name.startswith(("fine", "distill")) else []
    start += ["--downsampling=2"] if "autoencoder" in name else []
    start += ["--vae=run-train_autoencoder.py", "--unet=tiny"] if "latent" in name else []
    steps = [flag for flag in flags if "inference" not in flag] if "autoencoder" in name else flags
    script.main(script.parse_args([*steps, *start, f"--output_dir=run-{{name}}", "--max_train_steps=2"]))
    print("TRAINED", name)
"""


def test_every_script_does_without_all_that_may_be_deleted(tmp_path, finished_run):
    copy(tmp_path / "copy", without=FOLDERS)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path / "copy")
    flags = [finished_run, *known(TINY, FOLDERS)]
    code, said = children.run(ALL.format(scripts=SCRIPTS), *flags, folder=tmp_path / "copy")
    assert code == 0 and said.count("TRAINED") == len(SCRIPTS), said[-3000:]


DATA = "    train_data = load_train_data(args, accelerator, pretrained and pretrained.unet.config)\n"
UNET = "        unet = make_unet(args.unet, args.model_config_name_or_path, train_data.model_shape, DROPOUT)\n"
LABELS = [
    ("model(noisy_images, timesteps).sample", 'model(noisy_images, timesteps, class_labels=batch["labels"]).sample'),
    (
        "return run.sample_images(unet, sampler, count, train_data.image_shape, num_inference_steps)",
        "inputs = lambda sample_ids: dict(class_labels=torch.from_numpy(sample_ids % 10))\n"
        "        shape = train_data.image_shape\n"
        "        return run.sample_images(unet, sampler, count, shape, num_inference_steps, model_inputs=inputs)",
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
        "            num_embeds_ada_norm=10, **train_data.model_shape,\n        )\n",
    ),
    (
        "    optimizer = make_optimizer(  # or any of torch.optim\n"
        "        args.optimizer, unet, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8\n    )\n",
        "    optimizer = torch.optim.SGD(unet.parameters(), lr=learning_rate, momentum=0.9, weight_decay=0.01)\n",
    ),
    ("lr_scheduler = get_scheduler(\n", "lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(\n"),
    (
        "args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps\n",
        "optimizer, run.max_train_steps\n",
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
    classes = UNET.replace("train_data.model_shape", "dict(train_data.model_shape, num_class_embeds=10)")
    copy(tmp_path / "copy", edits=[(UNET, classes), *LABELS])
    run_copy(tmp_path / "copy", "train_ddpm.py", "--unet=tiny", "--label_column=label")


def test_a_model_that_cannot_draw_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers.DPMSolverMultistepScheduler, "step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run")
    assert not [*(tmp_path / "run").glob("checkpoint-*")]


# ---------------------------------------------------------------------------------- settings that are added or removed


def forget(folder, *flags, **added):
    """Change an interrupted run into one of a script with other flags."""
    interrupt(folder, "checkpoint-3")
    for path, key in ((folder / "training_args.json", "arguments"), (folder / "checkpoint-3" / STATE, "settings")):
        record = json.loads(path.read_text())
        for flag in flags:
            del record[key][flag]
        record[key] |= added
        path.write_text(json.dumps(record))
    (folder / "checkpoint-3" / "manifest.json").unlink()
    _write_manifest(folder / "checkpoint-3")


def test_a_flag_added_with_its_default_resumes_the_run(tmp_path, capsys):
    train(tmp_path / "run")
    forget(tmp_path / "run", "lr_scheduler", removed=7)
    assert train(tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "the run was started without lr_scheduler. The defaults count as its values" in said
    assert "holds a run with removed 7, which is not a flag of this script" in said
    assert "Resuming from" in said


def test_a_new_flag_at_another_value_is_refused(tmp_path):
    train(tmp_path / "run")
    forget(tmp_path / "run", "lr_scheduler")
    with pytest.raises(UserError, match=r"lr_scheduler was 'linear', is 'cosine'"):
        train(tmp_path / "run", "--lr_scheduler=cosine")


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
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(tmp_path / "run", "--max_train_steps=1") == 0
    assert "has no locks" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- notebooks, and updates


def test_a_script_can_be_used_from_a_notebook(tmp_path, capsys):
    from accelerate import notebook_launcher

    assert train_ddpm.main(parse(f"--output_dir={tmp_path}/cell", "--max_train_steps=1")) is None
    reset_accelerate()
    notebook_launcher(train_ddpm.main, (parse(f"--output_dir={tmp_path}/launched", "--max_train_steps=1"),), 1)
    assert capsys.readouterr().out.count("Finished, after 1 optimizer step.") == 2
    assert equal_weights(tmp_path / "cell" / WEIGHTS, tmp_path / "launched" / WEIGHTS)


PLAIN = """
import sys
import huggingface_hub.utils._http
del huggingface_hub.utils._http.default_client_factory  # as if an update had taken it away
import train_ddpm
train_ddpm.main(train_ddpm.parse_args(sys.argv[1:]))
print("IMPORTED", [name for name in ("matplotlib", "sklearn", "skimage") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_plain_run_depends_on_nothing_that_it_does_not_use(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(8):
        Image.new("L", (8, 8), 30 * k).save(tmp_path / "images" / f"{k}.png")
    flags = [flag for flag in TINY if not flag.startswith("--dataset_name")]
    flags += ["--unet=tiny", f"--train_data_dir={tmp_path}/images", f"--output_dir={tmp_path}/run"]
    result = subprocess.run([sys.executable, "-c", PLAIN, *flags], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "IMPORTED []" in result.stdout, result.stdout
