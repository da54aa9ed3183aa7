"""Rollback to the newest checkpoint, and exact skipping of the bad samples."""

import json
import shutil
import signal

import children
import pytest
from conftest import equal_weights, interrupt, scalars, tiny, train
from PIL import Image

from utils import UserError, exits
from utils.data.train_data import TrainData
from utils.resilience.rollbacks import RECORD, global_batches, read
from utils.signals import StopSignal

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FLAGS = ["--max_rollbacks=2", "--logging_steps=2", "--report_to=tensorboard"]
POISON = """
from utils.data.train_data import TrainData
original = TrainData.batches
def batches(self, *steps):
    for batch in original(self, *steps):
        batch["images"][batch["sample_ids"] // self.global_batch_size == 4] *= float("nan")
        yield batch
TrainData.batches = batches
"""


@pytest.fixture
def poisoned(monkeypatch):
    """Return a function that makes the images of given global batches, counted from 0, NaN."""
    original = TrainData.batches

    def poison(*numbers):
        def batches(self, *steps):
            for batch in original(self, *steps):
                if batch["sample_ids"][0] // self.global_batch_size in numbers:
                    batch["images"] *= float("nan")
                yield batch

        monkeypatch.setattr(TrainData, "batches", batches)

    return poison


def train_again(folder, *flags):
    """Train until the end, and return the number of rollbacks."""
    before = len(read(folder))
    assert train(folder, *flags) == 0
    return len(read(folder)) - before


def test_the_run_goes_around_what_is_not_finite_and_ends_as_if_it_had_never_been_there(tmp_path, poisoned, capsys):
    """Batch 4 is bad (step 5, after checkpoint-3), and so is batch 1 (step 2, before any checkpoint)."""
    poisoned(1, 4)
    assert train_again(tmp_path / "run", *FLAGS) == 2
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert [(entry["global_batch"], entry["step"]) for entry in record] == [(1, 2), (4, 4)]
    assert "nan" in record[0]["loss"] and "(2 of 2 rollbacks)" in capsys.readouterr().err

    # A run that skips these batches from the start, and so has no bad step
    assert train(tmp_path / "known", *FLAGS, "--max_train_steps=1") == 0
    shutil.rmtree(tmp_path / "known" / "checkpoint-1")
    (tmp_path / "known" / "model_index.json").unlink()  # as if the run had not finished
    (tmp_path / "known" / RECORD).write_text(json.dumps(record))
    assert train_again(tmp_path / "known", *FLAGS) == 0
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "known" / WEIGHTS)
    assert list(scalars(tmp_path / "run", "loss/train")) == [2, 4, 6]

    # Killed after the rollback
    interrupt(tmp_path / "run", "checkpoint-3")
    (tmp_path / "run" / WEIGHTS).unlink()
    assert train_again(tmp_path / "run", *FLAGS) == 0
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "known" / WEIGHTS)


def test_rollbacks_come_to_an_end(tmp_path, poisoned):
    poisoned(1, 2, 3)
    with pytest.raises(UserError, match=r"loss nan.*expected finite.*--max_rollbacks 2 is reached"):
        train_again(tmp_path / "run", *FLAGS)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(UserError, match=r"step 2: loss nan.*skip the images of such steps with --max_rollbacks"):
        train(tmp_path / "other", "--logging_steps=2")  # by default, the run stops


