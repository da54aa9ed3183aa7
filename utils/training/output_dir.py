"""The output folder of a run: its lock, its recorded settings, and their comparison when the run resumes."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import filelock
import torch

from .. import UserError, args, counted, read_record, write_record
from ..hardware import device_name
from ..privacy import OWN_IMAGES, public_data, redact
from ..saved import index_file, is_complete
from .process import on_main_process

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.json"
# An output folder may hold these before its first run: a lock, and the log of the command (`... | tee DIR/log`)
ALLOWED_FILES = re.compile(r"\.lock|\.tmp-.*|log|nohup\.out|.*\.(log|out|err)")
# Records of a run, and what shows its images. They are removed before another run starts in its folder
RUN_RECORDS = (ARGUMENTS, "done.json", "rollbacks.json", "evaluation.json", "clusters.npz")
SHOWN = ("samples", "logs", "hub", "*.png")
LOCK_SECONDS = 120  # NFSv4 releases the locks of a lost machine after 90 s
SAMPLING_FLAGS = {  # if they change, a finished run draws again and rewrites its page
    "num_samples", "sampler", "num_inference_steps", "guidance_color", "guidance_prompt", "guidance_scale",
    "guidance_mode", "clip_model_name_or_path",
}  # fmt: skip
# These flags may change when a run resumes, because they set places, speed and intervals, but not the results. The size
# of a process's batches may change if the global batch stays the same. The place of the images may change because the
# fingerprint of the images is compared. So is the digest of the autoencoder.
MAY_CHANGE_ON_RESUME = {
    "cache_images", "checkpointing_steps", "checkpoints_total_limit", "compile", "condition_dir", "config", "constants",
    "data", "dataloader_num_workers", "dataset_name", "evaluate_steps", "features", "fingerprint",
    "gradient_accumulation_steps", "gradient_checkpointing", "hang_timeout", "hub_model_id", "hub_private_repo",
    "net_code", "image_range", "logging_steps", "max_bad_images", "max_rollbacks", "max_train_steps", "mixed_precision",
    "num_evaluation_samples", "num_train_epochs", "output_dir", "prior_dataset_name", "push_to_hub", "report_to",
    "resume_from_checkpoint", "sample_batch_size", "sample_steps", "train_batch_size", "train_data_dir", "vae",
    "validation_split", "validation_steps", *SAMPLING_FLAGS,
}  # fmt: skip
IMPLEMENTATION_OPTIONS = {
    "lr",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
    "maximize",
}  # arguments of torch's optimizers
_locks = {}  # locks that this process holds, by folder


def prepare_output_dir(
    accelerator, flags: dict, defaults: dict, script: str, constants: dict
) -> tuple[Path, int | None]:
    """Create or check the output folder, and lock it for this run.

    Args:
        flags: flags by name, compared with those of a run in the folder.
        defaults: defaults of the flags.
        script: name of the script. The folder of another script is refused.
        constants: constants of the script, compared like flags.

    Returns:
        The folder, and the number of optimizer steps of a finished run in it, or None. A run that its script ended
        early counts with its planned number of steps.

    Raises:
        UserError: the folder cannot be written, or holds other files or a run with other settings.
    """
    folder, settings = Path(flags["output_dir"]), {**flags, "constants": constants}
    try:
        return folder, inspect_together(accelerator, folder, lambda: _inspect(folder, settings, defaults, script))
    except UserError:
        release_output_dir(folder)  # A notebook's kernel continues, so it must not keep the lock
        raise


def inspect_together(accelerator, folder: Path, inspect: Callable[[], Any]) -> Any:
    """Call ``inspect`` on the main process, and return its result on all processes. Call it on all.

    Raises:
        UserError: the folder cannot be used. It is raised on all processes.
    """

    def attempt():
        try:
            return inspect()
        except (OSError, ValueError) as error:
            raise UserError(f"--output_dir {folder} cannot be used: {error}. Choose another folder") from error

    return on_main_process(accelerator, attempt)


def _inspect(folder: Path, settings: dict, defaults: dict, script: str) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} cannot be written to. Choose another folder")
    foreign = [path for path in folder.iterdir() if not ALLOWED_FILES.fullmatch(path.name) or path.is_dir()]
    if foreign and not (folder / ARGUMENTS).is_file():
        raise UserError(
            f"--output_dir {folder} is not empty, and is not the output of these scripts. Choose another folder"
        )
    _lock(folder)
    if not (folder / ARGUMENTS).is_file():
        return None
    found = read_arguments(folder)
    if found["script"] != script:
        raise UserError(
            f"--output_dir {folder} holds a run of another script, {found['script']}. Choose another --output_dir"
        )
    old = {**found["arguments"], "constants": found["constants"]}
    if settings.get("learning_rate", "") is None:  # The model's default, which is compared with the checkpoint's later
        old, settings = ({key: values[key] for key in values if key != "learning_rate"} for values in (old, settings))
    where = f"--output_dir {folder}"
    models = [index_file(folder), folder / "best", *folder.glob("checkpoint-*"), *folder.glob("abandoned-*")]
    changed = setting_changes(where, old, settings, defaults)
    if changed and not any(path.exists() for path in models):
        logger.warning(
            f"{where} holds a run without a checkpoint. This run starts from scratch, because {'; '.join(changed)}. "
            "The samples and curves of that run are removed"
        )
        for name in RUN_RECORDS:
            (folder / name).unlink(missing_ok=True)
        _remove_shown(folder)
        return None
    _refuse(where, changed)
    # Without a --sampler, a script chooses one
    drawn_by = {flag for flag in SAMPLING_FLAGS if flag != "sampler" or settings.get(flag)}
    redraw = any(old.get(flag) != settings.get(flag) for flag in drawn_by)
    complete = is_complete(folder) and (folder / "samples.png").is_file()
    if not complete or redraw or "finished_at_step" not in found:
        return None
    return max(found["finished_at_step"], found.get("max_train_steps", 0))


def _lock(folder: Path) -> None:
    """Keep other runs out of the folder until this one ends.

    A killed launcher ends before its child has saved. The same command, if given at once, waits here for the child.
    """
    folder = folder.resolve()
    if folder in _locks:
        return
    lock = filelock.FileLock(folder / ".lock", fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.warning(f"Another run is writing to {folder}. Waiting up to {LOCK_SECONDS} s for it to end.")
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=1)
    except filelock.Timeout:
        raise UserError(
            f"--output_dir {folder}: another run is writing to it. Wait for it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
            raise
        logger.warning(f"The file system of {folder} has no locks ({error}). Do not start another run there.")
    _locks[folder] = lock


def release_output_dir(folder: Path) -> None:
    """Release the lock on the folder, so that other processes can write there while this one continues."""
    if lock := _locks.pop(Path(folder).resolve(), None):
        lock.release()


def check_settings(where: str, old: dict, new: dict, defaults: dict) -> None:
    """Refuse to resume a run with other settings.

    Args:
        where, old, new, defaults: see ``setting_changes``.

    Raises:
        UserError: settings differ. The message lists them.
    """
    _refuse(where, setting_changes(where, old, new, defaults))


def _refuse(where: str, changed: list[str]) -> None:
    if changed:
        raise UserError(
            f"{where} holds a run with other settings: {'; '.join(changed)}. Give the old values to resume it, or "
            "another --output_dir to start a new run"
        )


def setting_changes(where: str, old: dict, new: dict, defaults: dict) -> list[str]:
    """Return the differences between the settings of two runs, as texts for a message.

    A flag that the old run did not have counts with its default. A warning names flags that no longer exist.

    Args:
        where: folder, for messages.
        old, new: settings by name. Those in ``MAY_CHANGE_ON_RESUME`` may differ. ``constants`` are those of the script.
        defaults: defaults of the current flags, by name.
    """
    constants = new.get("constants", {})
    added = {*new} - {*old} - MAY_CHANGE_ON_RESUME - {"noise_scheduler", "optimizer_settings"}
    if added:
        logger.info(
            f"{where}: the run was started without {', '.join(sorted(added))}. The defaults count as its values."
        )
    for name in sorted({*old} - {*new} - MAY_CHANGE_ON_RESUME):
        if old[name] is not None:
            logger.warning(
                f"{where} holds a run with {name} {old[name]!r}, which is not a flag of this script. If the script has "
                "this setting in its code, the values must be equal."
            )
    old = {**{name: defaults.get(name) for name in added}, **old}
    changed = []
    for name in sorted({*new} - MAY_CHANGE_ON_RESUME):
        if name == "scaled_from" and old.get(name) != new[name]:
            ranges = [",".join(f"{value:g}" for value in values.get(name) or ()) or "full" for values in (old, new)]
            changed.append("--image_range was {}, is {}".format(*ranges))
        elif name in old:
            changed += _differences(name, old[name], new[name])
            if name == "global_batch_size" and old[name] != new[name]:
                changed[-1] += _batch_advice(old[name], new)
            if name == "autoencoder" and old[name] != new[name] and "vae" in new:
                changed[-1] += " (--vae CHECKPOINT takes the autoencoder of a checkpoint)"
    before = old.get("constants", {})
    for name in sorted({*before} & {*constants}):
        changed += _differences(name, before[name], constants[name])
    if before and (others := sorted({*before} ^ {*constants})):
        logger.warning(f"{where} holds a run of a script with other constants: {', '.join(others)}")
    if old.get("fingerprint") != new.get("fingerprint") and "fingerprint" in new:
        changed.append(f"the images differ from those of {old.get('data')}, or have other names")
    return changed


def _batch_advice(size: int, new: dict) -> str:
    """Return a hint about the flags that keep the global batch with another number of processes."""
    batch, steps = new["train_batch_size"], new["gradient_accumulation_steps"]
    processes = new["global_batch_size"] // (batch * steps)
    if size % processes:
        return f" (by {counted(processes, 'process')}, which cannot share {size} evenly)"
    share = size // processes
    batch = math.gcd(batch, share)  # No larger than the given one, which fits into memory
    flags = f"--train_batch_size {batch} --gradient_accumulation_steps {share // batch}"
    return f" (here, with {counted(processes, 'process')}, {flags} makes it {size})"


def _differences(name: str, old, new) -> list[str]:
    """Return the differences between two values, as texts for a message. In dictionaries, only common entries count."""
    if isinstance(old, dict) and isinstance(new, dict):
        shared = [key for key in new if key in old]
        return [line for key in shared for line in _differences(f"{name}[{key!r}]", old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and name == "optimizer_settings":
        return [line for pair in zip(old, new, strict=True) for line in _differences("optimizer", *pair)]
    if repr(old) == repr(new) or old == new:  # NaN does not equal NaN, but its text does
        return []
    texts = ["not given" if value is None else repr(value) for value in (old, new)]
    shown = [text if len(text) <= 200 else f"{text[:200]} ..." for text in texts]
    return [f"{name} was {shown[0]}, is {shown[1]}"]


def own_constants(names: dict) -> dict:
    """Return a script's constants: names in capitals with values that JSON can hold, without imported ones."""
    own = {}
    for key, value in names.items():
        if key.isupper() and getattr(args, key, names) is not value:
            with contextlib.suppress(TypeError, ValueError):
                own[key] = json.loads(json.dumps(value, default=_numbers))
    return own


