"""Labels, splits, tables and archives as users have them: correct results, and messages."""

import tarfile
import zipfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from conftest import parse
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import evaluate
import train_ddpm
from utils import UserError
from utils.data.own_images import OwnImages
from utils.data.train_data import load_train_data
from utils.diffusion.class_conditional import ClassConditionalPipeline
from utils.diffusion.classes import add_class_embedding, choose_classes
from utils.diffusion.pretrained import load_pretrained
from utils.diffusion.unets import UNETS
from utils.evaluation.reference import Reference
from utils.sources.sources import shared_rows

RNG = np.random.default_rng(0)


def write(folder, count, colour=(90, 9, 9)):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        pixels = np.array(colour) + RNG.integers(0, 20, (8, 8, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:03}.png")
    return folder


def load(accelerator, *flags, **options):
    return load_train_data(parse("--train_batch_size=2", *map(str, flags)), accelerator, **options)


def classes(data):
    return Counter(data.label_names[code] if code >= 0 else None for code in data.images.labels())


def mean(data, count=3):
    """Return the mean pixel of some batches, 0 to 255."""
    return float(torch.cat([batch["images"] for batch in data.batches(range(count))]).mean() + 1) * 127.5


# ------------------------------------------------------------------------------------------------- slices and samples


@pytest.mark.parametrize("parts", [("train[:100]", "train[50:]"), ("train[:40%]", "train[20%:]")])
@pytest.mark.parametrize("streaming", [[], ["--streaming", "--max_train_steps=3"]])
def test_slices_that_overlap_are_not_held_out(accelerator, tmp_path, parts, streaming):
    flags = [f"--train_data_dir={write(tmp_path / 'many', 110)}", f"--dataset_split={parts[0]}", *streaming]
    data = load(accelerator, *flags, f"--validation_split={parts[1]}")
    with pytest.raises(UserError, match="so it would not be held out"):
        _ = data.held_out
    assert load(accelerator, *flags, "--validation_split=train[100:]").held_out is not None


@pytest.mark.parametrize("first", [0, 20])
def test_a_bad_image_of_a_stream_counts_once_in_all_epochs(accelerator, tmp_path, caplog, first):
    (write(tmp_path / "many", 8) / "003.png").write_bytes(b"no image")
    flags = [f"--train_data_dir={tmp_path}/many", "--streaming", "--max_train_steps=60", "--max_bad_images=1"]
    assert len(list(load(accelerator, *flags).batches(range(first, 60)))) == 60 - first
    assert caplog.text.count("skipped (1 so far)") == 1


@pytest.mark.parametrize("allowed, message", [(0, "bad image|cannot be|No such file"), (8, "can be read any more")])
def test_images_of_a_stream_that_disappear_end_the_run(accelerator, tmp_path, allowed, message):
    folder = write(tmp_path / "many", 8)
    flags = [f"--train_data_dir={folder}", "--streaming", "--max_train_steps=60", f"--max_bad_images={allowed}"]
    batches = load(accelerator, *flags).batches(range(60))
    for _ in range(8):  # two epochs
        next(batches)
    for path in folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=message):
        list(batches)


@pytest.fixture
def three(tmp_path):
    for name, count in (("a", 30), ("b", 15), ("c", 15)):
        write(tmp_path / "three" / name, count)
    return tmp_path / "three"


def test_a_slice_that_lacks_a_class_says_which(accelerator, three, caplog):
    data = load(accelerator, f"--train_data_dir={three}", "--dataset_split=train[:75%]")
    assert "--dataset_split train[:75%]: no image for 1 of the 3 classes in label: c." in caplog.text
    data.images.held_out("train[75%:]", "--validation_split")
    assert "--validation_split train[75%:]: no image for 2 of the 3 classes in label: a, b." in caplog.text
    caplog.clear()
    load(accelerator, f"--train_data_dir={three}", "--dataset_split=train")
    assert "no image for" not in caplog.text


def test_a_sample_is_drawn_at_random_by_the_seed(accelerator, three):
    flags = [f"--train_data_dir={three}", "--max_train_samples=30", "--label_column=label"]
    first, again = load(accelerator, *flags), load(accelerator, *flags)
    assert len(classes(first)) == 3 and first.images.dataset["image"][:] == again.images.dataset["image"][:]
    assert first.settings["sample"] == "at random, seed 0"
    assert load(accelerator, *flags, "--seed=1").images.dataset["image"][:] != first.images.dataset["image"][:]


