"""The output folder: whose it is, which settings it was made with, and where to go on."""

import errno
import json
import logging
import os
import re
import time
from pathlib import Path

import accelerate
import diffusers
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from .. import UserError, randomness, rollbacks, write_record
from ..args import defaults_of
from ..hardware import device_name
from . import checkpoints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.json"
# Flags that say where things are on this machine, or concern it alone
PRIVATE = {"output_dir", "logging_dir", "image_cache_dir", "config", "resume_from_checkpoint", "report_to"}
DATA = {"dataset_name", "prior_dataset_name", "data"}  # flags and results that may name own images
OWN_IMAGES = "own images"
LOCK = ".lock"
# What may be in an output folder before its first run: a lock, and the log of that very command (`... | tee DIR/log`)
OUR_FILES = re.compile(r"\.lock|\.tmp-.*|log|nohup\.out|.*\.(log|out|err)")
DRAWING = {  # a finished run with others draws, and writes its page, again
    "num_samples", "sampler", "num_inference_steps", "guidance_color", "guidance_prompt", "guidance_scale",
    "guidance_mode", "clip_model_name_or_path", "teacher_steps", "hub_dataset_name", "hub_license",
}  # fmt: skip
_locks = {}  # files that this process has locked, by folder
# Flags that may change when a run is resumed: they say where, how fast and how often, not what is computed. The batch
# geometry may change too, as long as the global batch stays what it was, and where the images are, as long as they are
# the same: their fingerprint is compared.
FREE_ON_RESUME = {
    "bad_images", "cache_images", "checkpointing_steps", "checkpoints_total_limit", "compile", "config", "data",
    "dataloader_num_workers", "dataset_name", "evaluate_steps", "features", "features_model_name_or_path",
    "fingerprint", "grad_norm_deviations", "gradient_accumulation_steps", "gradient_checkpointing", "hang_timeout",
    "hub_logs", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy", "hub_timeout", "image_cache_dir",
    "image_range", "keep_best", "logging_dir", "logging_steps", "max_bad_images", "max_rollbacks", "max_train_steps",
    "mixed_precision", "num_evaluation_samples", "num_train_epochs", "num_validation_images", "output_dir",
    "prior_dataset_name", "prior_dataset_split", "push_required", "push_to_hub", "report_to",
    "resume_from_checkpoint", "sample_batch_size", "sample_steps", "tracker_project_name", "train_batch_size",
    "train_data_dir", "validation_split", "validation_steps", *DRAWING,
}  # fmt: skip


# What a run did that did not know a flag, where that is not the default of now
BEFORE = {"model_guidance": 0.0, "optimizer": "adamw", "time_density": "uniform", "logit_mean": 0.0}


def claim_output_dir(accelerator, args, script: str) -> tuple[Path, int | None]:
    """Make the output folder this run's, or find that it holds this run already.

    Args:
        script: its name; the folder of another one is refused.

    Returns:
        The folder, and the number of optimizer steps after which a run in it finished, or None.

    Raises:
        UserError: the folder cannot be written, holds something else, or a run with other settings.
    """
    folder, answer = Path(args.output_dir), [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _inspect_output_dir(folder, args, script)
        except UserError as error:
            answer[1] = str(error)
        except (OSError, ValueError) as error:
            answer[1] = f"--output_dir {folder} cannot be used: {error}. Choose another folder"
    finished_at, problem = broadcast_object_list(answer)
    if problem:
        raise UserError(problem)
    if accelerator.num_processes > 1:
        checkpoints.check_shared(accelerator, folder)
    return folder, finished_at


def _inspect_output_dir(folder: Path, args, script: str) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} cannot be written to. Choose another folder")
    foreign = [path for path in folder.iterdir() if not OUR_FILES.fullmatch(path.name) or path.is_dir()]
    if foreign and not (folder / ARGUMENTS).is_file():
        raise UserError(
            f"--output_dir {folder} is not empty, and not the output of these scripts. Choose another folder"
        )
    _lock(folder)
    if not (folder / ARGUMENTS).is_file():
        return None
    found = read_arguments(folder)
    if found.get("script", script) != script:
        raise UserError(
            f"--output_dir {folder} holds a run of another script, {found['script']}. Choose another --output_dir"
        )
    check_settings(f"--output_dir {folder}", found["arguments"], vars(args), defaults_of(args))
    redraw = any(found["arguments"].get(flag) != vars(args).get(flag) for flag in DRAWING)
    complete = (folder / "model_index.json").is_file() and (folder / "samples.png").is_file()
    return found.get("finished_at_step") if complete and not redraw else None


def _lock(folder: Path) -> None:
    """Keep other runs out of the folder until this one ends; where there is no ``fcntl`` (Windows), do nothing.

    A launcher that is killed returns before its child has saved: the same command, given at once, waits for that.
    """
    if fcntl is None or folder.resolve() in _locks:
        return
    file = open(folder / LOCK, "a", encoding="utf-8")  # noqa: SIM115  open as long as the process lives
    for seconds in range(60):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _locks[folder.resolve()] = file
            return
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
                logger.warning(
                    f"The file system of {folder} knows no locks ({error}): see to it that no other run writes there."
                )
                return
            if not isinstance(error, BlockingIOError):
                raise
            if seconds == 0:
                logger.warning(f"Another run is writing to {folder}; waiting up to a minute for it to end.")
            time.sleep(1)
    raise UserError(f"--output_dir {folder}: another run is writing to it. Wait for it, or choose another folder")


