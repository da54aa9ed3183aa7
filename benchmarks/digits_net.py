"""Train the digit classifier that gives evaluate.py its features, on the images of MNIST.

    python benchmarks/digits_net.py --dataset_name mnist

This writes utils/evaluation/digits_net.safetensors and its card. The seed is fixed, so a machine writes the same file
each time. The images are augmented by shifts of up to two pixels and rotations of up to ten degrees.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from utils.evaluation.features import DIGITS_WEIGHTS, DigitsNet  # noqa: E402

CARD = """# digits_net.safetensors

A classifier of 28x28 digits with 64 features for comparing samples: `features.py: DigitsNet`, {parameters:,} weights.
`python benchmarks/digits_net.py --dataset_name mnist` trained it on MNIST's 60,000 training images (LeCun et al. 1998,
CC BY-SA 3.0) for {epochs} epochs with seed {seed}. It classifies {accuracy:.2%} of the 10,000 test images correctly.
The SHA-256 of the file is `{digest}`.

Use its features to rank models of digits. Distances in these features mean nothing for other images, and cannot be
compared with distances in other features.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="Hub id or local copy of MNIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = "ylecun/mnist" if options.dataset_name == "mnist" else options.dataset_name
    train, test = (load(datasets.load_dataset(name, split=split)) for split in ("train", "test"))
    torch.manual_seed(options.seed)
    net, size = DigitsNet(), 128
    steps = options.epochs * (len(train[0]) // size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(options.epochs):
        start, order = time.perf_counter(), torch.randperm(len(train[0]))
        net.train()
        for rows in order[: len(order) // size * size].view(-1, size):
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = net(augment(train[0][rows]))
            loss = F.cross_entropy(logits.float(), train[1][rows], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        net.eval()
        with torch.no_grad():
            predicted = torch.cat([net(images)[1].argmax(1) for images in test[0].split(1000)])
        accuracy = (predicted == test[1]).float().mean().item()
        print(f"epoch {epoch + 1}: {accuracy:.2%}, {time.perf_counter() - start:.0f} s", flush=True)
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, DIGITS_WEIGHTS)
    digest = hashlib.sha256(DIGITS_WEIGHTS.read_bytes()).hexdigest()
    parameters = sum(parameter.numel() for parameter in net.parameters())
    facts = dict(parameters=parameters, epochs=options.epochs, seed=options.seed, accuracy=accuracy, digest=digest)
    DIGITS_WEIGHTS.with_suffix(".md").write_text(CARD.format(**facts), encoding="utf-8")
    print(f"{DIGITS_WEIGHTS}: {DIGITS_WEIGHTS.stat().st_size / 1e3:.0f} kB, sha256 {digest}")


def load(dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 1, 28, 28) in [0, 1] and labels (N,)."""
    images = torch.from_numpy(np.stack([np.asarray(image) for image in dataset["image"]]))
    return images[:, None].float() / 255, torch.tensor(dataset["label"])


def augment(images: torch.Tensor) -> torch.Tensor:
    angles = (torch.rand(len(images)) * 2 - 1) * (np.pi / 18)
    shifts = (torch.rand(len(images), 2) * 2 - 1) * (2 * 2 / 28)
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack([cos, -sin, shifts[:, 0], sin, cos, shifts[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


if __name__ == "__main__":
    main()
