"""The README.md of a trained model, written by the run that trained it."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

TRAINING_FLAGS = (
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "snr_gamma",
    "dropout",
    "use_ema",
    "random_flip",
    "seed",
)
PEOPLE = """
## People

The training images may show real people. Whoever trains or publishes such a model needs their consent, or a licence
that covers it. A model adapted to few images repeats them: before showing samples, compare them with the training
images (`nearest.png`, written by the run, shows the nearest by their pixels: that finds copies, not likenesses).
Intended for studying and illustrating generative models. Not for depicting an identifiable person without consent, for
deceiving anyone, or for recognising or judging people; what it draws says nothing about anybody.
"""


def how_to_load(folder: Path, name: str | Path) -> str:
    """The expression that loads the pipeline saved in ``folder`` as ``name``: a path, or an id on the Hub."""
    pipeline_class = json.loads((folder / "model_index.json").read_text())["_class_name"]
    if isinstance(pipeline_class, list):  # its code is in the folder
        return f"DiffusionPipeline.from_pretrained({str(name)!r}, trust_remote_code=True)"
    return f"{pipeline_class}.from_pretrained({str(name)!r})"


def write_card(folder: Path, title: str, args, grid: str, of_people: bool = False, **facts) -> None:
    """Write ``README.md`` with valid metadata, the samples, a snippet that loads the model, and how it was trained.

    Args:
        folder: a saved pipeline.
        title: what kind of model it is, one line.
        args: the run's flags.
        grid: path of the sample grid, relative to ``folder``.
        of_people: whether the images show people; adds a section.
        facts: what the run found out; ``data`` is the Hub id, path or short name of the training images, ``base`` the
            id or path of the pipeline that it started from.
    """
    index = json.loads((folder / "model_index.json").read_text())
    on_hub = {key: name for key, name in facts.items() if key in ("data", "base") and _is_hub_id(name)}
    tags = ["diffusers", "unconditional-image-generation"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=tags + (["ddpm"] if index["_class_name"] == "DDPMPipeline" else []),
        datasets=[on_hub["data"]] if "data" in on_hub else None,
        base_model=on_hub.get("base"),
    )
    for key in {"data", "base"} & (set(facts) - set(on_hub)):
        facts[key] = Path(facts[key]).name  # no path of one machine
    facts |= {key: vars(args)[key] for key in TRAINING_FLAGS if key in vars(args)}
    table = "\n".join(f"| {_escape(key)} | {_escape(value)} |" for key, value in facts.items())
    load = how_to_load(folder, folder.resolve().name)
    folders = [folder, *(folder / part for part in ("scheduler", "unet"))]
    code = [f"`{path.relative_to(folder)}`" for place in folders for path in place.glob("*.py")]
    trust = f"`trust_remote_code=True` runs the code that comes with the model: {', '.join(code)}. Read it first.\n\n"
    text = f"""---
{data.to_yaml()}
---

# {_escape(title)}

Draws images like those in {_escape(facts["data"])}, with a {index["unet"][1]}.

![samples]({grid})

```python
from diffusers import {load.split(".")[0]}

pipeline = {load}
images = pipeline(batch_size=16, num_inference_steps={args.num_inference_steps}).images
images[0].save("sample.png")
```

{trust if code else ""}The saved scheduler is `{index["scheduler"][1]}`; the weights drew the samples above
({args.num_samples} images, {vars(args).get("sampler", index["scheduler"][1])}, {args.num_inference_steps} steps, \
seed {args.seed}, not selected).

## Training

| | |
|---|---|
{table}

## Limits

It draws what its training images show, with their gaps and biases. Small data sets are memorised: compare samples with
the training images.
{PEOPLE if of_people else ""}"""
    ModelCard(text).save(folder / "README.md")


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _escape(value) -> str:
    """One line of Markdown text without markup, whatever the user named things."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
