"""The results of evaluate.py, as a table for people and as JSON for programs."""

from pathlib import Path

import numpy as np

from .. import write_record
from ..pictures import make_grid
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


def write_report(
    folder: Path, rows: list[dict], losses: list[dict], grids: dict, pairs: dict, by_class: dict, sweep: bool, **facts
) -> None:
    """Write ``results.json``, ``results.md``, ``samples.png`` and ``nearest.png``, and print the tables.

    If samplers are compared, also write ``sweep.png``.

    Args:
        folder: folder to write to.
        rows: results, each with its name as ``model``; the floor is the first, if there is one.
        losses: denoising losses for a second table; may be empty.
        grids: samples to show by name, uint8 (N, C, H, W).
        pairs: pairs of such arrays by name: the samples most similar to training images, and those training images.
        by_class: results for each class by name, only for results.json.
        sweep: True if there are rows for several numbers of steps.
        facts: values that hold for all rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heading = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"{heading}\n\n{table_of(rows)}\n{NOTE}"
    if losses:
        text += f"{LOSS_NOTE}\n{table_of(losses)}\n"
    files = ["results.json", "results.md", "samples.png", "nearest.png"]
    if sweep:
        plot_sweep(rows).savefig(folder / "sweep.png")
        files.append("sweep.png")
    if len({row.get("guidance_scale") for row in rows} - {None}) > 1:
        plot_guidance(rows).savefig(folder / "guidance.png")
        files.append("guidance.png")
    print(f"\n{heading}\n\n{table_of([_short(row) for row in rows])}\n{SHORT}")
    if losses:
        print(table_of(losses))
    print(f"\nWrote {', '.join(files)} to {folder}. All columns are in results.md")
    (folder / "results.md").write_text(text, encoding="utf-8")
    record = {**facts, "results": rows, "denoising_losses": losses, "by_class": by_class}
    write_record(folder / "results.json", record)
    _strip(grids).save(folder / "samples.png")
    both = {}
    for name, (images, trained_on) in pairs.items():
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
