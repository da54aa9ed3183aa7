"""A run's surroundings: the accelerator, logging, the trackers, the first lines and the last ones."""

import contextlib
import importlib.metadata
import logging
import math
import os
import re
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from tqdm.auto import tqdm

from .. import UserError, printable
from ..exits import LAUNCHER, close_bars
from ..hardware import device_name, has_bf16, set_up_process, use_all_cores
from ..watchdog import close_trackers
from .curves import draw_curves
from .output_dir import check_finished, how_to_load, read_arguments, release_output_dir, write_arguments, write_finished
from .trackers import check_trackers, start_trackers

logger = logging.getLogger(__name__)

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"  # what the tests have run with


def make_accelerator(args) -> Accelerator:
    """The Accelerator of a training run, see ``start_process``.

    Raises:
        UserError: also for an unknown or missing tracker.
    """
    trackers = check_trackers(args.report_to)
    # The schedule counts optimizer steps. By default accelerate steps it once per process, which no schedule's length
    # survives unless it is multiplied by the number of processes.
    accelerator = start_process(
        args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(args.output_dir, logging_dir=str(Path(args.output_dir, args.logging_dir))),
        step_scheduler_with_optimizer=False,
    )
    if accelerator.device.type == "cuda":
        # The names of before: with fp32_precision, torch 2.13 raises an error where something asks by these names
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def start_process(mixed_precision: str | None, **options) -> Accelerator:
    """An Accelerator, with threads and logging set up and what cannot work refused.

    Raises:
        UserError: fp16 on a CPU, several processes that do not know of each other, an engine that cuts up the weights.
    """
    set_up_process()
    command = Path(f"/proc/{LAUNCHER}/cmdline")  # on a CPU, accelerate passes nothing of it on
    launched = command.read_bytes().decode(errors="replace").split("\0") if os.access(command, os.R_OK) else []
    for engine in ("FSDP", "DeepSpeed", "Megatron_LM", "parallelism_config"):
        asked = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() in ("true", "1")
        if asked or f"--use_{engine.lower()}" in launched:
            said = f"the accelerate configuration asks for {engine}, which cuts up weights that the average needs whole"
            raise UserError(f"{said}; leave it out: --multi_gpu gives each GPU all of them")
    AcceleratorState._reset_state()  # of a run before in this Python process, a notebook's, in another precision
    # Others wait while one downloads; while it trains, the Watchdog is faster
    group = InitProcessGroupKwargs(init_method="attempt://", timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group], **options)
    _set_up_logging(accelerator)
    _check_versions()
    use_all_cores(accelerator.device)
    if accelerator.distributed_type == DistributedType.XLA:
        raise UserError("TPUs are not supported: nothing here was made for or run on one; take GPUs or CPUs")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise UserError(
            f"{world_size} processes were started, but they form no group (this one counts "
            f"{accelerator.num_processes}): they would work apart and write to the same folder. On a CPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; on a CPU use bf16 or no")
    if accelerator.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        faster = "--mixed_precision " + ("no" if accelerator.device.type == "cpu" else "fp16")
        logger.warning(f"{device_name(accelerator.device)} has no bf16 instructions: {faster} is probably faster")
    return accelerator


def _rendezvous(url: str, timeout: timedelta, **options):
    """torch's way to find the other processes, apart from what those before a restart have left in the same store.

    The launcher's agent keeps one store over all restarts, and in torch 2.13 a restarted process may read in it where
    one that is gone had listened.
    """
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    yield store, rank, world_size


if torch.distributed.is_available():
    with contextlib.suppress(RuntimeError):  # this module was loaded before, and is again
        torch.distributed.register_rendezvous_handler("attempt", _rendezvous)


def _check_versions() -> None:
    """One line about packages of other versions than requirements.txt pins; a further release of one counts as it."""
    pinned = REQUIREMENTS.read_text(encoding="utf-8") if REQUIREMENTS.is_file() else ""
    others = []
    for name, tested in re.findall(r"^([\w-]+)==([\w.]+)", pinned, re.M):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every script needs each
            version = importlib.metadata.version(name)
            if version.split("+")[0].split(".")[:2] != tested.split(".")[:2]:
                others.append(f"{name} {version} (tested: {tested})")
    if others:
        logger.warning(f"Not tested with {', '.join(others)}. If something fails: pip install -r requirements.txt")


