"""Compare training on latents with training on pixels for the same total time, with several seeds.

    python benchmarks/latents.py --dataset_name portraits --resolution 64 --output_dir outputs/latents-64

For each seed it trains an autoencoder (train_autoencoder.py), a model of its latents (train_latent.py), and a model of
pixels (train_flow.py) for the time of both. All samples are compared with images that no model was trained on. As in
speedrun.py, a few steps measure the speed of the machine. After an interruption, the same command keeps the finished
runs, and repeats the interrupted one.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKL
from speedrun import accelerate, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
PACE = 40  # steps that measure the speed
BATCHES = {"train_autoencoder.py": 8, "train_latent.py": 64, "train_flow.py": 16}  # 64 gives too few steps on pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="images")
    parser.add_argument("--dataset_split", default="train[:700]")
    parser.add_argument("--held_out_split", default="train[700:]", help="images to compare samples with")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--downsampling", type=int, default=4)
    parser.add_argument("--latent_channels", type=int, default=4)
    parser.add_argument("--autoencoder_seconds", type=float, default=90)
    parser.add_argument("--seconds", type=float, default=100, help="time of the latent model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=200, help="number of samples of each model")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/latents"))
    parser.add_argument("--picture", type=Path, help="picture of held-out images, reconstructions and samples")
    options = parser.parse_args()
    paces, models, records = {}, {}, {}
    for seed in options.seeds:
        autoencoder = options.output_dir / f"autoencoder-{seed}"
        shape = [f"--downsampling={options.downsampling}", f"--latent_channels={options.latent_channels}"]
        validation = [f"--validation_split={options.held_out_split}", "--validation_steps=1000000"]
        for name, script, seconds, flags in [
            ("autoencoder", "train_autoencoder.py", options.autoencoder_seconds, shape + validation),
            ("latents", "train_latent.py", options.seconds, [f"--vae={autoencoder}"]),
            ("pixels", "train_flow.py", options.autoencoder_seconds + options.seconds, []),
        ]:
            folder = options.output_dir / f"{name}-{seed}"
            records[name, seed] = train(options, script, folder, seconds, seed, flags, paces)
            if script != "train_autoencoder.py":
                models[name, seed] = folder
    run(
        "evaluate.py", *models.values(), f"--reference={options.dataset_name}", "--features=efficientnet",
        f"--reference_split={options.held_out_split}", f"--held_out_split={options.dataset_split}",
        f"--num_samples={options.num_samples}", f"--num_inference_steps={options.num_inference_steps}",
        "--mixed_precision=bf16", f"--output_dir={options.output_dir / 'evaluation'}",
    )  # fmt: skip
    report(options, models, records)
    if options.picture:
        draw(options, models)


def train(options, script: str, folder: Path, seconds: float, seed: int, flags: list[str], paces: dict) -> dict:
    """Train for the given time unless such a run exists, and return its record."""
    flags = [
        f"--dataset_name={options.dataset_name}", f"--dataset_split={options.dataset_split}",
        f"--resolution={options.resolution}", f"--seed={seed}", f"--train_batch_size={BATCHES[script]}",
        "--sample_steps=1000000", "--checkpointing_steps=1000000", "--num_samples=8", *flags,
    ]  # fmt: skip
    if not (folder / "seconds.json").is_file():
        if script not in paces:
            times = []
            for steps in (1, 1, 1 + PACE):  # the first run prepares the images
                times.append(timed(script, options.output_dir / "pace", flags, steps))
            pace = (times[2] - times[1]) / PACE
            paces[script] = times[1] - pace, pace
        startup, pace = paces[script]
        steps = max(1, round((seconds - startup) / pace))
        found = timed(script, folder, flags, steps)
        record = dict(steps=steps, seconds=found, images_per_second=BATCHES[script] / pace)
        (folder / "seconds.json").write_text(json.dumps(record), encoding="utf-8")
    record = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    print(f"{folder.name}: {record['steps']} steps in {record['seconds']:.0f} seconds", flush=True)
    return record


def timed(script: str, folder: Path, flags: list[str], steps: int) -> float:
    """Train, and return the seconds until the last checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)  # it may hold an interrupted run
    start = time.time()
    accelerate(script, f"--output_dir={folder}", f"--max_train_steps={steps}", *flags)
    return (folder / f"checkpoint-{steps}" / "manifest.json").stat().st_mtime - start


