"""Further tensors of a row are cropped and flipped like their image, or refused by name."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import parse
from PIL import Image

from utils import UserError
from utils.data.columns import Column
from utils.data.own_images import OwnImages
from utils.data.train_data import load_train_data

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (24, 12, 17), dtype=np.uint8)  # neither square nor of the training size
VECTORS = np.stack([PICTURES[:, 0, 0], PICTURES[:, 1, 1]], axis=1).astype(np.float32)
MASKS = (PICTURES // 64).astype(np.uint8)  # four classes


def folder_of(path, arrays):
    path.mkdir(parents=True)
    for k, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{k:03}.png")
    return path


def batches(train_data, numbers=range(5)):
    return list(train_data.batches(numbers))


def check(found):
    """Check that the column ``twin`` equals the image, cropped and flipped, and that ``mask`` has no new values."""
    for batch in found:
        assert batch["images"].shape == batch["twin"].shape == (8, 1, 8, 8)
        assert torch.equal(batch["twin"], batch["images"])
        assert batch["mask"].dtype == torch.int64 and set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3}
        assert batch["mask"].shape == (8, 8, 8)
        assert batch["vector"].dtype == torch.float32 and batch["vector"].shape == (8, 2)
    assert len({tuple(row) for batch in found for row in batch["vector"].tolist()}) > 12


FLAGS = ["--resolution=8", "--random_flip"]


@pytest.fixture
def table(tmp_path):
    """A data set with columns for everything, on disk."""
    columns = {
        "image": [Image.fromarray(picture) for picture in PICTURES],
        "copy": [Image.fromarray(picture) for picture in PICTURES],
        "classes": [Image.fromarray(mask) for mask in MASKS],
        "numbers": VECTORS.tolist(),
    }
    kinds = {"image": datasets.Image(), "copy": datasets.Image(), "classes": datasets.Image()}
    features = datasets.Features({**kinds, "numbers": datasets.List(datasets.Value("float32"))})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    return tmp_path / "table"


NAMED = {"twin": Column("copy"), "mask": Column("classes", kind="mask"), "vector": Column("numbers", kind="vector")}
OWN = {"twin": Column(PICTURES), "mask": Column(MASKS, kind="mask"), "vector": Column(VECTORS, kind="vector")}


@pytest.mark.parametrize("how", ["auto", "never", "DIR"])
def test_columns_of_own_images_are_cut_and_flipped_alike(tmp_path, accelerator, how):
    flags = [*FLAGS, f"--cache_images={tmp_path if how == 'DIR' else how}", "--dataloader_num_workers=2"]
    check(batches(load_train_data(parse(*flags), accelerator, own_images=OwnImages(PICTURES, columns=OWN))))


@pytest.mark.parametrize("how", ["auto", "never", "DIR"])
def test_columns_of_a_table_are_cut_and_flipped_alike(tmp_path, accelerator, table, how):
    flags = [*FLAGS, f"--cache_images={tmp_path / 'cache' if how == 'DIR' else how}", "--dataloader_num_workers=0"]
    args = parse(*flags, f"--dataset_name={table}", "--image_column=image")
    data = load_train_data(args, accelerator, columns=NAMED)
    found = batches(data)
    check(found)
    if how == "DIR":  # the next run uses the file
        again = batches(load_train_data(args, accelerator, columns=NAMED))
        assert all(torch.equal(a[key], b[key]) for a, b in zip(found, again, strict=True) for key in ("images", *NAMED))


def test_columns_of_a_stream_are_cut_and_flipped_alike(accelerator, table):
    args = parse(*FLAGS, f"--dataset_name={table}", "--image_column=image", "--streaming")
    check(batches(load_train_data(args, accelerator, columns=NAMED)))


def test_two_micro_steps_give_what_one_gives(accelerator, table):
    found = []
    for flags in (["--train_batch_size=8"], ["--train_batch_size=4", "--gradient_accumulation_steps=2"]):
        args = parse(*FLAGS, f"--dataset_name={table}", "--image_column=image", *flags)
        found.append(batches(load_train_data(args, accelerator, columns=NAMED)))
    for key in ("images", *NAMED):
        assert torch.equal(*(torch.cat([batch[key] for batch in batches]) for batches in found))


def test_partners_from_a_folder_of_the_same_names(tmp_path, accelerator):
    folder_of(tmp_path / "images" / "cat", PICTURES[:12])
    folder_of(tmp_path / "images" / "dog", PICTURES[12:])
    folder_of(tmp_path / "partners" / "cat", PICTURES[:12])
    # These partners are larger, with the same ratio of sides
    folder_of(tmp_path / "partners" / "dog", PICTURES[12:].repeat(2, axis=1).repeat(2, axis=2))
    args = parse(*FLAGS, f"--train_data_dir={tmp_path}/images")
    columns = {"twin": Column(tmp_path / "partners")}
    data = load_train_data(args, accelerator, columns=columns)
    for batch in batches(data):
        assert (batch["twin"] - batch["images"]).abs().max() < 0.5  # resized twice
    examples = data.examples(6)
    assert examples["twin"].shape == examples["images"].shape == (6, 1, 8, 8)
    before = data.settings["fingerprint"]
    Image.fromarray(255 - PICTURES[0]).save(tmp_path / "partners" / "cat" / "000.png")
    assert load_train_data(args, accelerator, columns=columns).settings["fingerprint"] != before
    (tmp_path / "partners" / "dog" / "003.png").unlink()
    with pytest.raises(UserError, match=r"no partner for 1 of 24 images: .*dog/003\.png"):
        load_train_data(args, accelerator, columns=columns)


def test_a_partner_of_another_shape_is_refused_by_name(tmp_path, accelerator):
    folder_of(tmp_path / "images", PICTURES)
    folder_of(tmp_path / "partners", PICTURES.transpose(0, 2, 1))
    args = parse(*FLAGS, f"--train_data_dir={tmp_path}/images")
    data = load_train_data(args, accelerator, columns={"twin": Column(tmp_path / "partners")})
    with pytest.raises(UserError, match=r"partners/000\.png.* has 12 x 17 pixels beside an image of 17 x 12"):
        batches(data)


def test_any_number_of_channels_in_own_images(accelerator):
    many = RNG.random((24, 7, 12, 17), dtype=np.float32)
    columns = {"many": Column(many), "function": Column(lambda index: many[index, :2])}
    data = load_train_data(parse(*FLAGS), accelerator, own_images=OwnImages(PICTURES, columns=columns))
    assert data.settings["columns"] == {"many": ["image", 7], "function": ["image", 2]}
    batch = batches(data)[0]
    assert batch["many"].shape == (8, 7, 8, 8) and torch.equal(batch["function"], batch["many"][:, :2])


def test_held_out_images_bring_their_columns(tmp_path, accelerator, table):
    flags = [f"--dataset_name={table}", "--image_column=image", "--dataset_split=train[:16]"]
    data = load_train_data(parse(*FLAGS, *flags), accelerator, columns=NAMED)
    held_out = data.examples(8, data.images.held_out("train[16:]", "--validation_split"))
    assert torch.equal(held_out["twin"], held_out["images"]) and held_out["vector"].shape == (8, 2)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"images": Column("copy")}, "every batch already has the name 'images'"),
        ({"twin": Column("copy", kind="picture")}, "has the kind 'picture'. Expected image, mask, vector"),
        ({"twin": Column("nothing")}, "has no 'nothing' for twin. Its columns are image"),
        ({"twin": Column("image")}, "'image' of .* is already image"),
        ({"twin": Column(Path("nowhere"))}, "the folder of twin, nowhere is missing"),
    ],
)
def test_columns_that_are_not_there_are_refused(accelerator, table, columns, said):
    with pytest.raises(UserError, match=said):
        load_train_data(parse(f"--dataset_name={table}", "--image_column=image"), accelerator, columns=columns)


def test_rows_without_a_value_are_bad_rows(accelerator, caplog):
    broken = VECTORS.copy()
    broken[5, 1] = np.nan
    columns = {"vector": Column(broken, kind="vector")}
    for flags in ([], ["--cache_images=never", "--dataloader_num_workers=0"]):
        data = load_train_data(parse(*FLAGS, *flags), accelerator, own_images=OwnImages(PICTURES, columns=columns))
        with pytest.raises(UserError, match=r"column vector of own image 5: expected finite numbers of shape \(2,\)"):
            batches(data)
    data = load_train_data(
        parse(*FLAGS, "--max_bad_images=1"), accelerator, own_images=OwnImages(PICTURES, columns=columns)
    )
    assert all(torch.isfinite(batch["vector"]).all() for batch in batches(data))


def test_a_column_of_another_length_is_refused():
    with pytest.raises(UserError, match="10 values of mask for 24 images"):
        OwnImages(PICTURES, columns={"mask": Column(MASKS[:10], kind="mask")})


def test_the_range_of_partners_of_high_bit_depth_is_reported_kept_and_may_be_given(tmp_path, accelerator, caplog):
    folder_of(tmp_path / "images", PICTURES)
    folder_of(tmp_path / "deep", (PICTURES.astype(np.uint16) * 4))  # up to 1020
    args = parse(*FLAGS, f"--train_data_dir={tmp_path}/images", "--center_crop")
    data = load_train_data(args, accelerator, columns={"twin": Column(tmp_path / "deep")})
    assert "twin: values from 0 to 1020 become -1 and 1" in caplog.text
    assert data.settings["columns"]["twin"] == ["image", 1, [0.0, 1020.0]]
    given = load_train_data(
        args, accelerator, columns={"twin": Column(tmp_path / "deep", value_range=(0, 2040))}
    ).examples(8)
    assert (given["twin"] - (data.examples(8)["twin"] - 1) / 2).abs().max() < 0.02


def test_a_cache_is_renewed_for_other_partners(tmp_path, accelerator):
    folder_of(tmp_path / "images", PICTURES.repeat(4, axis=0))  # 96 images; only some are probed
    folder_of(tmp_path / "partners", PICTURES.repeat(4, axis=0))
    args = parse(*FLAGS, f"--train_data_dir={tmp_path}/images", f"--cache_images={tmp_path}/cache")
    columns = {"twin": Column(tmp_path / "partners")}
    for k in range(96):
        batches(load_train_data(args, accelerator, columns=columns), range(1))
        Image.fromarray(255 - PICTURES[k // 4]).save(tmp_path / "partners" / f"{k:03}.png")
        if k == 2:
            break
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3


def test_partners_that_are_ambiguous_are_refused_and_other_files_are_none(tmp_path, accelerator):
    folder_of(tmp_path / "images" / "cats", PICTURES[:12])
    folder_of(tmp_path / "images" / "dogs", PICTURES[12:])
    flat = folder_of(tmp_path / "flat", PICTURES)
    args = parse(*FLAGS, f"--train_data_dir={tmp_path}/images")
    with pytest.raises(UserError, match="no partner for 24 of 24 images"):
        load_train_data(args, accelerator, columns={"twin": Column(flat)})
    args = parse(*FLAGS, f"--train_data_dir={flat}")
    partners = folder_of(tmp_path / "partners", PICTURES)
    (partners / "004.txt").write_text("a caption")
    check_twin = batches(load_train_data(args, accelerator, columns={"twin": Column(partners)}))
    assert all(torch.equal(batch["twin"], batch["images"]) for batch in check_twin)
    Image.fromarray(PICTURES[0]).save(partners / "004.bmp")
    with pytest.raises(UserError, match="several files have the same name, such as 004 "):
        load_train_data(args, accelerator, columns={"twin": Column(partners)})


def test_arrays_of_a_table_may_have_any_number_of_channels(tmp_path, accelerator):
    five = RNG.integers(0, 256, (24, 5, 12, 17), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "many": datasets.Array3D((5, 12, 17), "uint8")})
    columns = {"image": [Image.fromarray(picture) for picture in PICTURES], "many": list(five)}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "table")
    data = load_train_data(
        parse(*FLAGS, f"--dataset_name={tmp_path}/table"), accelerator, columns={"m": Column("many")}
    )
    assert batches(data)[0]["m"].shape == (8, 5, 8, 8)
    last = OwnImages(PICTURES, columns={"m": Column(lambda k: five[k].transpose(1, 2, 0))})
    with pytest.raises(UserError, match=r"column m of own image 0 .*arrays are \(C, H, W\) or \(H, W\)"):
        batches(load_train_data(parse(*FLAGS), accelerator, own_images=last))


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("seg", "'m' is 'seg'. Expected a Column"),
        (Column(Path("x"), kind="vector"), "'m' is a vector from a folder"),
        (Column(Path("x")), "m comes from x. Expected an array, Dataset or function"),
        (Column(lambda index: None), "column m of own image 0: expected a value, got None|expected a value, got None"),
        (Column(["a"] * 24, kind="vector"), "expected numbers of shape"),
    ],
)
def test_columns_that_cannot_be_are_refused_in_words(accelerator, column, said):
    with pytest.raises(UserError, match=said):
        own = OwnImages(PICTURES, columns={"m": column})
        batches(load_train_data(parse(*FLAGS), accelerator, own_images=own))