@pytest.mark.slow
def test_a_stream_reads_past_what_is_left_out(tmp_path, poisoned):
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for number in range(40):
        Image.new("L", (8, 8), number * 6).save(pictures / f"{number:02}.png")
    flags = [*FLAGS, "--train_batch_size=4", f"--train_data_dir={pictures}", "--streaming"]
    poisoned(4)
    assert train_again(run, *flags) == 1
    weights = (run / WEIGHTS).rename(tmp_path / "weights.safetensors")
    interrupt(run, "checkpoint-3")
    assert train_again(run, *flags) == 0  # the batches are 3, 5 and 6, not 3, 4 and 5
    assert equal_weights(run / WEIGHTS, weights)
    known = tmp_path / "known"
    known.mkdir()
    shutil.copy(run / RECORD, tmp_path / RECORD)
    assert train(known, *flags, "--max_train_steps=1") == 0
    shutil.rmtree(known / "checkpoint-1")
    (known / "model_index.json").unlink()
    shutil.move(tmp_path / RECORD, known / RECORD)
    assert train_again(known, *flags) == 0
    assert equal_weights(known / WEIGHTS, weights)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_several_processes_go_back_together(tmp_path, processes):
    """All processes roll back together. A run that is killed afterwards ends with the same bits."""
    flags = tiny(f"--output_dir={tmp_path / 'run'}", "--max_rollbacks=1")
    code, said = children.run(children.patched(POISON), *flags, processes=processes, folder=tmp_path)
    assert code == 0 and said.count("Rolling back to the newest checkpoint") == 1, said
    weights = (tmp_path / "run" / WEIGHTS).rename(tmp_path / "weights.safetensors")
    interrupt(tmp_path / "run", "checkpoint-3")
    code, said = children.run(children.patched(POISON), *flags, processes=processes, folder=tmp_path)
    assert code == 0 and "Rolling back" not in said, said
    assert equal_weights(tmp_path / "run" / WEIGHTS, weights)


@pytest.mark.parametrize("steps", [1, 10])
def test_a_signal_is_not_lost_when_the_run_goes_back(tmp_path, poisoned, monkeypatch, steps):
    """The signal comes before the bad step is found, at a point of the curves or by the check before saving. The run
    rolls back, and then stops at its next step."""
    flags = [*FLAGS, f"--logging_steps={steps}"]
    poisoned(4)
    original = StopSignal.check

    def check(self, global_step):
        if global_step == 4 + (steps > 1):
            signal.raise_signal(signal.SIGTERM)
            return None  # as between two checks on a GPU
        return original(self, global_step)

    monkeypatch.setattr(StopSignal, "check", check)
    closed = exits.close_runs

    def close_runs(again=False):
        if again:
            monkeypatch.setattr(StopSignal, "check", original)
        closed(again)

    monkeypatch.setattr(exits, "close_runs", close_runs)
    assert train(tmp_path / "run", *flags) == 143
    assert len(read(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert train(tmp_path / "run", *flags) == 0  # in a notebook, the signal does not stop the next run


def test_a_run_that_was_told_where_to_begin_goes_back_to_what_it_has_saved_since(tmp_path, poisoned, capsys):
    """Protection: ``prefer_newest`` in ``checkpoints.find_checkpoint``."""
    folder, flags = tmp_path / "run", [*FLAGS, "--lr_scheduler=constant", "--checkpoints_total_limit=9"]
    assert train(folder, *flags, "--max_train_steps=3") == 0
    poisoned(7)
    flags += ["--max_train_steps=9", f"--resume_from_checkpoint={folder / 'checkpoint-3'}"]
    capsys.readouterr()
    assert train_again(folder, *flags) == 1
    resumed = [line.split("Resuming from ")[1] for line in capsys.readouterr().err.splitlines() if "Resuming" in line]
    assert [line.split(",")[0].rpartition("/")[2] for line in resumed] == ["checkpoint-3", "checkpoint-6"]
    assert not list(folder.glob("abandoned*"))


def test_the_order_of_global_batches(tmp_path):
    assert read(tmp_path) == []
    assert next(global_batches([])) == 0
    (tmp_path / RECORD).write_text(json.dumps([{"global_batch": 1}, {"global_batch": 2}]))
    order = global_batches(read(tmp_path))
    assert [next(order) for _ in range(3)] == [0, 3, 4]


@pytest.mark.parametrize("content", ["[{", '{"step": 3}', '[{"step": 3}]', '[{"global_batch": "x"}]'])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(UserError, match=r"rollbacks.json is damaged.*delete the file"):
        read(tmp_path)
