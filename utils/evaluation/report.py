"""The results of evaluate.py, as a table for people and as JSON for programs."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from .. import write_record
from ..pictures import make_grid
from .class_statistics import AskedClasses, digit_probabilities, digit_statistics
from .comparison import compare
from .reference import Preparation, Reference
from .sweep import plot_guidance, plot_sweep

NOTE = """
N is the number of samples, and of the real images that they are compared with. Compare only rows with the same N, and
only within this table. ema states whether the weights are averages, if that is known. The floor is the result of real,
held-out images. Lower is better for fd, kid and class_distance. Higher is better for precision, recall, density,
coverage and class_accuracy. class_distance is the distance of the digits' frequencies from equal ones. class_accuracy
is the share of samples that are recognised as the requested digit. confidence is the mean certainty of the digit
classifier, which can also be high for noise. copies is the share of images that are nearer to a training image than
99 % of the held-out images are. Errors are bootstrap estimates over the generated images. Pixels have no precision,
recall, density or coverage, because noise would score best.
For models of train_paired.py, psnr and ssim compare samples with the true images, and psnr_mean8 the mean of eight
samples of an input. Higher is better. detail is the energy of fine structure as a share of that of the true images:
1 means as sharp. spread is the standard deviation between samples of one input.
"""
SHORT = """
Lower is better for fd, fid and kid. Higher is better for coverage, class_accuracy, psnr and ssim.
detail is about 1 for images as sharp as the true ones. The floor is the result of real images.
copies is the share of samples that are suspiciously near to a training image. It is about 0.01 for real images.
"""
LOSS_NOTE = """
Denoising loss on fixed (image, timestep, noise) triples, overall and by range of timesteps. A model that has memorised
its training images has a lower loss on them than on held-out images. Do not use this loss to compare models with
different prediction targets or noise.
"""


def table_of(rows: list[dict]) -> str:
    """Return a Markdown table with a column for each key; ``KEY_error`` follows the value of ``KEY`` after ±."""
    keys = []
    for row in rows:
        keys += [key for key in row if key not in keys and not key.endswith("_error")]
    table = [keys]
    for row in rows:
        cells = []
        for key in keys:
            text = _show(row.get(key))
            error = row.get(f"{key}_error")
            cells.append(f"{text} ± {_show(error)}" if error is not None else text)
        table.append(cells)
    widths = [max(len(cells[k]) for cells in table) for k in range(len(keys))]
    lines = [
        "| " + " | ".join(c.ljust(width) for c, width in zip(cells, widths, strict=True)) + " |" for cells in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _short(row: dict) -> dict:
    """Return the most important columns of a row, for the terminal."""
    kept = (
        "model",
        "N",
        "psnr",
        "ssim",
        "detail",
        "spread",
        "fd_",
        "fid_",
        "kid_",
        "coverage",
        "class_accuracy",
        "copies",
    )
    return {key: value for key, value in row.items() if key.startswith(kept)}


def _show(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Report:
    """The results of an evaluation, as tables and pictures.

    Args:
        accelerator: accelerator of this process.
        reference: real images that samples are compared with.
        extract: extractor of features.
        seed: seed of bootstrap.

    Attributes:
        rows: results, each with its name as ``model``.
        losses: denoising losses for a second table.
        grids: samples to show by name, uint8 (N, C, H, W).
        pairs: pairs of such arrays by name: the samples most similar to training images, and those training images.
        by_class: results for each class by name, only for results.json.
    """

    def __init__(self, accelerator, reference: Reference, extract, seed: int):
        self.accelerator, self.reference, self.extract, self.seed = accelerator, reference, extract, seed
        self.rows, self.losses, self.grids, self.pairs, self.by_class = [], [], {}, {}, {}

    def measure(
        self, name: str, blocks: Iterable, how: Preparation, scores: dict | None = None,
        asked: AskedClasses | None = None, labels: np.ndarray | None = None, **facts,
    ) -> dict | None:  # fmt: skip
        """Compare images with the reference, and add a row. Call it on all processes.

        Args:
            name: name of the row.
            blocks: blocks of images, uint8 (B, C, H, W), or pairs of held-out images and their indices.
            how: preparation of the real images.
            scores: further values of the row, which may be computed while the blocks are read.
            asked: requested classes of the images.
            labels: digits that the images should show, or None if they are not digits.
            facts: values of the row about the model.

        Returns:
            The row on the main process, and None on the others.
        """
        main, features, probabilities, shown = self.accelerator.is_main_process, [], [], []
        copies = self.reference.copies(how) if main else None
        for block in blocks:  # the other processes only take part in drawing
            if not main:
                continue
            images, indices = block if isinstance(block, tuple) else (block, None)
            features.append(self.extract(images))
            if self.extract.name == "digits":
                probabilities.append(digit_probabilities(images, self.accelerator.device))
            copies.add(images, indices)
            shown = images[:8].copy() if not len(shown) else shown
        if not main:
            return None
        features = np.concatenate(features)
        row = dict(model=name, N=len(features), **facts)
        if len(features) < 2 * features.shape[1]:
            print(
                f"warning: {name}: {len(features)} images for {features.shape[1]} features. fd is reliable only with "
                "at least twice as many images as features. For fewer images, look at kid",
                flush=True,
            )
        real = self.reference.features(self.extract, how, len(features))
        row |= compare(features, real, self.extract.name, self.seed)
        probabilities = np.concatenate(probabilities) if probabilities else None
        if probabilities is not None:
            row |= digit_statistics(probabilities)
        if asked:
            self.by_class[name] = asked.by_class(features, probabilities)
            if "class_accuracy" in self.by_class[name]:
                row["class_accuracy"] = self.by_class[name]["class_accuracy"]
        if labels is not None and probabilities is not None:
            row["class_accuracy"] = float(np.mean(probabilities.argmax(1) == labels))
        rate, self.pairs[name] = copies.result()
        row |= {} if rate is None else {"copies": rate}
        row |= scores or {}
        self.rows.append(row)
        self.grids[name] = shown
        return row

    def write(self, folder: Path, sweep: bool, **facts) -> None:
        """Write ``results.json``, ``results.md``, ``samples.png`` and ``nearest.png``, and print the tables.

        If samplers are compared, also write ``sweep.png``.

        Args:
            folder: folder to write to.
            sweep: whether there are rows for several numbers of steps.
            facts: values that hold for all rows.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "results.json").is_file():
            print(f"The results of an earlier evaluation in {folder} are replaced. --output_dir sets another folder")
        heading = ", ".join(f"{key} {value}" for key, value in facts.items())
        text = f"{heading}\n\n{table_of(self.rows)}\n{NOTE}"
        if self.losses:
            text += f"{LOSS_NOTE}\n{table_of(self.losses)}\n"
        files = ["results.json", "results.md", "samples.png", "nearest.png"]
        if sweep:
            plot_sweep(self.rows).savefig(folder / "sweep.png")
            files.append("sweep.png")
        if len({row.get("guidance_scale") for row in self.rows} - {None}) > 1:
            plot_guidance(self.rows).savefig(folder / "guidance.png")
            files.append("guidance.png")
        print(f"\n{heading}\n\n{table_of([_short(row) for row in self.rows])}\n{SHORT}")
        if self.losses:
            print(table_of(self.losses))
        print(f"\nWrote {', '.join(files)} to {folder}. All columns are in results.md")
        (folder / "results.md").write_text(text, encoding="utf-8")
        record = {**facts, "results": self.rows, "denoising_losses": self.losses, "by_class": self.by_class}
        write_record(folder / "results.json", record)
        _strip(self.grids).save(folder / "samples.png")
        both = {}
        for name, (images, trained_on) in self.pairs.items():
            both |= {name: images, f"{name}: nearest": trained_on}
        _strip(both).save(folder / "nearest.png")


def _strip(groups: dict):
    """Return an RGB grid with a row of eight images for each name, enlarged to the largest size."""
    height, width = (max(images.shape[axis] for images in groups.values()) for axis in (2, 3))
    rows = []
    for images in groups.values():
        factor = min(height // images.shape[2], width // images.shape[3])
        images = np.pad(images, ((0, 8 - len(images)), (0, 0), (0, 0), (0, 0)))
        images = images.repeat(factor, axis=2).repeat(factor, axis=3)
        rest = height - images.shape[2], width - images.shape[3]
        images = np.pad(images, ((0, 0), (0, 0), (0, rest[0]), (0, rest[1])))
        rows.append(images if images.shape[1] == 3 else images.repeat(3, axis=1))
    return make_grid(np.concatenate(rows), captions=list(groups))
