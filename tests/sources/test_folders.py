"""utils/sources/: folders, sources and columns of all kinds. Every image is used, and used unchanged."""

import json
import os
import re
import struct
import tarfile
import zlib

import datasets
import numpy as np
import pytest
from conftest import interrupt, parse
from conftest import train as train_script
from PIL import Image, ImageFilter
from test_images import encode

import evaluate
from utils import UserError
from utils.data.train_data import load_train_data
from utils.evaluation.class_statistics import asked_classes, check_classes
from utils.evaluation.features import load_extractor
from utils.evaluation.image_folder import SampleFolder, load_image
from utils.evaluation.reference import Reference
from utils.sources.sources import ImageSource, load_source


def draw(*paths, size=(16, 16), **options):
    """Write a picture to each path. All pixels of the k-th are (7 k, 40, 9)."""
    for k, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (7 * k, 40, 9)).save(path, **options)


def names_of(dataset, folder):
    return [os.path.relpath(row["path"], folder) for row in dataset["image"]]


def load(accelerator, folder, split="train", **options):
    return load_source(ImageSource(str(folder), split, is_folder=True, **options), accelerator)[0]


def train(accelerator, *flags):
    flags = [*flags, "--train_batch_size=4", "--cache_images=always"]
    data = load_train_data(parse(*map(str, flags)), accelerator)
    return data, next(data.batches(range(0, 1)))


def test_a_class_called_train_hides_nothing(accelerator, tmp_path):
    for name in ("bus", "car", "train"):
        draw(*(tmp_path / name / f"{k}.png" for k in range(6)))
    dataset = load(accelerator, tmp_path, label_column="label")
    assert len(dataset) == 18 and dataset.features["label"].names == ["bus", "car", "train"]
    assert dataset["label"][:] == [0] * 6 + [1] * 6 + [2] * 6
    with pytest.raises(UserError, match=r"--dataset_split test: .* has the one split train"):
        load(accelerator, tmp_path, "test")


def test_splits_are_folders_of_their_names_and_nothing_else(accelerator, tmp_path):
    draw(
        *(tmp_path / "Train" / "cat" / f"{k}.png" for k in range(6)),
        *(tmp_path / "val" / "dog" / f"{k}.png" for k in range(4)),
    )
    assert len(load(accelerator, tmp_path)) == 6
    for name in ("val", "validation", "validation[:50%]"):
        dataset = load(accelerator, tmp_path, name, label_column="label")
        assert len(dataset) == (2 if "50" in name else 4)
        assert dataset.features["label"].names == ["cat", "dog"] and set(dataset["label"][:]) == {1}
    assert len(load(accelerator, tmp_path, "train+val")) == 10
    with pytest.raises(UserError, match=r"--dataset_split test: .* has the splits train, validation. Expected a split"):
        load(accelerator, tmp_path, "test")


def test_links_are_followed_once(accelerator, tmp_path):
    draw(*(tmp_path / "source" / f"{k}.png" for k in range(12)))
    linked = tmp_path / "linked"
    linked.mkdir()
    os.symlink(tmp_path / "source", linked / "sub")
    os.symlink(linked, linked / "loop")
    assert len(load(accelerator, linked)) == 12
    os.symlink(tmp_path / "source", tmp_path / "again")
    assert len(load(accelerator, tmp_path)) == 12
    os.symlink(tmp_path / "nowhere.png", linked / "broken.png")  # a missing picture does not shrink the data set
    with pytest.raises(UserError, match=r"broken\.png.*No such file"):
        train(accelerator, "--train_data_dir", linked)


@pytest.mark.parametrize("extension", ["avif", "AVIF", "webp", "bmp", "tif", "ppm", "jp2", "tga", "JPEG", "gif", "qoi"])
def test_every_format_that_pillow_reads(accelerator, tmp_path, extension):
    draw(*(tmp_path / f"{k}.{extension}" for k in range(12)))
    assert train(accelerator, "--train_data_dir", tmp_path)[0].length == 12


