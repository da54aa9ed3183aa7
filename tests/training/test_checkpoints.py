"""utils/training/checkpoints.py: incomplete checkpoints are ignored, and a failed save never damages an older one."""

import errno
import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch

from utils import sync
from utils.training import checkpoints
from utils.training.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)


@pytest.fixture
def save(accelerator, tmp_path):
    model = accelerator.prepare(torch.nn.Linear(4, 4))

    def save(step, total_limit=10, save_pipeline=lambda folder: (folder / "model_index.json").write_text("{}")):
        assert model is not None
        return save_checkpoint(accelerator, tmp_path, step, save_pipeline, {"settings": {}}, total_limit)

    return save


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_verified_and_found(accelerator, save, tmp_path):
    for step in (9, 10, 100):
        save(step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(accelerator, tmp_path, None).name == "checkpoint-100"
    assert find_checkpoint(accelerator, tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    state = checkpoints.read_state(tmp_path / "checkpoint-9")
    assert state["global_step"] == 9 and state["num_processes"] == 1


def test_none_and_wrong_requests(accelerator, tmp_path):
    assert find_checkpoint(accelerator, tmp_path, None) is None
    assert find_checkpoint(accelerator, tmp_path, "latest") is None
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-5"))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        find_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-5"))


def damage(file, how):
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped":
        place = 0 if file.name == "manifest.json" else int(np.random.default_rng(len(content)).integers(len(content)))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        file.write_bytes(content[: 0 if how == "empty" else len(content) // 2])


@pytest.mark.parametrize("how", ["missing", "empty", "halved", "flipped"])
def test_any_damage_is_found_and_latest_falls_back(accelerator, save, tmp_path, how, caplog):
    save(1)
    newest = save(2)
    files = [file.relative_to(newest) for file in newest.rglob("*") if file.is_file()]
    assert len(files) >= 5
    for name in files:
        copy = tmp_path / "copy"
        shutil.copytree(newest, copy)
        damage(newest / name, how)
        caplog.clear()
        assert find_checkpoint(accelerator, tmp_path, None).name == "checkpoint-1"
        assert name.as_posix() in caplog.text  # the message names the file
        with pytest.raises(CheckpointError, match=name.name.replace(".", r"\.")):
            find_checkpoint(accelerator, tmp_path, str(newest))
        shutil.rmtree(newest)
        copy.rename(newest)
    verify_checkpoint(newest)


def test_a_newest_checkpoint_that_cannot_be_read_is_passed_over(accelerator, save, tmp_path, monkeypatch, caplog):
    save(1), save(2)
    original = checkpoints.file_hash

    def file_hash(*files):
        if "checkpoint-2" in str(files[0]):
            raise OSError(errno.EIO, "Input/output error", str(files[0]))
        return original(*files)

    monkeypatch.setattr(checkpoints, "file_hash", file_hash)
    assert find_checkpoint(accelerator, tmp_path, None).name == "checkpoint-1"
    assert "checkpoint-2 cannot be read: [Errno 5]" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-2 cannot be read"):
        find_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-2"))


def test_files_can_be_read_as_the_umask_says(save, tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint = save(1)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in checkpoint.rglob("*") if path.is_file()} == {0o640}


def test_a_folder_that_cannot_be_synced_is_no_fault(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_another_number_of_threads_is_reported(accelerator, save, caplog):
    checkpoint = save(1)
    state = checkpoints.read_state(checkpoint)
    checkpoints.load_checkpoint(accelerator, checkpoint, state)
    assert "this run has" not in caplog.text
    checkpoints.load_checkpoint(accelerator, checkpoint, {**state, "device": "CPU, 64 threads"})
    assert "was saved on CPU, 64 threads, but this run has CPU, 1 thread. Rounding differs" in caplog.text


def test_a_failed_save_leaves_the_older_checkpoint_and_nothing_else(save, tmp_path):
    save(1, total_limit=1)

    def fail(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be saved: .*No space left.*intact"):
        save(2, total_limit=1, save_pipeline=fail)
    assert names(tmp_path) == ["checkpoint-1"]
    verify_checkpoint(tmp_path / "checkpoint-1")


def test_too_little_space_is_noticed_before_writing(save, tmp_path, monkeypatch):
    save(1)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match=r"the disk is full\. The checkpoint needs about 0 MiB, and 0 MiB"):
        save(2)
    assert names(tmp_path) == ["checkpoint-1"]


def test_old_checkpoints_go_after_the_new_one_is_there(save, tmp_path):
    for step in (1, 2, 3):
        save(step)
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()  # incomplete ones neither count nor are touched
    save(4, total_limit=2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("start", ["the beginning", "elsewhere", "itself"])
def test_a_run_keeps_its_checkpoints_apart_from_newer_ones(save, tmp_path, start):
    """Otherwise the new checkpoint, with the lower number, is the first that is removed."""
    for step in (300, 500, 700):
        save(step)
    path, step = {"the beginning": (None, 0), "itself": (tmp_path / "checkpoint-500", 500)}.get(
        start, (tmp_path / "backup" / "checkpoint-400", 400)
    )
    checkpoints.archive_newer(tmp_path, path, step)
    kept = {"the beginning": [], "itself": ["checkpoint-300", "checkpoint-500"]}.get(start, ["checkpoint-300"])
    assert [found.name for found in checkpoints.list_checkpoints(tmp_path)] == kept
    save(step + 100, total_limit=1)
    assert [found.name for found in checkpoints.list_checkpoints(tmp_path)] == [f"checkpoint-{step + 100}"]


def test_a_failing_removal_is_a_warning(save, tmp_path, monkeypatch, caplog):
    save(1)
    monkeypatch.setattr(checkpoints.os, "rename", refuse_removal(checkpoints.os.rename))
    save(2, total_limit=1)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert "cannot be removed" in caplog.text


def refuse_removal(rename):
    def renamed(source, target):
        if "removed" in str(target):
            raise PermissionError("busy")
        return rename(source, target)

    return renamed


def test_nothing_in_a_checkpoint_runs_code_when_loaded(save):
    folder = save(1)
    suffixes = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert suffixes <= {".json", ".safetensors", ".bin", ".pkl"}
    assert not list(folder.rglob("custom_checkpoint_*"))  # accelerate loads these files without weights_only
    for file in folder.rglob("*"):
        if file.suffix in (".bin", ".pkl"):
            from accelerate.utils.other import load  # as accelerate reads it, with its list of safe types

            assert load(file, weights_only=True) is not None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    } - {"manifest.json"}
