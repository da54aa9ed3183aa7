"""The README.md of a trained model, written by the run that trained it."""

import contextlib
import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import accelerate
import torch
from huggingface_hub import ModelCard, ModelCardData

from ..args import defaults_of
from ..hardware import device_name
from ..pictures import how_drawn
from ..training.output_dir import OWN_IMAGES, how_to_load, is_hub_id, public, read_arguments

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")
TRAINING_FLAGS = (
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "snr_gamma", "dropout", "label_dropout", "use_ema",
    "random_flip", "seed", "solver_steps", "points_per_way", "noisy_points", "huber_c", "teacher_guidance_scale",
)  # fmt: skip
USE = """
## Intended use and limits

For studying and illustrating diffusion models, and to start others from. It draws what its training images show, with
their gaps and biases; what it draws is evidence of nothing. Small data sets are memorised: compare samples with the
training images before showing them. The licence of the training images applies, too.
"""
UNLICENSED = "The page says `license: unknown`: --hub_license says under which one others may use the model"
PEOPLE = """
## People

The training images may show real people. Whoever trains or publishes such a model needs their consent, or a licence
that covers it. A model adapted to few images repeats them: before showing samples, compare them with the training
images (`nearest.png`, written by the run, shows the nearest by their pixels: that finds copies, not likenesses).
Intended for studying and illustrating generative models. Not for depicting an identifiable person without consent, for
deceiving anyone, or for recognising or judging people; what it draws says nothing about anybody.
"""
NOBODY = {"digits", "mnist", "ylecun/mnist"}  # images that show no people
SUBJECTS = {"digits": "scikit-learn's digits", "mnist": "MNIST", "faces": "scikit-image's faces"}
PAPERS = {  # by a setting and its value, ... for any: what it comes from
    ("ddpm", True): ("Denoising diffusion probabilistic models", "2006.11239"),
    ("prediction_type", "v_prediction"): ("Progressive distillation: v-prediction", "2202.00512"),
    ("prediction_type", "flow_prediction"): ("Flow matching for generative modeling", "2210.02747"),
    ("beta_schedule", "squaredcos_cap_v2"): ("Improved DDPM: the cosine schedule", "2102.09672"),
    ("time_density", "logit_normal"): ("Scaling rectified flow transformers: the density of times", "2403.03206"),
    ("rescale_betas_zero_snr", True): ("Common diffusion noise schedules and sample steps are flawed", "2305.08891"),
    ("snr_gamma", ...): ("Efficient diffusion training via min-SNR weighting", "2303.09556"),
    ("classes", True): ("Classifier-free diffusion guidance", "2207.12598"),
    ("model_guidance", ...): ("Diffusion models without classifier-free guidance", "2502.12154"),
    ("method", "lora"): ("LoRA", "2106.09685"),
    ("sampler", "LCMScheduler"): ("Latent consistency models", "2310.04378"),
    ("sampler", "DPMSolverMultistepScheduler"): ("DPM-Solver++", "2211.01095"),
    ("sampler", "DDIMScheduler"): ("Denoising diffusion implicit models", "2010.02502"),
    ("sampler", "UniPCMultistepScheduler"): ("UniPC", "2302.04867"),
}


