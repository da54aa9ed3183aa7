"""Measure the time to save a checkpoint of a model as large as google/ddpm-celebahq-256 (113.7 M weights, AdamW).

    python benchmarks/saving.py

Compare the result with the time between two checkpoints: --checkpointing_steps times the seconds of a step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils.diffusion.unets import UNETS  # noqa: E402
from utils.training import checkpoints  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=5, help="number of checkpoints. The previous one is kept")
    parser.add_argument("--folder", help="folder for the checkpoints (default: a temporary folder)")
    options = parser.parse_args()
    accelerator = Accelerator()
    unet = UNet2DModel(sample_size=256, in_channels=3, out_channels=3, **UNETS["large"])
    model, optimizer = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    spent = {}

    def timed(name, function):
        def call(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent.setdefault(name, []).append(time.perf_counter() - start)

        return call

    accelerator.save_state = timed("write weights, optimizer, random state", accelerator.save_state)
    checkpoints._write_manifest = timed("hash and fsync", checkpoints._write_manifest)
    save_pipeline = timed("write the pipeline", DDPMPipeline(unet, DDPMScheduler()).save_pretrained)
    save = timed("whole save", checkpoints.save_checkpoint)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for step in range(options.times):
            path = save(accelerator, Path(folder), step, save_pipeline, {}, total_limit=2)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    for name, times in spent.items():
        print(f"{name}: {statistics.median(times):.1f} s, {min(times):.1f} to {max(times):.1f} (N={len(times)})")
    print(f"{size / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
