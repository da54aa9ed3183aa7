"""Which settings draw readable digits soonest: trains variants of train_ddpm.py on the embedded digits and scores them.

    python benchmarks/recipes.py --steps 1000

Every variant differs from the defaults in the flags that name it. The score is evaluate.py's: fd_digits between 1,797
samples and the 1,797 digits (lower is better), and how sure the classifier of digits is of the samples. "real" is one
half of the digits against the other, which is half as many of each. The distance is good for comparing these rows, and
for nothing else.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from accelerate.state import AcceleratorState, GradientState
from sklearn.datasets import load_digits

with contextlib.suppress(ImportError):  # run as a script: the repository is one level up
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent))
import train_ddpm
from utils.evaluation.class_statistics import digit_statistics
from utils.evaluation.features import load_extractor
from utils.evaluation.metrics import frechet_distance

VARIANTS = {
    "defaults": [],
    "epsilon, linear schedule": ["--prediction_type=epsilon", "--beta_schedule=linear"],
    "epsilon": ["--prediction_type=epsilon"],
    "clean image": ["--prediction_type=sample"],
    "linear schedule": ["--beta_schedule=linear"],
    "uniform timesteps": ["--timestep_sampling=uniform"],
    "min-SNR, gamma 5": ["--snr_gamma=5"],
    "learning rate 3e-4": ["--learning_rate=3e-4"],
    "learning rate 2e-3": ["--learning_rate=2e-3"],
    "constant rate": ["--lr_scheduler=constant_with_warmup"],
    "no EMA": ["--no-use_ema"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each variant")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    options = parser.parse_args()
    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    extract = load_extractor("digits")
    real = extract(images)
    print(f"{'':28}fd_digits  confidence  seconds   ({options.steps} steps, N={options.seeds})")
    halves = np.array_split(np.random.default_rng(0).permutation(len(real)), 2)
    floor = frechet_distance(*(real[half] for half in halves))
    print(f"{'real':28}{floor:9.2f}{digit_statistics(images)['confidence']:12.3f}")
    for name, flags in VARIANTS.items():
        rows = []
        for seed in range(options.seeds):
            start = time.perf_counter()
            samples = train_and_sample([*flags, f"--seed={seed}", f"--max_train_steps={options.steps}"])
            distance = frechet_distance(extract(samples), real)
            rows.append((distance, digit_statistics(samples)["confidence"], time.perf_counter() - start))
        distance, confidence, seconds = np.median(rows, axis=0)
        print(f"{name:28}{distance:9.2f}{confidence:12.3f}{seconds:9.0f}", flush=True)


def train_and_sample(flags: list[str]) -> np.ndarray:
    """Run train_ddpm.py; returns its final samples, as many as there are digits, uint8 (1797, 1, 8, 8)."""
    import utils.diffusion

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    drawn, original = [], utils.diffusion.sample_images

    def keep(*arguments, **options):
        drawn.append(original(*arguments, **options))
        return drawn[-1]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(utils.diffusion, "sample_images", keep):
        common = ["--dataset_name=digits", "--mixed_precision=bf16", "--report_to=none", f"--output_dir={folder}/run"]
        common += ["--num_samples=1797", "--sample_batch_size=250", "--sample_steps=1000000"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert train_ddpm.main(train_ddpm.parse_args([*common, "--checkpointing_steps=1000000", *flags])) == 0
    return drawn[-1]


if __name__ == "__main__":
    main()
