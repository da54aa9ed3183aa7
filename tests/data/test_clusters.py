"""Clusters of images as classes: equal sizes, the same after a resume, drawn evenly by diffusers alone."""

import json
import shutil
import stat

import numpy as np
import pytest
import torch
from conftest import equal_weights, exit_code, interrupt, parse, train
from diffusers import ConsistencyModelPipeline, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

import distill_few_steps
import evaluate
import train_conditional
from utils import UserError
from utils.data.clusters import load_clusters, make_clusters
from utils.data.train_data import load_train_data
from utils.diffusion.classes import classes_to_show

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def run(folder, *flags):
    flags = ["--unet=tiny", "--clusters=12", "--num_samples=4", *flags]
    return train(folder, *flags, script=train_conditional)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run. Do not change it."""
    folder = tmp_path_factory.mktemp("clusters") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def digits():
    return (load_digits().images[:, None] * 15.9).astype(np.uint8)


def test_clusters_have_similar_images_and_about_equal_sizes(digits):
    clusters = make_clusters(digits, 20)
    assert make_clusters(digits, 20).digest == clusters.digest
    assert len({*clusters.names}) == 20
    labels = clusters.assign(torch.from_numpy(digits) / 127.5 - 1).numpy()
    sizes = np.bincount(labels, minlength=20)
    assert sizes.min() > 0.7 * sizes.mean() and sizes.max() < 1.3 * sizes.mean(), sizes
    target = load_digits().target
    likeliest = sum(np.bincount(target[labels == cluster]).max() for cluster in range(20))
    assert likeliest / len(labels) > 0.8  # without labels, most digits of a cluster are of the same class


@pytest.mark.parametrize(
    "images, count, message",
    [
        (60, 12, "--clusters 12: 60 images are too few. Expected 10 for each cluster, so give at most --clusters 6"),
        (12, 12, "--clusters 12: 12 images are too few. .* so leave --clusters out"),
        (0, 12, "--clusters 12: only 1 of the 300 images are different"),
    ],
)
def test_too_few_images_are_refused(digits, images, count, message):
    with pytest.raises(UserError, match=message):
        make_clusters(digits[:images] if images else digits[:1].repeat(300, 0), count)


def test_a_label_depends_on_the_image_alone(accelerator, tmp_path):
    def batches(data):
        data.cluster(12, tmp_path)
        return list(data.batches(range(3)))

    flags = ["--train_batch_size=16", "--random_flip", "--dataloader_num_workers=0"]
    kept = batches(load_train_data(parse(*flags), accelerator))
    read = batches(load_train_data(parse(*flags, "--cache_images=never"), accelerator))
    clusters = load_clusters(tmp_path / "clusters.npz")
    for one, other in zip(kept, read, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["labels"], clusters.assign(one["images"]))


def test_the_centres_stay_in_the_folder_of_the_run(finished):
    assert stat.S_IMODE((finished / "clusters.npz").stat().st_mode) == 0o600
    from utils.publishing.hub import ALLOWED

    assert finished / "clusters.npz" not in {path for pattern in ALLOWED for path in finished.glob(pattern)}
    assert not (finished / "checkpoint-6" / "clusters.npz").exists()
    assert "12 classes are clusters of similar training images" in (finished / "README.md").read_text()


def test_diffusers_alone_draws_the_clusters_evenly(finished, monkeypatch):
    asked, original = [], UNet2DModel.forward

    def forward(self, images, timesteps, class_labels=None, **options):
        asked.append(class_labels)
        return original(self, images, timesteps, class_labels, **options)

    pipeline = ConsistencyModelPipeline.from_pretrained(finished)
    monkeypatch.setattr(UNet2DModel, "forward", forward)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=600, num_inference_steps=1, output_type="np").images
    assert images.shape == (600, 8, 8, 1)
    frequencies = np.bincount(asked[0].numpy(), minlength=12)
    assert frequencies.min() > 20 and frequencies.max() < 90


def test_a_run_resumes_with_its_clusters_bit_for_bit(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "cut")
    interrupt(tmp_path / "cut", "checkpoint-3")
    assert run(tmp_path / "cut") == 0
    assert equal_weights(finished / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    with pytest.raises(UserError, match=r"clusters was 12, is 11\. Give the old values"):
        run(tmp_path / "cut", "--clusters=11")


def test_a_stream_is_clustered_by_a_sample(tmp_path):
    (tmp_path / "images").mkdir()
    for k in range(150):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8), np.uint8)).save(tmp_path / f"images/{k}.png")
    assert run(tmp_path / "run", f"--train_data_dir={tmp_path / 'images'}", "--streaming") == 0
    assert len(UNet2DModel.load_config(tmp_path / "run" / "unet")["_class_names"]) == 12


def test_training_continues_with_the_clusters_of_the_pretrained_model(finished, tmp_path):
    flags = ["--max_train_steps=2", f"--pretrained_model_name_or_path={finished}"]
    assert train(tmp_path / "more", *flags, "--clusters=12", script=train_conditional) == 0
    assert load_clusters(tmp_path / "more" / "clusters.npz").digest == load_clusters(finished / "clusters.npz").digest
    with pytest.raises(UserError, match=r"--clusters 11: .*clusters.npz has 12 clusters\. Give that number"):
        train(tmp_path / "fewer", *flags, "--clusters=11", script=train_conditional)
    shutil.copytree(finished, tmp_path / "without")
    (tmp_path / "without" / "clusters.npz").unlink()
    other = [flags[0], f"--pretrained_model_name_or_path={tmp_path}/without", "--dataset_split=train[:900]"]
    with pytest.raises(UserError, match=r"has 12 classes \(cluster .*, but none of the classes of the images"):
        train(tmp_path / "other", *other, "--clusters=12", script=train_conditional)


def test_a_student_has_the_clusters_of_its_teacher(finished, tmp_path):
    flags = [f"--pretrained_model_name_or_path={finished}", "--max_train_steps=2"]
    assert train(tmp_path / "student", *flags, script=distill_few_steps) == 0
    config = [UNet2DModel.load_config(folder / "unet") for folder in (finished, tmp_path / "student")]
    assert config[0]["_class_names"] == config[1]["_class_names"]


def test_evaluate_draws_clusters_evenly_though_the_reference_has_classes(finished, tmp_path):
    flags = ["--reference=digits", "--num_samples=60", "--num_inference_steps=1", f"--output_dir={tmp_path}"]
    flags += ["--validation_loss", "--num_validation_images=20", "--features=pixels"]
    assert exit_code(evaluate.main, evaluate.parse_args([str(finished), *flags])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["denoising_losses"][0]["model"] == "run"
    assert results["by_class"]["run guidance 1"]["fd_by_class"] == {}


def test_grids_show_all_classes_or_rows_of_eight():
    assert classes_to_show(10, 80) == list(range(10)) and classes_to_show(3, 6) == [0, 1, 2]
    assert classes_to_show(64, 80) == [0, 6, 12, 19, 25, 32, 38, 44, 51, 57]
    assert classes_to_show(10, 4) == [0] and classes_to_show(2, 1) == [0]
