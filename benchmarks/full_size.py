"""Measure the time and peak memory of finetune_faces.py at full size, in two optimizer steps with each method.

    python benchmarks/full_size.py

The model has the config of google/ddpm-celebahq-256 (113.7 M weights, 256x256) and random weights, so that nothing is
downloaded. The runs use batch 1, bf16 and gradient checkpointing. Peak memory is that of the GPU if there is one,
otherwise that of the process.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_batch_size", type=int, default=1, help="images per step")
    parser.add_argument("--methods", nargs="+", default=["full", "attention", "norm", "lora"])
    options = parser.parse_args()
    print(
        "| Method | Trainable weights | Optimizer, MiB | Peak memory, GiB | Seconds per step |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(UNet2DModel(**CONFIG), DDPMScheduler()).save_pretrained(f"{folder}/base")
        for method in options.methods:
            command = [sys.executable, ROOT / "finetune_faces.py", *FLAGS, f"--method={method}"]
            command += [f"--train_batch_size={options.train_batch_size}", f"--output_dir={folder}/{method}"]
            command += [f"--pretrained_model_name_or_path={folder}/base"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(result.stdout + result.stderr)
            found = re.search(r"-> .*: ([\d,]+) trainable weights.* keeps ([\d.]+) MiB", result.stderr)
            events = EventAccumulator(str(Path(folder, method, "logs", method))).Reload()
            peak = events.Scalars("system/peak_memory_gib")[-1].value
            seconds = options.train_batch_size / events.Scalars("system/images_per_second")[-1].value
            print(f"| {method} | {found[1]} | {found[2]} | {peak:.1f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
