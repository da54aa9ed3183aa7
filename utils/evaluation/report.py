"""What evaluate.py found, as a table for people and as JSON for programs."""

import json
from pathlib import Path

import numpy as np

from ..pictures import make_grid
from .sweep import plot_guidance, plot_sweep

NOTE = """
N: samples, and as many real images. Rows with the same N can be compared with each other, and with no other table. ema:
whether the weights are averages, where that is known. The floor is what real, held-out images get. Lower is better for
fd, kid and class_distance (of the digits' frequencies from equal ones), higher for precision, recall, density, coverage
and class_accuracy (the share of samples that are recognised as the digit that was asked for). confidence: how sure the
classifier is; noise can make it sure, too. copies: the share of images nearer to a training image than 99 % of the
held-out ones are. Errors: by bootstrap over the generated images. Pixels have no precision, recall, density and
coverage: noise would be best by them.
"""
SHORT = """
Lower is better, of coverage and class_accuracy higher. Floor: real images in the place of samples.
copies: the share of samples suspiciously near to a training image; about 0.01 is what real images have.
"""
LOSS_NOTE = """
Denoising loss on frozen (image, timestep, noise) triples, whole and by range of timesteps. A model that has learned by
heart has a lower one on the images that it was trained on than on held-out ones. Models with different targets or
noise cannot be compared by it.
"""


def table_of(rows: list[dict]) -> str:
    """Markdown. Columns are the keys in order of appearance; a key with ``_error`` goes beside its own as +-."""
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
    """What matters of a row, for the terminal."""
    kept = ("model", "N", "fd_", "fid_", "kid_", "coverage", "class_accuracy", "copies")
    return {key: value for key, value in row.items() if key.startswith(kept)}


def _show(value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_report(
    folder: Path, rows: list[dict], losses: list[dict], grids: dict, pairs: dict, by_class: dict, sweep: bool, **facts
) -> None:
    """Write ``results.json``, ``results.md``, ``samples.png`` and ``nearest.png``, and print the tables.

    If samplers are compared, also ``sweep.png``.

    Args:
        rows: one result each, with ``model`` its name; the first one is the floor, if there is one.
        losses: denoising losses, a second table; may be empty.
        grids: uint8 (N, C, H, W) by name, samples to show.
        pairs: two of the same by name: the images most like training images, and those.
        by_class: what was found of each class, by name; only for results.json.
        sweep: whether there are rows for several numbers of steps.
        facts: what holds for all rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    said = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"{said}\n\n{table_of(rows)}\n{NOTE}"
    if losses:
        text += f"{LOSS_NOTE}\n{table_of(losses)}\n"
    files = ["results.json", "results.md", "samples.png", "nearest.png"]
    if sweep:
        plot_sweep(rows).savefig(folder / "sweep.png")
        files.append("sweep.png")
    if len({row.get("guidance_scale") for row in rows} - {None}) > 1:
        plot_guidance(rows).savefig(folder / "guidance.png")
        files.append("guidance.png")
    print(f"\n{said}\n\n{table_of([_short(row) for row in rows])}\n{SHORT}")
    if losses:
        print(table_of(losses))
    print(f"\nwritten to {folder}: {', '.join(files)}; every column is in results.md")
    (folder / "results.md").write_text(text, encoding="utf-8")
    record = {**facts, "results": rows, "denoising_losses": losses, "by_class": by_class}
    (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _strip(grids).save(folder / "samples.png")
    both = {}
    for name, (images, trained_on) in pairs.items():
        both |= {name: images, f"{name}: nearest": trained_on}
    _strip(both).save(folder / "nearest.png")


def _strip(groups: dict):
    """One row of eight images a name, all in colour if one is, enlarged to the largest."""
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
