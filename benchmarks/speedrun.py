"""Train for a given number of seconds with several seeds, and evaluate the samples.

    python benchmarks/speedrun.py --dataset_name mnist --seconds 150 300

A few steps measure the speed of the machine, which gives the number of steps that fit into the time. Therefore the
learning rate reaches zero when the time is over. Seconds count from the start of the command to the last step, without
sampling. Flags after -- go to the training script. To measure a change of settings, compare two such runs on an idle
machine. After an interruption, the same command resumes. The whole benchmark takes half an hour on 2 cores, of which
training takes 23 minutes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
PACE = 60  # steps that measure the speed
THRESHOLDS = (10, 5, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default="train_ddpm.py")
    parser.add_argument("--dataset_name", default="mnist", help="training images, also the reference of evaluate.py")
    parser.add_argument("--seconds", type=float, nargs="+", default=[150, 300])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=2000, help="number of samples of each model")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--evaluate", nargs="*", default=[], help="flags for evaluate.py, each as NAME=VALUE")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/speedrun"))
    parser.add_argument("flags", nargs="*", help="flags for the training script, after --")
    options = parser.parse_args()
    folders, steps = {}, {}
    for seconds in options.seconds:
        for seed in options.seeds:
            folders[seconds, seed] = options.output_dir / f"{seconds:g}s-seed-{seed}"
            steps.setdefault(seconds, []).append(train(options, folders[seconds, seed], seconds, seed))
    run(
        "evaluate.py", *folders.values(), f"--reference={options.dataset_name}",
        f"--num_samples={options.num_samples}", f"--num_inference_steps={options.num_inference_steps}",
        "--mixed_precision=bf16", f"--output_dir={options.output_dir / 'evaluation'}",
        *(f"--{flag}" for flag in options.evaluate),
    )  # fmt: skip
    report(options, folders, steps)


def train(options, folder: Path, seconds: float, seed: int) -> int:
    """Train for the given time unless such a run exists, and return the number of optimizer steps."""
    recipe = [options.script, options.dataset_name, *options.flags]
    if (folder / "seconds.json").is_file():
        record = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        if record["recipe"] != recipe:
            sys.exit(
                f"{folder} has a run with other settings: {' '.join(record['recipe'])}. Choose another --output_dir"
            )
    else:
        startup, pace = measured_pace(options.script, options.dataset_name, options.output_dir / "pace", *options.flags)
        steps = max(1, round((seconds - startup) / pace))
        shutil.rmtree(folder, ignore_errors=True)  # it may hold an interrupted run
        start = time.time()
        launch(
            options.script, options.dataset_name, folder, *options.flags, f"--seed={seed}", f"--max_train_steps={steps}"
        )
        end = (folder / f"checkpoint-{steps}" / "manifest.json").stat().st_mtime
        record = dict(recipe=recipe, steps=steps, seconds=end - start)
        (folder / "seconds.json").write_text(json.dumps(record), encoding="utf-8")
    print(f"{folder.name}: {record['steps']} steps in {record['seconds']:.0f} seconds", flush=True)
    return record["steps"]


@cache
def measured_pace(script: str, dataset_name: str, folder: Path, *flags: str) -> tuple[float, float]:
    """Return the seconds before the first step and the seconds per step, from two short runs."""
    times = []
    for steps in (1, 1, 1 + PACE):  # the first run prepares the images
        shutil.rmtree(folder, ignore_errors=True)
        start = time.time()
        launch(script, dataset_name, folder, *flags, f"--max_train_steps={steps}")
        times.append((folder / f"checkpoint-{steps}" / "manifest.json").stat().st_mtime - start)
    pace = (times[2] - times[1]) / PACE
    return times[1] - pace, pace


def launch(script: str, dataset_name: str, folder: Path, *flags: str) -> None:
    never = ["--sample_steps=1000000", "--checkpointing_steps=1000000", "--num_samples=1", "--num_inference_steps=1"]
    accelerate(ROOT / script, f"--dataset_name={dataset_name}", f"--output_dir={folder}", *never, *flags)


def accelerate(script: Path, *flags) -> None:
    """Run a training script as in the README."""
    config = ROOT / "accelerate_config.yaml"
    run("-m", "accelerate.commands.launch", "--quiet", "--config_file", config, script, *flags)


def run(script, *arguments) -> None:
    """Run a Python script of the repository, or Python with flags. Show the output if that fails."""
    program = [ROOT / script] if str(script).endswith(".py") else [script]
    done = subprocess.run(
        [sys.executable, *map(str, program), *map(str, arguments)], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")


def report(options, folders: dict, steps: dict) -> None:
    text = (options.output_dir / "evaluation" / "results.json").read_text(encoding="utf-8")
    rows = json.loads(text)["results"]
    metric = next(key for key in rows[0] if key.startswith(("fd_", "fid_")))
    values = {row["model"].split()[0]: row[metric] for row in rows}  # the name of the folder
    print(f"\n{options.script} {' '.join(options.flags)}")
    print(f"| seconds | steps | {metric} | {metric} of each seed |\n|---|---|---|---|")
    means = {}
    for seconds in options.seconds:
        found = np.array([values[folders[seconds, seed].name] for seed in options.seeds])
        error = found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else float("nan")
        means[seconds] = found.mean()
        each = ", ".join(f"{value:.2f}" for value in found)
        print(f"| {seconds:g} | {np.mean(steps[seconds]):.0f} | {found.mean():.2f} ± {error:.2f} | {each} |")
    for threshold in THRESHOLDS:
        enough = [seconds for seconds in options.seconds if means[seconds] <= threshold]
        print(f"{metric} <= {threshold}: {f'{min(enough):g} seconds' if enough else 'not reached'}")
    print(f"N={options.num_samples}, held-out images: {rows[0][metric]:.2f}. ± is the standard error over the seeds")


if __name__ == "__main__":
    main()
