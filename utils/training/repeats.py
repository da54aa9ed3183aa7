"""What a run does every so many steps: which of it is due, also where the run stopped before it was done."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .. import write_record

DONE = "done.json"  # in the output folder: the step at which each thing was done last


class Repeats:
    """Things to repeat, and a record of the steps at which they were done.

    The record is written after a thing is done. A run that resumes at a checkpoint does what is due at that step and is
    not in the record. What is not in the record of an earlier version counts as done.

    Args:
        accelerator: of this process.
        folder: of the record.
        global_step: optimizer steps done.
    """

    def __init__(self, accelerator, folder: Path, global_step: int):
        self.accelerator, self.file, self.global_step = accelerator, folder / DONE, global_step
        record = {}
        if accelerator.is_main_process and self.file.is_file():
            record = json.loads(self.file.read_text(encoding="utf-8"))
        self.record = broadcast_object_list([record])[0]
        self.all, self.done = {}, {}

    def add(self, name: str, every: int, action: Callable[[], None], at_start: bool, at_end: bool) -> None:
        """Repeat ``action`` every so many optimizer steps, and perhaps before the first and after the last."""
        default = self.global_step or (-1 if at_start else 0)
        self.all[name] = (every, action, at_end)
        self.done[name] = min(self.record.get(name, default), self.global_step)

    def due(self, step: int, is_last: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the name and the action of what is due at this step and is not done; call ``note`` after each."""
        for name, (every, action, at_end) in self.all.items():
            if (at_end if is_last else step % every == 0) and self.done[name] < step:
                yield name, action

    def note(self, name: str, step: int) -> None:
        """Record that a thing is done."""
        self.done[name] = step
        self.write()

    def write(self) -> None:
        """Write the record, on the main process."""
        if self.accelerator.is_main_process:
            write_record(self.file, self.done)
