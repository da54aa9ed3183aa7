"""The README.md of a trained model, written by the run that trained it."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

SNIPPET = """from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained({model!r}, use_safetensors=True)
images = pipeline(batch_size=16, num_inference_steps={steps}).images
images[0].save("sample.png")"""


def write_card(folder: Path, title: str, args, grid: str, **facts) -> None:
    """Write ``README.md`` with valid metadata, the samples, a snippet that loads the model, and how it was trained.

    Args:
        folder: a saved pipeline.
        title: heading, one line.
        args: the run's flags.
        grid: path of the sample grid, relative to ``folder``.
        facts: what the run found out; ``data`` is the Hub id, path or short name of the training images.
    """
    name = facts["data"]
    is_hub_id = name.count("/") == 1 and not Path(name).exists()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "ddpm", "unconditional-image-generation"],
        datasets=[name] if is_hub_id else None,
    )
    facts["data"] = name if is_hub_id else Path(name).name  # no path of one machine
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    listed = ("learning_rate", "lr_scheduler", "lr_warmup_steps", "snr_gamma", "use_ema", "random_flip", "seed")
    facts |= {key: getattr(args, key) for key in listed}
    table = "\n".join(f"| {_escape(key)} | {_escape(value)} |" for key, value in facts.items())
    text = f"""---
{data.to_yaml()}
---

# {_escape(title)}

An unconditional diffusion model (UNet2DModel) of the images in {_escape(facts["data"])}.

![samples]({grid})

```python
{SNIPPET.format(model=folder.resolve().name, steps=args.num_inference_steps)}
```

The saved scheduler is `{config["_class_name"]}`; the weights are those that drew the samples above
({args.num_samples} images, {args.sampler}, {args.num_inference_steps} steps, seed {args.seed}, not selected).

## Training

| | |
|---|---|
{table}

## Limits

It draws what its training images show, with their gaps and biases. No metric was computed, and the samples were not
compared with the training images: small data sets are memorised.
"""
    ModelCard(text).save(folder / "README.md")


def _escape(value) -> str:
    """One line of Markdown text without markup, whatever the user named things."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