# ------------------------------------------------------------------------------------------------------ split layouts


@pytest.mark.parametrize(
    ("wrapper", "names"),
    [
        ("", ("train", "valid", "test")), ("", ("training", "validation", "testing")), ("", ("train", "dev", "eval")),
        ("animals", ("train", "val", "test")), ("images/of", ("Train", "Valid", "Test")),
    ],
)  # fmt: skip
def test_splits_are_found_under_the_names_that_people_give_them(accelerator, tmp_path, wrapper, names):
    for split, count in zip(names, (10, 3, 2), strict=True):
        for name in ("cat", "dog"):
            write(tmp_path / "data" / wrapper / split / name, count)
    data = load(accelerator, f"--train_data_dir={tmp_path}/data", "--label_column=label")
    assert classes(data) == {"cat": 10, "dog": 10}
    for asked, count in (("validation", 6), ("val", 6), ("test", 4), (names[1].lower(), 6), (names[2].lower(), 4)):
        assert data.images.held_out(asked, "--validation_split").length == count


def test_loose_images_beside_splits_are_left_out_by_name(accelerator, tmp_path, caplog):
    write(tmp_path / "data" / "train" / "cat", 6)
    write(tmp_path / "data" / "test" / "cat", 4)
    write(tmp_path / "data", 1)
    data = load(accelerator, f"--train_data_dir={tmp_path}/data")
    assert data.length == 6 and "skipped images beside the splits (1)" in caplog.text and "000.png" in caplog.text


def test_a_class_that_is_called_like_a_split_is_reported(accelerator, tmp_path, caplog):
    for name in ("bus", "car", "train"):
        write(tmp_path / "data" / name, 4)
    data = load(accelerator, f"--train_data_dir={tmp_path}/data", "--label_column=label")
    assert classes(data) == {"bus": 4, "car": 4, "train": 4}
    assert "names of splits (train) are beside bus, car, so they are treated as classes" in caplog.text


# ------------------------------------------------------------------------------------------------------------- floats


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_are_scaled_once_for_the_data_set(accelerator, tmp_path, channels):
    shape = (20, 8, 8, 3) if channels == 3 else (20, 8, 8)
    kind = datasets.Array3D((8, 8, 3), "float32") if channels == 3 else datasets.Array2D((8, 8), "float32")
    unit = RNG.random(shape).astype(np.float32)
    unit.reshape(20, -1)[:12, 0] = np.float32(1.0000001)
    wide = unit * 255
    wide[3] = np.minimum(wide[3], 1)  # nearly black, and no white
    for name, array in (("unit", unit), ("wide", wide)):
        data = datasets.Dataset.from_dict({"image": list(array)}, features=datasets.Features({"image": kind}))
        data.to_parquet(tmp_path / f"{name}.parquet")
        flags = [f"--dataset_name={tmp_path}/{name}.parquet", "--image_column=image"]
        images = load(accelerator, *flags, "--train_batch_size=20").examples(20)["images"]
        means = sorted(((images + 1) * 127.5).mean(dim=(1, 2, 3)).tolist())
        assert means[0] > 90 if name == "unit" else means[0] < 2 < 90 < means[1]
        assert means[-1] < 170
    overshot = (unit * 1.2 - 0.1).astype(np.float32)  # like values after a bicubic resize
    if channels == 3:
        data = datasets.Dataset.from_dict({"image": list(overshot)}, features=datasets.Features({"image": kind}))
        data.to_parquet(tmp_path / "overshot.parquet")
        for flags in ([], ["--image_range=0,1"]):
            data = load(accelerator, f"--dataset_name={tmp_path}/overshot.parquet", "--image_column=image", *flags)
            assert mean(data) == pytest.approx(128, abs=15)


