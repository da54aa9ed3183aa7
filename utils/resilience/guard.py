"""What guards a training run: a watchdog, and rollbacks where a step went wrong."""

import itertools
import logging
import math
import platform
import statistics
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

WINDOW = 100  # optimizer steps whose gradient norms the next one's is compared with
GRAD_NORM_DEVIATIONS = None  # K: also roll back where a norm is over K standard deviations above the mean of those


class Guard:
    """Takes part in a training run, see ``training.loop.Run``.

    Args:
        max_rollbacks: in the whole run.
        hang_timeout: seconds, see ``Watchdog``; 0 for never.
    """

    def __init__(self, max_rollbacks: int, hang_timeout: float):
        self.max_rollbacks, self.hang_timeout = max_rollbacks, hang_timeout
        self.watchdog, self.norms = None, []

    def claimed(self, run) -> None:
        if run.accelerator.num_processes > 1:
            check_shared(run.accelerator, run.output_dir)

    def state(self, run) -> dict:
        return {"rollbacks": rollbacks.read(run.output_dir), "last_grad_norms": self.norms}

    def load_state(self, run, state: dict) -> None:
        if run.accelerator.is_main_process:
            rollbacks.add(run.output_dir, state.get("rollbacks", []))  # if it is of another folder
        self.norms = state.get("last_grad_norms", [])
        for optimizer in run.accelerator._optimizers:  # where earlier versions kept them
            self.norms = optimizer.param_groups[0].pop("grad_norms", self.norms)

    def started(self, run) -> None:
        self.watchdog = Watchdog(run.accelerator, self.hang_timeout)

    def global_batches(self, run) -> Iterator[int]:
        """Yield the number of the global batch that each optimizer step of the whole run takes."""
        return rollbacks.global_batches(rollbacks.read_together(run.accelerator, run.output_dir))

    def stepped(self, run) -> None:
        self.watchdog.heartbeat(run.global_step)

    def checked(self, run, step: int, loss: float, norm: float) -> None:
        """Roll back where the norm of a gradient is much larger than those before.

        Raises:
            UserError, RestartFromCheckpoint: see ``Run.diverged``.
        """
        if not GRAD_NORM_DEVIATIONS or not self.max_rollbacks or not math.isfinite(norm):
            return
        if len(self.norms) == WINDOW:
            limit = statistics.fmean(self.norms) + GRAD_NORM_DEVIATIONS * statistics.stdev(self.norms)
            if norm > limit:
                run.diverged(step, loss, norm, f"expected a norm of at most {limit:g}")
        self.norms = [*self.norms, norm][-WINDOW:]

    def diverged(self, run, problem: str, entry: dict) -> tuple[str, str]:
        """Roll back, if a rollback is left.

        Args:
            entry: for the record, but for the global batch.

        Returns:
            Why there is no rollback, and what to do instead, for the message: one of them is empty.

        Raises:
            RestartFromCheckpoint: the step is recorded as left out; ``main`` has to be called again.
        """
        found = rollbacks.read_together(run.accelerator, run.output_dir)
        if len(found) >= self.max_rollbacks:
            if found:
                return f", and --max_rollbacks {self.max_rollbacks} are used up, see {rollbacks.RECORD}", ""
            return "", "--max_rollbacks leaves the images of such steps out, or "
        number = next(itertools.islice(rollbacks.global_batches(found), entry["step"] - 1, None))
        logger.warning(
            f"{problem}. Back to the newest checkpoint, or to the start if there is none; its images, global "
            f"batch {number}, are left out ({len(found) + 1} of {self.max_rollbacks} rollbacks)"
        )
        if run.accelerator.is_main_process:
            rollbacks.add(run.output_dir, [{"global_batch": number, **entry}])
        run.accelerator.wait_for_everyone()  # the record is there when it is read
        raise RestartFromCheckpoint("the run goes back to its newest checkpoint: call main(args) again")

    def closed(self, run) -> None:
        if self.watchdog:
            self.watchdog.end()


def check_shared(accelerator, folder: Path) -> None:
    """Refuse a folder of which each machine has its own: each would save a part of every checkpoint.

    Raises:
        UserError: on every process.
    """
    token = folder / broadcast_object_list([f".tmp-seen-by-all-{uuid.uuid4().hex}"])[0]
    if accelerator.is_main_process:
        token.touch()
    accelerator.wait_for_everyone()
    deadline = time.monotonic() + 2
    while not (seen := token.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)  # a network's file system may be late
    found = gather_object([(seen, f"process {accelerator.process_index} on {platform.node()}")])
    if accelerator.is_main_process:
        token.unlink()
    blind = [name for seen, name in found if not seen]
    if blind:
        raise UserError(
            f"--output_dir {folder} must be on a file system that all machines share: what {found[0][1]} writes there, "
            f"{', '.join(blind)} does not see. Choose a shared folder"
        )
