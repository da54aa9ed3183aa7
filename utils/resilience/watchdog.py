"""A run that hangs is ended, and says where it was.

Progress is counted, not time: a batch, a model call while sampling, a piece of a file while saving. A run hangs when
none of its processes has made any for ``--hang_timeout`` seconds. What it waits for then never comes by itself: another
process that is stopped or stuck, a file system that is gone.
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

COMPILING = 10  # times as long may nothing move while --compile compiles


class Watchdog:
    """Two threads: one tells the other processes of progress and hears of theirs, one looks at the clock.

    They are two because the first may wait for ever for a process that has stopped. A process that is itself suspended,
    by Ctrl-Z or with its machine, has not hung.

    Args:
        accelerator: of this process.
        seconds: without progress of any process, until this one prints the stacks of its threads and exits with
            ``EXIT_PEER_LOST``; 0 for never.
    """

    def __init__(self, accelerator, seconds: float):
        self.rank, self.world_size, self.seconds = accelerator.process_index, accelerator.num_processes, seconds
        self.step, self.moved_at, self.silent, self.ended = 0, 0.0, {}, threading.Event()
        self.interval = min(5.0, seconds / 10)

    def heartbeat(self, global_step: int) -> None:
        """Note the end of an optimizer step; the first one starts the watch, for before it there are downloads."""
        self.step = max(self.step, global_step)
        if self.moved_at or not self.seconds:
            return
        self.moved_at = time.monotonic()
        for task in (self._watch, self._share_progress)[: min(2, self.world_size)]:
            threading.Thread(target=task, daemon=True, name="watchdog").start()

    def end(self) -> None:
        """Stop watching."""
        self.ended.set()

    def _watch(self) -> None:
        count, woken_at = signals.count, time.monotonic()
        while not self.ended.wait(self.interval):
            now = time.monotonic()
            if count != signals.count or now - woken_at > self.interval + self.seconds / 2:  # it was suspended itself
                count, self.moved_at = signals.count, now
            woken_at = now
            if now - self.moved_at > self.seconds * (COMPILING if signals.compiling else 1):
                self._abort()

    def _share_progress(self) -> None:
        """One number that all processes add to; whether each still adds is asked only when it does not move."""
        if process.store:
            with contextlib.suppress(RuntimeError):  # the process that keeps the store has ended
                self._exchange(process.store.clone())

    def _exchange(self, store) -> None:
        store.set(f"watchdog/name/{self.rank}", f"{platform.node()} {os.getpid()}")
        told, total, pulses = 0, 0, {}
        while True:
            store.add(f"watchdog/{self.rank}", 1)
            moved = signals.count
            before, total, told = total, store.add("watchdog", moved - told), moved
            if total != before:
                self.moved_at, self.silent, pulses = time.monotonic(), {}, {}
            else:
                first, others = not pulses, [rank for rank in range(self.world_size) if rank != self.rank]
                heard = {rank: store.add(f"watchdog/{rank}", 0) for rank in others}
                silent = [rank for rank, pulse in heard.items() if pulses.setdefault(rank, pulse) == pulse > 0]
                self.silent = {} if first else {rank: store.get(f"watchdog/name/{rank}").decode() for rank in silent}
            if self.ended.wait(self.interval):
                return

    def _abort(self) -> None:
        silent = "".join(f" Process {rank} does not answer either." for rank in self.silent)
        where = f"process {self.rank} of {self.world_size} on {platform.node()}"
        print(
            f"\nerror: nothing has moved for {self.seconds:g} s (--hang_timeout): {where} has done {self.step} "
            f"optimizer steps and is in: {signals.activity}.{silent} Its threads:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        print("The same command resumes from the newest checkpoint.", file=sys.stderr, flush=True)
        for machine, pid in (name.rsplit(" ", 1) for name in self.silent.values()):
            with contextlib.suppress(OSError):  # it has ended, or this is not Linux
                parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                if machine == platform.node() and int(parent) == os.getppid():  # of this run, and stopped: only this
                    os.kill(int(pid), signal.SIGKILL)  # ends it
        os._exit(EXIT_PEER_LOST)
