"""utils/data and utils/sources: the samples and their order do not depend on how they are loaded."""

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import parse
from PIL import Image

from utils import UserError
from utils.data.train_data import load_train_data


def batches(accelerator, *flags, steps=(0, 3), **options):
    data = load_train_data(parse(*flags), accelerator, **options)
    return data, list(data.batches(range(*steps)))


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a["sample_ids"], b["sample_ids"]) and torch.equal(a["images"], b["images"])
        for a, b in zip(first, second, strict=True)
    )


def png(value):
    Image.new("L", (8, 8), value).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


class Process:
    """One of several processes, with the attributes of an accelerator that the loaders use."""

    def __init__(self, index, count):
        self.process_index, self.num_processes, self.is_main_process = index, count, index == 0
        self.device = torch.device("cpu")

    def main_process_first(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture
def folder(tmp_path):
    """Twelve wide colour images and a text file."""
    rng = np.random.default_rng(0)
    for k in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 36, 3), dtype=np.uint8)).save(tmp_path / f"{k:02}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_embedded_sets(accelerator):
    data, (first, *_) = batches(accelerator)
    assert (data.length, data.channels, data.sample_size) == (1797, 1, 8)
    assert first["images"].shape == (8, 1, 8, 8) and first["images"].dtype == torch.float32
    assert first["images"].min() == -1 and first["images"].max() == 1
    data, _ = batches(accelerator, "--dataset_name=faces")
    assert (data.length, data.channels, data.sample_size) == (100, 1, 24)


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_cache_and_workers_change_nothing(accelerator, folder, source):
    where = ["--random_flip"] + (["--train_data_dir", folder, "--resolution=16"] if source == "folder" else [])
    _, cached = batches(accelerator, *where, "--cache_images=always")
    for workers in (0, 2):
        _, loaded = batches(accelerator, *where, "--cache_images=never", f"--dataloader_num_workers={workers}")
        assert same(cached, loaded)
    assert not torch.equal(cached[0]["images"], cached[1]["images"])


def test_starting_later_continues_the_same_order(accelerator):
    _, whole = batches(accelerator, "--train_batch_size=500", steps=(0, 9))  # the batches cross two ends of an epoch
    _, tail = batches(accelerator, "--train_batch_size=500", steps=(5, 9))
    assert same(whole[5:], tail)
    numbers = np.concatenate([batch["sample_ids"] for batch in whole])
    assert np.array_equal(numbers, np.arange(4500))


def test_two_processes_see_what_one_sees_with_accumulation():
    _, alone = batches(Process(0, 1), "--gradient_accumulation_steps=2", "--random_flip")
    parts = [batches(Process(index, 2), "--random_flip")[1] for index in (0, 1)]
    interleaved = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert same(alone, interleaved)


def test_labels_travel_with_their_images(accelerator):
    data, (batch, *_) = batches(accelerator, "--label_column=label", "--train_batch_size=1797", steps=(0, 1))
    assert data.label_names == [str(k) for k in range(10)]
    from sklearn.datasets import load_digits

    bunch = load_digits()
    zero = batch["images"][batch["labels"] == 0].mean(0)[0]
    expected = torch.tensor(bunch.images[bunch.target == 0].mean(0) / 8 - 1)
    assert torch.allclose(zero.double(), expected, atol=0.02)


def test_colour_and_grey(accelerator, folder, tmp_path_factory):
    flags = ["--train_data_dir", folder]
    assert batches(accelerator, *flags)[0].channels == 3
    data, (batch, *_) = batches(accelerator, *flags, "--image_mode=L", "--resolution=12")
    assert batch["images"].shape == (8, 1, 12, 12) and data.size == (12, 12)
    grey = tmp_path_factory.mktemp("grey")
    for k in range(200):
        Image.new("RGB" if k == 100 else "L", (8, 8)).save(grey / f"{k:03}.png")
    with pytest.raises(UserError, match=r"100\.png.*has colour.*--image_mode L or --image_mode RGB"):
        batches(accelerator, "--train_data_dir", grey)


def test_local_parquet_arrow_and_saved_sets(accelerator, tmp_path):
    from utils.sources.sources import _embedded

    digits = _embedded("digits").select(range(64))
    digits.to_parquet(tmp_path / "digits.parquet")
    digits.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": digits, "test": digits.select(range(16))}).save_to_disk(tmp_path / "splits")
    expected = batches(accelerator, "--dataset_split=train[:64]")[1]
    for path in (tmp_path / "digits.parquet", tmp_path / "saved", tmp_path / "splits"):
        assert same(expected, batches(accelerator, "--dataset_name", path)[1])
    data, _ = batches(accelerator, "--dataset_name", tmp_path / "splits", "--dataset_split=test")
    assert data.length == 16


def test_unnamed_source_falls_back_to_digits_with_one_warning(accelerator, caplog):
    data, _ = batches(accelerator, "--dataset_name=")  # offline, and not in the cache
    assert data.name == "digits"
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "ylecun/mnist is not available" in warnings[0] and "--dataset_name" in warnings[0]


def test_a_missing_split_of_an_unnamed_source_is_reported(accelerator, caplog, monkeypatch):
    def has_two(path, split=None, **options):
        if split not in (None, "train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", has_two)
    with pytest.raises(UserError, match=r"--dataset_split tranin: ylecun/mnist: .*Should be one of"):
        batches(accelerator, "--dataset_name=", "--dataset_split=tranin")
    assert "not available" not in caplog.text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset_name=nobody/nothing"], "--dataset_name nobody/nothing cannot be loaded"),
        (["--dataset_name=./missing"], "there is no such file or folder"),
        (["--train_data_dir=missing"], "--train_data_dir missing: there is no such folder"),
        (["--train_data_dir={tmp}"], "it holds no image files"),
        (["--train_data_dir={tmp}/notes.txt"], "is a file. Expected a folder"),
        (["--dataset_name={tmp}/notes.txt"], "expected .parquet, .arrow, .csv, .json, .jsonl, .tar files of one kind"),
        (["--image_column=picture"], r"--image_column picture: .*image \(Image\), label \(ClassLabel\)"),
        (["--label_column=image"], r"--label_column image: this is the column of images"),
        (["--dataset_split=test"], "--dataset_split test: digits has the one split train"),
        (["--max_train_samples=5"], "digits has 5 images, fewer than one global batch of 8 .*Try --train_batch_size 5"),
    ],
)
def test_bad_sources_are_refused_by_name(accelerator, tmp_path, flags, message):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match=message):
        batches(accelerator, *[flag.format(tmp=tmp_path) for flag in flags])


