"""The model card (README.md) of a trained model, written by the run that trained it."""

import contextlib
import functools
import importlib.metadata
import io
import logging
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import diffusers
import torch
from huggingface_hub import ModelCard, ModelCardData

from .. import read_record, write_record
from ..args import Parser, add_common_arguments, defaults_of
from ..data.clusters import has_clusters
from ..diffusion.class_conditional import class_names
from ..diffusion.unets import add_unet_arguments
from ..hardware import device_name
from ..privacy import OWN_IMAGES, is_hub_id, redact
from ..saved import AUTOENCODERS, NETS, index_file, net_config
from ..training.last_lines import Loading, how_to_load, inputs_beside
from ..training.output_dir import ARGUMENTS, read_arguments
from .results import describe_results

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "numpy", "pillow")
TRAINING_FLAGS = ("learning_rate", "lr_scheduler", "lr_warmup_steps", "use_ema", "random_flip", "seed")
# The card shows these flags elsewhere, as the base model and as the settings of the samples
SHOWN_OTHERWISE = {"pretrained_model_name_or_path", "sampler", "num_inference_steps"}
INTENDED_USE = """
## Intended use and limits

This model is for studying and illustrating diffusion models, and for training other models from it. Its images resemble
its training images, with their gaps and biases. They are not evidence of anything. Models memorise small data sets, so
compare samples with the training images before showing them. The licence of the training images also applies.
"""
UNLICENSED = "The model card has `license: unknown`. State the licence of the model with `push.py --hub_license`"
PEOPLE = """
## People

The training images may show real people. To train or publish such a model, you need their consent, or a licence that
covers it. A model that was adapted to few images repeats them. Compare samples with the training images before showing
them.{nearest} Use the model for studying and illustrating generative models. Do not use it to depict an identifiable
person without consent, to deceive anyone, or to recognise or judge people. Its images are not evidence about any real
person.
"""
NEAREST = """ `nearest.png`, written by the run, shows the training images with the most
similar pixels. This finds copies, but not likenesses."""
DATA_WITHOUT_PEOPLE = {"digits", "mnist", "ylecun/mnist"}  # images that show no people
CONDITIONS = {
    "gray": "It colours grey images.", "inpaint": "It fills the transparent part of an image.",
    "outline": "It draws an image from white outlines on black.",
    "paired": "It draws an image from another one, as in its training pairs.",
}  # fmt: skip
DATA_TITLES = {"digits": "scikit-learn's digits", "mnist": "MNIST", "faces": "scikit-image's faces"}
PAPERS = {  # papers by (setting, value); Ellipsis stands for any value
    ("ddpm", True): ("Denoising diffusion probabilistic models", "2006.11239"),
    ("prediction_type", "v_prediction"): ("Progressive distillation: v-prediction", "2202.00512"),
    ("prediction_type", "flow_prediction"): ("Flow matching for generative modeling", "2210.02747"),
    ("beta_schedule", "squaredcos_cap_v2"): ("Improved DDPM: the cosine schedule", "2102.09672"),
    ("weighting_scheme", "logit_normal"): ("Scaling rectified flow transformers: the density of times", "2403.03206"),
    ("rescale_betas_zero_snr", True): ("Common diffusion noise schedules and sample steps are flawed", "2305.08891"),
    ("snr_gamma", ...): ("Efficient diffusion training via min-SNR weighting", "2303.09556"),
    ("condition", ...): ("Image super-resolution via iterative refinement: a condition as channels", "2104.07636"),
    ("classes", True): ("Classifier-free diffusion guidance", "2207.12598"),
    ("latent", True): ("High-resolution image synthesis with latent diffusion models", "2112.10752"),
    ("clusters", ...): ("Rethinking cluster-conditioned diffusion models", "2403.00570"),
    ("model_guidance", ...): ("Diffusion models without classifier-free guidance", "2502.12154"),
    ("autoguidance", ...): ("Guiding a diffusion model with a bad version of itself", "2406.02507"),
    ("method", "lora"): ("LoRA", "2106.09685"),
    ("sampler", "LCMScheduler"): ("Latent consistency models", "2310.04378"),
    ("sampler", "DPMSolverMultistepScheduler"): ("DPM-Solver++", "2211.01095"),
    ("sampler", "DDIMScheduler"): ("Denoising diffusion implicit models", "2010.02502"),
    ("sampler", "UniPCMultistepScheduler"): ("UniPC", "2302.04867"),
}


