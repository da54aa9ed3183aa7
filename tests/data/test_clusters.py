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
from utils.data.clusters import features_of, has_clusters, load_clusters, make_clusters
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
    """Return images of 8 x 8 pixels in [-1, 1], float32."""
    return torch.from_numpy(load_digits().images[:, None]).float() / 8 - 1


def test_clusters_have_similar_images_and_about_equal_sizes(digits):
    clusters = make_clusters(features_of(digits).numpy(), 20, "")
    assert make_clusters(features_of(digits).numpy(), 20, "").digest == clusters.digest
    assert has_clusters(clusters.names) and len({*clusters.names}) == 20
    assert not has_clusters([]) and not has_clusters(["cluster bean", "dog"])
    labels = clusters.assign(digits).numpy()
    sizes = np.bincount(labels, minlength=20)
    assert sizes.min() > 0.7 * sizes.mean() and sizes.max() < 1.3 * sizes.mean(), sizes
    target = load_digits().target
    likeliest = sum(np.bincount(target[labels == cluster]).max() for cluster in range(20))
    assert likeliest / len(labels) > 0.8  # without labels, most digits of a cluster are of the same class


@pytest.mark.parametrize(
    "choose, count, message",
    [
        (lambda found: found[:60], 12, "12: 60 images were found, 60 of them different .* at most --clusters 6"),
        (lambda found: found[:12], 12, "12: 12 images were found, .* Leave --clusters out"),
        (lambda found: found[:1].repeat(300, 0), 12, "300 images were found, 1 of them different at 16 x 16 pixels"),
        (lambda found: np.concatenate([found[:200], found[:1].repeat(5000, 0)]), 20, "because many images are equal"),
    ],
)
def test_images_that_do_not_suffice_are_refused(digits, choose, count, message):
    with pytest.raises(UserError, match=message):
        make_clusters(choose(features_of(digits).numpy()), count, "")


def test_a_label_depends_on_the_image_alone(accelerator, tmp_path):
    def batches(*flags):
        flags = ["--random_flip", "--dataloader_num_workers=0", *flags]
        data = load_train_data(parse(*flags), accelerator)
        data.cluster(12, tmp_path)
        data.prepare()
        found = list(data.batches(range(48 // data.global_batch_size)))
        return [torch.cat([batch[name] for batch in found]) for name in ("images", "labels")]

    kept, read = batches("--train_batch_size=16"), batches("--train_batch_size=48", "--cache_images=never")
    assert torch.equal(kept[0], read[0]) and torch.equal(kept[1], read[1]) and len(kept[1].unique()) > 6


def test_clusters_of_other_images_are_not_used(accelerator, tmp_path):
    digests = []
    for flags in ([], ["--dataset_split=train[:900]"]):
        data = load_train_data(parse(*flags), accelerator)
        data.cluster(12, tmp_path)
        data.prepare()
        digests.append(data.settings["clusters_digest"])
        assert digests[-1] == load_clusters(tmp_path / "clusters.npz").digest
    assert len({*digests}) == 2
    smaller = load_train_data(parse("--dataset_split=train[:900]", "--resolution=4"), accelerator)
    with pytest.raises(UserError, match=r"of 64 values each\. These images have 16 values\. Give the --clusters"):
        smaller.cluster(12, tmp_path)


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
    with pytest.raises(
        UserError, match=r"--clusters 11: the clusters in .*clusters.npz are 12, .* another --pretrained"
    ):
        train(tmp_path / "fewer", *flags, "--clusters=11", script=train_conditional)
    shutil.copytree(finished, tmp_path / "without")
    (tmp_path / "without" / "clusters.npz").unlink()
    best = f"--pretrained_model_name_or_path={finished}/checkpoint-6"
    assert train(tmp_path / "best", flags[0], best, "--clusters=12", script=train_conditional) == 0
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
    assert classes_to_show(10, 4) == [0, 1, 2, 3] and classes_to_show(2, 1) == [0]
    assert classes_to_show(64, 80) == [0, 6, 12, 19, 25, 32, 38, 44, 51, 57]
