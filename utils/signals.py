"""Stopping on request: a checkpoint first, then an exit code that says why."""

import os
import signal
import time

import torch

from . import rollbacks
from .watchdog import Watchdog

# Ctrl-C; the polite kill; the terminal is gone; Slurm's --signal=USR1@300. Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class StopSignal:
    """Signals ask for a checkpoint at the end of the step; a second one, later, ends at once.

    A launcher may deliver one signal twice within moments, or SIGTERM after the terminal's SIGINT; that counts once.
    Signals that are ignored stay so: that is how ``nohup`` works. It also feeds the ``Watchdog``, which ends a run that
    nobody could stop in this way any more.

    Args:
        accelerator: of this process.
        promise: what a signal brings about, for the line that confirms it.
        hang_timeout: seconds, see ``Watchdog``.
    """

    GRACE = 2.0  # seconds in which a repeated signal is the same request; five times that for another one

    def __init__(self, accelerator, promise="stopping after this step, with a checkpoint", hang_timeout: float = 0):
        self.accelerator, self.promise, self.received, self.at = accelerator, promise, None, 0.0
        self.watchdog = Watchdog(accelerator, hang_timeout)
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._handle) for number in heard}
        for number, handler in self.previous.items():  # of a run before that had no end, but a rollback or an error
            before = getattr(handler, "__self__", None)
            if isinstance(before, StopSignal):
                self.previous[number] = before.previous[number]
                if rollbacks.gone_back and before.received:
                    self.received, self.at = before.received, before.at
        rollbacks.gone_back = False

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
            if self.accelerator.is_main_process:  # os.write, for print may not be interrupted by itself
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: {self.promise}; send it again after 2 s to stop at once\n".encode())
        elif time.monotonic() - self.at > self.GRACE * (1 if number == self.received else 5):
            os._exit(128 + number)

    def requested(self) -> bool:
        """Whether this process has received a signal: asked before each model call of what takes long."""
        return self.received is not None

    def check(self, global_step: int) -> int | None:
        """The signal that any process has received, or None. Call it on all processes, after every optimizer step.

        Several processes ask each other; on GPUs every tenth step only, for the answer waits for the device.
        """
        self.watchdog.feed(global_step)
        number = self.received
        if self.accelerator.num_processes > 1:
            if self.accelerator.device.type != "cpu" and global_step % 10:
                return None
            received = torch.tensor([self.received or 0], device=self.accelerator.device)
            number = int(self.accelerator.gather(received).max()) or None
        return number

    def restore(self) -> None:
        """Put the handlers back that were there before, and watch no longer."""
        self.watchdog.end()
        for number, handler in self.previous.items():
            signal.signal(number, handler)