def test_ambiguous_image_columns_are_listed(accelerator, tmp_path):
    image = Image.new("L", (8, 8))
    features = datasets.Features({"a": datasets.Image(), "b": datasets.Image()})
    two = datasets.Dataset.from_dict({"a": [image] * 9, "b": [image] * 9}, features=features)
    two.save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match=r"2 columns of images: a, b. Name one with --image_column"):
        batches(accelerator, "--dataset_name", tmp_path / "two")
    assert batches(accelerator, "--dataset_name", tmp_path / "two", "--image_column=b")[0].length == 9


@pytest.mark.parametrize("cache", ["always", "never"])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stop_or_are_skipped(accelerator, tmp_path, cache, workers, caplog):
    for k in range(70):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k:02}.png")
    (tmp_path / "67.png").write_bytes(b"")  # not among the probed images
    flags = ["--train_data_dir", tmp_path, f"--cache_images={cache}"]
    flags += [f"--dataloader_num_workers={workers}", "--train_batch_size=64"]
    with pytest.raises(UserError, match=r"67\.png \(image 67 of .*the file is empty.*--max_bad_images N skips"):
        batches(accelerator, *flags)
    caplog.clear()
    first, second = (batches(accelerator, *flags, "--max_bad_images=100")[1] for _ in range(2))
    assert same(first, second)
    assert sum("67.png" in record.message for record in caplog.records) == 2  # once per run