class _AboveTheBar(logging.Handler):
    """Log lines above a progress bar instead of through it."""

    def emit(self, record):
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _set_up_logging(accelerator) -> None:
    lines = dict(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.basicConfig(**lines, level=logging.WARNING, handlers=[_AboveTheBar()], force=True)
    diffusers.utils.logging.disable_progress_bar()  # two small files need no bar
    logging.getLogger("huggingface_hub").propagate = False  # it has its own handler; once is enough
    logging.getLogger("utils").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not accelerator.is_main_process:
        diffusers.utils.logging.set_verbosity_error()


def start(accelerator, args, name: str, first_step: int, **summary) -> None:
    """Log what is about to be trained, write ``training_args.json`` and open the trackers.

    Args:
        name: of the script.
        first_step: optimizer steps done.
        summary: what was found out, to be recorded beside the flags.
    """
    write_arguments(accelerator, args, name, **summary)
    logger.info("Training: " + ", ".join(f"{key} {value}" for key, value in summary.items() if value is not None))
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    logger.info(f"{accelerator.num_processes} x {device_name(accelerator.device)}, {precision}")
    start_trackers(accelerator, args, name, first_step, summary)


def total_train_steps(args, num_images: int | None, global_batch_size: int) -> int:
    """Optimizer steps of a run, the length of its learning-rate schedule too.

    Args:
        args: with ``max_train_steps``, or None for ``num_train_epochs`` passes over the data.
        num_images: in the data set; None for a stream, which needs ``max_train_steps``.
        global_batch_size: images per optimizer step: per process x accumulation x processes.
    """
    return args.max_train_steps or math.ceil(args.num_train_epochs * num_images / global_batch_size)


def finish(accelerator, args, global_step: int, max_train_steps: int, stop_signal) -> None:
    """Record that the run is complete, close the trackers and print the last lines; ``stop`` if a signal came."""
    if number := stop_signal.check(0):  # what was being drawn is missing
        stop(accelerator, args, global_step, max_train_steps, number)
    write_finished(accelerator, args, global_step)
    accelerator.wait_for_everyone()
    close_trackers(accelerator)
    if accelerator.is_main_process:
        try:
            draw_curves(Path(args.output_dir), Path(args.output_dir) / args.logging_dir)
        except Exception as error:  # a full disk, a damaged file, no matplotlib: the model is there
            logger.warning(f"curves.png could not be drawn: {type(error).__name__}: {error}")
    stop_signal.restore()
    print_finished(accelerator, args, global_step)


def print_finished(accelerator, args, global_step: int, data_settings: dict | None = None) -> None:
    """The last lines, where the grid and the pipeline are and what to do next; the folder is free for other runs.

    Args:
        data_settings: of a run that was found finished: its images must be these.
    """
    if data_settings:
        check_finished(args, data_settings)
    if not args.push_to_hub:  # which reads the folder after this
        release_output_dir(args)
    if not accelerator.is_main_process:
        return
    folder, script = Path(args.output_dir), os.path.relpath(sys.argv[0])
    pictures = sorted(path.name for path in folder.glob("*.png") if path.name != "samples.png")
    lines = {"samples": ", ".join([str(folder / "samples.png"), *pictures])}
    card = folder / "README.md"
    if not card.is_file() or "from_pretrained" in card.read_text(encoding="utf-8"):  # the card has what has been run
        load = how_to_load(folder, args.output_dir)
        labels = "[0], " if "custom_pipeline" in load else ""  # which it must be told
        lines["pipeline"] = f"{load}({labels}num_inference_steps={args.num_inference_steps})"
    if any((folder / args.logging_dir).glob("**/events.out.*")):
        lines["curves"] = f"{_command('tensorboard')} --logdir {args.output_dir}"
    lines["train longer"] = "the same command with a larger --max_train_steps"
    data = read_arguments(folder).get("public_data")  # a run of before does not say
    if data in ("mnist", "ylecun/mnist", "digits", "faces") and "ipykernel" not in sys.modules:
        config = os.path.join(os.path.dirname(script), "accelerate_config.yaml")
        options = f" --quiet --config_file {config}" if os.path.isfile(config) else ""
        images = "--train_data_dir DIR --output_dir outputs/mine"
        if base := vars(args).get("pretrained_model_name_or_path"):
            images += f" --pretrained_model_name_or_path {base} --learning_rate {args.learning_rate:g}"
        lines["your images"] = f"{_command('accelerate')} launch{options} {script} {images}"
    title = "This run was finished before" if data_settings else "Finished"
    print(f"\n{title}, after {global_step} optimizer steps.", *(f"  {k:12} {v}" for k, v in lines.items()), sep="\n")


def _command(name: str) -> str:
    """How to call a program of this environment: by name, or by path where it is not activated."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)


def stop(accelerator, args, global_step: int, max_train_steps: int, number: int) -> NoReturn:
    """Say how to go on after a signal, and exit with 128 + its number: 143 for SIGTERM, 130 for SIGINT."""
    close_trackers(accelerator)
    release_output_dir(args)
    close_bars()
    if accelerator.is_main_process:
        print(
            f"\nStopped by {signal.Signals(number).name} after {global_step} of {max_train_steps} optimizer steps; "
            f"{Path(args.output_dir) / f'checkpoint-{global_step}'} is complete.\nThe same command goes on from there.",
            flush=True,
        )
    accelerator.wait_for_everyone()  # whoever exits first may have the launcher end the others
    sys.exit(128 + number)