def add_to_record(folder: Path, args, title: str, caption: str, state) -> None:
    """Add to ``training_args.json`` the facts that a model card needs and that only the run has.

    Args:
        folder: output folder of the run.
        args: all flags, for the command that reproduces the run.
        title: kind of the model, in a few words.
        caption: description of the settings that its samples are drawn with.
        state: accelerate's state of the processes.
    """
    record = read_arguments(folder)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    where = f"{state.num_processes} x {device_name(state.device)}, Python {platform.python_version()}"
    command = _command(record["public_arguments"], defaults_of(args), record["file"], state)
    text = f"    {command}\n\n{_commit()}Packages: {versions}. Run on {where}"
    shown = record["public_arguments"]
    if cut := [flag for flag, value in record["arguments"].items() if flag in shown and shown[flag] != value]:
        text += f". The command leaves out the paths on that machine in --{', --'.join(cut)}"
    people = _shows_people(record["arguments"].get("pretrained_model_name_or_path"))
    card = {"title": title, "caption": caption, "reproduce": text, "base_shows_people": people}
    write_record(folder / ARGUMENTS, {**record, "card": card})


def write_card(
    folder: Path, run_folder: Path, final: bool | None = None, name: str | None = None, license: str | None = None,
    dataset_name: str | None = None, evaluation: dict | None = None, record: dict | None = None, trust: bool = False,
) -> None:  # fmt: skip
    """Write ``README.md``: metadata, samples, code that loads the model, and the command that reproduces it.

    The card of a finished model has the code only if the pipeline loads and draws. Training images that
    are only on this machine are described by their number.

    Args:
        folder: folder of a saved pipeline.
        run_folder: output folder of the run, with its record. Without ``add_to_record`` nothing is written.
        final: True for the finished model, with its pictures; by default True if the folders are the same.
        name: name that the code loads the model by; by default the path or name of ``run_folder``.
        license: licence of the model; by default ``unknown``, with a warning if ``name`` is given.
        dataset_name: name of the training images.
        evaluation: content of ``results.json`` of evaluate.py.
        record: record of the run; by default that in ``run_folder``.
        trust: True to run the code in ``folder``, to test the code of the card. The run that wrote it does so.

    Raises:
        ValueError: see ``describe_results``, or the record holds a shape of images that is no shape.
    """
    record = record or read_arguments(run_folder)
    if "card" not in record:
        return
    final = folder.resolve() == run_folder.resolve() if final is None else final
    index, autoencoder = read_record(index_file(folder)), how_to_load(folder, folder).is_autoencoder
    scheduler = {} if autoencoder else read_record(folder / "scheduler" / "scheduler_config.json")
    kind_of_scheduler = index.get("scheduler", [None, None])[1]
    net = next((index[part][1] for part in NETS if part in index), index["_class_name"])
    classes = class_names(net_config(folder))
    flags, base, kind = record["public_arguments"], record.get("base"), record.get("condition")
    data = record.get("public_data", OWN_IMAGES)
    people = data not in DATA_WITHOUT_PEOPLE or record["card"]["base_shows_people"]
    people = PEOPLE.format(nearest=NEAREST * (run_folder / "nearest.png").is_file()) if people else ""
    if data == OWN_IMAGES:
        data = f"{record.get('images') or 'a stream of'} {OWN_IMAGES}"
    data = dataset_name or data
    subject = DATA_TITLES.get(data, data)
    section, results = describe_results(folder, evaluation) if evaluation else ("", None)
    metadata = ModelCardData(
        license=license or "unknown",
        library_name="diffusers",
        pipeline_tag="image-to-image" if kind or autoencoder else "unconditional-image-generation",
        tags=_tags(index, scheduler, classes, kind),
        datasets=[data] if is_hub_id(data) else None,
        base_model=next((model for model in (base, flags.get("vae")) if is_hub_id(model)), None),
        model_name=run_folder.resolve().name if results else None,
        eval_results=results,
    )
    if name and not license:
        logger.warning(f"{UNLICENSED} (licence of the training images: {record.get('data_license', 'not stated')})")
    known = {"script", "arguments", "constants", "public_arguments", "public_constants", "public_data"}
    known |= {"card", "ran", "versions"}
    known |= {"num_processes", "mixed_precision", "device", "finished_at_step", "fingerprint", "classes", "file"}
    found = {key: value for key, value in record.items() if key not in known and value is not None}
    settings = redact(found) | {"data": data} | record.get("ran", {})
    own = {*flags} - _common_flags() - {*settings} - SHOWN_OTHERWISE  # flags of the script itself
    own -= {"class_dropout_prob"} if not classes else set()  # an unconditional model does not use this flag
    settings |= {key: flags[key] for key in (*TRAINING_FLAGS, *sorted(own)) if flags.get(key) is not None}
    settings |= record["public_constants"]
    code = [
        f"`{path.relative_to(folder)}`" for part in ("", "scheduler", "unet") for path in (folder / part).glob("*.py")
    ]
    trust = f"`trust_remote_code=True` runs the code that comes with the model: {', '.join(code)}. Read it first.\n\n"
    ours = index["_class_name"] in ("DDPMPipeline", "ConsistencyModelPipeline")  # linear mixing has its own class
    used = flags | found | {"ddpm": ours and not scheduler.get("use_flow_sigmas"), "classes": bool(classes)}
    used |= {
        "sampler": kind_of_scheduler,
        "latent": autoencoder or (not kind and not {*AUTOENCODERS}.isdisjoint(index)),
    }
    papers = {
        paper for (key, value), paper in PAPERS.items() if (used.get(key) if value is ... else used.get(key) == value)
    }
    links = "\n".join(f"* [{name}](https://arxiv.org/abs/{number})" for name, number in sorted(papers))
    steps = record.get("num_inference_steps", flags.get("num_inference_steps"))
    named, given = name or _loading_name(run_folder), record.get("model_inputs")
    snippet = _snippet(folder, named, steps, classes, flags.get("guidance_scale"), final, given, record, trust)
    pictured = "![samples](samples.png)" if (folder / "samples.png").is_file() else ""
    described = _describe_samples(kind_of_scheduler, record) if final and pictured else ""
    does = f"draws {_shape(record)}images like those of {_escape(subject)} with a {net}"
    if autoencoder:
        does = f"encodes {_shape(record)}images like those of {_escape(subject)} as latents, and decodes latents"
    text = f"""---
{metadata.to_yaml()}
---

# {_escape(record["card"]["title"])} trained on {_escape(subject)}

{pictured if final else "This is a checkpoint from before the end of training."}

{described}This model {does}.{_describe_classes(classes)}{_describe_condition(kind)}

## Use

{snippet}{trust if code else ""}{f"The saved scheduler is `{kind_of_scheduler}`." if scheduler else ""}
{_section("Metrics", _metrics(run_folder) if final else "")}{_section("Evaluation", section)}
## Training

{"![curves](curves.png)" if final and (run_folder / "curves.png").is_file() else ""}

{record["card"]["reproduce"]}

{_table(settings)}
{_section("Papers", links)}{INTENDED_USE}{people}"""
    ModelCard(text).save(folder / "README.md")


