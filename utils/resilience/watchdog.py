"""Detection of a run that hangs: abort it, and print where it hangs.

Progress is an event, such as a batch, a sampling step, or a piece of a file while saving. A run hangs if none of its
processes makes progress for ``--hang_timeout`` seconds. Waiting longer does not help in this case, because a process
is stopped or stuck, or a file system is gone.
"""

import contextlib
import faulthandler
import os
import platform
import signal
import sys
import threading
import time
from pathlib import Path

from .. import signals
from ..training import process
from . import EXIT_PEER_LOST

COMPILING = 10  # factor on the time limit while --compile compiles


class Watchdog:
    """Two threads: one exchanges progress with the other processes, and one checks the time.

    Two threads are needed because the first may wait forever for a process that has stopped. A process that was
    itself suspended, by Ctrl-Z or with its machine, does not count as hanging.

    Args:
        accelerator: ``Accelerator`` of this process.
        seconds: seconds without progress of any process, until this one prints the stack traces of its threads and
            exits with ``EXIT_PEER_LOST``; 0: never.
    """

    def __init__(self, accelerator, seconds: float):
        self.rank, self.world_size, self.seconds = accelerator.process_index, accelerator.num_processes, seconds
        self.step, self.progress_at, self.silent, self.ended = 0, 0.0, {}, threading.Event()
        self.interval = min(5.0, seconds / 10)

    def heartbeat(self, global_step: int) -> None:
        """Note the end of an optimizer step. The first call starts the threads, because downloads come before it."""
        self.step = max(self.step, global_step)
        if self.progress_at or not self.seconds:
            return
        self.progress_at = time.monotonic()
        for task in (self._watch, self._share_progress)[: min(2, self.world_size)]:
            threading.Thread(target=task, daemon=True, name="watchdog").start()

    def end(self) -> None:
        """Stop watching."""
        self.ended.set()

    def _watch(self) -> None:
        count, woken_at = signals.count, time.monotonic()
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            # Either there was progress, or this process was suspended
            if count != signals.count or now - woken_at > self.interval + self.seconds / 2:
                count, self.progress_at = signals.count, now
            woken_at = now
            if now - self.progress_at > self.seconds * (COMPILING if signals.compiling else 1):
                self._abort()

    def _share_progress(self) -> None:
        """Add to a number that all processes share. If it does not change, find out which of them do not answer."""
        if process.store:
            with contextlib.suppress(RuntimeError):  # the process that keeps the store may have ended
                self._exchange(process.store.clone())

    def _exchange(self, store) -> None:
        store.set(f"watchdog/name/{self.rank}", f"{platform.node()} {os.getpid()}")
        reported, total, pulses = 0, 0, {}
        while True:
            store.add(f"watchdog/{self.rank}", 1)
            count = signals.count
            before, total, reported = total, store.add("watchdog", count - reported), count
            if total != before:
                self.progress_at, self.silent, pulses = time.monotonic(), {}, {}
            else:
                first, others = not pulses, [rank for rank in range(self.world_size) if rank != self.rank]
                heard = {rank: store.add(f"watchdog/{rank}", 0) for rank in others}
                silent = [rank for rank, pulse in heard.items() if pulses.setdefault(rank, pulse) == pulse > 0]
                self.silent = {} if first else {rank: store.get(f"watchdog/name/{rank}").decode() for rank in silent}
            if self.ended.wait(self.interval):
                return

    def _abort(self) -> None:
        try:
            self._report()
        finally:  # also if the terminal is closed
            os._exit(EXIT_PEER_LOST)

    def _report(self) -> None:
        """Print the state of this process, and kill stopped processes of this run on this machine."""
        silent = "".join(f" Process {rank} does not answer." for rank in self.silent)
        where = f"process {self.rank} of {self.world_size} on {platform.node()}"
        print(
            f"\nerror: no progress for {self.seconds:g} s (--hang_timeout): {where} has done {self.step} "
            f"optimizer steps and is in: {signals.activity}.{silent} The threads of this process:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        print("The same command resumes from the newest checkpoint.", file=sys.stderr, flush=True)
        for machine, pid in (name.rsplit(" ", 1) for name in self.silent.values()):
            with contextlib.suppress(OSError):  # the process has ended, or this is not Linux
                parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                if machine == platform.node() and int(parent) == os.getppid():  # it belongs to this run
                    os.kill(int(pid), signal.SIGKILL)  # a stopped process ends only by this signal
