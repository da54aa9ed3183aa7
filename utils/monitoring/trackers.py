"""Trackers of a run: start them, send them pictures, and show a resumed run as one run."""

import logging
import uuid
from pathlib import Path

import numpy as np
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from .. import UserError
from ..args import defaults_of
from ..privacy import redact

logger = logging.getLogger(__name__)

# TensorBoard's custom scalars show each measure in a chart of its own. The training loss and the losses on fixed noise
# are different measures: in training, timesteps are not equally likely, and the target may include guidance
LAYOUT = {
    "loss": {
        "training": ["Multiline", ["^loss/train$"]],
        "fixed noise, equal timesteps: training and held-out images": ["Multiline", ["^loss/validation_"]],
        "training, by noise level": ["Multiline", ["^loss_by_timestep/"]],
        "fixed noise, by noise level": ["Multiline", ["^loss_by_timestep_validation/"]],
    }
}
ALWAYS = ("train_batch_size", "seed")  # flags in TensorBoard's table of hyperparameters even at their defaults
FACTS = ("parameters", "learning_rate")  # facts of the run in that table


def check_trackers(report_to: str) -> list[str]:
    """Return the names of the trackers in ``--report_to``; ``all`` means all installed trackers.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    known, available = (LoggerType.list(), [str(tracker) for tracker in get_available_trackers()])
    names = {"none": [], "all": available}.get(report_to, [name.strip() for name in report_to.split(",")])
    for name in names:
        if name not in known:
            raise UserError(f"--report_to {name}: unknown tracker. Expected none, {', '.join(known)}")
        if name not in available:
            raise UserError(f"--report_to {name}: its package is not installed. Run pip install {name}, or choose none")
    return names


def start_trackers(run, names: list[str], logs: Path) -> None:
    """Open the trackers on the main process.

    The trackers name the run after its output folder. In TensorBoard, a resumed run stays one run, and points after the
    step that it resumes from are hidden. The table of hyperparameters shows the flags that differ from their defaults,
    and a few others.

    Args:
        run: training run.
        names: names of the trackers, see ``check_trackers``.
        logs: folder for TensorBoard's files.

    Raises:
        UserError: a tracker cannot start.
    """
    accelerator, args = run.accelerator, run.args
    if not accelerator.is_main_process or not names:
        return
    folder = run.output_dir.resolve()
    before = sorted({path.parent.name for path in logs.glob("*/events.out.*")})
    title = before[0] if run.global_step and len(before) == 1 else folder.name  # the folder may have been renamed
    flags = redact(vars(args))
    try:
        tensorboard = (
            TensorBoardTracker(title, logs, purge_step=run.global_step + 1) if "tensorboard" in names else None
        )
        accelerator.log_with = [tensorboard if name == "tensorboard" else name for name in names]
        accelerator.init_trackers(run.name, init_kwargs=_options(folder, logs, names, run.global_step))
        for tracker in accelerator.trackers:
            if tracker is tensorboard:
                # The summary goes into the run itself, because accelerate would add a run for each start, and torch's
                # record of the experiment would hide the flags of other runs
                from torch.utils.tensorboard.summary import hparams

                defaults = {**defaults_of(args), **dict.fromkeys(ALWAYS)}
                shown = {flag: value for flag, value in flags.items() if value != defaults.get(flag)}
                _, session, _ = hparams(_plain({**shown, **{name: run.facts.get(name) for name in FACTS}}), {})
                tracker.writer.file_writer.add_summary(session)
                tracker.writer.add_custom_scalars(LAYOUT)
            else:
                tracker.store_init_configuration(_plain({**flags, **redact(run.facts)}))
                if not hasattr(tracker, "log_images") and tracker.name != "trackio":
                    logger.warning(f"--report_to {tracker.name} does not show pictures. They are in {args.output_dir}")
    except Exception as error:  # each tracker raises errors of its own: no login, no network, no folder
        raise UserError(f"--report_to {args.report_to} cannot start: {type(error).__name__}: {error}") from error


def show_picture(trackers, name: str, picture: Image.Image, step: int, caption: str) -> None:
    """Send a picture to the trackers that show pictures.

    Args:
        trackers: trackers of the accelerator.
        name: name of the picture in the trackers.
        picture: picture to send.
        step: number of optimizer steps done, the trackers' x-axis.
        caption: caption for the trackers that show one.
    """
    pixels = np.atleast_3d(np.asarray(picture))
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":  # accelerate's tracker for it has no log_images
            import trackio

            tracker.log({name: trackio.Image(picture, caption=caption)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [picture]}, step=step)


def _plain(values: dict) -> dict:
    return {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in values.items() if v is not None}


def _options(folder: Path, logs: Path, names: list[str], first_step: int) -> dict[str, dict]:
    """Return options that keep a resumed run as one run: an id for W&B, a unique name for trackio."""
    if not {"wandb", "trackio"} & {*names}:
        return {}
    file = logs / "wandb_id"
    if not (first_step and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run_id = file.read_text(encoding="utf-8")
    wandb = dict(id=run_id, resume="allow", dir=str(folder), name=folder.name)
    return {"wandb": wandb, "trackio": dict(name=f"{folder.name} {run_id}", resume="allow")}
