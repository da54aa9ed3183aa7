"""Actions that a run repeats at regular steps, and a record of them that survives a stop."""

from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .. import read_record, write_record

DONE = "done.json"  # file in the output folder with the last step of each action


class Repeats:
    """Actions to repeat, and a record of the step at which each was last done.

    The record is written after each action. A run that resumes at a checkpoint does the actions that are due at that
    step and not in the record. Actions that the record does not contain count as done.

    Args:
        accelerator: accelerator of this process.
        folder: folder of the record.
        global_step: number of completed optimizer steps.
    """

    def __init__(self, accelerator, folder: Path, global_step: int):
        self.accelerator, self.file, self.global_step = accelerator, folder / DONE, global_step
        record = {}
        if accelerator.is_main_process and self.file.is_file():
            record = read_record(self.file)
        self.record = broadcast_object_list([record])[0]
        self.all, self.done = {}, {}

    def add(self, name: str, every: int, action: Callable[[], None], at_start: bool, at_end: bool) -> None:
        """Repeat ``action`` every ``every`` optimizer steps, and optionally before the first and after the last."""
        default = self.global_step or (-1 if at_start else 0)
        self.all[name] = (every, action, at_end)
        self.done[name] = min(self.record.get(name, default), self.global_step)

    def due(self, step: int, is_last: bool) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield name and action of those that are due at this step and not done. Call ``note`` after each."""
        for name, (every, action, at_end) in self.all.items():
            if (at_end if is_last else step % every == 0) and self.done[name] < step:
                yield name, action

    def note(self, name: str, step: int) -> None:
        """Record that an action is done at this step."""
        self.done[name] = step
        self.write()

    def write(self) -> None:
        """Write the record, on the main process."""
        if self.accelerator.is_main_process:
            write_record(self.file, self.done)
