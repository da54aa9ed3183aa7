"""What a process is told and tells: requests to stop, and signs of life.

A request to stop leads to a checkpoint first, then to an exit code that says why. Signs of life are counted, so that a
watchdog can tell a slow run from one that hangs.
"""

import os
import signal
import sys
import threading
import time

import torch

# Ctrl-C; the polite kill; the terminal is gone; Slurm's --signal=USR1@300. Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

count = 0  # of signs of life
activity = "starting"
compiling = 0  # compilations of --compile that have begun and not ended


def progress(doing: str) -> None:
    """Record that something has moved. Whatever takes long calls this for each of its parts.

    Args:
        doing: what begins or continues now: ``data``, ``step``, ``sampling``, ``saving`` ...
    """
    global count, activity
    count, activity = count + 1, doing


def watch_compilations() -> None:
    """Count compilations while they last, which give no signs of life."""
    from torch._dynamo.callback import callback_handler

    def change(by: int) -> None:
        global compiling
        compiling += by
        progress("compiling")

    if not callback_handler.start_callbacks:
        callback_handler.register_start_callback(lambda _: change(1))
        callback_handler.register_end_callback(lambda _: change(-1))


class Interrupted(Exception):
    """Sampling or measuring was given up, for the run is asked to stop."""


class StopSignal:
    """Signals ask for a checkpoint at the end of the step; a second one, later, ends at once.

    A launcher may deliver one signal twice within moments, or SIGTERM after the terminal's SIGINT; that counts once.
    Signals that are ignored stay so: that is how ``nohup`` works. In a notebook the second signal raises
    KeyboardInterrupt, for its kernel has to live on. Outside the main thread Python takes no handlers: there are none.

    Args:
        accelerator: of this process.
        promise: what a signal brings about, for the line that confirms it.
    """

    GRACE = 2.0  # seconds in which a repeated signal is the same request; five times that for another one
    _current = None  # the one that has the handlers
    _kept = None  # that of a run that goes back to a checkpoint

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
            if self.accelerator.is_main_process:  # os.write, for print may not be interrupted by itself
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: {self.promise}; send it again after 2 s to stop at once\n".encode())
        elif time.monotonic() - self.at > self.GRACE * (1 if number == self.received else 5):
            if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
                raise KeyboardInterrupt
            os._exit(128 + number)

    def requested(self) -> bool:
        """Whether this process has received a signal: asked before each model call of what takes long."""
        return self.received is not None

    def check(self, global_step: int = 0) -> int | None:
        """Return the signal that any process has received, or None. Call it on all, after each optimizer step.

        Several processes ask each other; on GPUs every tenth step only, for the answer waits for the device.
        """
        number = self.received
        if self.accelerator.num_processes > 1:
            if self.accelerator.device.type != "cpu" and global_step % 10:
                return None
            received = torch.tensor([self.received or 0], device=self.accelerator.device)
            number = int(self.accelerator.gather(received).max()) or None
        return number

    def keep(self) -> None:
        """Hand what it has received to the next ``StopSignal``, for the run goes back to a checkpoint."""
        StopSignal._kept = self

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        if StopSignal._current is not self:
            return
        StopSignal._current = None
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.previous.items():
                signal.signal(number, handler)