def test_names_are_no_patterns_and_litter_is_left_out(accelerator, tmp_path, caplog):
    names = [
        "[1].png",
        "*.png",
        "a?b.png",
        "{x}.png",
        "train-00000-of-00001.png",
        "test.png",
        "é 😀.png",
        "validation_1.png",
    ]
    folder = tmp_path / "[set] (1)*"
    draw(
        *(folder / name for name in names),
        folder / "test" / "x.png",
        folder / ".hidden.png",
        folder / "__MACOSX" / "y.png",
    )
    (folder / "notes.txt").write_text("")
    (folder / "photo.HEIC").write_text("")
    dataset = load(accelerator, folder)
    assert names_of(dataset, folder) == sorted([*names, "test/x.png"])
    assert "skipped files that Pillow does not read (2): .txt (1), .heic (1)" in caplog.text
    assert "pip install pillow-heif" in caplog.text
    stream = load(accelerator, folder, streaming=True)
    assert [row["image"]["path"] for row in stream] == [record["path"] for record in dataset["image"]]


def test_classes_are_the_first_folders_that_differ(accelerator, tmp_path):
    draw(*(tmp_path / "all" / "images" / name / "day" / f"{k}.png" for name in ("b", "a") for k in range(3)))
    assert load(accelerator, tmp_path, find_labels=True).features["label"].names == ["a", "b"]
    draw(tmp_path / "all" / "images" / "loose.png")
    assert load(accelerator, tmp_path, find_labels=True)["label"][:].count(None) == 1
    with pytest.raises(UserError, match="has no columns of class labels"):
        load(accelerator, tmp_path / "all" / "images" / "a", find_labels=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_give_labels_and_take_no_picture_away(accelerator, tmp_path, caplog, kind):
    draw(*(tmp_path / "deep" / f"{k}.png" for k in range(12)))
    rows = [{"file_name": f"deep/{k}.png", "text": "a, b", "digit": 10 - k} for k in range(5)]

    def write(rows):
        if kind == "csv":
            lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
            (tmp_path / "metadata.csv").write_text("\n".join(lines))
        elif kind == "jsonl":
            (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "metadata.parquet")

    write([*rows, {"file_name": "gone.png", "text": "", "digit": 3}])
    assert len(load(accelerator, tmp_path)) == 12
    assert f"metadata.{kind}: no image exists for 1 of its 6 rows: gone.png" in caplog.text
    labelled = load(accelerator, tmp_path, label_column="digit")
    assert labelled.features["label"].names == ["3", "6", "7", "8", "9", "10"][1:]
    assert (
        labelled["label"][:].count(-1) == 7 and labelled["label"][names_of(labelled, tmp_path).index("deep/1.png")] == 3
    )
    if kind == "csv":  # a comma that is not quoted: more values than columns
        (tmp_path / "metadata.csv").write_text("file_name,text\ndeep/1.png,a cat, sitting\n")
        assert len(load(accelerator, tmp_path)) == 12
    write([{"text": "no name", "digit": 1}])
    assert len(load(accelerator, tmp_path)) == 12
    with pytest.raises(UserError, match=rf"metadata\.{kind} has digit, but no column file_name"):
        load(accelerator, tmp_path, label_column="digit")
    with pytest.raises(UserError, match="--label_column other"):
        load(accelerator, tmp_path, label_column="other")


def test_broken_metadata_are_named(accelerator, tmp_path, caplog):
    draw(*(tmp_path / f"{k}.png" for k in range(12)))
    (tmp_path / "metadata.jsonl").write_text("{")
    assert len(load(accelerator, tmp_path)) == 12 and "metadata.jsonl cannot be read" in caplog.text
    with pytest.raises(UserError, match=r"metadata\.jsonl cannot be read: JSONDecodeError"):
        load(accelerator, tmp_path, label_column="digit")


def test_a_folder_of_images_as_dataset_name(accelerator, tmp_path, caplog):
    draw(*(tmp_path / f"{k}.png" for k in range(12)))
    for k in range(12):
        (tmp_path / f"{k}.txt").write_text("a caption")
    caplog.set_level("INFO")
    assert train(accelerator, "--dataset_name", tmp_path)[0].length == 12
    assert "--train_data_dir" in caplog.text


def test_archives_of_images(accelerator, tmp_path):
    import zipfile

    draw(*(tmp_path / "source" / f"{k}.png" for k in range(12)))
    (tmp_path / "packed").mkdir()
    with zipfile.ZipFile(tmp_path / "packed" / "images.zip", "w") as archive:
        for k in range(12):
            archive.write(tmp_path / "source" / f"{k}.png", f"{k}.png")
    assert train(accelerator, "--train_data_dir", tmp_path / "packed")[0].length == 12
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for k in range(12):
            archive.add(tmp_path / "source" / f"{k}.png", f"{k}.png")
    assert train(accelerator, "--dataset_name", tmp_path / "shard-0.tar")[0].length == 12


def pictures(count=12):
    return [Image.fromarray(np.full((8, 8, 3), 20 * k % 256, np.uint8)) for k in range(count)]


@pytest.mark.parametrize("column", ["raw", "record", "path", "nested", "array", "plane", "floats"])
@pytest.mark.parametrize("streaming", ["--no-streaming", "--streaming"])
def test_columns_of_every_kind_of_image(accelerator, tmp_path, column, streaming):
    arrays = [np.asarray(picture) for picture in pictures()]
    for k, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{k}.png")
    columns = {
        "raw": [encode(picture) for picture in pictures()],
        "record": [{"bytes": encode(picture), "path": "x.png"} for picture in pictures()],
        "path": [f"{k}.png" for k in range(12)],  # beside the table
        "nested": [array.tolist() for array in arrays],
        "array": arrays,
        "plane": [array[..., 0] for array in arrays],
        "floats": [(array / 255).tolist() for array in arrays],
    }
    features = {"array": datasets.Array3D((8, 8, 3), "uint8"), "plane": datasets.Array2D((8, 8), "uint8")}
    features = datasets.Features({column: features[column]}) if column in features else None
    table = datasets.Dataset.from_dict({column: columns[column]}, features=features)
    place = tmp_path / ("X.PARQUET" if streaming == "--no-streaming" else "saved")
    (table.to_parquet if streaming == "--no-streaming" else table.save_to_disk)(place)
    flags = ["--dataset_name", place, "--image_column", column, streaming]
    data = load_train_data(parse(*map(str, flags), "--train_batch_size=12"), accelerator)
    images = next(data.batches(range(0, 1)))["images"]
    assert data.image_shape == ((1 if column == "plane" else 3), 8, 8)
    levels = sorted(round((float(image.mean()) + 1) * 127.5) for image in images)
    assert levels == [20 * k for k in range(12)]


def test_tables_of_paths_and_several_files(accelerator, tmp_path):
    for k, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{k}.png")
    (tmp_path / "list.csv").write_text("file,kind\n" + "".join(f"{k}.png,{'ab'[k % 2]}\n" for k in range(12)))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"file": f"{k}.png"}) + "\n" for k in range(12)))
    for name in ("list.csv", "list.jsonl"):
        assert train(accelerator, "--dataset_name", tmp_path / name, "--image_column=file")[0].length == 12
    data, _ = train(accelerator, "--dataset_name", tmp_path / "list.csv", "--image_column=file", "--label_column=kind")
    assert data.label_names == ["a", "b"]
    two = datasets.Dataset.from_dict({"a": pictures(20), "b": pictures(20), "kind": ["x", "y"] * 10})
    two.to_parquet(tmp_path / "two.parquet")
    flags = [str(tmp_path / "packed"), f"--reference={tmp_path / 'two.parquet'}"]
    with pytest.raises(UserError, match=r"2 columns of images: a, b\. Name one with --image_column"):
        evaluate.main(evaluate.parse_args(flags))
    source = evaluate.parse_args([*flags, "--image_column=b", "--label_column=kind"])
    assert Reference(source, accelerator).labels()[1] == ["x", "y"]
    table = datasets.Dataset.from_dict({"image": pictures()})
    for k in range(2):
        table.shard(2, k).to_parquet(tmp_path / "parts [1]" / f"{k}.parquet")
    assert train(accelerator, "--dataset_name", tmp_path / "parts ?1?" / "*.parquet")[0].length == 12
    with pytest.raises(UserError, match=r"--image_column kind: image .*: a: .*No such file|b.*No such file"):
        train(accelerator, "--dataset_name", tmp_path / "list.csv", "--image_column=kind")
    with pytest.raises(UserError, match="files of one kind"):
        train(accelerator, "--dataset_name", tmp_path / "list.*")