@functools.cache
def _common_flags() -> set[str]:
    """Return the flags that all scripts share."""
    parser = Parser("")
    add_unet_arguments(parser)
    add_common_arguments(parser)
    return {action.dest for action in parser._actions}


def _tags(index: dict, scheduler: dict, classes, kind: str | None) -> list[str]:
    tags = [
        "diffusers",
        *(["autoencoder"] if not scheduler else ["image-to-image" if kind else "unconditional-image-generation"]),
        *(["class-conditional"] if classes else []),
    ]
    if scheduler.get("use_flow_sigmas"):
        tags.append("flow-matching")
    elif index.get("scheduler", [None, None])[1] == "LCMScheduler":
        tags.append("consistency-distillation")
    elif index["_class_name"] == "DDPMPipeline":
        tags.append("ddpm")
    return tags


def _shows_people(base: str | None) -> bool:
    """Return whether the base model may have been trained on images of people."""
    card = Path(base or "") / "README.md"
    return bool(base) and not (card.is_file() and "## People" not in card.read_text(encoding="utf-8"))


def _loading_name(folder: Path) -> str:
    """Return the path from the working directory, or the name of a folder elsewhere."""
    folder = folder.resolve()
    return folder.relative_to(Path.cwd()).as_posix() if folder.is_relative_to(Path.cwd()) else folder.name


