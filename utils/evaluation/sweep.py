"""Comparison of samplers and numbers of steps: find the best, plot all, and write the best into a pipeline."""

import json
import re
from pathlib import Path

from diffusers import SchedulerMixin
from matplotlib.figure import Figure

from .. import UserError, read_record, write_record
from ..pictures import label_log_axis
from ..training.output_dir import ARGUMENTS, read_arguments


def best_setting(tried: list[tuple]) -> tuple:
    """Return the sampler and the fewest steps that reach the lowest distance, within its standard error.

    Args:
        tried: pairs of a sampler, or its name, and its row.
    """
    rows = [(sampler, row, _distance(row)) for sampler, row in tried]
    lowest = min(rows, key=lambda entry: entry[2])
    limit = lowest[2] + _distance(lowest[1], "_error")
    near = [entry for entry in rows if entry[2] <= limit]
    sampler, row, _ = min(near, key=lambda entry: (entry[1]["steps"], entry[2]))
    return sampler, row["steps"]


def _distance(row: dict, suffix: str = "") -> float:
    return row[_metric(row) + suffix]


def _metric(row: dict) -> str:
    """Return the name of the Fréchet distance in a row."""
    return next(key for key in row if key.startswith(("fd_", "fid_")))


def plot_sweep(rows: list[dict]) -> Figure:
    """Plot the Fréchet distance against the number of sampling steps, a line for each model and sampler."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel="sampling steps", ylabel=_metric(rows[0]))
    lines = {}
    for row in rows:
        if "steps" in row:
            name = re.sub(rf" {row['steps']}(?= guidance |$)", "", row["model"])
            lines.setdefault(name, []).append(row)
    for name, points in lines.items():
        points = sorted(points, key=lambda row: row["steps"])
        distances, errors = ([_distance(row, suffix) for row in points] for suffix in ("", "_error"))
        axes.errorbar([row["steps"] for row in points], distances, errors, marker="o", capsize=3, label=name)
    if rows[0]["model"].startswith("floor"):
        floor = _distance(rows[0])
        axes.axhline(floor, color="grey", linestyle="--", label=f"held-out images: {floor:.2g}")
    steps = sorted({row["steps"] for row in rows if "steps" in row})
    axes.set_xticks(steps, [str(n) for n in steps])
    label_log_axis(axes)
    axes.legend()
    axes.set_title(f"N={rows[0]['N']}, bars: standard error by bootstrap", fontsize="medium")
    return figure


def plot_guidance(rows: list[dict]) -> Figure:
    """Plot Fréchet distance, precision and recall over the guidance scale, a line for each model."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    metrics = [metric for metric in (_metric(rows[0]), "precision", "recall") if metric in rows[0]]
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    lines = {}
    for row in rows:
        if "guidance_scale" in row:
            lines.setdefault(row["model"].rsplit(" guidance ", 1)[0], []).append(row)
    for axes, metric in zip(panels, metrics, strict=True):
        for name, points in lines.items():
            points = sorted(points, key=lambda row: row["guidance_scale"])
            axes.plot([p["guidance_scale"] for p in points], [p[metric] for p in points], marker="o", label=name)
        if rows[0]["model"].startswith("floor"):
            axes.axhline(rows[0][metric], color="grey", linestyle="--", label="held-out images")
        axes.set(title=metric, xlabel="guidance scale")
    panels[0].legend()
    return figure


def check_writable(name: str) -> None:
    """Refuse a pipeline if its scheduler cannot be replaced.

    Raises:
        UserError: there is no such folder, it is not a DDPMPipeline, or it is a checkpoint, which must not change,
            because its manifest has hashes.
    """
    index = Path(name) / "model_index.json"
    if not index.is_file():
        raise UserError(f"--write_best: {name} is not a folder with a pipeline. Expected the output of train_ddpm.py")
    if (Path(name) / "manifest.json").exists():
        raise UserError(f"--write_best: {name} is a checkpoint, which must not change. Give the run's output folder")
    pipeline_class = read_record(index).get("_class_name")
    if pipeline_class != "DDPMPipeline":
        raise UserError(
            f"--write_best: {name} is a {pipeline_class}, which has only one sampler. Expected a DDPMPipeline"
        )


def write_scheduler(folder: Path, scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Put another scheduler into a saved DDPMPipeline, and the number of steps into its run's record."""
    index = read_record(folder / "model_index.json")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    write_record(folder / "scheduler" / "scheduler_config.json", json.loads(scheduler.to_json_string()))
    write_record(folder / "model_index.json", index)
    if record := read_arguments(folder):
        write_record(folder / ARGUMENTS, {**record, "num_inference_steps": num_inference_steps})