def _numbers(value) -> list:
    """Convert an array or tensor to a list for JSON."""
    if not hasattr(value, "tolist"):
        raise TypeError
    return value.tolist()


def plain(value):
    """Return a value as JSON would restore it, for comparisons. Values that JSON cannot hold become text."""
    return json.loads(json.dumps(value, default=str))


def config_of(configured) -> dict:
    """Return the class of a model or scheduler and its config, without the internal entries of diffusers."""
    config = {key: value for key, value in getattr(configured, "config", {}).items() if not key.startswith("_")}
    return plain({"class": type(configured).__name__, **config})


def describe_noise(noise_scheduler) -> dict:
    """Return the noise schedule as shown on the model's page: its class, prediction type, betas or shift."""
    config, shown = noise_scheduler.config, ("prediction_type", "beta_schedule", "flow_shift")
    found = {
        "noise_scheduler": type(noise_scheduler).__name__,
        **{key: config[key] for key in shown if config.get(key)},
    }
    if (betas := config.get("trained_betas")) is not None:
        found["beta_schedule"] = f"{len(betas)} trained_betas from {min(betas):g} to {max(betas):g}"
    return found


def describe_optimizers(accelerator) -> list[dict]:
    """Return class and numbers of each optimizer, except the learning rate (a flag) and implementation options."""
    found = []
    for wrapped in accelerator._optimizers:
        numbers = {key: value for key, value in wrapped.optimizer.defaults.items() if key not in IMPLEMENTATION_OPTIONS}
        found.append(plain({"class": type(wrapped.optimizer).__name__, **numbers}))
    return found


