"""A run's surroundings: the accelerator, the output folder, signals, and how it begins and ends."""

import contextlib
import ctypes
import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration, broadcast_object_list
from tqdm.auto import tqdm

from . import UserError, checkpoints

logger = logging.getLogger(__name__)

ARGUMENTS = "training_args.json"
# Flags that may change when a run is resumed: they say where, how fast and how often, not what is computed. The batch
# geometry may change too, as long as the global batch stays what it was.
FREE_ON_RESUME = {
    "cache_images", "checkpointing_steps", "checkpoints_total_limit", "compile", "config", "dataloader_num_workers",
    "gradient_accumulation_steps", "gradient_checkpointing", "logging_dir", "logging_steps", "max_bad_images",
    "max_train_steps", "mixed_precision", "num_inference_steps", "num_samples", "num_train_epochs", "output_dir",
    "report_to", "resume_from_checkpoint", "sample_batch_size", "sample_steps", "sampler", "train_batch_size",
}  # fmt: skip


def make_accelerator(args) -> Accelerator:
    """The Accelerator, with logging set up and what cannot work refused.

    Raises:
        UserError: fp16 on a CPU, several processes that do not know of each other, an unknown or missing tracker.
    """
    trackers = _check_trackers(args.report_to)
    set_up_process()
    # The schedule counts optimizer steps. By default accelerate steps it once per process, which no schedule's length
    # survives unless it is multiplied by the number of processes.
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=trackers or None,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=str(Path(args.output_dir) / args.logging_dir)
        ),
        step_scheduler_with_optimizer=False,
    )
    _set_up_logging(accelerator)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise UserError(
            f"{world_size} processes were started, but they form no group (this one counts "
            f"{accelerator.num_processes}): they would train apart and write to the same folder. On a CPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not _cpu_has_bf16():
        logger.warning("This CPU has no bf16 instructions: --mixed_precision no is probably faster than bf16")
    if args.allow_tf32 and accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def _check_trackers(report_to: str) -> list[str]:
    if report_to in ("none", "all"):
        return [] if report_to == "none" else ["all"]
    known, available = (LoggerType.list(), [str(tracker) for tracker in get_available_trackers()])
    names = [name.strip() for name in report_to.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--report_to {name}: unknown tracker; expected none, {', '.join(known)}")
        if name not in available:
            raise UserError(f"--report_to {name}: its package is not installed; pip install {name}, or choose none")
    return names


def set_up_process() -> None:
    """On Linux: die with the launcher, which does not pass SIGTERM on; keep freed memory instead of returning it."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # started by `accelerate launch`
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    with contextlib.suppress(AttributeError):  # not glibc
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: activations are not mapped and unmapped, page by page, every step
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class _AboveTheBar(logging.Handler):
    """Log lines above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(self.format(record), file=sys.stderr)


def _set_up_logging(accelerator) -> None:
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.WARNING,
        handlers=[_AboveTheBar()],
        force=True,
    )
    logging.getLogger("utils").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not accelerator.is_main_process:
        diffusers.utils.logging.set_verbosity_error()


def _cpu_has_bf16() -> bool:
    checks = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(check() for check in checks if check) or platform.machine() in ("arm64", "aarch64")


def claim_output_dir(accelerator, args) -> tuple[Path, int | None]:
    """Make the output folder this run's, or find that it holds this run already.

    Returns:
        The folder, and the number of optimizer steps after which a run in it finished, or None.

    Raises:
        UserError: the folder cannot be written, holds something else, or a run with other settings.
    """
    folder, answer = Path(args.output_dir), [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _inspect_output_dir(folder, args)
        except UserError as error:
            answer[1] = str(error)
        except (OSError, ValueError) as error:
            answer[1] = f"--output_dir {folder} cannot be used: {error}. Choose another folder"
    finished_at, problem = broadcast_object_list(answer)
    if problem:
        raise UserError(problem)
    return folder, finished_at


def _inspect_output_dir(folder: Path, args) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder} cannot be written to. Choose another folder")
    if (folder / ARGUMENTS).is_file():
        found = json.loads((folder / ARGUMENTS).read_text())
        check_settings(f"--output_dir {folder}", found["arguments"], args._asdict())
        return found.get("finished_at_step")
    if any(not path.name.startswith(".tmp-") for path in folder.iterdir()):
        raise UserError(
            f"--output_dir {folder} is not empty, and not the output of these scripts. Choose another folder"
        )
    return None


def check_settings(where: str, old: dict, new: dict) -> None:
    """Refuse to go on with a run whose results would depend on when the settings changed.

    Args:
        where: the folder, for the message.
        old, new: flags and facts by name; those in ``FREE_ON_RESUME`` may differ.

    Raises:
        UserError: lists what differs.
    """
    names = sorted({*old, *new} - FREE_ON_RESUME)
    changed = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names if old.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(
            f"{where} holds a run with other settings: {'; '.join(changed)}. Give the old values to go on with it, or "
            "another --output_dir to start afresh"
        )


def resume(accelerator, args, facts: dict) -> dict | None:
    """Load the checkpoint that the flags ask for into what ``accelerator`` prepared.

    Args:
        facts: further settings that must not have changed, such as the number of images.

    Returns:
        The saved state, with ``path`` and ``global_step``; None for a run from scratch.
    """
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        checkpoints.remove_leftovers(output_dir)
    path = checkpoints.find_checkpoint(accelerator, output_dir, args.resume_from_checkpoint)
    if path is None:
        logger.info(f"Starting from scratch in {output_dir}.")
        return None
    state = checkpoints.read_state(path)
    check_settings(str(path), state["settings"], {**args._asdict(), **facts})
    checkpoints.load_checkpoint(accelerator, path, state)
    logger.info(f"Resuming from {path}, {state['global_step']} optimizer steps done.")
    return {**state, "path": path}


def start(accelerator, args, name: str, first_step: int, **facts) -> None:
    """Say what is about to be trained, write ``training_args.json`` and open the trackers.

    Args:
        name: the trackers' project; TensorBoard's folder is ``<output_dir>/<logging_dir>/<name>``.
        first_step: optimizer steps done; what TensorBoard has from later steps is hidden.
        facts: what was found out, to be recorded beside the flags.
    """
    write_arguments(accelerator, args, **facts)
    logger.info("Training: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    logger.info(f"{device_name(accelerator.device)} x {accelerator.num_processes}, {accelerator.mixed_precision}")
    tensorboard = {"purge_step": first_step + 1} if first_step else {}
    values = {**args._asdict(), **facts}
    scalars = {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in values.items() if v is not None}
    try:
        accelerator.init_trackers(name, config=scalars, init_kwargs={"tensorboard": tensorboard})
    except Exception as error:  # each tracker has its own: no login, no network, no folder
        raise UserError(f"--report_to {args.report_to} cannot start: {type(error).__name__}: {error}") from error


def write_arguments(accelerator, args, **facts) -> None:
    """Write ``training_args.json``: the flags, what was found out, the versions and the machine."""
    if not accelerator.is_main_process:
        return
    content = {
        "arguments": args._asdict(),
        **facts,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": device_name(accelerator.device),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, accelerate)},
    }
    path = Path(args.output_dir) / ARGUMENTS
    temporary = path.with_name(f".tmp-{ARGUMENTS}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def device_name(device: torch.device) -> str:
    """For example "NVIDIA H100" or "CPU, 2 threads"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def finish(accelerator, args, global_step: int, **facts) -> None:
    """Record that the run is complete, and close the trackers."""
    write_arguments(accelerator, args, **facts, finished_at_step=global_step)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def say_finished(accelerator, args, global_step: int, again: bool = False) -> None:
    """The last lines: where the grid and the pipeline are, and what to do next."""
    folder, script = args.output_dir, os.path.relpath(sys.argv[0])
    accelerator.print(
        f"\n{'This run was finished before' if again else 'Finished'}, after {global_step} optimizer steps."
        f"\n  samples      {Path(folder) / 'samples.png'}"
        f"\n  pipeline     DDPMPipeline.from_pretrained({str(folder)!r})"
        f"\n  curves       {_command('tensorboard')} --logdir {folder}"
        f"\n  train on     the same command with a larger --max_train_steps"
        f"\n  your images  {_command('accelerate')} launch {script} --train_data_dir DIR --output_dir outputs/mine"
    )


def _command(name: str) -> str:
    """How to call a program of this environment: by name, or by path where it is not activated."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)


def say_stopped(accelerator, args, global_step: int, max_train_steps: int, number: int) -> int:
    """How to go on after a signal. Returns the exit code: 143 for SIGTERM, 130 for SIGINT."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.print(
        f"\nStopped by {signal.Signals(number).name} after {global_step} of {max_train_steps} optimizer steps; "
        f"{Path(args.output_dir) / f'checkpoint-{global_step}'} is complete.\nThe same command goes on from there."
    )
    return 128 + number


class StopSignal:
    """SIGTERM and SIGINT ask for a checkpoint at the end of the step; a second one, later, ends at once.

    A launcher may deliver one signal twice within moments; that counts once.
    """

    GRACE = 2.0  # seconds in which a repeated signal is the same request

    def __init__(self, accelerator):
        self.accelerator, self.received, self.at = accelerator, None, 0.0
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
        elif time.monotonic() - self.at > self.GRACE:
            os._exit(128 + number)

    def check(self, global_step: int) -> int | None:
        """The signal that any process has received, or None. Call it on all processes, after every optimizer step.

        Several processes ask each other every tenth step only: the answer waits for the device.
        """
        if self.accelerator.num_processes == 1:
            return self.received
        if global_step % 10:
            return None
        number = torch.tensor(self.received or 0, device=self.accelerator.device)
        return int(self.accelerator.gather(number[None]).max()) or None

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_script(main: Callable[[tuple], int | None], args) -> None:
    """Call ``main(args)`` and exit: with its code, or with 1 and one line for a mistake that the user can mend."""
    try:
        sys.exit(main(args))
    except UserError as error:
        sys.exit(f"error: {error}")
