"""The surroundings of a process: the accelerator, its threads, its place among other processes, its log."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast_object_list
from tqdm.auto import tqdm

from .. import UserError, printable
from ..hardware import device_name, has_bf16, set_up_process, use_all_cores

logger = logging.getLogger(__name__)

store = None  # what the processes of this run have in common, beside torch's own keys; None for a single process


def start_process(mixed_precision: str | None, **options) -> Accelerator:
    """Make an Accelerator, with threads and logging set up and what cannot work refused.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``; None for what the accelerate configuration says.
        options: for ``Accelerator``.

    Raises:
        UserError: fp16 on a CPU, several processes that do not know of each other, an engine that cuts up the weights.
    """
    set_up_process()
    command = Path(f"/proc/{os.getppid()}/cmdline")  # on a CPU, accelerate passes nothing of it on
    launched = command.read_bytes().decode(errors="replace").split("\0") if os.access(command, os.R_OK) else []
    for engine in ("FSDP", "DeepSpeed", "Megatron_LM", "parallelism_config"):
        asked = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() in ("true", "1")
        if asked or f"--use_{engine.lower()}" in launched:
            problem = (
                f"the accelerate configuration asks for {engine}, which cuts up weights that the average needs whole"
            )
            raise UserError(f"{problem}; leave it out: --multi_gpu gives each GPU all of them")
    AcceleratorState._reset_state()  # an earlier run in this Python process, a notebook's, may have another precision
    # Others wait while one downloads; while it trains, the watchdog is faster
    group = InitProcessGroupKwargs(init_method="attempt://", timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group], **options)
    _set_up_logging(accelerator)
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


def on_main_process(accelerator, action: Callable[[], Any]) -> Any:
    """Call ``action`` on the main process, and return on all what it returns. Call it on all.

    Raises:
        UserError: on all, if the action raises it on the main process.
    """
    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = error
    result, problem = broadcast_object_list(answer)
    if problem:
        raise problem
    return result


def _rendezvous(url: str, timeout: timedelta, **options):
    """torch's way to find the other processes, apart from what those before a restart have left in the same store.

    The launcher's agent keeps one store over all restarts, and in torch 2.13 a restarted process may read in it where
    one that is gone had listened.
    """
    global store
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    yield store, rank, world_size


if torch.distributed.is_available():
    with contextlib.suppress(RuntimeError):  # this module was loaded before, and is again
        torch.distributed.register_rendezvous_handler("attempt", _rendezvous)


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
