"""Checkpoints that are written atomically.

``checkpoint-N`` is a pipeline that ``from_pretrained`` loads, with ``training_state/`` to resume from. Its files are
written to a staging folder beside it. A manifest with the size and SHA-256 of every file is written last. Then one
rename publishes the checkpoint, and older ones are removed. Loading a checkpoint runs no code from it: weights are
safetensors, the optimizer and the random state are read with ``weights_only=True``, and the rest is JSON.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file

from .. import UserError, counted, randomness, sync
from ..hardware import device_name
from ..saved import AUTOENCODERS, net_folder
from ..signals import progress
from .process import on_main_process

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "trainer_state.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or is not complete."""


def save_checkpoint(
    accelerator, output_dir: Path, step: int, save_pipeline: Callable[[Path], None], state: dict, total_limit: int
) -> Path:
    """Publish ``checkpoint-<step>``. Call it on all processes, at the end of an optimizer step.

    Args:
        save_pipeline: function that saves the pipeline in the given folder, called on the main process.
        state: values that JSON can hold, returned by ``read_state``.
        total_limit: number of the newest complete checkpoints to keep.

    Returns:
        Folder of the checkpoint.

    Raises:
        CheckpointError: saving failed on any process. It is raised on all, and earlier checkpoints are unchanged.
    """
    final, staging = (output_dir / f"checkpoint-{step}", output_dir / f".tmp-checkpoint-{step}")
    space = _space(accelerator, output_dir)

    def stage():
        _check_finite(accelerator)
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
            if space[1] < space[0]:
                raise OSError("the disk is full")
            staging.mkdir(parents=True)

    def publish():
        if accelerator.is_main_process:
            save_pipeline(staging)
            facts = {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
            facts |= {"randomness": randomness.VERSION, "device": device_name(accelerator.device)}
            _write_json(staging / STATE, {**state, **facts, "global_step": step})
            _write_manifest(staging)
            _link_autoencoder(staging, output_dir)
            if final.exists():  # The existing checkpoint is damaged
                os.rename(final, final.with_name(f".tmp-removed-{final.name}"))
            os.rename(staging, final)
            sync(output_dir)
            _prune(output_dir, total_limit)
            remove_leftovers(output_dir)

    advice = "The checkpoint needs about {:.0f} MiB, and {:.0f} MiB of its disk were free".format(
        *(n / 2**20 for n in space)
    )
    try:
        for action in (stage, lambda: accelerator.save_state(str(staging / "training_state")), publish):
            on_all_processes(accelerator, f"{final} cannot be saved", action, advice)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(staging, ignore_errors=True)
    logger.info(f"Saved {final}")
    return final


def find_checkpoint(accelerator, output_dir: Path, request: str | None, prefer_newest: bool = False) -> Path | None:
    """Remove the leftovers of a killed run, and return the checkpoint to resume from, the same on every process.

    Args:
        request: path of a checkpoint. ``latest`` or None selects the newest complete one, if there is one.
        prefer_newest: whether to prefer the newest complete checkpoint if it is newer than ``request``, because a
            restarted run has saved it.

    Returns:
        Path of the checkpoint, or None if there is no complete checkpoint and no path was given.

    Raises:
        CheckpointError: the given checkpoint does not exist or is not complete.
    """
    if accelerator.is_main_process:
        remove_leftovers(output_dir)
    path = on_main_process(accelerator, lambda: _find(output_dir, request, prefer_newest))
    if path is None:
        logger.info(f"Starting a new run in {output_dir}.")
    return path


def _find(output_dir: Path, request: str | None, prefer_newest: bool) -> Path | None:
    if request not in (None, "latest"):
        steps = re.search(r"checkpoint-(\d+)", Path(request).name)
        newest = _find(output_dir, None, False) if prefer_newest else None
        if newest and (not steps or int(newest.name.split("-")[1]) > int(steps[1])):
            return newest
        verify_checkpoint(Path(request))
        return Path(request)
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            logger.warning(f"Skipping a checkpoint that is damaged or cannot be read. {error}")
    if request == "latest":
        logger.info(f"--resume_from_checkpoint latest: {output_dir} has no complete checkpoint.")
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders named ``checkpoint-<number>``, sorted by number, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[1]))


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing, damaged or unreadable. The message names the first one.
    """
    try:
        _verify(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _verify(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {path}: there is no such folder. Expected .../checkpoint-N")
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {MANIFEST} is missing or damaged") from error
    state_files = {file.relative_to(path).as_posix() for file in path.glob("training_state/**/*") if file.is_file()}
    for name in sorted(state_files - set(files)):  # accelerate would load them, too
        raise CheckpointError(
            f"{path} is damaged: {name} is not in its manifest. Remove that file if you know its origin"
        )
    for name, (size, digest) in files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise CheckpointError(f"{path} is damaged: {name} lies outside of the checkpoint")
        if not file.is_file():
            raise CheckpointError(f"{path} is not a complete checkpoint: {name} is missing")
        if file.stat().st_size != size or file_hash(file) != digest:
            raise CheckpointError(f"{path} is damaged: {name} has changed since it was saved")


def read_state(path: Path) -> dict:
    """Return the ``state`` of ``save_checkpoint``, with ``global_step`` and facts such as ``num_processes``."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def load_checkpoint(accelerator, path: Path, state: dict) -> None:
    """Load weights, optimizer, schedule and random state into what ``accelerator`` prepared.

    Args:
        path: checkpoint that ``find_checkpoint`` returned.
        state: values that ``read_state`` returned.

    Raises:
        CheckpointError: the checkpoint does not fit the model or cannot be loaded.
    """
    if state["randomness"] != randomness.VERSION:
        logger.warning(
            f"{path} was saved by a version that drew other noise. The run resumes, but its result differs "
            "from that of an uninterrupted run."
        )
    if state["num_processes"] != accelerator.num_processes:
        logger.warning(
            f"{path} was saved by {counted(state['num_processes'], 'process')}, but this run has "
            f"{accelerator.num_processes}. Samples and learning rates stay the same, but rounding differs."
        )
    if state["mixed_precision"] != accelerator.mixed_precision:
        logger.warning(
            f"{path} was saved with mixed precision {state['mixed_precision']!r}, but this run has "
            f"{accelerator.mixed_precision!r}. The run resumes, but not bit for bit."
        )
    if state.get("device") not in (None, device_name(accelerator.device)):
        logger.warning(
            f"{path} was saved on {state['device']}, but this run has {device_name(accelerator.device)}. "
            "Rounding differs."
        )
    scaler = accelerator.scaler
    if not (path / "training_state" / "scaler.pt").exists():
        accelerator.scaler = None  # The precision was another one, so the scaler of fp16 starts with its initial state
    try:
        accelerator.load_state(str(path / "training_state"))  # This uses weights_only, so no code runs
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # The manifest fits, so the script has changed, or the files were made by hand
        # torch's message has a line for each weight
        lines = [line.strip(" \t.") for line in str(error).splitlines() or [""]]
        advice = ""
        if "loading state_dict" in lines[0]:
            advice = ". It holds another network. Use that network in the script, or choose another --output_dir"
        raise CheckpointError(
            f"{path} cannot be loaded: {type(error).__name__}: {' '.join(lines[:2])}{advice}"
        ) from error
    accelerator.scaler = scaler
    # A schedule may have another length than when it was saved, and therefore another rate
    for wrapped in accelerator._schedulers:
        schedule = wrapped.scheduler
        if not hasattr(schedule, "lr_lambdas"):  # Other schedules of torch load their length with their state
            continue
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # torchao's optimizers refuse another object
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        before, schedule._last_lr = schedule.get_last_lr()[0], rates
        if abs(before - rates[0]) > 1e-3 * max(before, rates[0]):
            logger.info(
                f"The learning rate changes from {before:.3g} to {rates[0]:.3g}, because its schedule has another "
                "length. --lr_scheduler constant_with_warmup does not depend on the length."
            )
    accelerator.step = 0  # Count of micro-steps, which is 0 at the end of an optimizer step


