"""Back to the newest checkpoint, and around the images that made it necessary.

All that is drawn at random follows from the number of a sample. So a run can leave out the samples of one optimizer
step, for good, and the others stay what they were: it ends with the same bits whether or not it is killed in between.
"""

import itertools
import json
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from . import UserError, write_record
from .exits import Again
from .watchdog import close_trackers

logger = logging.getLogger(__name__)

RECORD = "rollbacks.json"  # in the output folder: one entry for each time
gone_back = False  # this process's run, and it has not begun again yet
WINDOW = 100  # optimizer steps whose gradient norms the next one's is compared with


class NonFiniteLoss(UserError):
    """The loss or the gradient is not a finite number, or the gradient is much larger than those before."""


def read(output_dir: str | Path) -> list[dict]:
    """What the run in this folder has left out, an entry for each time: ``global_batch``, ``step`` and why.

    Raises:
        UserError: the record is damaged.
    """
    file = Path(output_dir) / RECORD
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return [{**entry, "global_batch": int(entry["global_batch"])} for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}); expected a list of entries with global_batch. The "
            "newest checkpoint holds all but the last of them: delete the file, and the same command goes on from there"
        ) from error


def add(output_dir: str | Path, entries: list[dict]) -> None:
    """Leave these out, too, from now on."""
    found = read(output_dir)
    new = [entry for entry in entries if entry["global_batch"] not in {known["global_batch"] for known in found}]
    if new:
        write_record(Path(output_dir) / RECORD, [*found, *new])


def read_together(accelerator, output_dir: str | Path) -> list[dict]:
    """``read`` by the main process for all: another machine may see an older state of the file. Call it on all."""
    return broadcast_object_list([read(output_dir)])[0] if accelerator.num_processes > 1 else read(output_dir)


def global_batches(entries: list[dict]) -> Iterator[int]:
    """Which global batch of the order of samples each optimizer step takes: 0, 1, 2 ..., less what is left out."""
    left_out = {entry["global_batch"] for entry in entries}
    return (number for number in itertools.count() if number not in left_out)


def check(accelerator, args, global_step: int, losses: torch.Tensor, grad_norms: torch.Tensor) -> None:
    """Whether all is well with the last steps. Call it on all processes, with the same numbers.

    Args:
        args: ``max_rollbacks``, ``grad_norm_deviations``, ``output_dir``.
        global_step: optimizer steps done.
        losses, grad_norms: of the last of them, (steps,) on the CPU. In fp16 a gradient that overflows is not an error:
            the scaler skips that step.

    Raises:
        Again: the step is noted as left out; ``main`` is to be called again.
        NonFiniteLoss: there is something wrong, and no rollback is left.
    """
    optimizer = accelerator._optimizers[0] if args.grad_norm_deviations else None
    norms = optimizer.param_groups[0].get("grad_norms", []) if optimizer else []  # there, a checkpoint holds them
    for index, (loss, norm) in enumerate(zip(losses.tolist(), grad_norms.tolist(), strict=True)):
        step = global_step - len(losses) + 1 + index
        overflow = accelerator.mixed_precision == "fp16" and not math.isfinite(norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            _go_back(accelerator, args, step, loss, norm, "expected finite numbers")
        if optimizer and len(norms) == WINDOW and not overflow:
            limit = statistics.fmean(norms) + args.grad_norm_deviations * statistics.stdev(norms)
            if norm > limit:
                _go_back(accelerator, args, step, loss, norm, f"expected a norm of at most {limit:g}")
        if optimizer and not overflow:
            norms = [*norms, norm][-WINDOW:]
    if optimizer:
        optimizer.param_groups[0]["grad_norms"] = norms


def _go_back(accelerator, args, step: int, loss: float, norm: float, expected: str) -> None:
    found = read_together(accelerator, args.output_dir)
    problem = f"step {step}: loss {loss:g}, gradient norm {norm:g}; {expected}"
    if len(found) >= args.max_rollbacks:
        used_up = f", and --max_rollbacks {args.max_rollbacks} are used up, see {RECORD}" if found else ""
        others = "" if found else "--max_rollbacks leaves the images of such steps out, or "
        raise NonFiniteLoss(
            f"{problem}. No checkpoint was made of it{used_up}. The same command goes on from the last one, perhaps "
            f"with --mixed_precision no; if it happens again, {others}start anew with a lower --learning_rate"
        )
    number = next(itertools.islice(global_batches(found), step - 1, None))
    logger.warning(
        f"{problem}. Back to the newest checkpoint, or to the start if there is none; its images, global "
        f"batch {number}, are left out ({len(found) + 1} of {args.max_rollbacks} rollbacks)"
    )
    if accelerator.is_main_process:
        entry = dict(global_batch=number, step=step, loss=str(loss), grad_norm=str(norm), expected=expected)
        add(args.output_dir, [entry])
    close_trackers(accelerator)
    accelerator.wait_for_everyone()  # the record is there when it is read
    accelerator.free_memory()
    global gone_back
    gone_back = True
    raise Again("the run goes back to its newest checkpoint: call main(args) again")