def test_slices_of_saved_splits(accelerator, tmp_path):
    table = datasets.Dataset.from_dict({"image": pictures()})
    datasets.DatasetDict({"train": table, "test": table.select(range(4))}).save_to_disk(tmp_path / "saved")
    for split, count in (("train[:50%]", 6), ("train+test", 16), ("test", 4)):
        assert train(accelerator, "--dataset_name", tmp_path / "saved", "--dataset_split", split)[0].length == count
    with pytest.raises(UserError, match=r"--dataset_split dev: .* has the splits train, test"):
        train(accelerator, "--dataset_name", tmp_path / "saved", "--dataset_split=dev")


def test_examples_of_a_sorted_stream_are_of_every_class(accelerator, tmp_path):
    for k in range(200):
        draw(tmp_path / "ab"[k // 100] / f"{k:03}.png")
    flags = ["--train_data_dir", tmp_path, "--streaming", "--label_column=label"]
    data = load_train_data(parse(*map(str, flags)), accelerator)
    assert 4 < data.examples(20)["labels"].sum() < 16


def test_an_unwritable_cache_is_named(accelerator, tmp_path, monkeypatch):
    datasets.Dataset.from_dict({"image": pictures()}).to_parquet(tmp_path / "x.parquet")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"Permission denied.*Set HF_HOME to another folder"):
        train(accelerator, "--dataset_name", tmp_path / "x.parquet")


# Pixels


def deep(tmp_path, values, count=12, kind=np.uint16, suffix="png"):
    """Write images of a gradient that runs from the first to the last of ``values``."""
    for k in range(count):
        ramp = np.linspace(*values, 64).reshape(8, 8).astype(kind)
        Image.fromarray(ramp).save(tmp_path / f"{k:02}.{suffix}")


@pytest.mark.parametrize(
    "values, kind, suffix",
    [((0, 4095), np.uint16, "png"), ((30000, 34000), np.uint16, "tif"), ((-1000, 3000), np.int32, "tif"),
     ((0, 70000), np.int32, "tif"), ((-1, 1), np.float32, "tif"), ((0, 0.3), np.float32, "tif")],
)  # fmt: skip
def test_a_part_of_the_range_becomes_black_to_white(accelerator, tmp_path, caplog, values, kind, suffix):
    deep(tmp_path, values, kind=kind, suffix=suffix)
    data, batch = train(accelerator, "--train_data_dir", tmp_path)
    assert batch["images"].min() == -1 and batch["images"].max() == 1
    said = f"{values[0]:g},{values[1]:g}"
    assert f"--image_range {said} does the same" in caplog.text
    assert np.allclose(data.settings["scaled_from"], values)
    given, other = train(accelerator, "--train_data_dir", tmp_path, "--image_range=" + said)
    assert (other["images"] == batch["images"]).all() and np.allclose(given.settings["scaled_from"], values)


def test_the_full_range_is_kept_where_it_is_used(accelerator, tmp_path, caplog):
    deep(tmp_path, (0, 60000))
    data, batch = train(accelerator, "--train_data_dir", tmp_path)
    assert data.settings["scaled_from"] is None and "--image_range" not in caplog.text
    assert abs(float(batch["images"].max()) - (60000 / 65535 * 2 - 1)) < 0.01
    low = tmp_path / "low"
    low.mkdir()
    deep(low, (0, 4095))
    _, batch = train(accelerator, "--train_data_dir", low, "--image_range=full")
    assert batch["images"].max() < -0.85


def test_values_outside_are_clipped_and_counted(accelerator, tmp_path, caplog):
    deep(tmp_path, (0, 4095))
    _, batch = train(accelerator, "--train_data_dir", tmp_path, "--image_range=0,2000")
    assert (batch["images"] == 1).float().mean() > 0.4
    assert "clipped in 10 images so far" in caplog.text and "outside of 0 to 2000" in caplog.text


def test_long_images_are_refused_and_animations_reported(accelerator, tmp_path, caplog):
    draw(*(tmp_path / f"{k}.png" for k in range(12)))
    frames = [Image.new("RGB", (16, 16), (k, 0, 0)) for k in (10, 250)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    train(accelerator, "--train_data_dir", tmp_path)
    assert re.search(
        r"1 of 13 inspected images, such as .*film\.gif.*: only the first of several pictures", caplog.text
    )
    Image.new("L", (4000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match=r"strip\.png.*4000 x 1 pixels"):
        train(accelerator, "--train_data_dir", tmp_path, "--resolution=256")


def test_colours_of_16_bits_that_pillow_shortens_are_reported(accelerator, tmp_path, caplog):
    draw(*(tmp_path / f"{k}.png" for k in range(12)))

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = b"".join(b"\0" + b"\x0f\xff" * 3 * 16 for _ in range(16))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    deep = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(deep)
    train(accelerator, "--train_data_dir", tmp_path)
    assert "deep.png" in caplog.text and "Pillow keeps only the upper 8" in caplog.text


def test_a_long_image_is_cut_before_it_is_enlarged():
    from utils.data.pixels import prepare_image

    noise = np.random.default_rng(0).integers(0, 255, (10, 900), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.BoxBlur(3))
    cut = prepare_image(image, (40, 40), center_crop=True)
    whole = np.asarray(image.resize((3600, 40), Image.Resampling.BICUBIC))[None, :, 1780:1820]
    assert cut.shape == whole.shape and np.abs(cut.astype(int) - whole).max() <= 2


# Shapes


def test_images_of_any_shape(accelerator, tmp_path):
    draw(*(tmp_path / f"{k}.png" for k in range(12)), size=(48, 20))  # width x height
    data, batch = train(accelerator, "--train_data_dir", tmp_path)
    assert batch["images"].shape == (4, 3, 20, 48) and data.sample_size == (20, 48)
    data, batch = train(accelerator, "--train_data_dir", tmp_path, "--resolution=32x16", "--random_flip")
    assert batch["images"].shape == (4, 3, 32, 16) and data.settings["image_shape"] == [3, 32, 16]
    data, batch = train(accelerator, "--train_data_dir", tmp_path, "--resolution=16x16")
    assert data.sample_size == 16
    draw(tmp_path / "another.png", size=(20, 48))
    assert train(accelerator, "--train_data_dir", tmp_path)[0].sample_size == 20


def test_crops_of_any_shape_reach_every_place():
    from utils.data.pixels import augment

    image = np.arange(4 * 12, dtype=np.uint8).reshape(1, 4, 12)
    lefts = {int(augment(image, number, (4, 8), 3, False)[0, 0, 0]) for number in range(200)}
    assert lefts == set(range(5))


# The same data under other paths and names


def test_a_fingerprint_is_of_the_images_and_not_of_their_place(accelerator, tmp_path):
    import shutil

    def fingerprint(*flags):
        return train(accelerator, *flags)[0].settings["fingerprint"]

    draw(*(tmp_path / "a" / f"{k}.png" for k in range(12)))
    first = fingerprint("--train_data_dir", tmp_path / "a")
    assert first == fingerprint("--train_data_dir", f"{tmp_path}/a/")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert first == fingerprint("--train_data_dir", tmp_path / "elsewhere" / "b")
    (tmp_path / "a" / "5.png").rename(tmp_path / "a" / "5a.png")
    assert first != fingerprint("--train_data_dir", tmp_path / "a")
    draw(*(tmp_path / "elsewhere" / "b" / f"{k}.png" for k in reversed(range(12))))
    assert first != fingerprint("--train_data_dir", tmp_path / "elsewhere" / "b")
    assert fingerprint("--dataset_name=digits") != fingerprint("--dataset_name=digits", "--max_train_samples=100")


def test_a_run_resumes_with_the_same_images_from_another_place_and_with_no_others(accelerator, tmp_path, capsys):
    draw(*(tmp_path / "a" / f"{k}.png" for k in range(12)))
    run = tmp_path / "run"

    def go(folder, *flags):
        return train_script(run, "--train_data_dir", folder, "--resolution=8", "--unet=tiny", *flags)

    assert go(tmp_path / "a") == 0
    (tmp_path / "a").rename(tmp_path / "b")
    assert go(f"{tmp_path}/b/") == 0 and "already finished" in capsys.readouterr().out
    interrupt(run, "checkpoint-3")
    assert go(tmp_path / "b") == 0
    draw(*(tmp_path / "a" / f"{k}.png" for k in reversed(range(12))))
    with pytest.raises(UserError, match="the images differ from those of"):
        go(tmp_path / "a")  # as a finished run
    interrupt(run, "checkpoint-6")
    with pytest.raises(UserError, match="the images differ from those of"):
        go(tmp_path / "a", "--max_train_steps=9")


def test_another_range_is_refused_when_a_run_resumes(accelerator, tmp_path):
    (tmp_path / "a").mkdir()
    deep(tmp_path / "a", (0, 4095))
    flags = ["--train_data_dir", tmp_path / "a", "--unet=tiny"]
    assert train_script(tmp_path / "run", *flags) == 0
    with pytest.raises(UserError, match=r"--image_range was 0,4095, is full"):
        train_script(tmp_path / "run", *flags, "--image_range=full", "--max_train_steps=8")
    assert train_script(tmp_path / "run", *flags, "--image_range=0,4095", "--max_train_steps=8") == 0


def test_evaluation_reads_a_folder_as_training_does(accelerator, tmp_path):
    """Exact copies of 16-bit training files count as copies, and have the best metrics."""
    (tmp_path / "a").mkdir()
    noise = np.random.default_rng(0).integers(0, 4095, (40, 8, 8))
    for k, image in enumerate(noise):
        Image.fromarray(image.astype(np.uint16)).save(tmp_path / "a" / f"{k:02}.png")
    flags = [str(tmp_path / "a"), f"--reference={tmp_path / 'a'}", "--reference_split=train[:50%]"]
    flags += ["--held_out_split=train[50%:]", "--features=pixels", f"--output_dir={tmp_path / 'e'}", "--num_samples=20"]
    evaluate.main(evaluate.parse_args(flags))
    floor, copies, _ = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    assert copies["fd_pixels"] < 0.7 * floor["fd_pixels"]  # the copies are 20 of the 40 images, from both halves
    assert 0.3 <= copies["copies"] <= 0.7


# Further cases


def test_an_archive_beside_the_images_hides_none_of_them(accelerator, tmp_path, caplog):
    for name in ("bus", "car", "train"):
        draw(*(tmp_path / name / f"{k}.png" for k in range(6)))
    (tmp_path / "backup.zip").write_bytes(b"")
    assert train(accelerator, "--dataset_name", tmp_path)[0].length == 18
    assert ".zip (1)" in caplog.text


def test_classes_below_each_split(accelerator, tmp_path):
    places = ("train/imgs/cat", "train/imgs/dog", "val/pics/cat")
    draw(*(tmp_path / place / f"{k}.png" for place in places for k in range(3)))
    dataset = load(accelerator, tmp_path, "val", label_column="label")
    assert dataset.features["label"].names == ["cat", "dog"] and dataset["label"][:] == [0] * 3


def test_links_in_a_circle_and_twice_are_reported(accelerator, tmp_path, caplog):
    draw(*(tmp_path / "a" / f"{k}.png" for k in range(12)), tmp_path / "__background__" / "x.png")
    os.symlink("self", tmp_path / "self")
    os.symlink(tmp_path / "a", tmp_path / "b")
    assert len(load(accelerator, tmp_path)) == 13
    assert f"{tmp_path / 'b'} is skipped, because it links to a folder that was already read" in caplog.text


def test_masks_and_wide_numbers_in_a_table(accelerator, tmp_path):
    masks = [(np.arange(64).reshape(8, 8) % 2 == 0).tolist()] * 12
    ramps = [(np.arange(64).reshape(8, 8) * (65 if k else 3)).tolist() for k in range(12)]
    datasets.Dataset.from_dict({"mask": masks, "ramp": ramps}).to_parquet(tmp_path / "x.parquet")
    _, batch = train(accelerator, "--dataset_name", tmp_path / "x.parquet", "--image_column=mask")
    assert set(batch["images"].unique().tolist()) == {-1, 1}
    flags = ["--dataset_name", tmp_path / "x.parquet", "--image_column=ramp", "--train_batch_size=12"]
    data = load_train_data(parse(*map(str, flags)), accelerator)
    tops = sorted(next(data.batches(range(0, 1)))["images"].amax(dim=(1, 2, 3)).tolist())
    assert tops[1:] == [1] * 11 and tops[0] < -0.9  # the dark one stays dark
    datasets.Dataset.from_dict({"x": [[[1, 2], [3]]] * 12}).to_parquet(tmp_path / "ragged.parquet")
    with pytest.raises(UserError, match=r"image 0 of .* Expected an array"):
        train(accelerator, "--dataset_name", tmp_path / "ragged.parquet", "--image_column=x")


def test_a_hot_pixel_does_not_make_the_others_black(accelerator, tmp_path, caplog):
    deep(tmp_path, (0, 2000))
    image = np.asarray(Image.open(tmp_path / "03.png")).copy()
    image[0, 0] = 65535
    Image.fromarray(image).save(tmp_path / "03.png")
    data, batch = train(accelerator, "--train_data_dir", tmp_path)
    assert data.image_range == (0, 2000) and batch["images"].max() == 1
    assert "03.png" in caplog.text and "outside of 0 to 2000" in caplog.text


@pytest.mark.parametrize("null", [None, {"bytes": None, "path": None}])
def test_missing_images_in_a_table_are_skipped_or_named(accelerator, tmp_path, null):
    rows = [{"image": null}, *({"image": {"bytes": encode(p), "path": "x.png"}} for p in pictures())]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    flags = ["--dataset_name", tmp_path / "x.parquet"]
    assert train(accelerator, *flags, "--max_bad_images=100")[0].length == 13
    with pytest.raises(UserError, match=r"image 0 of .*the file is empty"):
        train(accelerator, *flags)


def test_a_table_of_paths_has_a_fingerprint_of_the_files(accelerator, tmp_path):
    for folder in ("a", "b"):
        draw(*(tmp_path / folder / f"{k}.png" for k in range(200)))
        lines = "file\n" + "".join(f"{k}.png\n" for k in range(200))
        (tmp_path / folder / "list.csv").write_text(lines)

    def fingerprint(folder):
        flags = ["--dataset_name", tmp_path / folder / "list.csv", "--image_column=file"]
        return train(accelerator, *flags)[0].settings["fingerprint"]

    before = fingerprint("a")
    assert before == fingerprint("b")
    Image.effect_noise((16, 16), 99).save(tmp_path / "b" / "198.png")  # this image is not among the probed images
    assert before != fingerprint("b")


def test_metadata_in_other_spellings(accelerator, tmp_path, monkeypatch):
    draw(*(tmp_path / "set" / f"{k}.png" for k in range(12)))
    file = tmp_path / "set" / "Metadata.csv"
    lines = "".join(f"{tmp_path}/set/{k}.png;{k % 3 or ''}\n" for k in range(12))
    file.write_text("\ufefffile_name;digit\n" + lines, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load(accelerator, "set", label_column="digit").features["label"].names == ["1", "2"]
    file.write_text("file_name,digit\nother.png,3\n")
    with pytest.raises(UserError, match=r"Metadata\.csv: digit has no integers or strings for these images"):
        load(accelerator, "set", label_column="digit")


def test_integers_beside_missing_ones(accelerator, tmp_path):
    for k, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{k}.png")
    (tmp_path / "x.csv").write_text("file,y\n" + "".join(f"{k}.png,{k % 2 if k else ''}\n" for k in range(12)))
    source = ImageSource(str(tmp_path / "x.csv"), image_column="file", label_column="y")
    dataset = load_source(source, accelerator)[0]
    assert dataset.features["label"].names == ["0", "1"] and dataset["label"][:3] == [-1, 1, 0]


def test_evaluation_reads_every_split_of_a_folder_and_names_no_foreign_flag(accelerator, tmp_path):
    draw(*(tmp_path / part / f"{k}.png" for part in ("train", "test") for k in range(6)))
    assert len(SampleFolder(str(tmp_path), accelerator, None, 0)) == 12
    flags = [str(tmp_path), f"--reference={tmp_path}", "--held_out_split=test[:1%]"]
    with pytest.raises(UserError, match=r"test\[:1%\]: 0 images\. Expected at least 6"):
        evaluate.main(evaluate.parse_args(flags))
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"has no column of images. Name one with --image_column\. .*\)$"):
        evaluate.main(evaluate.parse_args([str(tmp_path), f"--reference={tmp_path / 'x.parquet'}"]))


def test_images_without_a_class_are_not_asked_for(accelerator, tmp_path):
    draw(tmp_path / "loose.png", *(tmp_path / name / f"{k}.png" for name in "ab" for k in range(6)))
    real = Reference(evaluate.parse_args(["x", f"--reference={tmp_path}"]), accelerator)
    config = {"num_class_embeds": 3, "_class_names": ["a", "b"]}
    assert check_classes(config, real) == ["a", "b"]
    asked = asked_classes(["a", "b"], real, load_extractor("pixels"), real.preparation((3, 16, 16), {}), 30)
    assert set(asked.labels) == {0, 1} and len(asked.real_features) == 12


def test_a_started_picture_is_scaled_as_the_training_images_were(tmp_path):
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(tmp_path / "x.png")
    (tmp_path / "training_args.json").write_text(json.dumps({"scaled_from": [0, 4000]}))
    image = load_image(str(tmp_path / "x.png"), "--init_image", (1, 8, 8), str(tmp_path))
    assert abs(float(image.mean()) + 0.5) < 0.01