def archive_newer(output_dir: Path, path: Path | None, step: int) -> None:
    """Rename checkpoints that are not older than a run that starts, so that it does not take them for its own.

    Args:
        path: checkpoint from which the run resumes, which keeps its name, or None.
        step: number of optimizer steps that are done.
    """
    for newer in list_checkpoints(output_dir):
        if int(newer.name.split("-")[1]) >= step and not (path and newer.resolve() == path.resolve()):
            number, target = 0, newer.with_name(f"abandoned-{newer.name}")
            while target.exists():
                number += 1
                target = newer.with_name(f"abandoned-{newer.name}-{number}")
            os.rename(newer, target)
            start = f"resumes from {path}" if path else "starts from the beginning"
            logger.warning(f"{newer} is renamed to {target.name}, because this run {start}.")


def averaged_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the averaged weights of a checkpoint, from its model and, if there is one, its low-rank adapter."""
    averaged = {}
    for file in [*net_folder(path).glob("*.safetensors"), *path.glob("adapter/*.safetensors")]:
        averaged |= {name.removeprefix("base_model.model."): value for name, value in load_file(file).items()}
    return averaged


def on_all_processes(accelerator, problem: str, action: Callable[[], None], advice: str) -> None:
    """Run ``action`` on every process. If it fails on one, fail on all, so that no process waits for another.

    Args:
        problem: start of the error message.
        action: function to run.
        advice: end of the error message.

    Raises:
        CheckpointError: the action failed on a process.
    """
    progress("saving")
    try:
        action()
        failure = None
    except Exception as error:
        where = f"process {accelerator.process_index}: " if accelerator.num_processes > 1 else ""
        failure = f"{where}{type(error).__name__}: {error}"
    failures = [message for message in gather_object([failure]) if message]
    if failures:
        raise CheckpointError(
            f"{problem}: {failures[0]}. {advice}. Earlier checkpoints are intact. After the problem is solved, "
            "the same command resumes from the newest"
        )


def _space(accelerator, output_dir: Path) -> tuple[float, int]:
    """Return the bytes that a checkpoint needs and those that are free.

    A checkpoint needs 10 % more than the last one or, without one, the size of weights, average and two moments. Frozen
    weights have neither average nor moments.
    """
    earlier = list_checkpoints(output_dir)
    if earlier:
        needed = sum(file.stat().st_size for file in earlier[-1].rglob("*") if file.is_file()) * 1.1
    else:
        weights = [weight for model in accelerator._models for weight in model.parameters()]
        needed = sum((4 if weight.requires_grad else 1) * weight.nbytes for weight in weights)
    return needed, shutil.disk_usage(output_dir).free


def _check_finite(accelerator) -> None:
    for model in accelerator._models:
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(
                    f"{name} holds numbers that are not finite. Start a new run with a lower --learning_rate"
                )


def _write_manifest(folder: Path) -> None:
    def hash_and_sync(path: Path) -> list | None:
        if path.is_file():
            shutil.copymode(folder / STATE, path)  # safetensors makes files that other users cannot read
        entry = [path.stat().st_size, file_hash(path)] if path.is_file() else None
        sync(path)
        return entry

    paths = sorted(folder.rglob("*"))
    with ThreadPoolExecutor() as pool:  # Hashing takes half of the time of saving
        entries = dict(
            zip((path.relative_to(folder).as_posix() for path in paths), pool.map(hash_and_sync, paths), strict=True)
        )
    _write_json(folder / MANIFEST, {"files": {name: entry for name, entry in entries.items() if entry}})
    sync(folder / MANIFEST)
    sync(folder)


def _link_autoencoder(folder: Path, output_dir: Path) -> None:
    """Replace the autoencoder by hard links to that of the newest checkpoint, because it is frozen and may be large."""
    earlier = next((path for path in reversed(list_checkpoints(output_dir)) if (path / MANIFEST).is_file()), None)
    if earlier is None:
        return
    # The earlier checkpoint may be damaged, and the file system may have no hard links
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known, new = (json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"] for path in (earlier, folder))
        for name, entry in new.items():
            shared = name.startswith(tuple(f"{part}/" for part in AUTOENCODERS)) and known.get(name) == entry
            if shared and file_hash(earlier / name) == entry[1]:
                link = folder / f".tmp-{Path(name).name}"
                os.link(earlier / name, link)
                os.replace(link, folder / name)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def file_hash(*files: Path) -> str:
    """Return the SHA-256 of the concatenated files, sorted by name: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
                progress("saving")
    return digest.hexdigest()


def _prune(output_dir: Path, total_limit: int) -> None:
    complete = [path for path in list_checkpoints(output_dir) if (path / MANIFEST).is_file()]
    for path in complete[:-total_limit]:
        try:
            # It is renamed first, so that no checkpoint is ever half removed under its name
            removed = path.with_name(f".tmp-removed-{path.name}")
            os.rename(path, removed)
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning(f"{path} cannot be removed: {error}")


def remove_leftovers(output_dir: Path) -> None:
    """Remove the files of interrupted writes and removals."""
    for path in output_dir.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