def test_a_skipped_image_is_replaced_by_the_same_one_with_and_without_the_cache(accelerator, tmp_path):
    for k in range(70):
        Image.new("L", (8, 8), 3 * k).save(tmp_path / f"{k:02}.png")
    for k in (3, 4, 69):
        (tmp_path / f"{k:02}.png").write_bytes(b"")
    flags = ["--train_data_dir", tmp_path, "--max_bad_images=100", "--train_batch_size=70"]
    data, cached = batches(accelerator, *flags, "--cache_images=always", steps=(0, 2))
    _, loaded = batches(accelerator, *flags, "--cache_images=never", steps=(0, 2))
    assert data.length == 70 and same(cached, loaded)


def test_what_travels_to_workers_can_be_pickled(accelerator):
    import pickle

    data, _ = batches(accelerator, "--cache_images=never", "--dataloader_num_workers=0")
    images = pickle.loads(pickle.dumps(data._prepared))
    assert np.array_equal(images[(3, 7)]["image"], data._prepared[(3, 7)]["image"])


def test_streaming_gives_each_process_its_own_images_and_resumes(tmp_path):
    for k in range(64):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k:02}.png")
    flags = ["--train_data_dir", tmp_path, "--streaming"]
    seen = []
    for index in (0, 1):
        _, found = batches(Process(index, 2), *flags, "--dataloader_num_workers=0", steps=(0, 4))
        values = torch.cat([batch["images"][:, 0, 0, 0] for batch in found])
        seen.append({round((value.item() + 1) * 127.5) for value in values})
        for workers in (1, 3):
            assert same(
                found, batches(Process(index, 2), *flags, f"--dataloader_num_workers={workers}", steps=(0, 4))[1]
            )
        _, tail = batches(Process(index, 2), *flags, "--dataloader_num_workers=0", steps=(2, 4))
        assert same(found[2:], tail)
    assert len(seen[0]) == len(seen[1]) == 32
    assert seen[0].isdisjoint(seen[1])


def test_streaming_skips_and_stops_at_bad_images(accelerator, tmp_path):
    for k in range(80):
        Image.new("L", (8, 8), k).save(tmp_path / f"{k:02}.png")
    (tmp_path / "77.png").write_bytes(b"junk")
    flags = ["--train_data_dir", tmp_path, "--streaming", "--train_batch_size=40"]
    with pytest.raises(UserError, match=r"77\.png"):
        batches(accelerator, *flags, steps=(0, 2))
    _, found = batches(accelerator, *flags, "--max_bad_images=100", steps=(0, 2))
    assert [len(batch["images"]) for batch in found] == [40, 40]


def test_small_images_are_enlarged_and_counted(accelerator, tmp_path, caplog):
    for k in range(12):
        Image.new("L", (8, 8) if k < 3 else (20, 20)).save(tmp_path / f"{k:02}.png")
    _, (batch, *_) = batches(accelerator, "--train_data_dir", tmp_path, "--resolution=16")
    assert batch["images"].shape[-1] == 16
    assert "3 of 12 inspected images are smaller than 16 x 16 pixels" in caplog.text


def test_defaults_from_a_pretrained_model(accelerator):
    data, _ = batches(accelerator, pretrained_config=SimpleNamespace(sample_size=12, out_channels=3))
    assert (data.sample_size, data.channels) == (12, 3)


def test_shape_flags_reach_the_images(accelerator, folder):
    flags = ["--train_data_dir", folder, "--resolution=8", "--cache_images=always"]
    _, (plain, *_) = batches(accelerator, *flags)
    for flag in ("--center_crop", "--random_flip", "--seed=4"):
        _, (other, *_) = batches(accelerator, *flags, flag)
        assert other["images"].shape == plain["images"].shape
        assert not torch.equal(other["images"], plain["images"]), flag


@pytest.fixture
def decoded(monkeypatch, caplog):
    """Return a list that grows by each image that is decoded into the cache."""
    from utils.data.images import PreparedImages

    caplog.set_level("INFO", "utils")
    seen, attempt = [], PreparedImages.attempt
    monkeypatch.setattr(
        PreparedImages, "attempt", lambda self, row: seen.append(row["image"].args[1]) or attempt(self, row)
    )
    return seen


