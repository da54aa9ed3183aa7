"""How a script ends: its exit codes, what it says about errors, and that nothing of a run stays behind.

torch is imported only where it is needed: a mistake in a flag is answered at once.
"""

import errno
import functools
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import NoReturn

from . import UserError, counted, optional, printable

UPLOAD_THREAD = "upload"  # name of a thread that the end of the process does not wait for
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_runs = []  # training runs that have begun in this process and are not closed
_restarts = 0  # how often this process has begun its run again


class RestartFromCheckpoint(Exception):
    """The run goes back to a checkpoint: ``main`` has to be called again."""


def restarted() -> bool:
    """Whether this run goes on by itself: after ``RestartFromCheckpoint``, or started again by a launcher."""
    return _restarts > 0 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def register(run) -> None:
    """Have ``run.close(again)`` called when the script's ``main`` ends."""
    close_runs()  # one that was left open, in this process
    _runs.append(run)


def close_runs(again: bool = False) -> None:
    """Close what is still open: signal handlers, trackers, the progress bar, the lock on the output folder."""
    while _runs:
        _runs.pop().close(again)


def training_script(main: Callable) -> Callable:
    """Decorate a script's ``main(args)``: whatever ends it, also in a notebook, the run that it began is closed."""

    @functools.wraps(main)
    def wrapper(args):
        global _restarts
        _restarts = 0
        while True:
            try:
                return main(args)
            except RestartFromCheckpoint:
                close_runs(again=True)
                _restarts += 1
            except Exception as error:
                stopped = [run for run in _runs if run.stop_signal and run.stop_signal.requested()]
                if not stopped or explain(error, args)[1]:
                    raise
                # The signal went to the whole process group, and a helper such as a compiler has ended first
                number, step = stopped[0].stop_signal.received, stopped[0].global_step
                print(
                    f"\nStopped by {signal.Signals(number).name} after {counted(step, 'optimizer step')}, with a "
                    f"{type(error).__name__} instead of a checkpoint. The same command resumes from the newest one.",
                    file=sys.stderr,
                )
                raise SystemExit(128 + number) from error
            finally:
                close_runs()
            gc.collect()  # the model of the attempt that ended

    return wrapper


def run_script(main: Callable, parse_args: Callable) -> NoReturn:
    """Call ``main(parse_args())`` and exit: with 0, its code, or 1 and one line for a mistake of the user."""
    code, final, args = 0, True, None  # final: started again, it would end in the same way
    try:
        args = parse_args()
        main(args)
    except SystemExit as request:
        code = request.code or 0
    except KeyboardInterrupt:  # during training, StopSignal receives it
        print("\nStopped by SIGINT before the first step", file=sys.stderr)
        code = 130
    except Exception as error:
        code, message, final = explain(error, args)
        if message:
            print(printable(f"error: {message}"), file=sys.stderr)
        else:
            traceback.print_exc()
    for ended in optional.collect("ended"):
        ended(code, final)
    # At once, where something may keep the process from ending: other processes, or an upload that was interrupted
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or any(
        thread.name == UPLOAD_THREAD for thread in threading.enumerate()
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def explain(error: Exception, args) -> tuple[int, str | None, bool]:
    """Find the exit code for an error, what the user can do about it, and whether a restart would meet it again.

    Returns:
        The message is None for what looks like a mistake of ours, which deserves a traceback.
    """
    from safetensors import SafetensorError

    if isinstance(error, UserError):
        return 1, str(error), True
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        resumes = "resumes from the newest checkpoint" if hasattr(args, "checkpointing_steps") else "continues"
        return 1, f"{error}. When this is fixed, the same command {resumes}", True
    for explain_more in optional.collect("explain"):
        if found := explain_more(error, args):
            return found
    return 1, None, False