def read_arguments(folder: str | Path) -> dict:
    """Return the record that ``write_arguments`` wrote in this folder, or {} if there is none."""
    path = Path(folder) / ARGUMENTS
    return read_record(path) if path.is_file() else {}


def remove_pictures_of_others(folder: Path, data_settings: dict) -> None:
    """Remove pictures and curves of an earlier run with other images from the folder of a run that starts.

    They may show images that must not be published with this run.
    """
    found = read_arguments(folder)
    if found.get("fingerprint") != data_settings.get("fingerprint") and _remove_shown(folder):
        logger.warning(
            f"--output_dir {folder}: pictures and curves of an earlier run with other images ({found.get('data')}) are "
            "removed. That run had no checkpoint"
        )


def _remove_shown(folder: Path) -> bool:
    """Remove what shows a run's images, and return whether there was anything."""
    paths = [path for pattern in SHOWN for path in folder.glob(pattern)]
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return bool(paths)


def check_finished(folder: Path, data_settings: dict) -> None:
    """Refuse a finished run that was trained on other images.

    Raises:
        UserError: the images differ, see ``check_settings``.
    """
    found = read_arguments(folder)
    names = [name for name in ("data", "images", "fingerprint", "scaled_from", "autoencoder") if name in found]
    old, new = ({name: values[name] for name in names} for values in (found, data_settings))
    given = found.get("arguments", {})
    old["data"] = given.get("train_data_dir") or given.get("dataset_name") or found.get("data")
    check_settings(f"--output_dir {folder}", old, new, {})