def report(options, models: dict, records: dict) -> None:
    rows = json.loads((options.output_dir / "evaluation" / "results.json").read_text(encoding="utf-8"))["results"]
    by_name = {row["model"].split()[0]: row for row in rows}
    metrics = [name for name in rows[0] if name.startswith(("fd_", "kid_")) and "error" not in name]
    print(f"| model | seconds | steps | training, images/s | drawing, images/s | {' | '.join(metrics)} |")
    print("|---|---|---|---|---|" + "---|" * len(metrics))
    for name in dict.fromkeys(name for name, _ in models):
        runs = [records[name, seed] for seed in options.seeds]
        found = [by_name[models[name, seed].name] for seed in options.seeds]
        keys = ("seconds", "steps", "images_per_second")
        cells = [f"{np.mean([record[key] for record in runs]):.0f}" for key in keys]
        cells.append(f"{np.median([row['images_per_second'] for row in found]):.1f}")
        cells += [spread([row[metric] for row in found]) for metric in metrics]
        print(f"| {name} | {' | '.join(cells)} |")
    floor = " | ".join(f"{rows[0][metric]:.3g}" for metric in metrics)
    print(f"| training images | | | | | {floor} |")
    quality = {"psnr": [], "ssim": []}
    for seed in options.seeds:
        folder = options.output_dir / f"autoencoder-{seed}"
        events = EventAccumulator(str(next(folder.glob("logs/*")))).Reload()
        for name, values in quality.items():
            values.append(events.Scalars(f"metrics/{name}_held_out")[-1].value)
    size = sum(weight.numel() for weight in AutoencoderKL.from_pretrained(folder).parameters())
    runs = [records["autoencoder", seed] for seed in options.seeds]
    speed = np.median([record["images_per_second"] for record in runs])
    seconds, steps = (np.mean([record[key] for record in runs]) for key in ("seconds", "steps"))
    print(
        f"autoencoder: {size / 1e6:.2f} M weights, {steps:.0f} steps in {seconds:.0f} s, {speed:.0f} images/s, "
        f"held-out PSNR {spread(quality['psnr'])} dB, SSIM {spread(quality['ssim'])}"
    )


def draw(options, models: dict) -> None:
    """Draw some held-out images, their reconstructions, and samples of two models of the first seed."""
    import torch

    import train_flow
    from utils.data.train_data import load_train_data
    from utils.diffusion.pipelines import load_pipeline
    from utils.diffusion.sampling import sample_images
    from utils.pictures import make_grid, to_uint8
    from utils.training.process import start_process

    accelerator, seed = start_process("bf16"), options.seeds[0]
    flags = [f"--dataset_name={options.dataset_name}", f"--dataset_split={options.held_out_split}"]
    args = train_flow.parse_args([*flags, f"--resolution={options.resolution}"])
    images = load_train_data(args, accelerator).examples(8)["images"]
    model = AutoencoderKL.from_pretrained(options.output_dir / f"autoencoder-{seed}")
    with torch.no_grad():
        reconstructions = model(images).sample
    rows = {"held-out images": to_uint8(images), "reconstructions": to_uint8(reconstructions)}
    for name in ("latents", "pixels"):
        unet, sampler, space = load_pipeline(str(models[name, seed]))
        unet, space = accelerator.prepare_model(unet, evaluation_mode=True), space.to(accelerator.device)
        rows[name] = sample_images(
            unet, sampler, accelerator, 8, space.shape, options.num_inference_steps, 8, 0, decode=space.decode
        )
    make_grid(np.concatenate(list(rows.values())), captions=list(rows)).save(options.picture)


def spread(values: list[float]) -> str:
    """Return the mean with its standard error."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{np.mean(values):.3g} ± {error:.2g}"


if __name__ == "__main__":
    main()
