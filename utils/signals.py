"""Requests to stop a process, and its heartbeat.

A request to stop leads to a checkpoint, and then to an exit code that names the reason. The heartbeat counts progress,
so that a watchdog can tell a slow run from one that hangs.
"""

import contextlib
import os
import signal
import sys
import threading
import time

import torch

# Ctrl-C, kill, a closed terminal, and Slurm's --signal=USR1@300. Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

count = 0  # number of calls of ``progress``
activity = "starting"
compiling = 0  # number of running compilations of --compile


def progress(doing: str) -> None:
    """Record progress. Every long task calls this for each of its parts.

    Args:
        doing: name of the current activity: ``data``, ``step``, ``sampling``, ``saving`` ...
    """
    global count, activity
    count, activity = count + 1, doing


def watch_compilations() -> None:
    """Count running compilations, because they record no progress."""
    from torch._dynamo.callback import callback_handler

    def change(by: int) -> None:
        global compiling
        compiling += by
        progress("compiling")

    if not callback_handler.start_callbacks:
        callback_handler.register_start_callback(lambda _: change(1))
        callback_handler.register_end_callback(lambda _: change(-1))


class Interrupted(Exception):
    """Sampling or measuring was abandoned, because the run was asked to stop."""


class StopSignal:
    """Signal handlers: the first signal asks for a checkpoint at the end of the step, a later one exits at once.

    A launcher may deliver one signal twice within moments, or SIGTERM after the terminal's SIGINT. Both count as one
    signal. Ignored signals stay ignored, as ``nohup`` requires. In a notebook the second signal raises
    KeyboardInterrupt, because the kernel has to survive. Outside the main thread Python allows no handlers, so there
    are none.

    Args:
        accelerator: accelerator of this process.
        promise: effect of a signal, for the line that confirms it.
    """

    GRACE = 2.0  # seconds in which a repeated signal is the same request; five times that for another signal
    _current = None  # the instance that has the handlers
    _kept = None  # the instance of a run that rolls back to a checkpoint

    def __init__(self, accelerator, promise="stopping after this step, with a checkpoint"):
        self.accelerator, self.promise, self.received, self.at = accelerator, promise, None, 0.0
        self.previous = {}
        if StopSignal._current:
            self.previous = StopSignal._current.previous
        if StopSignal._kept:
            self.received, self.at = StopSignal._kept.received, StopSignal._kept.at
        StopSignal._current, StopSignal._kept = self, None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN:
                    self.previous.setdefault(number, handler)
                    signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            if self.accelerator.is_main_process:
                name = signal.Signals(number).name
                # os.write, because a handler must not call print while print is running
                with contextlib.suppress(OSError):  # the terminal is closed, or tee has ended first
                    os.write(2, f"\n{name}: {self.promise}. Send the signal again after 2 s to stop at once\n".encode())
        elif time.monotonic() - self.at > self.GRACE * (1 if number == self.received else 5):
            if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
                raise KeyboardInterrupt
            os._exit(128 + number)

    def requested(self) -> bool:
        """Return whether this process has received a signal. Long tasks check this before each evaluation."""
        return self.received is not None

    def check(self, global_step: int = 0) -> int | None:
        """Return the signal that any process has received, or None. Call it on all processes, after each step.

        Several processes gather their signals. On GPUs they do so every tenth step, because this waits for the device.
        """
        number = self.received
        if self.accelerator.num_processes > 1:
            if self.accelerator.device.type != "cpu" and global_step % 10:
                return None
            received = torch.tensor([self.received or 0], device=self.accelerator.device)
            number = int(self.accelerator.gather(received).max()) or None
        return number

    def keep(self) -> None:
        """Pass the received signal to the next ``StopSignal``, because the run rolls back to a checkpoint."""
        StopSignal._kept = self

    def restore(self) -> None:
        """Restore the previous handlers."""
        if StopSignal._current is not self:
            return
        StopSignal._current = None
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.previous.items():
                signal.signal(number, handler)
