"""Setup of a process: accelerator, threads, process group and logging."""

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

store = None  # key-value store that the processes of this run share, or None for a single process


def start_process(mixed_precision: str | None, **options) -> Accelerator:
    """Set up threads and logging, make an Accelerator, and refuse unsupported configurations.

    Args:
        mixed_precision: ``no``, ``fp16`` or ``bf16``, or None for the value of the accelerate configuration.
        options: further arguments of ``Accelerator``.

    Raises:
        UserError: fp16 on a CPU, several processes without a process group, TPUs, or an engine that shards weights.
    """
    set_up_process()
    sys.stdout, sys.stderr = Lasting(sys.stdout), Lasting(sys.stderr)
    command = Path(f"/proc/{os.getppid()}/cmdline")  # On a CPU, accelerate does not pass on these settings
    launched = command.read_bytes().decode(errors="replace").split("\0") if os.access(command, os.R_OK) else []
    for engine in ("FSDP", "DeepSpeed", "Megatron_LM", "parallelism_config"):
        asked = os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "").lower() in ("true", "1")
        if asked or f"--use_{engine.lower()}" in launched:
            raise UserError(
                f"the accelerate configuration asks for {engine}. It is not supported, because the EMA needs unsharded "
                f"weights. Leave {engine} out. --multi_gpu gives each GPU all weights"
            )
    AcceleratorState._reset_state()  # An earlier run in a notebook may have used another precision
    # Other processes wait while one downloads data. During training, the watchdog has a shorter timeout
    group = InitProcessGroupKwargs(init_method="attempt://", timeout=timedelta(hours=2))
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group], **options)
    _set_up_logging(accelerator)
    use_all_cores(accelerator.device)
    if accelerator.device.type == "cuda":
        # The newer fp32_precision is not used: with it, torch 2.13 raises an error when code reads these attributes
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if accelerator.distributed_type == DistributedType.XLA:
        raise UserError("TPUs are not supported, because they are untested. Use GPUs or CPUs")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size != accelerator.num_processes:
        raise UserError(
            f"{world_size} processes were started, but they form no process group (the group of this process has size "
            f"{accelerator.num_processes}). They would train independently and write to the same folder. On a CPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU. On a CPU use bf16 or no")
    if accelerator.mixed_precision == "bf16" and not has_bf16(accelerator.device):
        faster = "--mixed_precision " + ("no" if accelerator.device.type == "cpu" else "fp16")
        logger.warning(f"{device_name(accelerator.device)} has no bf16 instructions. {faster} is probably faster.")
    return accelerator


def on_main_process(accelerator, action: Callable[[], Any]) -> Any:
    """Call ``action`` on the main process, and return its result on all processes. Call it on all.

    Raises:
        UserError: the action raised it on the main process. It is raised on all processes.
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
    """Find the other processes as torch does, with keys of the store that differ between restarts.

    The launcher's agent keeps one store over all restarts. In torch 2.13, a restarted process may read the address of
    an ended process from this store.
    """
    global store
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = torch.distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    yield store, rank, world_size


if torch.distributed.is_available():
    with contextlib.suppress(RuntimeError):  # This module was imported before in the same process
        torch.distributed.register_rendezvous_handler("attempt", _rendezvous)


class Lasting:
    """A text stream without errors, because a closed terminal or pipe must not end a run before its checkpoint."""

    def __init__(self, stream):
        self.stream = stream.stream if isinstance(stream, Lasting) else stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


class _AboveTheBar(logging.Handler):
    """A handler that writes log lines above the progress bar."""

    def emit(self, record):
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _set_up_logging(accelerator) -> None:
    lines = dict(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.basicConfig(**lines, level=logging.WARNING, handlers=[_AboveTheBar()], force=True)
    diffusers.utils.logging.disable_progress_bar()  # Two small files need no progress bar
    logging.getLogger("huggingface_hub").propagate = False  # It has its own handler, so lines would appear twice
    logging.getLogger("utils").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if not accelerator.is_main_process:
        diffusers.utils.logging.set_verbosity_error()