def write_arguments(accelerator, flags: dict, script: str, constants: dict, **summary) -> None:
    """Write ``training_args.json``: flags, constants, facts of the run, prepared objects, versions and device."""
    if not accelerator.is_main_process:
        return
    content = {
        "script": script,
        "arguments": flags,
        "constants": constants,
        # Paths are redacted now, because they can be recognised only while they exist
        "public_arguments": redact(flags),
        "public_constants": redact(constants),
        "public_data": OWN_IMAGES if flags.get("train_data_dir") else public_data(summary.get("data")),
        **redact(summary),
        "ran": _describe_prepared(accelerator),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": device_name(accelerator.device),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)},
    }
    write_record(Path(flags["output_dir"]) / ARGUMENTS, content)


def write_finished(accelerator, folder: Path, global_step: int) -> None:
    """Record in ``training_args.json`` that the run is complete."""
    if accelerator.is_main_process:
        write_record(folder / ARGUMENTS, {**read_arguments(folder), "finished_at_step": global_step})


def _describe_prepared(accelerator) -> dict[str, str]:
    """Return class and settings of the objects that the accelerator prepared, which may differ from the flags."""

    def described(thing, settings):
        simple = {name: v for name, v in settings.items() if name[0] != "_" and isinstance(v, (int, float, str, tuple))}
        shown = ", ".join(f"{name}={v}" for name, v in simple.items() if v is not False and name != "last_epoch")
        return f"{type(thing).__name__}({shown})" if shown else ""  # A LambdaLR has no settings to show

    ran = {"model": [type(accelerator.unwrap_model(model)).__name__ for model in accelerator._models]}
    ran["optimizer"] = [described(wrapped.optimizer, wrapped.optimizer.defaults) for wrapped in accelerator._optimizers]
    schedules = [wrapped.scheduler for wrapped in accelerator._schedulers]
    ran["schedule"] = [described(schedule, schedule.state_dict()) for schedule in schedules]
    return {part: ", ".join(names) for part, names in ran.items() if any(names)}