def _section(title: str, text: str) -> str:
    return f"\n## {title}\n\n{text}\n" if text else ""


def _table(values: dict) -> str:
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {_escape(key)} | {_escape(_short(value))} |" for key, value in values.items())]
    )


def _short(value, limit: int = 300) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text)} characters)"


def _shape(record: dict) -> str:
    if "image_shape" not in record:
        return ""
    channels, height, width = record["image_shape"]
    return f"{height} x {width} {'grey ' if channels == 1 else ''}"


def _describe_samples(sampler: str | None, record: dict) -> str:
    """Return a sentence about the picture of samples."""
    flags, caption = record["public_arguments"], record["card"]["caption"]
    if sampler == "LCMScheduler":
        return f"The picture shows unselected samples of the teacher and this model from the same noise ({caption}). "
    if sampler is None:
        return f"The picture shows images, their reconstructions, and the differences ({caption}). "
    if record.get("condition"):
        return f"The picture shows inputs, unselected samples of each ({caption}), and true images. "
    return f"The picture shows {flags['num_samples']} samples, not selected: {caption}. "


def _metrics(output_dir: Path) -> str:
    """Return the metrics of the samples that were drawn during training (``--evaluate_steps``)."""
    file = output_dir / "evaluation.json"
    if not file.is_file():
        return ""
    values = read_record(file)
    shown = {name: f"{value:.4g}" for name, value in values.items() if name != "step"}
    heading = f"After {values['step']} optimizer steps, from N samples and N training images. Lower is better."
    return f"{heading}\n\n{_table(shown)}"


def _describe_classes(classes) -> str:
    """Return a sentence about the classes of a conditional model."""
    if not classes:
        return ""
    if has_clusters(classes):
        return f" Its {len(classes)} classes are clusters of similar training images. Choose them by number (from 0)."
    shown = ", ".join(_escape(name) for name in classes[:50]) + (" ..." if len(classes) > 50 else "")
    return f" It has {len(classes)} classes, which are chosen by number (from 0) or by name: {shown}."


def _describe_condition(kind: str | None) -> str:
    """Return a sentence about the condition of a model of train_paired.py."""
    if str(kind).startswith("lowres:"):
        return f" It enlarges images by a factor of {kind.partition(':')[2]}."
    return f" {CONDITIONS[kind]}" if kind else ""