def only_file(folder):
    """Return the file of decoded images, and check that there is nothing else but its lock."""
    (found,) = [path for path in folder.iterdir() if path.suffix != ".lock"]
    return found


@pytest.mark.parametrize("flags", (["--center_crop"], ["--random_flip"]), ids=("one size", "many sizes"))
def test_images_are_decoded_once_into_a_file(accelerator, folder, tmp_path_factory, decoded, caplog, flags):
    kept = tmp_path_factory.mktemp("kept")
    flags = ["--train_data_dir", folder, "--resolution=16", *flags]
    _, loaded = batches(accelerator, *flags, "--cache_images=never")
    for said in ("are kept in", "Using the decoded images in"):
        caplog.clear()
        assert same(loaded, batches(accelerator, *flags, f"--cache_images={kept}")[1])
        assert f"{said} {only_file(kept)}, 0 MiB" in caplog.text
        assert len(decoded) == 12  # the second load decodes none
    batches(accelerator, *flags, "--image_mode=L", f"--cache_images={kept}")
    os.utime(folder / "07.png", (1, 1))  # the file has the same name and size, but may have other pixels
    batches(accelerator, *flags, f"--cache_images={kept}")
    assert len(decoded) == 36 and len([*kept.glob("*.lock")]) == 3


def test_processes_of_a_machine_share_one_file(folder, tmp_path_factory, decoded):
    flags = ["--train_data_dir", folder, "--resolution=16", "--train_batch_size=3"]
    shared = [*flags, f"--cache_images={tmp_path_factory.mktemp('kept')}"]
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda index: batches(Process(index, 4), *shared)[1], range(4))]
    assert sorted(decoded) == [*range(12)]
    assert all(
        same(part, batches(Process(index, 4), *flags, "--cache_images=never")[1]) for index, part in enumerate(found)
    )


def test_a_file_that_appears_while_a_process_gets_the_lock_is_used(
    accelerator, folder, tmp_path_factory, decoded, monkeypatch
):
    import utils.data.cache

    flags = ["--train_data_dir", folder, "--resolution=16", f"--cache_images={tmp_path_factory.mktemp('kept')}"]
    original = utils.data.cache.filelock.FileLock.acquire

    def acquire(*arguments, **options):
        monkeypatch.setattr(utils.data.cache.filelock.FileLock, "acquire", original)
        batches(accelerator, *flags)  # another process decodes everything
        return original(*arguments, **options)

    monkeypatch.setattr(utils.data.cache.filelock.FileLock, "acquire", acquire)
    batches(accelerator, *flags)
    assert sorted(decoded) == [*range(12)]


