"""What adapting gains over training from scratch: held-out loss after the same steps, for each method.

    python benchmarks/adapting.py --dataset_name DATA --negative

A base is trained by train_ddpm.py on --base_split. finetune_faces.py adapts it to --train_split (with --negative to its
negatives, so that there is something to learn) and measures the denoising loss on frozen triples of --test_split,
treated alike. From scratch is the same on the same UNet with random weights, at train_ddpm.py's learning rate.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
from diffusers import DDPMPipeline, UNet2DModel
from PIL import ImageOps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
RATES = {"scratch": 1e-3, "full": 3e-4, "attention": 1e-3, "norm": 3e-3, "lora": 1e-3}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="images of one column, local or on the Hub")
    parser.add_argument("--base_split", default="train[:700]")
    parser.add_argument("--train_split", default="train[700:850]")
    parser.add_argument("--test_split", default="train[850:]")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--base_steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--negative", action="store_true", help="adapt to the negatives of the images")
    parser.add_argument("--keep", metavar="DIR", help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        new = {}
        for part, split in (("train", options.train_split), ("test", options.test_split)):
            images = datasets.load_dataset(options.dataset_name, split=split)
            if options.negative:
                images = images.map(lambda row: {"image": ImageOps.invert(row["image"].convert("RGB"))})
            new[part] = images
        datasets.DatasetDict(new).save_to_disk(folder / "new")
        common = [f"--resolution={options.resolution}", f"--train_batch_size={options.train_batch_size}"]
        common += ["--mixed_precision=bf16", "--checkpointing_steps=100000", "--sample_steps=100000"]
        base = [f"--dataset_name={options.dataset_name}", f"--dataset_split={options.base_split}"]
        run("train_ddpm.py", folder / "base", *common, *base, f"--max_train_steps={options.base_steps}")
        pipeline = DDPMPipeline.from_pretrained(folder / "base")
        pipeline.unet = UNet2DModel.from_config(pipeline.unet.config)  # random weights
        pipeline.save_pretrained(folder / "random")
        print(f"| {options.steps} steps | Held-out loss, before | after | Loss on the base's images, before | after |")
        print("|---|---|---|---|---|")
        for name, rate in RATES.items():
            start = "random" if name == "scratch" else "base"
            flags = [f"--method={name}"] if name != "scratch" else []
            if name == "attention" and "Attn" not in str(pipeline.unet.config.down_block_types):
                continue
            run(
                "finetune_faces.py", folder / name, *common, *flags, f"--max_train_steps={options.steps}",
                f"--dataset_name={folder / 'new'}", "--validation_split=test", f"--learning_rate={rate}",
                f"--pretrained_model_name_or_path={folder / start}", "--prior_dataset_name",
                f"{options.dataset_name}:{options.base_split}",
                "--lr_warmup_steps=20",
            )  # fmt: skip
            events = EventAccumulator(str(folder / name / "logs" / name)).Reload()
            loss = [event.value for event in events.Scalars("loss/validation_held_out")]
            prior = [event.value for event in events.Scalars("loss/validation_prior")]
            print(f"| {name} | {loss[0]:.4f} | {loss[-1]:.4f} | {prior[0]:.4f} | {prior[-1]:.4f} |", flush=True)


def run(script, output_dir, *flags):
    command = [sys.executable, str(ROOT / script), f"--output_dir={output_dir}", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)


if __name__ == "__main__":
    main()
