"""Images in memory give the same batches as those of any other source, and clear errors."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import equal_weights, interrupt, parse, train
from PIL import Image
from sklearn.datasets import load_digits

import train_ddpm
import utils.data.train_data
from utils import UserError
from utils.data.own_images import OwnImages
from utils.data.train_data import load_train_data


@pytest.fixture(scope="module")
def digits():
    """The embedded digits, uint8 (N, 8, 8)."""
    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)


def batches(accelerator, own_images, *flags):
    data = load_train_data(parse(*flags), accelerator, own_images=own_images)
    return data, list(data.batches(range(0, 3)))


class Tuples(torch.utils.data.Dataset):
    def __init__(self, images, form):
        self.images, self.form = images, form

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.form(self.images[index])


KINDS = {
    "array N H W": OwnImages,
    "array N C H W": lambda digits: OwnImages(digits[:, None]),
    "array N H W C": lambda digits: OwnImages(digits[..., None]),
    "floats": lambda digits: OwnImages((digits / 255).astype(np.float32)),
    "floats from -1 to 1": lambda digits: OwnImages(torch.from_numpy(digits)[:, None] / 127.5 - 1, value_range=(-1, 1)),
    "Dataset of tuples": lambda digits: OwnImages(Tuples(digits, lambda image: (torch.from_numpy(image)[None], 3))),
    "Dataset of dictionaries": lambda digits: OwnImages(Tuples(digits, lambda image: {"image": image, "label": 3})),
    "function": lambda digits: OwnImages(lambda index: Image.fromarray(digits[index]), length=len(digits)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", ["always", "never"])
def test_every_kind_gives_the_batches_of_the_embedded_digits(accelerator, digits, kind, cache):
    flags = ["--random_flip", f"--cache_images={cache}", "--dataloader_num_workers=0"]
    expected = list(load_train_data(parse(*flags), accelerator).batches(range(0, 3)))
    data, found = batches(accelerator, KINDS[kind](digits), *flags)
    assert (data.length, data.image_shape, data.name) == (1797, (1, 8, 8), "own images")
    for mine, theirs in zip(found, expected, strict=True):
        assert np.array_equal(mine["sample_ids"], theirs["sample_ids"])
        assert torch.equal(mine["images"], theirs["images"])


def test_colour_sizes_and_labels(accelerator):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (3, 20, 30 + k), dtype=np.uint8) for k in range(12)]
    labels = [k % 3 for k in range(12)]
    flags = ["--resolution=16", "--dataloader_num_workers=2", "--cache_images=never"]
    data, found = batches(accelerator, OwnImages(images, labels=labels, label_names=["a", "b", "c"]), *flags)
    assert data.image_shape == (3, 16, 16) and data.label_names == ["a", "b", "c"]
    cached = batches(accelerator, OwnImages(images, labels=labels), "--resolution=16")[1]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(found, cached, strict=True))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(found, cached, strict=True))
    assert set(torch.cat([batch["labels"] for batch in found]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: OwnImages(lambda index: None), "needs length="),
        (lambda: OwnImages(np.zeros((20, 8, 8), np.uint8), labels=[0]), "1 labels, .* for 20 images"),
        (lambda: OwnImages(np.zeros((2, 8, 8), np.uint8), labels=[0, -1]), r"\[-1, 0\] among them"),
        (lambda: OwnImages(np.zeros((20, 4, 8, 8), np.uint8)), r"own image 0 has the shape \(4, 8, 8\). Expected C"),
        (lambda: OwnImages(np.zeros((20, 8, 8), np.int64)), "type int64. Expected uint8, or floats from 0 to 1"),
        (
            lambda: OwnImages(np.full((20, 8, 8), -0.5)),
            r"values from -0.5 to -0.5. Expected 0 to 1\. Give value_range=",
        ),
        (lambda: OwnImages(np.full((20, 8, 8), np.nan)), "values from nan"),
        (lambda: OwnImages(np.zeros((5, 8, 8), np.uint8)), "own images has 5 images, fewer than one global batch of 8"),
    ],
)
def test_what_cannot_be_an_image_is_refused(accelerator, make, message):
    with pytest.raises(UserError, match=message):
        batches(accelerator, make())


def test_files_that_a_function_cannot_read_are_bad_images(accelerator, digits):
    def read(index):
        if index == 5:
            raise OSError("no such file")
        return digits[index]

    with pytest.raises(UserError, match=r"own image 5: OSError: no such file$"):
        batches(accelerator, OwnImages(read, length=20))
    assert len(batches(accelerator, OwnImages(read, length=20), "--max_bad_images=100")[1]) == 3


def test_flags_that_need_a_data_set_are_refused(accelerator, digits):
    with pytest.raises(UserError, match="own images do not support --streaming"):
        batches(accelerator, OwnImages(digits), "--max_train_samples=9")
    with pytest.raises(UserError, match="--validation_split test: own images are in Python and have no splits"):
        OwnImages(digits).held_out("test", "--validation_split")


@pytest.mark.parametrize("kind", ["array N C H W", "Dataset of tuples"])
@pytest.mark.parametrize("cache", ["always", "never"])
def test_training_on_them_resumes_bit_for_bit(tmp_path, monkeypatch, digits, kind, cache):
    own_images = KINDS[kind](digits)
    monkeypatch.setattr(utils.data.train_data, "load_train_data", partial(load_train_data, own_images=own_images))
    monkeypatch.setattr(train_ddpm, "DROPOUT", 0.1)
    flags = ["--random_flip", f"--cache_images={cache}", "--dataloader_num_workers=0"]
    assert train(tmp_path / "straight", *flags) == 0
    assert train(tmp_path / "cut", *flags) == 0
    interrupt(tmp_path / "cut", "checkpoint-3")
    assert train(tmp_path / "cut", *flags) == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert equal_weights(tmp_path / "straight" / weights, tmp_path / "cut" / weights)
    record = json.loads((tmp_path / "cut" / "training_args.json").read_text())
    assert record["data"] == "own images" and record["images"] == 1797


@pytest.mark.parametrize("positions", [9, 1])
def test_copies_are_searched_for_in_all_parts_that_fit_into_memory(accelerator, positions):
    wide = np.broadcast_to(np.arange(16, dtype=np.uint8), (12, 8, 16))
    data = load_train_data(parse("--resolution=8", "--train_batch_size=4"), accelerator, own_images=OwnImages(wide))
    parts = data._prepared.all_parts(1000, limit=2 * 12 * 8 * 8 * positions)
    starts = [0, 1, 2, 3, 4, 5, 6, 7, 8] if positions == 9 else [4]
    assert sorted(parts[:, 0, 0, 0]) == sorted(12 * starts)