def test_a_held_out_split_is_scaled_like_the_training_images(accelerator, tmp_path):
    values = RNG.random((20, 8, 8, 3)).astype(np.float32) * 100
    values[12:] /= 200  # these images alone would be taken for values from 0 to 1
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "float32")})
    datasets.Dataset.from_dict({"image": list(values)}, features=features).to_parquet(tmp_path / "x.parquet")
    flags = [f"--dataset_name={tmp_path}/x.parquet", "--image_column=image", "--dataset_split=train[:12]"]
    flags += ["--validation_split=train[12:]"]
    for more, white in ([], 255), (["--image_range=0,4095"], 4095):
        data = load(accelerator, *flags, *more)
        shown = (data.examples(20, data.held_out)["images"] + 1) * 127.5
        assert shown.max() == pytest.approx(values[12:].max() * 255 / white, abs=1)


def test_the_parts_of_a_reference_are_scaled_alike(accelerator, tmp_path):
    values = RNG.random((200, 8, 8, 3)).astype(np.float32)
    values[0] *= 100  # only one of the parts has this image
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), "float32")})
    datasets.Dataset.from_dict({"image": list(values)}, features=features).to_parquet(tmp_path / "x.parquet")
    flags = [f"--reference={tmp_path}/x.parquet", "--image_column=image", "--num_samples=60"]
    reference = Reference(evaluate.parse_args(["x", *flags]), accelerator)
    assert {reference.images(part).white for part in ("train", reference.held_out_split)} == {255.0}


def test_integers_that_do_not_fit_are_refused(accelerator, tmp_path):
    features = datasets.Features({"image": datasets.Array2D((8, 8), "int64")})
    table = datasets.Dataset.from_dict({"image": [np.full((8, 8), 2**33)] * 9}, features=features)
    table.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"values from 8589934592 to 8589934592. Expected values that fit into 32 bits"):
        load(accelerator, f"--dataset_name={tmp_path}/x.parquet", "--image_column=image")


# ------------------------------------------------------------------------------------------------------------- labels


def table_of(tmp_path, labels, name="kind"):
    write(tmp_path / "pictures", len(labels))
    rows = "".join(f"pictures/{k:03}.png,{label}\n" for k, label in enumerate(labels))
    (tmp_path / "table.csv").write_text(f"image,{name}\n{rows}")
    return [f"--dataset_name={tmp_path}/table.csv", "--image_column=image", f"--label_column={name}"]


def test_words_for_nothing_are_classes_in_tables(accelerator, tmp_path):
    data = load(accelerator, *table_of(tmp_path, ["None", "NA", "null", "crack"] * 4))
    assert classes(data) == {"None": 4, "NA": 4, "null": 4, "crack": 4}


def test_images_without_a_class_are_counted(accelerator, tmp_path, caplog):
    data = load(accelerator, *table_of(tmp_path, ["a", "", "b", "a"] * 3))
    assert classes(data) == {"a": 6, "b": 3, None: 3} and "3 of 12 images have no class in kind" in caplog.text
    labels = data.typical_labels()  # of samples that are compared with these images
    assert sorted(labels) == [0] * 6 + [1] * 3 and list(labels) != sorted(labels)
    data = load(accelerator, *table_of(tmp_path, [0, 1, -1, 1] * 3))
    assert classes(data) == {"0": 3, "1": 6, None: 3}


def test_minus_one_beside_one_other_number_is_asked_about(accelerator, tmp_path):
    with pytest.raises(UserError, match=r"the values are -1 and 1, and -1 means that an image has no class"):
        load(accelerator, *table_of(tmp_path, [-1, 1] * 6))


def test_true_and_false_are_classes(accelerator, tmp_path):
    assert classes(load(accelerator, *table_of(tmp_path, [True, False, True] * 4))) == {"True": 8, "False": 4}


