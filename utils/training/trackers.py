"""The trackers of a run: what they need, what they are told at the start, and one run in them over all resumes."""

import importlib.metadata
import logging
import uuid
from pathlib import Path

from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType
from packaging.requirements import Requirement

from .. import UserError
from ..args import defaults_of
from .output_dir import public

logger = logging.getLogger(__name__)

LAYOUT = {  # TensorBoard's custom scalars: curves that belong together, in one chart
    "loss": {
        "training and held out": ["Multiline", ["^loss/"]],
        "by noise level": ["Multiline", ["^loss_by_timestep/"]],
        "held out, by noise level": ["Multiline", ["^loss_by_timestep_validation/"]],
    }
}
ALWAYS = ("learning_rate", "train_batch_size", "seed")  # among TensorBoard's hyperparameters, defaults or not


def check_trackers(report_to: str) -> list[str]:
    """The trackers' names in ``--report_to``; ``all`` are those that are installed.

    Raises:
        UserError: one is unknown or not installed.
    """
    known, available = (LoggerType.list(), [str(tracker) for tracker in get_available_trackers()])
    names = {"none": [], "all": available}.get(report_to, [name.strip() for name in report_to.split(",")])
    for name in names:
        if name not in known:
            raise UserError(f"--report_to {name}: unknown tracker; expected none, {', '.join(known)}")
        if name not in available:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or choose none")
    return names


def _unmet(package: str) -> list[str]:
    """What an installed package says that it needs, where something else is installed."""
    problems, found = [], next(iter(importlib.metadata.distributions(name=package)), None)  # perhaps tensorboardX
    for wanted in map(Requirement, (found.requires if found else None) or ()):
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = next(iter(importlib.metadata.distributions(name=wanted.name)), None)
        if found is None or not wanted.specifier.contains(found.version, prereleases=True):
            version = found.version if found else "none"
            problems.append(f"{wanted.name}{wanted.specifier} ({version} is installed)")
    return problems


def start_trackers(accelerator, args, name: str, first_step: int, summary: dict) -> None:
    """Open the trackers on the main process.

    A run is called after its folder. TensorBoard keeps one run over resumes, and hides what it has from later steps;
    its table of hyperparameters has the flags that differ from their defaults, and a few others.

    Args:
        name: the project without ``--tracker_project_name``.
        first_step: optimizer steps done.
        summary: what was found out, to be recorded beside the flags.

    Raises:
        UserError: one of them cannot start.
    """
    if not accelerator.is_main_process:
        return
    folder, logs = Path(args.output_dir).resolve(), Path(args.output_dir) / args.logging_dir
    before = sorted({path.parent.name for path in logs.glob("*/events.out.*")})
    title = before[0] if first_step and len(before) == 1 else folder.name  # of a folder that was renamed
    tensorboard = TensorBoardTracker(title, logs, purge_step=first_step + 1)
    names = [str(tracker) for tracker in accelerator.log_with]
    for tracker in names:
        if problems := _unmet(tracker):
            logger.warning(f"--report_to {tracker}: it wants {', '.join(problems)}. If it fails, install those")
    accelerator.log_with = [tensorboard if name == "tensorboard" else name for name in names]
    flags = public(vars(args))
    try:
        options = _options(args, names, first_step)
        accelerator.init_trackers(args.tracker_project_name or name, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker is tensorboard:  # in the run itself: accelerate's own way adds a run for each start, and torch's
                from torch.utils.tensorboard.summary import hparams  # record of the experiment hides other runs' flags

                defaults = {**defaults_of(args), **dict.fromkeys(ALWAYS)}
                shown = {flag: value for flag, value in flags.items() if value != defaults.get(flag)}
                _, session, _ = hparams(_plain({**shown, "parameters": summary.get("parameters")}), {})
                tracker.writer.file_writer.add_summary(session)
                tracker.writer.add_custom_scalars(LAYOUT)
            else:
                tracker.store_init_configuration(_plain({**flags, **public(summary), "output_dir": str(folder)}))
                if not hasattr(tracker, "log_images") and tracker.name != "trackio":
                    logger.warning(f"--report_to {tracker.name} shows no pictures; they are in {args.output_dir}")
    except Exception as error:  # each tracker has its own: no login, no network, no folder
        raise UserError(f"--report_to {args.report_to} cannot start: {type(error).__name__}: {error}") from error


def _plain(values: dict) -> dict:
    return {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in values.items() if v is not None}


def _options(args, names: list[str], first_step: int) -> dict[str, dict]:
    """What shows a resumed run as one: W&B knows it by an id, trackio by a name of its own."""
    if not {"wandb", "trackio"} & {*names}:
        return {}
    folder, file = Path(args.output_dir).resolve(), Path(args.output_dir) / args.logging_dir / "wandb_id"
    if not (first_step and file.is_file()):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run_id = file.read_text(encoding="utf-8")
    wandb = dict(id=run_id, resume="allow", dir=args.output_dir, name=folder.name)
    return {"wandb": wandb, "trackio": dict(name=f"{folder.name} {run_id}", resume="allow")}
