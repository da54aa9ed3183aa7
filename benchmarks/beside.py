"""Compare the images/s of another training script and of train_ddpm.py, by running both commands alternately.

    python benchmarks/beside.py train_unconditional.py

The script is an unchanged copy of diffusers' examples/unconditional_image_generation/train_unconditional.py, or another
script with its flags. diffusers' script needs torchvision. Both scripts train the same net on the same folder of colour
images, with the same batch size. The time is the difference between a long and a short run, so the time before the
first step and after the last step cancels out. Both scripts get all cores, because `accelerate launch` gives a CPU
process only one thread by default.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from diffusers import UNet2DModel
from PIL import Image
from speedrun import ROOT, accelerate

sys.path.insert(0, str(ROOT))


from utils.diffusion.unets import UNETS

BATCHES = 10  # per epoch
THEIRS = (  # train_unconditional.py always draws and saves after the first and the last epoch
    "--ddpm_num_inference_steps=1", "--eval_batch_size=1", "--save_images_epochs=1000000", "--use_ema",
    "--save_model_epochs=1000000", "--checkpointing_steps=1000000", "--num_epochs={epochs}",
)  # fmt: skip
OURS = (
    "--num_inference_steps=1", "--num_samples=1", "--sample_steps=1000000", "--checkpointing_steps=1000000",
    "--image_mode=RGB", "--num_train_epochs={epochs}",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="script with the flags of train_unconditional.py")
    parser.add_argument("--unet", choices=UNETS, default="small")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="number of measurements per median")
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16"), default=("no", "bf16"))
    parser.add_argument("--epochs", type=int, default=8, help=f"number of timed epochs, each of {BATCHES} steps")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    sides = ((options.script.absolute(), THEIRS), (ROOT / "train_ddpm.py", OURS))
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder), options)
        for precision in options.precisions:
            rates = []
            for _ in range(options.rounds):
                rates.append([])
                for script, never in sides:
                    flags = [*inputs, f"--mixed_precision={precision}", *never]
                    short, long = (seconds(script, flags, epochs) for epochs in (2, 2 + options.epochs))
                    rates[-1].append(options.epochs * BATCHES * options.train_batch_size / (long - short))
            theirs, ours = np.median(rates, axis=0)
            ratios = sorted(ours / theirs for theirs, ours in rates)
            ratio = f"x {statistics.median(ratios):.2f}, single rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"{precision:5}{options.script.name} {theirs:.0f}, train_ddpm.py {ours:.0f} images/s: {ratio}")
    print(f"--unet {options.unet}, {options.resolution} pixels, batch {options.train_batch_size}, N={options.rounds}")


def write_inputs(folder: Path, options) -> list[str]:
    """Write colour images and the config of a UNet, and return the flags with which both scripts use them."""
    (folder / "images").mkdir()
    side = options.resolution
    for number in range(BATCHES * options.train_batch_size):
        pixels = np.random.default_rng(number).integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    UNet2DModel(side, in_channels=3, out_channels=3, **UNETS[options.unet]).save_config(folder / "net")
    return [
        f"--train_data_dir={folder / 'images'}", f"--model_config_name_or_path={folder / 'net'}",
        f"--resolution={side}", f"--train_batch_size={options.train_batch_size}",
    ]  # fmt: skip


def seconds(script: Path, flags: list[str], epochs: int) -> float:
    """Return the number of seconds that the whole command takes."""
    with tempfile.TemporaryDirectory() as output_dir:
        start = time.perf_counter()
        accelerate(script, f"--output_dir={output_dir}", *(flag.format(epochs=epochs) for flag in flags))
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
