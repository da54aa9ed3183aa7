"""Back to the newest checkpoint, and around the images that made it necessary.

All that is drawn at random follows from the number of a sample. So a run can leave out the samples of one optimizer
step, for good, and the others stay what they were: it ends with the same bits whether or not it is killed in between.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .. import UserError, write_record

RECORD = "rollbacks.json"  # in the output folder: one entry for each time


def read(output_dir: Path) -> list[dict]:
    """Read what the run in this folder has left out, an entry for each time: ``global_batch``, ``step`` and why.

    Raises:
        UserError: the record is damaged.
    """
    file = output_dir / RECORD
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return [{**entry, "global_batch": int(entry["global_batch"])} for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}); expected a list of entries with global_batch. The "
            "newest checkpoint holds all but the last of them: delete the file, and the same command resumes from there"
        ) from error


def add(output_dir: Path, entries: list[dict]) -> None:
    """Leave these out, too, from now on."""
    found = read(output_dir)
    new = [entry for entry in entries if entry["global_batch"] not in {known["global_batch"] for known in found}]
    if new:
        write_record(output_dir / RECORD, [*found, *new])


def read_together(accelerator, output_dir: Path) -> list[dict]:
    """``read`` by the main process for all: another machine may see an older state of the file. Call it on all."""
    return broadcast_object_list([read(output_dir)])[0] if accelerator.num_processes > 1 else read(output_dir)


def global_batches(entries: list[dict]) -> Iterator[int]:
    """Yield the number of the global batch that each optimizer step takes: 0, 1, 2 ..., less what is left out."""
    left_out = {entry["global_batch"] for entry in entries}
    return (number for number in itertools.count() if number not in left_out)
