"""Measure time and peak memory of two optimizer steps at full size, of finetune_faces.py or train_latent.py.

    python benchmarks/full_size.py
    python benchmarks/full_size.py --latents

The model has the config of google/ddpm-celebahq-256 (113.7 M weights, 256x256) and random weights, so that nothing is
downloaded. The runs use batch 1, bf16 and gradient checkpointing. With --latents, train_latent.py trains --unet base on
the latents (4 x 32 x 32) of an autoencoder with the config of Stable Diffusion 1 (83.7 M weights), with and without a
cache. Peak memory is that of the GPU if there is one, otherwise that of the process.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils.diffusion.unets import UNETS  # noqa: E402

CONFIG = dict(
    UNETS["large"], sample_size=256, in_channels=3, out_channels=3,
    attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
)  # fmt: skip
FLAGS = [
    "--dataset_name=faces", "--resolution=256", "--image_mode=RGB", "--mixed_precision=bf16",
    "--gradient_checkpointing", "--max_train_steps=2", "--logging_steps=1", "--num_samples=1",
    "--num_inference_steps=1", "--lr_warmup_steps=0", "--sample_steps=1000",
]  # fmt: skip


AUTOENCODER = dict(
    in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, scaling_factor=0.18215,
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_batch_size", type=int, default=1, help="images per step")
    parser.add_argument("--methods", nargs="+", default=["full", "attention", "norm", "lora"])
    parser.add_argument("--latents", action="store_true", help="measurement of train_latent.py instead")
    options = parser.parse_args()
    if options.latents:
        measure_latents(options)
        return
    print(
        "| Method | Trainable weights | Optimizer, MiB | Peak memory, GiB | Seconds per step |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(UNet2DModel(**CONFIG), DDPMScheduler()).save_pretrained(f"{folder}/base")
        for method in options.methods:
            command = [sys.executable, ROOT / "finetune_faces.py", *FLAGS, f"--method={method}"]
            command += [f"--train_batch_size={options.train_batch_size}", f"--output_dir={folder}/{method}"]
            command += [f"--pretrained_model_name_or_path={folder}/base"]
            log, peak, seconds = run(command, Path(folder, method), options.train_batch_size)
            trainable = re.search(r": ([\d,]+) trainable weights", log)[1]
            moments = int(trainable.replace(",", "")) * 8 / 2**20  # two of AdamW, of 4 bytes
            print(f"| {method} | {trainable} | {moments:.1f} | {peak:.1f} | {seconds:.1f} |", flush=True)


def measure_latents(options):
    print("| Latents | Peak memory, GiB | Seconds per step |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        AutoencoderKL(**AUTOENCODER).save_pretrained(f"{folder}/vae")
        for name, cache in (("cached", folder), ("encoded at each step", "never")):
            place = Path(folder, name.split()[0])
            command = [sys.executable, ROOT / "train_latent.py", *FLAGS, "--dataset_split=train[:8]", "--unet=base"]
            command += [f"--cache_images={cache}", f"--train_batch_size={options.train_batch_size}"]
            _, peak, seconds = run(
                [*command, f"--vae={folder}/vae", f"--output_dir={place}"], place, options.train_batch_size
            )
            print(f"| {name} | {peak:.1f} | {seconds:.1f} |", flush=True)


def run(command: list, folder: Path, batch_size: int) -> tuple[str, float, float]:
    """Run a script, and return its log, its peak memory in GiB and the seconds of its last step."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    events = EventAccumulator(str(folder / "logs" / folder.name)).Reload()
    peak = events.Scalars("system/peak_memory_gib")[-1].value
    return result.stderr, peak, batch_size / events.Scalars("system/images_per_second")[-1].value


if __name__ == "__main__":
    main()
