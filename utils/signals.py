"""Stopping on request: a checkpoint first, then an exit code that says why."""

import os
import signal
import time

import torch

# Ctrl-C; the polite kill; the terminal is gone; Slurm's --signal=USR1@300. Windows has the first two
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class StopSignal:
    """Signals ask for a checkpoint at the end of the step; a second one, later, ends at once.

    A launcher may deliver one signal twice within moments, or SIGTERM after the terminal's SIGINT; that counts once.
    Signals that are ignored stay so: that is how ``nohup`` works.
    """

    GRACE = 2.0  # seconds in which a repeated signal is the same request; five times that for another one

    def __init__(self, accelerator, promise: str = "stopping after this step, with a checkpoint"):
        self.accelerator, self.promise, self.received, self.at = accelerator, promise, None, 0.0
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._handle) for number in heard}

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
        if self.accelerator.num_processes == 1:
            return self.received
        if self.accelerator.device.type != "cpu" and global_step % 10:
            return None
        number = torch.tensor(self.received or 0, device=self.accelerator.device)
        return int(self.accelerator.gather(number[None]).max()) or None

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
