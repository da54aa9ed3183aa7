"""Rollback to the newest checkpoint, and the record of the batches that a run skips.

Random numbers depend only on the seed, their purpose and the sample id. Therefore a run can skip the samples of one
optimizer step, and nothing changes for the others. It ends with the same bits whether or not it is killed in between.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .. import UserError, write_record

RECORD = "rollbacks.json"  # in the output folder, with an entry for each rollback


def read(output_dir: Path) -> list[dict]:
    """Read the rollbacks of the run in this folder: ``global_batch``, ``step``, ``loss`` and ``grad_norm`` of each.

    Raises:
        UserError: the record is damaged.
    """
    file = output_dir / RECORD
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        return [{**entry, "global_batch": int(entry["global_batch"])} for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}). Expected a list of entries with global_batch. The "
            "newest checkpoint holds the entries that existed when it was saved. To resume with those, delete the file"
        ) from error


def add(output_dir: Path, entries: list[dict]) -> None:
    """Add entries to the record, so that their batches are skipped, too."""
    found = read(output_dir)
    new = [entry for entry in entries if entry["global_batch"] not in {known["global_batch"] for known in found}]
    if new:
        write_record(output_dir / RECORD, [*found, *new])


def read_together(accelerator, output_dir: Path) -> list[dict]:
    """Read the record on the main process, because other machines may see an older file. Call it on all processes."""
    return broadcast_object_list([read(output_dir)])[0] if accelerator.num_processes > 1 else read(output_dir)


def global_batches(entries: list[dict]) -> Iterator[int]:
    """Yield the number of the global batch of each optimizer step: 0, 1, 2 ..., without the skipped ones."""
    skipped = {entry["global_batch"] for entry in entries}
    return (number for number in itertools.count() if number not in skipped)
