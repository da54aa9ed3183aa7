"""Train the scripts of all stages on MNIST, and compare their samples in one table.

    python benchmarks/ladder.py --dataset_name mnist

First every stage is trained with the same number of images, except that the class-conditional stage gets 75 % of them.
Then the first two stages are trained again, for the time that stage 3 took. That time is computed from the median of
the images/s. After an interruption, the same command resumes. The whole benchmark takes about 70 minutes on 2 cores, of
which the comparison takes a quarter.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
EPSILON = ("--prediction_type=epsilon", "--beta_schedule=linear")  # the settings of the paper
STAGES = {
    "basic": ("train_basic.py",),
    "unet2d": ("train_unet2d.py",),
    "ddpm": ("train_ddpm.py",),  # v-prediction, cosine schedule
    "ddpm-epsilon": ("train_ddpm.py", *EPSILON),
    "flow": ("train_flow.py",),
    "conditional": ("train_conditional.py",),
}
# Share of the steps. A step takes longer, because guidance needs a second function evaluation without gradients
SHARES = {"conditional": 0.75}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="mnist", help="training images, as in the training scripts")
    parser.add_argument("--steps", type=int, default=1200, help="number of optimizer steps of 64 images")
    parser.add_argument("--num_samples", type=int, default=2000, help="number of samples of each model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/stages"))
    options = parser.parse_args()
    folders = [train(options, name, round(options.steps * SHARES.get(name, 1))) for name in STAGES]
    speeds = [median_speed(folder) for folder in folders]
    for name, speed in zip(("basic", "unet2d"), speeds, strict=False):  # stage 3 has trained for that time
        folders.append(train(options, name, round(options.steps * speed / speeds[2]), "-same-time"))
        speeds.append(median_speed(folders[-1]))
    run(
        "evaluate.py", *folders, f"--reference={options.dataset_name}", f"--num_samples={options.num_samples}",
        "--mixed_precision=bf16", f"--output_dir={options.output_dir / 'evaluation'}",
    )  # fmt: skip
    print(f"\n{'':24}{'steps':>6}{'images/s':>10}{'minutes':>9}   median speed of training, without sampling")
    for folder, speed in zip(folders, speeds, strict=True):
        steps = json.loads((folder / "training_args.json").read_text(encoding="utf-8"))["finished_at_step"]
        print(f"{folder.name:24}{steps:6}{speed:10.0f}{steps * 64 / speed / 60:9.1f}")


def train(options, name: str, steps: int, suffix: str = "") -> Path:
    folder = options.output_dir / (name + suffix)
    run(
        *STAGES[name], f"--dataset_name={options.dataset_name}", f"--max_train_steps={steps}",
        "--mixed_precision=bf16", f"--output_dir={folder}",
    )  # fmt: skip
    return folder


def run(script: str, *flags) -> None:
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True)


def median_speed(folder: Path) -> float:
    """Return the median of the images per second in the curves."""
    events = [str(path) for path in folder.rglob("events.out.*")]
    speeds = []
    for event in events:
        accumulator = EventAccumulator(event).Reload()
        if "system/images_per_second" in accumulator.Tags()["scalars"]:
            speeds += [point.value for point in accumulator.Scalars("system/images_per_second")]
    return float(np.median(speeds))


if __name__ == "__main__":
    main()