def write_card(folder: Path, title: str, args, **summary) -> None:
    """Write ``README.md``: valid metadata, the samples, how to load the model, and what reproduces it.

    In the run's own folder the snippet has been run, with one step, before it is written. Training images of this
    machine are named by their number, unless ``--hub_dataset_name`` names them.

    Args:
        folder: a saved pipeline.
        title: what kind of model it is, a few words.
        args: the run's flags.
        summary: what the run found out; ``data`` is the Hub id, path or short name of the training images, ``images``
            their number, ``data_license`` their licence, ``base`` the id or path of the pipeline that it started from,
            ``classes`` the names of what a conditional model can be asked for.
    """
    classes, output_dir = summary.pop("classes", None), Path(args.output_dir)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    final = folder.resolve() == output_dir.resolve()  # otherwise a checkpoint, which has no pictures
    record = read_arguments(output_dir)
    name = record.get("public_data", OWN_IMAGES)
    people = name not in NOBODY or _shows_people(summary.get("base"))
    if name == OWN_IMAGES:
        name = f"{summary.get('images') or 'a stream of'} {OWN_IMAGES}"
    summary = {**public(summary), "data": args.hub_dataset_name or name}
    subject = SUBJECTS.get(summary["data"], summary["data"])
    data = ModelCardData(
        license=args.hub_license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=_tags(index, scheduler, classes),
        datasets=[summary["data"]] if is_hub_id(summary["data"]) else None,
        base_model=summary.get("base") if is_hub_id(summary.get("base")) else None,
    )
    if final and args.push_to_hub and args.hub_license == "unknown":
        logger.warning(f"{UNLICENSED} (the training images: {summary.get('data_license', 'not stated')})")
    flags = {key: value for key, value in vars(args).items() if value is not None}
    found = {key: value for key, value in summary.items() if value is not None and key != "fingerprint"}
    settings = found | record.get("ran", {}) | {key: flags[key] for key in TRAINING_FLAGS if key in flags}
    code = [
        f"`{path.relative_to(folder)}`" for part in ("", "scheduler", "unet") for path in (folder / part).glob("*.py")
    ]
    trust = f"`trust_remote_code=True` runs the code that comes with the model: {', '.join(code)}. Read it first.\n\n"
    has_curves = final and {"all", "tensorboard"} & set(args.report_to.split(","))
    ours = index["_class_name"] in ("DDPMPipeline", "ConsistencyModelPipeline")  # not linear mixing
    used = flags | found | {"ddpm": ours and not scheduler.get("use_flow_sigmas"), "classes": bool(classes)}
    used["sampler"] = index["scheduler"][1]
    papers = {
        paper for (key, value), paper in PAPERS.items() if (used.get(key) if value is ... else used.get(key) == value)
    }
    links = "\n".join(f"* [{name}](https://arxiv.org/abs/{number})" for name, number in sorted(papers))
    text = f"""---
{data.to_yaml()}
---

# {_escape(title)} trained on {_escape(subject)}

{"![samples](samples.png)" if final else "From before the end of training."}

{_drawn(index["scheduler"][1], args) if final else ""}Draws {_shape(summary)}images like those of \
{_escape(subject)}, with a {index["unet"][1]}.{_said_of(classes)}

## Use

{_snippet(folder, args, final, classes)}{trust if code else ""}The saved scheduler is `{index["scheduler"][1]}`.
{_section("Metrics", _metrics(output_dir) if final else "")}
## Training

{"![curves](curves.png)" if has_curves else ""}

{_reproduce(record, args)}

{_table(settings)}
{_section("Papers", links)}{USE}{PEOPLE if people else ""}"""
    ModelCard(text).save(folder / "README.md")


def _tags(index: dict, scheduler: dict, classes) -> list[str]:
    tags = ["diffusers", "unconditional-image-generation", *(["class-conditional"] if classes else [])]
    if scheduler.get("use_flow_sigmas"):
        tags.append("flow-matching")
    elif index["scheduler"][1] == "LCMScheduler":
        tags.append("consistency-distillation")
    elif index["_class_name"] == "DDPMPipeline":
        tags.append("ddpm")
    return tags


def _shows_people(base: str | None) -> bool:
    """Whether the model that training started from may have been trained on images of people."""
    card = Path(base or "") / "README.md"
    return bool(base) and not (card.is_file() and "## People" not in card.read_text(encoding="utf-8"))


def _section(title: str, text: str) -> str:
    return f"\n## {title}\n\n{text}\n" if text else ""


def _table(values: dict) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {_escape(key)} | {_escape(value)} |" for key, value in values.items())]
    )


def _shape(summary: dict) -> str:
    if "image_shape" not in summary:
        return ""
    channels, height, width = summary["image_shape"]
    return f"{height} x {width} {'grey ' if channels == 1 else ''}"


def _drawn(sampler: str, args) -> str:
    """How the picture above was made."""
    if sampler == "LCMScheduler":
        return f"The teacher's samples and this model's from the same noise, seed {args.seed}, not selected. "
    return f"{args.num_samples} samples, not selected: {how_drawn(args)}. "


def _metrics(output_dir: Path) -> str:
    """What the run has measured of its samples while it trained (``--evaluate_steps``)."""
    file = output_dir / "evaluation.json"
    if not file.is_file():
        return ""
    values = json.loads(file.read_text(encoding="utf-8"))
    shown = {name: f"{value:.4g}" for name, value in values.items() if name != "step"}
    said = f"After {values['step']} optimizer steps, N samples against as many training images; lower is better."
    return f"{said}\n\n{_table(shown)}"


