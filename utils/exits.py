"""How a script ends: its exit codes, advice about errors, and whether it is worth starting again.

torch is imported only where it is needed: a mistake in a flag is answered at once.
"""

import errno
import gc
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from . import UserError, printable

LOST = 124  # exit code: nothing moved any more, or another process of the run is gone; the same command goes on
UPLOAD = "upload"  # name of a thread that the end of the process does not wait for
LAUNCHER = os.getppid()
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Socket closed")


class Again(Exception):
    """``main`` has to be called again: the run goes back to a checkpoint, see ``rollbacks``."""


def run_script(main: Callable, args) -> NoReturn:
    """Call ``main(args)`` and exit: with 0, its code, or 1 and one line for a mistake that the user can correct."""
    code, final = 0, True  # final: started again, it would end in the same way
    try:
        while True:
            try:
                main(args)
                break
            except Again:
                close_bars()
                for thread in _uploads():
                    thread.join()
            gc.collect()  # what the run had until then
    except SystemExit as request:
        code = request.code or 0
    except KeyboardInterrupt:  # later on, StopSignal has it
        print("\nStopped by SIGINT" + " before training began" * hasattr(args, "checkpointing_steps"), file=sys.stderr)
        code = 130
    except Exception as error:
        close_bars()
        lost, advice = _lost(error), _advice(error, args)
        code, final = (LOST if lost else 1), advice is not None and not lost
        if lost or advice:
            print(printable(f"error: {lost or advice}"), file=sys.stderr)
        else:
            traceback.print_exc()
    if code and final:
        not_again()
    # At once, where something may keep the process from ending: other processes, or an upload that is still under way
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or _uploads():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _uploads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == UPLOAD]


def not_again() -> None:
    """Keep the launcher from starting a run again (``--max_restarts``) that would end in the same way.

    Its agent, torchrun's, restarts whatever does not end with 0, be it a mistake in a flag; only a signal stops it.
    """
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) - int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if left <= 0 or not hasattr(os, "getsid") or os.getsid(0) != os.getpid():  # the agent's workers lead their sessions
        return
    if os.getppid() == LAUNCHER:  # it lives: otherwise the parent is somebody else by now
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which it passes on to all
        os.kill(LAUNCHER, signal.SIGTERM)


def close_bars() -> None:
    """A progress bar is printed once more when it is closed: before the last lines, not after them."""
    from tqdm.auto import tqdm

    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _lost(error: Exception) -> str | None:
    """What to say where a collective operation failed because another process is gone; None for other errors."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError):
        return None
    if not any(words in str(error) for words in GONE):
        return None
    reason = re.sub(r"\[\S*/[\w.]+:\d+\] *", "", _first_line(error))  # without the place in torch's sources
    address = re.search(r"\[([\d.]+|[\da-f:]+)\]:\d+", reason)
    where = f", at {address[1]}," if address else ""
    return (
        f"another process of this run{where} has ended or cannot be reached; what it has said itself is above, or in "
        f"its machine's log. The same command goes on from the newest checkpoint ({reason})"
    )


def _advice(error: Exception, args) -> str | None:
    """What the user can do about an error; None for what looks like a mistake of ours."""
    import torch
    from safetensors import SafetensorError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        resumes = " from the newest checkpoint" if "checkpointing_steps" in vars(args) else ""
        return f"{error}. When this is fixed, the same command goes on{resumes}"
    # torch's error on a CPU is a RuntimeError like any other
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error):
        return _less_memory(error, args)
    return None


def _less_memory(error: Exception, args) -> str:
    """What to change, with values that keep the images per optimizer step, and so the learning rate."""
    flags, advice = vars(args), []
    batch, sampled = flags.get("train_batch_size", 1), flags.get("sample_batch_size", 1)
    if batch > 1:
        smaller = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        micro_steps = flags["gradient_accumulation_steps"] * batch // smaller
        advice.append(
            f"--train_batch_size {smaller} --gradient_accumulation_steps {micro_steps} (the same images in each "
            "optimizer step, the same learning rate: the same result)"
        )
    if flags.get("gradient_checkpointing") is False:
        advice.append("--gradient_checkpointing")
    if sampled > 1:
        advice.append(f"if it happened while samples were drawn, --sample_batch_size {sampled // 2}")
    advice.append("a smaller --resolution" if "resolution" in flags else "a smaller model")
    first_line = _first_line(error) if str(error) else "No memory is left."
    return f"{first_line} Add to the same command {'; or '.join(advice)}"
