"""Models from elsewhere: each model that diffusers loads is sampled correctly, or refused in one line."""

import functools
import json
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from conftest import exit_code, train
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import evaluate
import finetune_faces
import sample
import train_conditional
import train_flow
from utils import UserError
from utils.diffusion.pipelines import choose_sampler, load_pipeline, training_scheduler

SMALL = dict(
    in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
    down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False,
)  # fmt: skip


def make(folder, scheduler=None, **options):
    """Save a pipeline of diffusers with random weights, and with this UNet and scheduler."""
    torch.manual_seed(0)
    unet = UNet2DModel(**{"sample_size": 16, **SMALL, **options})
    DDPMPipeline(unet, scheduler or DDPMScheduler()).save_pretrained(folder)
    if scheduler:
        index = json.loads((folder / "model_index.json").read_text())
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def draw(model, folder, *flags):
    flags = [f"--output_dir={folder}", "--num_samples=2", "--num_inference_steps=2", *flags]
    return exit_code(sample.main, sample.parse_args([str(model), *flags]))


@pytest.fixture
def hub_id(tmp_path):
    """Return the id of a repository in the Hub's cache with its files in the root, like those of google/ddpm-*."""
    make(tmp_path / "made")
    commit = "0123456789" * 4
    snapshot = tmp_path / "hf" / "hub" / "models--google--toy" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for part in ("unet", "scheduler"):
        for file in (tmp_path / "made" / part).iterdir():
            shutil.copy(file, snapshot)
    shutil.copy(tmp_path / "made" / "model_index.json", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    return "google/toy"


def test_a_repository_with_its_files_in_the_root(tmp_path, hub_id, monkeypatch):
    snapshot = next((tmp_path / "hf").rglob("model_index.json")).parent
    assert draw(snapshot, tmp_path / "by-path") == 0
    cached = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hf" / "hub")
    monkeypatch.setattr("utils.diffusion.pipelines.snapshot_download", cached)
    assert draw(hub_id, tmp_path / "by-id") == 0
    drawn = [Image.open(tmp_path / name / "images" / "000000.png").tobytes() for name in ("by-path", "by-id")]
    assert drawn[0] == drawn[1]
    flags = [hub_id, "--reference=digits", "--num_samples=10", "--num_inference_steps=2"]
    flags += ["--reference_split=train[:900]", "--held_out_split=train[900:]"]
    assert exit_code(evaluate.main, evaluate.parse_args([*flags, f"--output_dir={tmp_path / 'e'}"])) == 0


def test_a_size_of_two_numbers_and_none(tmp_path):
    assert draw(make(tmp_path / "two", sample_size=(16, 16)), tmp_path / "a") == 0
    assert Image.open(tmp_path / "a" / "images" / "000000.png").size == (16, 16)
    with pytest.raises(UserError, match=r"config\.json has no sample_size"):
        draw(make(tmp_path / "none", sample_size=None), tmp_path / "b")
    for name in ("two", "none"):  # without a size, the images give the size
        start = f"--pretrained_model_name_or_path={tmp_path / name}"
        assert train(tmp_path / f"from-{name}", start, "--max_train_steps=1") == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(time_embedding_type="fourier"), "fourier embeddings"),
        (dict(class_embed_type="timestep"), "class_embed_type 'timestep'"),
    ],
)
def test_unknown_embeddings_are_refused(tmp_path, options, message):
    make(tmp_path / "model", **options)
    with pytest.raises(UserError, match=message):
        draw(tmp_path / "model", tmp_path / "drawn")
    start = f"--pretrained_model_name_or_path={tmp_path / 'model'}"
    for script in ({}, {"script": finetune_faces}):
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", start, **script)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "config", f"--model_config_name_or_path={tmp_path / 'model' / 'unet'}")


def test_classes_of_a_model_without_a_null_class(tmp_path):
    make(tmp_path / "model", num_class_embeds=4)
    assert draw(tmp_path / "model", tmp_path / "a", "--class_labels=3,0") == 0
    with pytest.raises(UserError, match="--guidance_scale 2: the model has 4 classes but no null class"):
        draw(tmp_path / "model", tmp_path / "b", "--guidance_scale=2")
    with pytest.raises(UserError, match="there is no class '4'"):
        draw(tmp_path / "model", tmp_path / "c", "--class_labels=4")
    with pytest.raises(UserError, match="has 4 classes and no null class"):
        start = f"--pretrained_model_name_or_path={tmp_path / 'model'}"
        train(tmp_path / "run", start, script=train_conditional)
    with pytest.raises(UserError, match="takes class labels"):
        train(tmp_path / "ddpm", f"--model_config_name_or_path={tmp_path / 'model' / 'unet'}")


FOREIGN = {  # models of these schedulers do not predict the noise of a DDPMScheduler
    "ScoreSdeVeScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "EDMEulerScheduler": {},
    "CMStochasticIterativeScheduler": {},
    "IPNDMScheduler": {},
    "DPMSolverMultistepScheduler": dict(use_flow_sigmas=True, prediction_type="flow_prediction"),
}
NOT_CALLED = {"ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_noise_is_never_taken_for_that_of_a_ddpm_scheduler(tmp_path, name):
    scheduler = getattr(diffusers, name)(**FOREIGN[name])
    make(tmp_path / "model", scheduler)
    start = f"--pretrained_model_name_or_path={tmp_path / 'model'}"
    flow = name == "DPMSolverMultistepScheduler"  # finetune_faces.py adapts models of straight paths
    for script in ({}, *([] if flow else [{"script": finetune_faces}]), {"script": train_conditional}):
        with pytest.raises(
            UserError, match=f"its {name} .* does not have the noise of a|straight paths. Expected the noise of a"
        ):
            train(tmp_path / "run", start, **script)
    _, own, _ = load_pipeline(str(tmp_path / "model"))
    if flow:  # tests/scripts/test_train_flow.py tests straight paths
        return
    with pytest.raises(UserError, match=f"a model with a {name} .* was not trained on straight paths"):
        train(tmp_path / "run", start, script=train_flow)
    with pytest.raises(UserError, match="the denoising loss: its"):
        training_scheduler(own)
    with pytest.raises(UserError, match="--sampler ddim: its"):
        choose_sampler(own, "ddim", 2)
    if name in NOT_CALLED:
        with pytest.raises(UserError, match="does not have the interface of a DDPMScheduler"):
            draw(tmp_path / "model", tmp_path / "drawn")
    else:
        assert draw(tmp_path / "model", tmp_path / "drawn") == 0
        with pytest.raises(UserError, match=r"does not have the noise of a DDPMScheduler\. Guidance"):
            draw(tmp_path / "model", tmp_path / "film", "--gif")


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_other_samplers_of_the_same_noise_are_drawn_with_and_trained_from(tmp_path, name):
    make(tmp_path / "model", getattr(diffusers, name)(prediction_type="v_prediction"))
    assert draw(tmp_path / "model", tmp_path / "drawn", "--num_inference_steps=8") == 0
    if name == "PNDMScheduler":
        with pytest.raises(UserError, match="--num_inference_steps 2: PNDMScheduler refuses this number"):
            draw(tmp_path / "model", tmp_path / "few")
    assert train(tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path / 'model'}", "--max_train_steps=1") == 0
    saved = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["prediction_type"] == "v_prediction"