def _snippet(
    folder: Path, name: str, steps: int, classes: list[str], guidance_scale: float | None, final: bool,
    given: str | None, record: dict, trust: bool,
) -> str:  # fmt: skip
    """Return code that loads the model and draws, as Markdown; nothing if the code of a finished model fails."""
    load = how_to_load(folder, name)
    # The record may come from someone else, and the code of the card is run to test it
    record = record | {"image_shape": [int(side) for side in record["image_shape"]]}
    if load.is_autoencoder:
        return _snippet_of_autoencoder(folder, load, name, final, record)
    if beside := inputs_beside(folder, given):
        code = f"from diffusers import {load.pipeline}\n\nunet = {load.call}.unet"
        note = f"Besides the noisy images, the net takes {beside} as input. No pipeline of diffusers can pass that. "
        note += "Use the script that trained the model to draw samples."
        return f"```python\n{code}\n```\n\n{note}\n\n"
    if load.takes_condition:
        return _snippet_with_condition(folder, name, steps, final, record)
    asked = f", class_labels={[k % len(classes) for k in range(4)]}" if classes and not load.clusters else ""
    how = repr(list(classes[:4])) if load.own_pipeline else f"batch_size=4{asked}"
    if load.guides_classes:
        plain = not any("," in label for label in classes)  # the pipeline splits names at commas
        how = f"pipeline.get_label_ids({list(classes[:4])})" if plain else repr([*range(min(4, len(classes)))])
        how += f", guidance_scale={guidance_scale:g}"
    code = f"from diffusers import {load.pipeline}\n\npipeline = {load.call}\n"
    code += f"images = pipeline({how}, num_inference_steps={steps}).images\n"
    code += 'images[0].save("sample.png")'
    # A distilled model takes no scale, because it has learnt its teacher's guidance
    guided = bool(classes) and guidance_scale is not None and not load.guides_classes
    if guided:
        scale = 1.5 if guidance_scale == 1 else guidance_scale
        more = "from diffusers import DiffusionPipeline\n\n"
        where = f"{name!r}, custom_pipeline={name!r}, trust_remote_code=True"
        more += f"pipeline = DiffusionPipeline.from_pretrained({where})\n"
        more += f"images = pipeline([{classes[0]!r}, {classes[-1]!r}], guidance_scale={scale}).images"
        code = (
            more
            if load.own_pipeline
            else f"{code}\n\n# With guidance: two function evaluations per step. Classes are given by name\n{more}"
        )
    if final and (trust or not (load.runs_code or load.own_pipeline or guided)):
        try:
            _try(folder, load, guided, classes)
        except Exception as error:  # the model is already saved, and a card without code is better than none
            logger.warning(
                f"{folder}: the saved pipeline could not be loaded and called: {type(error).__name__}: {error}"
            )
            return ""
    return f"```python\n{code}\n```\n\n"


def _snippet_of_autoencoder(folder: Path, load: Loading, name: str, final: bool, record: dict) -> str:
    """Return code that encodes and decodes images; nothing if the code of a finished model fails."""
    code = f"""import torch
from diffusers import {load.pipeline}

autoencoder = {load.call}
shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
images = torch.zeros(1, {", ".join(map(str, record["image_shape"]))})  # yours, in [-1, 1]
latents = (autoencoder.encode(images).latent_dist.sample() - shift) * scale  # with mean 0 and deviation 1
images = autoencoder.decode(latents / scale + shift).sample"""
    works = not final or _works(folder, code.replace(repr(name), repr(str(folder.resolve()))))
    return f"```python\n{code}\n```\n\n" if works else ""


