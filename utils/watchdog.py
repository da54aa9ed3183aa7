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
import types
from collections.abc import Iterator
from pathlib import Path

import torch

from .exits import LOST

PLACES = {  # what a process is doing, by the file of utils/ in which its main thread is, innermost first
    "checkpoints": "saving", "sampling": "sampling", "data": "data", "evaluation": "evaluation", "publishing": "upload",
}  # fmt: skip
_count = 0  # of this process's progress
_current = None  # the Watchdog of the run that this process is in


def progress() -> None:
    """Say that something has moved. Whatever takes long says so for each of its parts."""
    global _count
    _count += 1


def close_trackers(accelerator) -> None:
    """As ``accelerator.end_training``, but the process group is left alone: gloo may hang in destroying it.

    The watch ends before, if there is one: a tracker may have much to send.
    """
    if _current:
        _current.end()
    for tracker in accelerator.trackers:
        tracker.finish()


class Watchdog:
    """Two threads: one tells the other processes of progress and hears of theirs, one looks at the clock.

    They are two because the first may wait for ever for a process that has stopped. A process that is itself suspended,
    by Ctrl-Z or with its machine, has not hung. The watch ends with the function that made it, however that ends.

    Args:
        accelerator: of this process.
        seconds: without progress of any process, until this one prints the stacks of its threads and exits with
            ``LOST``; 0 for never.
    """

    def __init__(self, accelerator, seconds: float):
        self.rank, self.world_size, self.seconds = accelerator.process_index, accelerator.num_processes, seconds
        self.step, self.moved_at, self.silent, self.ended = 0, 0.0, {}, threading.Event()
        self.interval = min(5.0, seconds / 10)
        self.thread, self.main = threading.get_ident(), id(sys._getframe(2))  # a script's, that called StopSignal
        global _current
        if _current:
            _current.end()
        _current = self

    def feed(self, global_step: int) -> None:
        """The end of an optimizer step; the first one starts the watch, for before it there are downloads."""
        progress()
        self.step = max(self.step, global_step)
        if self.moved_at or not self.seconds:
            return
        self.moved_at = time.monotonic()
        for task in (self._look, self._talk)[: min(2, self.world_size)]:
            threading.Thread(target=task, daemon=True, name="watchdog").start()

    def end(self) -> None:
        """Watch no longer."""
        self.ended.set()

    def _look(self) -> None:
        count, woken_at = _count, time.monotonic()
        while not self.ended.wait(self.interval):
            if self.main not in map(id, self._stack()):
                return self.end()
            now = time.monotonic()
            if count != _count or now - woken_at > self.interval + self.seconds / 2:  # it was suspended itself
                count, self.moved_at = _count, now
            woken_at = now
            if now - self.moved_at > self.seconds:
                self._give_up()

    def _talk(self) -> None:
        """One number that all processes add to; whether each still adds is asked only when it does not move."""
        with contextlib.suppress(RuntimeError):  # whoever keeps the store has ended
            self._exchange(torch.distributed.distributed_c10d._get_default_store().clone())

    def _exchange(self, store) -> None:
        store.set(f"watchdog/name/{self.rank}", f"{platform.node()} {os.getpid()}")
        told, total, pulses = 0, 0, {}
        while True:
            store.add(f"watchdog/{self.rank}", 1)
            told, before, total = _count, total, store.add("watchdog", _count - told)
            if total != before:
                self.moved_at, self.silent, pulses = time.monotonic(), {}, {}
            else:
                first, others = not pulses, [rank for rank in range(self.world_size) if rank != self.rank]
                heard = {rank: store.add(f"watchdog/{rank}", 0) for rank in others}
                silent = [rank for rank, pulse in heard.items() if pulses.setdefault(rank, pulse) == pulse > 0]
                self.silent = {} if first else {rank: store.get(f"watchdog/name/{rank}").decode() for rank in silent}
            if self.ended.wait(self.interval):
                return

    def _give_up(self) -> None:
        silent = "".join(f" Process {rank} does not answer either." for rank in self.silent)
        where = f"process {self.rank} of {self.world_size} on {platform.node()}"
        print(
            f"\nerror: nothing has moved for {self.seconds:g} s (--hang_timeout): {where} has done {self.step} "
            f"optimizer steps and is in: {self._place()}.{silent} Its threads:",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        print("The same command goes on from the newest checkpoint.", file=sys.stderr, flush=True)
        for machine, pid in (name.rsplit(" ", 1) for name in self.silent.values()):
            with contextlib.suppress(OSError):  # it has ended, or this is not Linux
                parent = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
                if machine == platform.node() and int(parent) == os.getppid():  # of this run, and stopped: only this
                    os.kill(int(pid), signal.SIGKILL)  # ends it
        os._exit(LOST)

    def _stack(self) -> Iterator[types.FrameType]:
        """Frames of the thread that trains, the innermost first."""
        frame = sys._current_frames().get(self.thread)
        while frame:
            yield frame
            frame = frame.f_back

    def _place(self) -> str:
        for frame in self._stack():
            path = Path(frame.f_code.co_filename)
            for name in (path.stem, path.parent.name):
                if name in PLACES and "utils" in path.parts:
                    return PLACES[name]
        return "step"