def _said_of(classes) -> str:
    """One sentence about what a conditional model can be asked for."""
    if not classes:
        return ""
    shown = ", ".join(_escape(name) for name in classes[:50]) + (" ..." if len(classes) > 50 else "")
    return f" It can be asked for {len(classes)} classes, by number from 0 or by name: {shown}."


def _snippet(folder: Path, args, run_it: bool, classes=None) -> str:
    """How to load and draw, as Markdown; nothing if that failed here."""
    name = Path(args.output_dir).resolve().name
    load = how_to_load(folder, name)
    code = f"from diffusers import {load.split('.')[0]}\n\npipeline = {load}\n"
    asked = f", class_labels={[k % len(classes) for k in range(4)]}" if classes else ""
    how = repr(list(classes[:4])) if classes and load.startswith("DiffusionPipeline") else f"batch_size=4{asked}"
    code += f"images = pipeline({how}, num_inference_steps={args.num_inference_steps}).images\n"
    code += 'images[0].save("sample.png")'
    if classes and "guidance_scale" in vars(args):  # a model that was distilled has learnt its teacher's
        alone = code + "\n\n# With guidance, two calls of the model a step, and classes by name\n"
        where = f"{name!r}, custom_pipeline={name!r}"
        code = "from diffusers import DiffusionPipeline\n\n"
        code += f"pipeline = DiffusionPipeline.from_pretrained({where}, trust_remote_code=True)\n"
        scale = 1.5 if args.guidance_scale == 1 else args.guidance_scale
        code += f"images = pipeline([{classes[0]!r}, {classes[-1]!r}], guidance_scale={scale}).images"
        if not load.startswith("DiffusionPipeline"):
            code = alone + code
    if run_it:
        once = code.replace(repr(name), repr(str(folder.resolve())))
        once = re.sub(r"num_inference_steps=\d+", "num_inference_steps=1", once)
        once = re.sub(r"(guidance_scale=[\d.]+)\)", r"\1, num_inference_steps=1)", once)
        try:
            with tempfile.TemporaryDirectory() as place, contextlib.chdir(place), torch.random.fork_rng(devices=[]):
                with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
                    exec(once, {})
        except Exception as error:  # the model is saved: a card without the snippet is better than none
            logger.warning(
                f"{folder}: the saved pipeline could not be loaded and called: {type(error).__name__}: {error}"
            )
            return ""
    return f"```python\n{code}\n```\n\n"


def _reproduce(record: dict, args) -> str:
    """The command, the state of the scripts, versions and machine that a run takes to come out the same.

    The command has every flag that differs from its default, wherever it was given.
    """
    state = accelerate.state.AcceleratorState()
    command = ["accelerate", "launch", "--config_file", "accelerate_config.yaml"]
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if state.num_processes > 1:
        command += ["--multi_gpu", "--num_processes", str(state.num_processes)]
        command += ["--num_machines", str(machines)] * (machines > 1)
    command += ["--mixed_precision", state.mixed_precision, f"{record.get('script', 'SCRIPT')}.py"]
    for flag, value in record.get("public_arguments", {}).items():
        if value in (None, defaults_of(args).get(flag)) or flag.startswith(("hub_", "push_", "mixed_precision")):
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}={value}"] if str(value).startswith("-") else [f"--{flag}", str(value)]
    text = shlex.join(command).replace("\n", " ")
    if state.num_processes > 1 and state.device.type == "cpu":
        text = f"ACCELERATE_USE_CPU=true {text}"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    where = f"{state.num_processes} x {device_name(state.device)}, Python {platform.python_version()}"
    return f"    {text}\n\n{_commit()}{', '.join(versions)}; {where}"


@functools.cache
def _commit() -> str:
    """Which version of the scripts ran, as far as git knows it."""

    def git(*words):
        folder = Path(__file__).parents[2]
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H", "--", ".")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):  # no git here
        return ""
    return f"Scripts: commit {commit[:12]}{', with changes' * bool(changed)}. " if commit else ""


def _escape(value) -> str:
    """One line of Markdown text without markup, whatever the user named things."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