def release_output_dir(args) -> None:
    """Let other processes write to the folder, when this one goes on to something else, as a notebook does."""
    if file := _locks.pop(Path(args.output_dir).resolve(), None):
        file.close()


def check_settings(where: str, old: dict, new: dict, defaults: dict) -> None:
    """Refuse to go on with a run whose results would depend on when the settings changed.

    A flag that the old run did not know counts as having had its default, or what is in ``BEFORE``. One that is gone is
    named in a warning.

    Args:
        where: the folder, for the message.
        old, new: settings by name; those in ``FREE_ON_RESUME`` may differ.
        defaults: of the flags of now, by name.

    Raises:
        UserError: lists what differs.
    """
    if new.get("fingerprint") and not old.get("fingerprint"):
        logger.info(f"{where} does not say which images it was made with: going on with {new.get('data')}.")
        old = {**old, "fingerprint": new["fingerprint"]}
    added, gone = ({*new} - {*old} - FREE_ON_RESUME, {*old} - {*new} - FREE_ON_RESUME)
    if added:
        logger.info(
            f"{where} is of a run without {', '.join(sorted(added))}; what runs did before there were these counts."
        )
    if gone:
        said = ", ".join(f"{name} (it was {old[name]!r})" for name in sorted(gone))
        logger.warning(f"{where} is of a run with settings that this script does not have: {said}; they are ignored.")
    old = {**{name: BEFORE.get(name, defaults.get(name)) for name in added}, **old}
    names = [name for name in sorted({*new} - FREE_ON_RESUME) if old[name] != new[name]]
    changed = [f"{name} was {old[name]!r}, is {new[name]!r}" for name in names if name != "scaled_from"]
    if "scaled_from" in names:
        said = [",".join(f"{value:g}" for value in values["scaled_from"] or ()) or "full" for values in (old, new)]
        changed.append("--image_range was {}, is {}".format(*said))
    if old.get("fingerprint") != new.get("fingerprint"):
        changed.append(f"the images are others than those of {old.get('data')}, or named otherwise")
    if changed:
        raise UserError(
            f"{where} holds a run with other settings: {'; '.join(changed)}. Give the old values to go on with it, or "
            "another --output_dir to start afresh"
        )


def read_arguments(folder: str | Path) -> dict:
    """What ``write_arguments`` has written of the run in this folder; nothing where there is none."""
    path = Path(folder) / ARGUMENTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_finished(args, data_settings: dict) -> None:
    """Refuse to call a run finished that was made with other images.

    Raises:
        UserError: see ``check_settings``.
    """
    found = read_arguments(args.output_dir)
    names = [name for name in ("data", "images", "fingerprint", "scaled_from") if name in found]
    old, new = ({name: values[name] for name in names} for values in (found, data_settings))
    given = found.get("arguments", {})
    old["data"] = given.get("train_data_dir") or given.get("dataset_name") or found.get("data")
    check_settings(f"--output_dir {args.output_dir}", old, new, {})


