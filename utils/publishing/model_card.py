"""The README.md of a trained model, written by the run that trained it."""

import contextlib
import io
import json
import logging
import re
import shlex
import sys
import tempfile
from pathlib import Path

import accelerate
import diffusers
import torch
from huggingface_hub import ModelCard, ModelCardData

from ..hardware import device_name
from ..training.output_dir import how_to_load, is_hub_id, without_path

logger = logging.getLogger(__name__)

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
PEOPLE = """
## People

The training images may show real people. Whoever trains or publishes such a model needs their consent, or a licence
that covers it. A model adapted to few images repeats them: before showing samples, compare them with the training
images (`nearest.png`, written by the run, shows the nearest by their pixels: that finds copies, not likenesses).
Intended for studying and illustrating generative models. Not for depicting an identifiable person without consent, for
deceiving anyone, or for recognising or judging people; what it draws says nothing about anybody.
"""


def write_card(folder: Path, title: str, args, of_people: bool = False, **summary) -> None:
    """Write ``README.md``: valid metadata, the samples, a snippet that loads the model, and how it was trained.

    In the run's own folder the snippet has been run, with one step, before it is written.

    Args:
        folder: a saved pipeline.
        title: what kind of model it is, one line.
        args: the run's flags.
        of_people: whether the images show people; adds a section.
        summary: what the run found out; ``data`` is the Hub id, path or short name of the training images,
            ``data_license`` their licence, ``base`` the id or path of the pipeline that it started from, ``classes``
            the names of what a conditional model can be asked for.
    """
    classes = summary.pop("classes", None)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    on_hub = {key: name for key, name in summary.items() if key in ("data", "base") and is_hub_id(name)}
    sampler = index["scheduler"][1]
    tags = ["diffusers", "unconditional-image-generation", *(["class-conditional"] if classes else [])]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if scheduler.get("use_flow_sigmas"):
        tags.append("flow-matching")
    elif sampler == "LCMScheduler":
        tags.append("consistency-distillation")
    elif index["_class_name"] == "DDPMPipeline":
        tags.append("ddpm")
    data = ModelCardData(
        license=args.hub_license,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=tags,
        datasets=[on_hub["data"]] if "data" in on_hub else None,
        base_model=on_hub.get("base"),
    )
    for key in {"data", "base"} & (set(summary) - set(on_hub)):
        summary[key] = Path(summary[key]).name  # no path of one machine
    record = Path(args.output_dir) / "training_args.json"
    ran = json.loads(record.read_text(encoding="utf-8")).get("ran", {}) if record.is_file() else {}
    found = {key: value for key, value in summary.items() if value is not None and key != "fingerprint"}
    settings = found | ran | {key: vars(args)[key] for key in TRAINING_FLAGS if vars(args).get(key) is not None}
    table = "\n".join(f"| {_escape(key)} | {_escape(value)} |" for key, value in settings.items())
    folders = [folder, *(folder / part for part in ("scheduler", "unet"))]
    code = [f"`{path.relative_to(folder)}`" for place in folders for path in place.glob("*.py")]
    trust = f"`trust_remote_code=True` runs the code that comes with the model: {', '.join(code)}. Read it first.\n\n"
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, diffusers, accelerate))
    state = accelerate.PartialState()
    final = folder.resolve() == Path(args.output_dir).resolve()  # otherwise a checkpoint, which has no pictures
    guidance = f", guidance {args.guidance_scale}" if classes and "guidance_scale" in vars(args) else ""
    drawn = f"""The weights drew the samples above ({args.num_samples} images, \
{vars(args).get("sampler", sampler)}, {args.num_inference_steps} steps, seed {args.seed}{guidance}, not selected)."""
    if sampler == "LCMScheduler":
        drawn = f"Above, the teacher's samples and these weights' from the same noise, seed {args.seed}, not selected."
    snippet = _snippet(folder, args, final, classes)
    has_curves = final and {"all", "tensorboard"} & set(args.report_to.split(","))
    text = f"""---
{data.to_yaml()}
---

# {_escape(title)}

Draws images like those in {_escape(summary["data"])}, with a {index["unet"][1]}.{_said_of(classes)}

{"![samples](samples.png)" if final else "From before the end of training."}

{snippet}{trust if code else ""}The saved scheduler is `{sampler}`. {drawn if final else ""}

## Training

{"![curves](curves.png)" if has_curves else ""}

    {command_line()}

{versions}; {state.num_processes} x {device_name(state.device)}

| | |
|---|---|
{table}
{USE}{PEOPLE if of_people else ""}"""
    ModelCard(text).save(folder / "README.md")


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


def command_line() -> str:
    """The command that started this process, without paths of this machine."""
    if "ipykernel" in sys.modules:
        return "(in a notebook)"
    return shlex.join(["python", *(without_path(argument) for argument in sys.argv)]).replace("\n", " ")


def _escape(value) -> str:
    """One line of Markdown text without markup, whatever the user named things."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