def test_a_format_that_was_saved_hides_nothing(accelerator, tmp_path):
    data = {"image": [Image.new("L", (8, 8), k) for k in range(12)], "label": [k % 2 for k in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    for kind in ("torch", "pandas", "arrow", "numpy"):
        saved = datasets.Dataset.from_dict(data, features=features).with_format(kind, columns=["image"])
        saved.save_to_disk(tmp_path / kind)
        loaded = load(accelerator, f"--dataset_name={tmp_path}/{kind}", "--label_column=label")
        assert classes(loaded) == {"cat": 6, "dog": 6}, kind


def test_classes_without_an_image_are_left_out_of_filtered_data(accelerator, tmp_path, caplog):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdef"))})
    data = {"image": [Image.new("L", (8, 8), k) for k in range(12)], "label": [(k % 3) * 2 for k in range(12)]}
    datasets.Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "filtered")
    loaded = load(accelerator, f"--dataset_name={tmp_path}/filtered", conditional=True)
    assert classes(loaded) == {"a": 4, "c": 4, "e": 4}
    assert "left out 3 of the 6 classes in label, because no image has them: b, d, f" in caplog.text


def test_the_column_of_images_is_no_column_of_labels(accelerator, tmp_path):
    flags = table_of(tmp_path, ["a", "b"] * 4)[:-1]
    with pytest.raises(UserError, match="--label_column image: this is the column of images"):
        load(accelerator, *flags, "--label_column=image")


# -------------------------------------------------------------------------------------------- archives, broken tables


def test_archives_in_a_folder_are_unpacked(accelerator, tmp_path):
    loose = write(tmp_path / "loose", 12)
    for kind, count in (("tar", 2), ("tar.gz", 1), ("zip", 2)):
        folder = tmp_path / f"{kind} [1]"
        folder.mkdir()
        for part in range(count):
            names = sorted(path.name for path in loose.iterdir())[part::count]
            if kind == "zip":
                with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
                    for name in names:
                        archive.write(loose / name, name)
            else:
                with tarfile.open(folder / f"{part}.{kind}", "w:gz" if "gz" in kind else "w") as archive:
                    for name in names:
                        archive.add(loose / name, name)
        assert load(accelerator, f"--train_data_dir={folder}").length == 12, kind


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.json", b'{"image": "a.png"}\n{"image": \n', "JSON parse error"),
        ("x.csv", b"image,kind\na.png,1\nb.png,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
        ("x.csv", "image,kind\n\xe4.png,1\n".encode("latin-1"), "can't decode byte 0xe4"),
        ("x.csv", b"", "No columns to parse"),
    ],
)
def test_broken_tables_say_why(accelerator, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(accelerator, f"--dataset_name={tmp_path / name}", "--image_column=image")


def test_a_broken_file_of_own_images_is_one_bad_image_and_photographs_stand_upright(accelerator, tmp_path, caplog):
    folder = write(tmp_path / "own", 12)
    broken = folder / "003.png"
    broken.write_bytes(broken.read_bytes()[:80])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 16), "red").save(tmp_path / "turned.jpg", exif=exif)
    own = OwnImages(lambda k: Image.open(folder / f"{k:03}.png"), length=12)
    with pytest.raises(UserError, match="own image 3: "):
        list(load(accelerator, own_images=own).batches(range(6)))
    own = OwnImages(lambda k: Image.open(folder / f"{k:03}.png"), length=12)
    assert len(list(load(accelerator, "--max_bad_images=1", own_images=own).batches(range(6)))) == 6
    own = OwnImages(lambda k: Image.open(tmp_path / "turned.jpg"), length=12)
    assert load(accelerator, own_images=own).size == (8, 16)


# ------------------------------------------------------------------------------------------------- classes of a model


def conditional(names=("a", "b", "c, d")):
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=len(names) + 1, **UNETS["tiny"])
    unet.register_to_config(_class_names=list(names))
    return unet


def test_classes_go_by_name_when_a_model_is_adapted_to_others(caplog):
    unet = conditional()
    before = unet.class_embedding.weight.detach().clone()
    after = add_class_embedding(unet, ["b", "new", "a"]).class_embedding.weight
    assert torch.equal(after, before[[1, 3, 0, 3]]) and after.requires_grad and unet.config.num_class_embeds == 4
    assert "Started as the null class: 1 new class (new). Left out: 1 class (c, d)" in caplog.text
    with pytest.raises(UserError, match=r"has 3 classes .*, but none of the classes of the images \(x, y\)"):
        add_class_embedding(conditional(), ["x", "y"])


def test_a_name_with_a_comma_is_one_name():
    config = conditional().config
    assert choose_classes(config, "c, d") == [2] and choose_classes(config, '"c, d",a') == [2, 0]


def test_the_pipeline_of_classes_draws_in_half_precision_and_one_class(tmp_path):
    pipeline = ClassConditionalPipeline(conditional(), DDPMScheduler()).to(torch.bfloat16)
    for asked in (1, "b", ["a", 1]):
        images = pipeline(asked, num_inference_steps=2, output_type="np").images
        assert len(images) == (2 if isinstance(asked, list) else 1) and np.isfinite(images).all()