def _snippet_with_condition(folder: Path, name: str, steps: int, final: bool, record: dict) -> str:
    """Return code that draws from a picture; nothing if the code of a finished model fails."""
    (channels, height, width), kind = record["image_shape"], record["condition"]
    fetched = (folder / "condition.png").is_file()
    source = f'hf_hub_download({name!r}, "condition.png")' if is_hub_id(name) else repr(f"{name}/condition.png")
    first = f"Image.open({source})  # or a picture of yours" if fetched else 'Image.open("your_picture.png")'
    grey, steps_text = channels == 1, f"num_inference_steps={steps}"
    resize = f".resize(({width}, {height}), Image.Resampling.BICUBIC)"
    if kind == "inpaint":
        prepare = [
            f'picture = picture.convert("{"LA" if grey else "RGBA"}"){resize}  # transparent where to draw',
            "pixels = np.asarray(picture) / 255",
            "hole = pixels[..., -1:] < 0.5",
            "pixels = np.concatenate([np.where(hole, 0, pixels[..., :-1] * 2 - 1), hole], axis=2)",
        ]
    else:
        known = net_config(folder).get("_condition", {})
        mode = "L" if kind in ("gray", "outline") or grey or known.get("picture_channels") == 1 else "RGB"
        back = '.convert("RGB")' if mode == "L" and not grey else ""
        prepare = [f'picture = picture.convert("{mode}"){back}{resize}', "pixels = np.asarray(picture) / 127.5 - 1"]
    reshape = "[None, None]" if grey and kind != "inpaint" else ".permute(2, 0, 1)[None]"
    body = [
        f"pipeline = LDMSuperResolutionPipeline.from_pretrained({name!r})",
        f"picture = {first}",
        *prepare,
        f"condition = torch.tensor(pixels, dtype=torch.float32){reshape}",
        f"pipeline(condition, {steps_text}).images[0].save('sample.png')",
    ]
    hub = ["from huggingface_hub import hf_hub_download"] if fetched and is_hub_id(name) else []
    head = ["import numpy as np", "import torch", "from diffusers import LDMSuperResolutionPipeline", *hub]
    code = "\n".join([*head, "from PIL import Image", "", *body])
    if final and fetched:
        here = str(folder.resolve())
        tried = code.replace(source, repr(str(folder / "condition.png"))).replace(repr(name), repr(here))
        tried = tried.replace(steps_text, "num_inference_steps=1").replace(".save('sample.png')", "")
        if not _works(folder, tried):
            return ""
    return f"```python\n{code}\n```\n\n"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, and warnings about the classes of a pipeline's parts. Leave the random state as it is."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _works(folder: Path, code: str) -> bool:
    """Run code of a card, and return whether it works. If it fails, log a warning."""
    try:
        with _quiet(), torch.no_grad():  # gradients of an autoencoder could fill the memory
            exec(code, {})
    except Exception as error:  # the model is saved: a card without the snippet is better than none
        logger.warning(f"{folder}: the code of its card fails: {type(error).__name__}: {error}")
        return False
    return True


def _try(folder: Path, load: Loading, guided: bool, classes: list[str]) -> None:
    """Load the pipeline as the snippet does, and draw with one step. Errors of the libraries are passed on."""
    place, options = str(folder.resolve()), {"num_inference_steps": 1}
    trusted = {"trust_remote_code": True} if load.runs_code else {}
    with _quiet():
        if not load.own_pipeline:
            pipeline = getattr(diffusers, load.pipeline).from_pretrained(place, **trusted)
            first = {"batch_size": 1, **({"class_labels": [0]} if classes and not load.clusters else {})}
            pipeline(**({"class_labels": [0], "guidance_scale": 1.5} if load.guides_classes else first), **options)
        if load.own_pipeline or guided:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)
            pipeline([classes[0]], **({"guidance_scale": 1.5} if guided else {}), **options)


def _command(arguments: dict, defaults: dict, script: str, state) -> str:
    """Return the command that reproduces a run.

    It has every flag that differs from its default, whether it was given on the command line or in a file.
    """
    command = ["accelerate", "launch", "--config_file", "accelerate_config.yaml"]
    machines = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if state.num_processes > 1:
        command += ["--multi_gpu", "--num_processes", str(state.num_processes)]
        command += ["--num_machines", str(machines)] * (machines > 1)
    command += ["--mixed_precision", state.mixed_precision, script]
    for flag, value in arguments.items():
        if value in (None, defaults.get(flag)) or flag.startswith(("hub_", "push_", "mixed_precision")):
            continue
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}={value}"] if str(value).startswith("-") else [f"--{flag}", str(value)]
    text = shlex.join(command).replace("\n", " ")
    return f"ACCELERATE_USE_CPU=true {text}" if state.num_processes > 1 and state.device.type == "cpu" else text


@functools.cache
def _commit() -> str:
    """Return the commit of the scripts, or nothing without git."""

    def git(*words):
        folder = Path(__file__).parents[2]
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%H", "--", ".")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):  # git is not installed, or hangs
        return ""
    return f"Scripts: commit {commit[:12]}{', with changes' * bool(changed)}. " if commit else ""


def _escape(value) -> str:
    """Return one line of Markdown text without markup, for names that a user has chosen."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
