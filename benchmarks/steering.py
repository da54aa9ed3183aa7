"""Measure colour guidance: the mean distance of pixels to a colour, with and without guidance, from the same seeds.

    python benchmarks/steering.py MODEL --color teal

MODEL is any pipeline of colour images.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import ImageColor

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.diffusion.guidance import Guidance, color_loss
from utils.diffusion.pipelines import load_pipeline
from utils.diffusion.sampling import sample_images
from utils.diffusion.schedulers import make_sampler
from utils.pictures import make_grid


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--color", default="teal")
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument(
        "--picture", metavar="FILE", help="picture to write, with eight samples for each guidance, from the same seeds"
    )
    options = parser.parse_args()
    unet, scheduler, space = load_pipeline(options.model)
    accelerator, sampler = Accelerator(mixed_precision="bf16"), make_sampler("ddim", scheduler)
    unet = accelerator.prepare_model(unet, evaluation_mode=True)
    target = np.array(ImageColor.getrgb(options.color)[:3]).reshape(1, 3, 1, 1)
    print(f"| Guidance towards {options.color} | Mean distance, of 255 | Share | Seconds |\n|---|---|---|---|")
    settings = [(mode, scale) for mode in ("direct", "net") for scale in options.scales]
    guides = {f"{mode}, {scale:g}": Guidance(color_loss(options.color), scale, mode, space) for mode, scale in settings}
    first, rows = None, []
    for name, guidance in {"none": None, **guides}.items():
        start = time.perf_counter()
        images = sample_images(
            unet, sampler, accelerator, options.num_samples, space.shape, 40, options.num_samples, 0,
            guidance=guidance, decode=space.to(accelerator.device).decode,
        )  # fmt: skip
        distance = np.abs(images.astype(float) - target).mean()
        first = first or distance
        print(f"| {name} | {distance:.1f} | {distance / first:.2f} | {time.perf_counter() - start:.0f} |", flush=True)
        rows.append(images[:8])
    if options.picture:
        make_grid(np.concatenate(rows), captions=["none", *guides]).save(options.picture)


if __name__ == "__main__":
    main()