def test_weights_of_the_fp16_variant_are_found(tmp_path):
    from diffusers import DDPMPipeline

    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNETS["tiny"])
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model", variant="fp16")
    loaded = load_pretrained(str(tmp_path / "model")).unet
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), loaded.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------- --config


def test_values_in_a_config_file_stay_what_stands_there(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: 1.10\ndataset_name: 007\nlabel_column: on\nseed: 042\nuse_ema: false\n")
    args = train_ddpm.parse_args([f"--config={file}"])
    assert (args.output_dir, args.dataset_name, args.label_column, args.seed) == ("1.10", "007", "on", 42)
    for content, said in (
        ("seed: 1\noutput_dir: x\nseed: 2\n", "seed is given twice, the second time in line 3"),
        ("seed: [1, 2]\n", "seed is a list. Expected one value"),
        ("learning_rat: 1\n", "there is no flag --learning_rat. Did you mean learning_rate?"),
    ):
        file.write_text(content)
        with pytest.raises(SystemExit):
            train_ddpm.parse_args([f"--config={file}"])
        assert said in capsys.readouterr().err


def test_the_record_of_a_run_is_a_config_file(finished_run):
    args = train_ddpm.parse_args([f"--config={finished_run / 'training_args.json'}"])
    assert args.max_train_steps == 6 and args.label_column == "label" and args.use_ema is True


def test_a_stream_of_large_images_is_shuffled_in_a_smaller_buffer(accelerator, tmp_path, monkeypatch):
    from utils.sources import named_images

    write(tmp_path / "data", 12)
    table = datasets.Dataset.from_dict(
        {"image": [Image.open(path).copy() for path in sorted((tmp_path / "data").iterdir())]}
    )
    table.to_parquet(tmp_path / "x.parquet")
    flags = [f"--dataset_name={tmp_path}/x.parquet", "--streaming"]
    assert load(accelerator, *flags).images.buffer_size == 10_000
    monkeypatch.setattr(named_images, "SHUFFLE_BUFFER_BYTES", 200_000)
    assert 100 <= load(accelerator, *flags).images.buffer_size < 2_000


# ------------------------------------------------------------------------------------------------------------- the rest


def test_a_pipe_is_not_waited_for(accelerator, tmp_path, caplog):
    import os

    write(tmp_path / "data", 6)
    os.mkfifo(tmp_path / "data" / "pipe.png")
    assert load(accelerator, f"--train_data_dir={tmp_path}/data").length == 6
    assert "skipped pipes and other special files (1)" in caplog.text and "pipe.png" in caplog.text


@pytest.mark.parametrize("name", ["metadata.csv", "METADATA.CSV"])
def test_labels_that_differ_in_a_zero_are_two_and_capitals_are_read(accelerator, tmp_path, name):
    write(tmp_path / "data", 6)
    rows = "".join(f"{k:03}.png,{'01' if k % 2 else '1'}\n" for k in range(6))
    (tmp_path / "data" / name).write_text(f"file_name,kind\n{rows}")
    data = load(accelerator, f"--train_data_dir={tmp_path}/data", "--label_column=kind")
    assert classes(data) == {"01": 3, "1": 3}


def test_a_model_with_classes_is_asked_for_all_where_the_reference_has_no_labels(tmp_path):
    import json

    from conftest import exit_code

    import evaluate

    ClassConditionalPipeline(conditional(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    write(tmp_path / "reference" / "train", 40)
    write(tmp_path / "reference" / "test", 40)
    flags = [str(tmp_path / "model"), f"--reference={tmp_path}/reference", "--features=pixels", "--num_samples=12"]
    args = evaluate.parse_args([*flags, "--num_inference_steps=1", f"--output_dir={tmp_path}/out"])
    assert exit_code(evaluate.main, args) == 0
    rows = {row["model"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["results"]}
    assert rows["model guidance 1"]["N"] == 12


def test_only_code_that_the_run_wrote_is_published(tmp_path):
    from fnmatch import fnmatch

    from utils.publishing.hub import ALLOWED

    for name in ("notes.py", "unet/other.py", "scheduler/other.py"):
        assert not any(fnmatch(name, pattern) for pattern in ALLOWED), name
    for name in ("pipeline.py", "unet/own_net_0123456789ab.py", "unet/basic_unet.py", "scheduler/linear_mix.py"):
        assert any(fnmatch(name, pattern) for pattern in ALLOWED), name


# ------------------------------------------------------------------------------------------------- greys, rows, arrays


def test_gif_files_with_a_grey_palette_are_grey(accelerator, tmp_path):
    (tmp_path / "grey").mkdir()
    palette = bytes(value for level in (7, 200, 90, 255) for value in (level, level, level))
    for k in range(6):
        image = Image.fromarray(RNG.integers(0, 4, (8, 8), dtype=np.uint8), "P")
        image.putpalette(palette)
        options = {"transparency": 1} if k % 2 else {}
        image.save(tmp_path / "grey" / f"{k}.gif", **options)
        assert Image.open(tmp_path / "grey" / f"{k}.gif").mode == "P"
    files = sorted((tmp_path / "grey").iterdir())
    data = load(accelerator, f"--train_data_dir={tmp_path}/grey")
    assert data.mode == "L"
    expected = Image.open(files[0]).convert("L")
    assert np.array_equal(data._prepared[(0, 0)]["image"][0], np.asarray(expected))
    own = OwnImages(lambda k: Image.open(files[k]), length=6)
    assert load(accelerator, own_images=own).mode == "L"
    coloured = Image.open(files[0])
    coloured.putpalette(palette[:9] + b"\xff\x00\x00")
    coloured.save(files[0])
    assert load(accelerator, f"--train_data_dir={tmp_path}/grey").mode == "RGB"


def test_an_image_with_two_classes_in_the_metadata_is_refused(accelerator, tmp_path):
    write(tmp_path / "data", 6)
    rows = "".join(f"{k:03}.png,{'ab'[k % 2]}\n" for k in range(6))
    table = tmp_path / "data" / "metadata.csv"
    table.write_text(f"file_name,kind\n{rows}000.png,a\n")
    flags = (f"--train_data_dir={tmp_path}/data", "--label_column=kind")
    assert classes(load(accelerator, *flags)) == {"a": 3, "b": 3}
    table.write_text(f"file_name,kind\n{rows}000.png,b\n")
    with pytest.raises(UserError, match=r"000.png has two rows, with the kind 'a' and 'b'. Expected one"):
        load(accelerator, *flags)


def test_metadata_of_the_training_split_leave_the_test_split_without_classes(accelerator, tmp_path, caplog):
    write(tmp_path / "data" / "train", 6)
    write(tmp_path / "data" / "test" / "a", 3)
    rows = "".join(f"{k:03}.png,{'ab'[k % 2]}\n" for k in range(6))
    (tmp_path / "data" / "train" / "metadata.csv").write_text(f"file_name,kind\n{rows}")
    data = load(accelerator, f"--train_data_dir={tmp_path}/data", "--label_column=kind")
    assert classes(data) == {"a": 3, "b": 3}
    held_out = data.images.held_out("test", "--validation_split")
    assert held_out.labels() == [-1] * 3 and "3 of 3 images have no class in kind" in caplog.text


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_arrays_in_a_table_do_not_become_lists(accelerator, tmp_path, dtype):
    array = RNG.random((12, 8, 8, 3))
    array = (array * 255).astype(dtype) if dtype == "uint8" else array.astype(dtype)
    features = datasets.Features({"image": datasets.Array3D((8, 8, 3), dtype), "kind": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": list(array), "kind": ["a", "b"] * 6}, features=features)
    table.to_parquet(tmp_path / "x.parquet")
    flags = [f"--dataset_name={tmp_path}/x.parquet", "--image_column=image", "--label_column=kind"]
    data = load(accelerator, *flags)
    record = data.images.dataset[5]["image"]
    assert isinstance(record, np.ndarray) and (record == array[5]).all() and classes(data) == {"a": 6, "b": 6}
    expected = np.rint(array[5] if dtype == "uint8" else array[5].astype(np.float64) * 255).transpose(2, 0, 1)
    assert np.array_equal(data._prepared[(5, 0)]["image"], expected)
    assert shared_rows(data.images.dataset, data.images.dataset.select(range(3))) == 3