def resume(accelerator, args, data_settings: dict, ema_model) -> int:
    """Load the checkpoint that the flags ask for into what ``accelerator`` prepared and into ``ema_model``.

    Args:
        data_settings: further settings that must not have changed, such as the number of images.

    Returns:
        Optimizer steps done; 0 for a run from scratch.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        checkpoints.remove_leftovers(output_dir)
    path = _find_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    if path is None:
        logger.info(f"Starting a new run in {output_dir}.")
        return 0
    state = checkpoints.read_state(path)
    check_settings(str(path), state["settings"], {**vars(args), **data_settings}, defaults_of(args))
    if accelerator.is_main_process:
        checkpoints.set_aside_newer(output_dir, path)
    if state.get("randomness", 1) != randomness.VERSION:
        logger.warning(
            f"{path} is of a run before the noise was the same on every device: it goes on with other noise, and will "
            "not end with the bits that it would have ended with"
        )
    if accelerator.is_main_process:
        rollbacks.add(output_dir, state.get("rollbacks", []))  # if it is of another folder
    checkpoints.load_checkpoint(accelerator, path, state)
    averaged = {}  # the checkpoint's pipeline holds them, and its low-rank adapter if there is one
    for file in [*path.glob("unet/*.safetensors"), *path.glob("adapter/*.safetensors")]:
        averaged |= load_file(file)
    ema_model.load(averaged, state["ema_step"])
    logger.info(f"Resuming from {path}, {state['global_step']} optimizer steps done.")
    return state["global_step"]


def _find_checkpoint(accelerator, output_dir: Path, request: str | None) -> Path | None:
    """What the flag asks for; where this very run goes on by itself, what it has saved since then."""
    if rollbacks.gone_back or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        newest = checkpoints.find_checkpoint(accelerator, output_dir, None)
        steps = re.fullmatch(r"checkpoint-(\d+)", Path(request or "").name)
        if newest and (not steps or int(newest.name.split("-")[1]) > int(steps[1])):
            return newest
    return checkpoints.find_checkpoint(accelerator, output_dir, request)


def save(accelerator, args, data_settings: dict, ema_model, global_step: int, save_pipeline) -> None:
    """Publish ``checkpoint-<global_step>``, what ``resume`` goes on from. Call it on all processes.

    Args:
        data_settings: as for ``resume``.
        save_pipeline: writes a pipeline into the folder it gets, with the averaged weights in ``unet`` or ``adapter``.
    """
    state = dict(settings={**vars(args), **data_settings}, ema_step=ema_model.optimization_step)
    state |= {"randomness": randomness.VERSION, "rollbacks": rollbacks.read(args.output_dir)}
    folder, limit = Path(args.output_dir), args.checkpoints_total_limit
    checkpoints.save_checkpoint(accelerator, folder, global_step, save_pipeline, state, limit)


def write_arguments(accelerator, args, script: str, **summary) -> None:
    """Write ``training_args.json``: the flags, what was found out, what ran, the versions and the machine."""
    if not accelerator.is_main_process:
        return
    content = {
        "script": script,
        "arguments": vars(args),
        # Now, while it can be seen what is a path
        "public_arguments": public(vars(args)),
        "public_data": OWN_IMAGES if args.train_data_dir else public_data(summary.get("data")),
        **public(summary),
        "ran": _what_ran(accelerator),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": device_name(accelerator.device),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)},
    }
    write_record(Path(args.output_dir) / ARGUMENTS, content)


def write_finished(accelerator, args, global_step: int) -> None:
    """Note in ``training_args.json`` that the run is complete."""
    if accelerator.is_main_process:
        record = {**read_arguments(args.output_dir), "finished_at_step": global_step}
        write_record(Path(args.output_dir) / ARGUMENTS, record)


def _what_ran(accelerator) -> dict[str, str]:
    """Classes and settings of what the accelerator prepared, whatever the flags say."""

    def described(thing, settings):
        plain = {name: v for name, v in settings.items() if name[0] != "_" and isinstance(v, (int, float, str, tuple))}
        shown = ", ".join(f"{name}={v}" for name, v in plain.items() if v is not False and name != "last_epoch")
        return f"{type(thing).__name__}({shown})"

    ran = {"model": [type(accelerator.unwrap_model(model)).__name__ for model in accelerator._models]}
    ran["optimizer"] = [described(wrapped.optimizer, wrapped.optimizer.defaults) for wrapped in accelerator._optimizers]
    schedules = [wrapped.scheduler for wrapped in accelerator._schedulers]
    ran["schedule"] = [described(schedule, schedule.state_dict()) for schedule in schedules]
    return {part: ", ".join(names) for part, names in ran.items() if names}


def how_to_load(folder: Path, name: str | Path) -> str:
    """The expression that loads the pipeline saved in ``folder`` as ``name``: a path, or an id on the Hub."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    custom = ""
    if (folder / "pipeline.py").is_file() and not isinstance(unet.get("sample_size"), int):
        custom = f", custom_pipeline={str(name)!r}"  # ConsistencyModelPipeline draws squares only
    if custom or isinstance(kind, list):  # its code is in the folder
        return f"DiffusionPipeline.from_pretrained({str(name)!r}{custom}, trust_remote_code=True)"
    return f"{kind}.from_pretrained({str(name)!r})"


def without_path(value):
    """A flag's value, or ``--flag=value``; a path of this machine is cut down to its last part."""
    flag, equals, text = value.partition("=") if str(value).startswith("--") else ("", "", value)
    if not isinstance(text, str) or not text or is_hub_id(text):
        return value
    is_path = text.startswith(("/", "./", "../", "~")) or (("/" in text or "\\" in text) and Path(text).exists())
    return flag + equals + (Path(text).name if is_path else text)


def public(values: dict) -> dict:
    """Flags and results that may be published: paths are cut down to their last part, and own images are not named."""
    shown = {name: without_path(value) for name, value in values.items() if name not in PRIVATE}
    shown |= {name: public_data(values[name]) for name in DATA & {*shown}}
    return shown | {"train_data_dir": OWN_IMAGES} if shown.get("train_data_dir") else shown


def public_data(name):
    """Training images by their name, if it is one on the Hub or of the embedded ones, and ``OWN_IMAGES`` otherwise.

    What is a path is seen only where it is there: call this where the images have been loaded.
    """
    local = name and name not in ("digits", "faces", "mnist") and not is_hub_id(name)
    return OWN_IMAGES if local and (Path(name).exists() or not re.fullmatch(r"[\w.-]+", name)) else name


def is_hub_id(name: str) -> bool:
    """Whether it looks like user/name, and no such path is here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not Path(name).exists()