def test_a_file_of_decoded_images_is_complete_or_not_there(accelerator, folder, tmp_path_factory, decoded, monkeypatch):
    import utils.data.cache

    kept = tmp_path_factory.mktemp("kept")
    flags = ["--train_data_dir", folder, "--resolution=16", f"--cache_images={kept}"]
    with monkeypatch.context() as patch:
        patch.setattr(utils.data.cache.np, "savez", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            batches(accelerator, *flags)
    assert not [path for path in kept.iterdir() if path.suffix != ".lock"]
    _, whole = batches(accelerator, *flags)
    for damage in (
        lambda file: (file / "pixels").write_bytes(b"few"),
        lambda file: (file / "table.npz").write_bytes(b"PK"),
        lambda file: (file / "table.npz").unlink(),
        lambda file: file.rename(file.with_name(f".tmp-{file.name}")),  # as after a kill
    ):
        damage(only_file(kept))
        decoded.clear()
        assert same(whole, batches(accelerator, *flags)[1]) and len(decoded) == 12
        assert only_file(kept)


def test_where_no_file_can_be_kept_memory_holds_the_images(
    accelerator, folder, tmp_path_factory, decoded, caplog, monkeypatch
):
    import utils.data.train_data
    import utils.sources.named_images

    flags = ["--train_data_dir", folder, "--resolution=16"]
    (blocked := tmp_path_factory.mktemp("kept") / "file").write_text("not a folder")
    _, loaded = batches(accelerator, *flags, "--cache_images=never")
    data, found = batches(accelerator, *flags, f"--cache_images={blocked}")
    assert same(loaded, found) and data._cache is not None
    assert f"{blocked} cannot keep the decoded images" in caplog.text
    monkeypatch.setattr(utils.data.train_data, "FILE_LIMIT", 1000)
    monkeypatch.setattr(utils.sources.named_images, "QUICK", 0.0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", kept := tmp_path_factory.mktemp("kept"))
    kept = kept / "prepared-images"
    data, found = batches(accelerator, *flags)
    assert same(loaded, found) and data._cache is not None and not [*kept.iterdir()]
    assert f"too much for {kept}" in caplog.text
    assert same(loaded, batches(accelerator, *flags, "--cache_images=always")[1])
    assert only_file(kept)


def test_quick_data_stay_in_memory_and_slow_ones_go_into_the_cache_of_datasets(
    accelerator, folder, monkeypatch, tmp_path_factory
):
    import utils.sources.named_images

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hub"))
    place = datasets.config.HF_DATASETS_CACHE / "prepared-images"
    for quick, there in ((3600.0, False), (0.0, True)):
        monkeypatch.setattr(utils.sources.named_images, "QUICK", quick)
        batches(accelerator, "--train_data_dir", folder)
        assert place.exists() == there
    assert only_file(place)


def test_unreadable_images_are_tried_again_by_every_run(accelerator, folder, tmp_path_factory, decoded, caplog):
    good = (folder / "07.png").read_bytes()
    (folder / "07.png").write_bytes(b"junk".ljust(len(good)))
    os.utime(folder / "07.png", (1, 1))
    flags = ["--train_data_dir", folder, "--resolution=16", f"--cache_images={tmp_path_factory.mktemp('kept')}"]
    _, loaded = batches(accelerator, *flags, "--max_bad_images=100", "--cache_images=never")
    for _ in range(2):
        caplog.clear()
        assert same(loaded, batches(accelerator, *flags, "--max_bad_images=100")[1])
        assert sum("07.png" in record.message for record in caplog.records) == 1
    assert len(decoded) == 13
    with pytest.raises(UserError, match=r"07\.png"):
        load_train_data(parse(*flags), accelerator)


def test_other_pixels_under_the_same_fingerprint_are_decoded_again(accelerator, tmp_path, decoded):
    """The fingerprint of datasets depends on the steps that made a table, not on its content."""
    seen = []
    for value in (3, 200):
        image = {"bytes": png(value), "path": None}
        table = datasets.Dataset.from_dict(
            {"image": [image] * 64}, features=datasets.Features({"image": datasets.Image()})
        )
        table._fingerprint = "0123456789abcdef"
        table.save_to_disk(tmp_path / "saved")
        _, found = batches(accelerator, "--dataset_name", tmp_path / "saved", f"--cache_images={tmp_path}/kept")
        seen.append(found[0]["images"].mean().item())
        shutil.rmtree(tmp_path / "saved")
    assert seen[0] < -0.9 and seen[1] > 0.5


def test_images_that_do_not_fit_in_memory_are_decoded_as_they_come(accelerator, monkeypatch):
    import utils.data.train_data

    data, cached = batches(accelerator)
    assert data._cache is not None
    monkeypatch.setattr(utils.data.train_data, "CACHE_LIMIT", 1000)
    data, loaded = batches(accelerator)
    assert data._cache is None and same(cached, loaded)


def test_configurations_of_a_data_set(accelerator, tmp_path):
    """A folder with two configurations in its card, as on the Hub."""
    from utils.sources.sources import _embedded

    for name, count in (("few", 16), ("many", 32)):
        (tmp_path / name).mkdir()
        _embedded("digits").select(range(count)).to_parquet(tmp_path / name / "train.parquet")
    entries = "".join(f"- config_name: {name}\n  data_files: {name}/train.parquet\n" for name in ("few", "many"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    with pytest.raises(UserError, match="Config name is missing"):
        batches(accelerator, "--dataset_name", tmp_path)
    assert batches(accelerator, "--dataset_name", tmp_path, "--dataset_config_name=many")[0].length == 32
