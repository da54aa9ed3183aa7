"""The guard of a training run: a watchdog, and rollbacks after a bad step."""

import itertools
import logging
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object

from .. import UserError
from ..exits import RestartFromCheckpoint
from . import rollbacks
from .watchdog import Watchdog

logger = logging.getLogger(__name__)


class Guard:
    """Part of a training run that guards it, see ``training.loop.Run``.

    Args:
        max_rollbacks: maximum number of rollbacks in the whole run.
        hang_timeout: seconds without progress until the run aborts, see ``Watchdog``; 0: never.
    """

    def __init__(self, max_rollbacks: int, hang_timeout: float):
        self.max_rollbacks, self.hang_timeout = max_rollbacks, hang_timeout
        self.watchdog = None

    def claimed(self, run) -> None:
        if run.accelerator.num_processes > 1:
            check_shared(run.accelerator, run.output_dir)

    def state(self, run) -> dict:
        return {"rollbacks": rollbacks.read(run.output_dir)}

    def load_state(self, run, state: dict) -> None:
        if run.accelerator.is_main_process:
            rollbacks.add(run.output_dir, state.get("rollbacks", []))  # the checkpoint may come from another folder

    def started(self, run) -> None:
        self.watchdog = Watchdog(run.accelerator, self.hang_timeout)

    def global_batches(self, run) -> Iterator[int]:
        """Yield the number of the global batch of each optimizer step of the whole run."""
        return rollbacks.global_batches(rollbacks.read_together(run.accelerator, run.output_dir))

    def stepped(self, run) -> None:
        self.watchdog.heartbeat(run.global_step)

    def diverged(self, run, problem: str, entry: dict) -> tuple[str, str]:
        """Roll back, unless the run has used up its rollbacks.

        Args:
            problem: description of what went wrong.
            entry: entry for the record, without the global batch.

        Returns:
            The reason why there is no rollback, and advice on what to do, as parts of a message. One of them is empty.

        Raises:
            RestartFromCheckpoint: the step is recorded as skipped. ``main`` has to be called again.
        """
        found = rollbacks.read_together(run.accelerator, run.output_dir)
        if len(found) >= self.max_rollbacks:
            if found:
                return f", and --max_rollbacks {self.max_rollbacks} is reached, see {rollbacks.RECORD}", ""
            return "", "skip the images of such steps with --max_rollbacks, or "
        number = next(itertools.islice(rollbacks.global_batches(found), entry["step"] - 1, None))
        logger.warning(
            f"{problem}. Rolling back to the newest checkpoint, or to the start if there is none. The images of this "
            f"step, global batch {number}, are skipped ({len(found) + 1} of {self.max_rollbacks} rollbacks)"
        )
        if run.accelerator.is_main_process:
            rollbacks.add(run.output_dir, [{"global_batch": number, **entry}])
        run.accelerator.wait_for_everyone()  # until the record is written
        raise RestartFromCheckpoint("the run rolls back to its newest checkpoint: call main(args) again")

    def closed(self, run) -> None:
        if self.watchdog:
            self.watchdog.end()


def check_shared(accelerator, folder: Path) -> None:
    """Refuse an output folder that the machines do not share, because each would save only a part of a checkpoint.

    Raises:
        UserError: on every process.
    """
    token = folder / broadcast_object_list([f".tmp-seen-by-all-{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        token.touch()
    accelerator.wait_for_everyone()
    deadline = time.monotonic() + 2
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)  # a network file system may lag
    found = gather_object([(seen, f"process {accelerator.process_index} on {platform.node()}")])
    if accelerator.is_main_process:
        token.unlink()
    blind = [name for seen, name in found if not seen]
    if blind:
        raise UserError(
            f"--output_dir {folder} must be on a file system that all machines share. A file written by "
            f"{found[0][1]} is missing for {', '.join(blind)}. Choose a shared folder"
        )
