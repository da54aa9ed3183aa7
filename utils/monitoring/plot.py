"""The losses of a run as a picture."""

import logging
from pathlib import Path

from ..pictures import label_log_axis


def draw_curves(folder: Path, logs: Path) -> None:
    """Write ``curves.png``, the losses in TensorBoard's files below ``logs``. Without such files, write nothing."""
    runs = sorted({path.parent for path in logs.glob("**/events.out.*")})
    if not runs:
        return
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Otherwise TensorBoard warns about points that a resumed run has written twice
    logging.getLogger("tensorboard").setLevel(logging.ERROR)

    curves = {}
    for run in runs:
        events = EventAccumulator(str(run), size_guidance={"images": 1}).Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag) if tag.startswith("loss/") else []
            if points:  # a file of an early restart may have no points left
                curves.setdefault(tag.startswith("loss/validation_"), []).append((tag.removeprefix("loss/"), points))
    if not curves:
        return
    figure = Figure(figsize=(7 * len(curves), 4), dpi=110, layout="constrained")
    # The two losses differ: in training, timesteps are not equally likely, and the target may include guidance
    titles = {False: "training loss", True: "denoising loss: fixed noise, equal timesteps"}
    for axes, fixed in zip(figure.subplots(1, len(curves), squeeze=False)[0], sorted(curves), strict=True):
        for name, points in curves[fixed]:
            steps, values = [point.step for point in points], [point.value for point in points]
            axes.plot(
                steps,
                values,
                marker="o" if len(points) == 1 else None,
                label=f"{name.removeprefix('validation_')}: {values[-1]:.3g} at the end",
            )
        axes.set(xlabel="optimizer step", ylabel="loss", yscale="log", title=titles[fixed])
        label_log_axis(axes)
        axes.legend()
    figure.savefig(folder / "curves.png")
