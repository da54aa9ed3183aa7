"""The end of a script: exit codes, messages about errors, and cleanup after a run.

No package that takes seconds to import is imported at the top, so that a mistake in a flag is reported at once.
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
_runs = []  # training runs that are open in this process
_restarts = 0  # number of times that this process has restarted its run


class RestartFromCheckpoint(Exception):
    """Request to call ``main`` again, because the run rolls back to a checkpoint."""


def restarted() -> bool:
    """Return whether this run was restarted automatically: by ``RestartFromCheckpoint``, or by a launcher."""
    return _restarts > 0 or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def register(run) -> None:
    """Register a run, so that ``run.close(again)`` is called when the script's ``main`` ends."""
    close_runs()  # an earlier run in this process may be open
    _runs.append(run)


def close_runs(again: bool = False) -> None:
    """Close all open runs: signal handlers, trackers, the progress bar, the lock on the output folder."""
    while _runs:
        _runs.pop().close(again)


def training_script(main: Callable) -> Callable:
    """Decorate a script's ``main(args)`` so that its run is always closed, even after an error in a notebook."""

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
                # The signal went to the whole process group, so a helper such as a compiler may have ended first
                number, step = stopped[0].stop_signal.received, stopped[0].global_step
                print(
                    f"\nStopped by {signal.Signals(number).name} after {counted(step, 'optimizer step')}, but a "
                    f"{type(error).__name__} prevented the checkpoint. The same command resumes from the newest one.",
                    file=sys.stderr,
                )
                raise SystemExit(128 + number) from error
            finally:
                close_runs()
            gc.collect()  # the model of the ended attempt is freed

    return wrapper


def run_script(main: Callable, parse_args: Callable) -> NoReturn:
    """Call ``main(parse_args())``, and exit with 0, the code of a ``SystemExit``, or ``explain``'s code after an error.

    A mistake of the user is shown as one line.
    """
    code, final, args = 0, True, None  # final: a restart would end in the same way
    try:
        args = parse_args()
        main(args)
    except SystemExit as request:
        code = request.code or 0
    except KeyboardInterrupt:  # during training, StopSignal receives it
        print("\nStopped by SIGINT", file=sys.stderr)
        code = 130
    except Exception as error:
        code, message, final = explain(error, args)
        if message:
            print(printable(f"error: {message}"), file=sys.stderr)
        else:
            traceback.print_exc()
    for ended in optional.collect("ended"):
        ended(code, final)
    # The process exits at once if other processes or an interrupted upload might keep it alive
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or any(
        thread.name == UPLOAD_THREAD for thread in threading.enumerate()
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def explain(error: Exception, args) -> tuple[int, str | None, bool]:
    """Return the exit code for an error, a message for the user, and whether a restart would fail again.

    The message is None for an error of the program, which is shown with a traceback.
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
