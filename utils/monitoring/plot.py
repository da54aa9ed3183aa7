"""The losses of a run as a picture."""

import logging
from pathlib import Path

from ..pictures import label_log_axis


def draw_curves(folder: Path, logs: Path) -> None:
    """Write ``curves.png``, the losses in TensorBoard's files below ``logs``; nothing if there are none."""
    runs = sorted({path.parent for path in logs.glob("**/events.out.*")})
    if not runs:
        return
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what a resumed run has written again

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="loss", yscale="log")
    for run in runs:
        events = EventAccumulator(str(run), size_guidance={"images": 1}).Reload()
        for tag in events.Tags()["scalars"]:
            points = events.Scalars(tag) if tag.startswith("loss/") else []
            if points:  # none may be left of a run that was begun again
                steps, values = [point.step for point in points], [point.value for point in points]
                axes.plot(steps, values, label=f"{tag.removeprefix('loss/')}: {values[-1]:.3g} at the end")
    if axes.lines:
        label_log_axis(axes)
        axes.legend()
        figure.savefig(folder / "curves.png")
