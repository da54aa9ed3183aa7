"""Measure memory, open files and checkpoints during a long run: 2,000 steps with samples and checkpoints.

    python benchmarks/long_run.py

This trains the tiny UNet on the embedded digits, and prints a row every 200 steps. "memory" is the resident memory of
the process after Python's garbage collection. It should stop growing from row to row.
"""

import argparse
import contextlib
import gc
import io
import sys
import tempfile
from pathlib import Path
from unittest import mock

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))  # otherwise this script does not find the repository
import train_ddpm

ROWS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="number of optimizer steps")
    options = parser.parse_args()
    from utils.training.loop import Run

    process, original, table = psutil.Process(), Run.end_of_step, sys.stdout
    print("  step  memory MiB  open files  threads  checkpoints")

    def end_of_step(self, *arguments):
        stepped = original(self, *arguments)
        if stepped and self.global_step % (options.steps // ROWS) == 0:
            gc.collect()
            memory, kept = process.memory_info().rss / 2**20, len(list(folder.glob("checkpoint-*")))
            row = f"{self.global_step:6}{memory:12.0f}{process.num_fds():12}{process.num_threads():9}{kept:13}"
            print(row, file=table, flush=True)
        return stepped

    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(Run, "end_of_step", end_of_step):
        folder = Path(temporary) / "run"
        flags = ["--dataset_name=digits", "--unet=tiny", "--train_batch_size=16", f"--max_train_steps={options.steps}"]
        flags += ["--checkpointing_steps=50", "--sample_steps=50", "--num_samples=16", "--num_inference_steps=5"]
        flags += ["--validation_steps=50", "--dataset_split=train[:1700]", "--validation_split=train[1700:]"]
        with contextlib.redirect_stderr(None), contextlib.redirect_stdout(io.StringIO()):
            train_ddpm.main(train_ddpm.parse_args([*flags, f"--output_dir={folder}"]))


if __name__ == "__main__":
    main()
