"""finetune_faces.py: trained and frozen weights, pictures, and resuming."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import equal_weights, events, interrupt, scalars, slow, train
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import finetune_faces
from utils import UserError
from utils.diffusion.pretrained import load_pretrained

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAST = ["--learning_rate=1e-3", "--lr_warmup_steps=0", "--sampler=ddim"]


def small_unet(**options):
    torch.manual_seed(0)
    options = {"in_channels": 1, "out_channels": 1, **options}
    return UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, add_attention=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
    )  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Return the folder of a pipeline with random weights and attention."""
    folder = tmp_path_factory.mktemp("base")
    DDPMPipeline(small_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(folder)
    return folder


def finetune(output_dir, base, *flags):
    flags = [f"--pretrained_model_name_or_path={base}", *FAST, *flags]
    return train(output_dir, *flags, script=finetune_faces)


@pytest.fixture(scope="session")
def adapted(base, tmp_path_factory):
    """Return the folder of a finished run with everything switched on; do not change it."""
    folder = tmp_path_factory.mktemp("adapted") / "faces"
    flags = ["--dataset_name=faces", "--dataset_split=train[:90]", "--validation_split=train[90:]", "--center_crop"]
    flags += ["--prior_dataset_name=digits", "--guidance_color=white", "--sample_steps=3"]
    flags += ["--validation_steps=3"]
    assert finetune(folder, base, *flags, "--method=lora", "--report_to=tensorboard", "--num_samples=9") == 0
    return folder


def test_before_after_nearest_and_guided_pictures(adapted):
    for name in ("before_after", "nearest", "guided"):
        assert Image.open(adapted / f"{name}.png").height == 2 * 68 + 4
        assert [picture.step for picture in events(adapted).Images(name)] == [3, 6]
    assert Image.open(adapted / "samples.png").height == 3 * 68 + 4 + 24
    rows = np.asarray(Image.open(adapted / "before_after.png")).astype(int)
    assert np.abs(rows[4:68, -68:-4] - rows[72:136, -68:-4]).max() > 0  # training has changed the weights
    first = np.asarray(Image.open(adapted / "samples.png"))[4:68, 4:68]
    assert (rows[72:136, -8 * 68 : -8 * 68 + 64] == first).all()  # the strip shows the same samples


def test_curves_of_validation_and_of_the_distance_to_the_base(adapted):
    distance = scalars(adapted, "optimizer/distance_to_base")
    assert list(distance) == [3, 6] and 0 < distance[3] < distance[6] < 1
    for name in ("train", "held_out", "prior"):
        assert list(scalars(adapted, f"loss/validation_{name}")) == [0, 3, 6]
        assert list(scalars(adapted, f"loss_by_timestep_validation/{name}_0-249")) == [0, 3, 6]
    assert scalars(adapted, "loss/validation_prior") != scalars(adapted, "loss/validation_train")


def test_lora_ends_as_a_plain_pipeline_with_its_adapter_beside(adapted, base):
    for folder in (adapted, adapted / "checkpoint-6"):
        pipeline = DDPMPipeline.from_pretrained(folder, use_safetensors=True)
        assert pipeline.scheduler.config.solver_order == 1  # DDIM that clips: the base predicts noise
        assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 8
    before, after = load_file(base / WEIGHTS), load_file(adapted / WEIGHTS)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.split(".")[-2] in ("to_q", "to_k", "to_v", "0", "conv1", "conv2") for name in moved)


def test_the_card_has_a_section_on_people(adapted):
    card = (adapted / "README.md").read_text()
    assert "## People" in card and "consent" in card and "ddpm" in yaml.safe_load(card.split("---")[1])["tags"]


@pytest.mark.parametrize("method", ["full", "attention", "norm", "lora"])
def test_what_does_not_learn_stays_bit_for_bit(tmp_path, monkeypatch, base, method):
    monkeypatch.setattr(finetune_faces, "LORA_TARGETS", "to_q")
    finetune(tmp_path / "run", base, f"--method={method}", "--max_train_steps=2")
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "full": set(before),
        "attention": {name for name in before if ".attentions." in name},
        "norm": {name for name in before if name.endswith(".bias") or "norm" in name.split(".")[-2]},
        "lora": {name for name in before if name.endswith("to_q.weight")},
    }[method]
    assert moved <= expected and len(moved) > 0.8 * len(expected)
    state = torch.load(
        tmp_path / "run" / "checkpoint-2" / "training_state" / "optimizer.bin", weights_only=True, map_location="cpu"
    )
    assert len(state["state"]) == (2 * len(expected) if method == "lora" else len(expected))


@pytest.mark.parametrize("method", [slow("full"), slow("norm"), "lora"])
def test_resuming_equals_never_having_stopped(tmp_path, base, method):
    flags = [f"--method={method}", "--checkpointing_steps=4", "--random_flip", "--report_to=tensorboard"]
    flags += ["--gradient_accumulation_steps=2", "--train_batch_size=4", "--sample_steps=3", "--validation_steps=3"]
    flags += ["--prior_dataset_name=faces"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    finetune(straight, base, *flags)
    finetune(resumed, base, *flags)
    interrupt(resumed, "checkpoint-4")
    torch.manual_seed(99)
    finetune(resumed, base, *flags)
    assert equal_weights(straight / WEIGHTS, resumed / WEIGHTS)  # EMA
    state = "checkpoint-6/training_state/model.safetensors"
    assert equal_weights(straight / state, resumed / state)
    for tag in ("loss/train", "optimizer/distance_to_base", "loss/validation_train"):
        assert scalars(straight, tag) == scalars(resumed, tag)
    for name in ("samples.png", "before_after.png", "nearest.png"):
        assert np.array_equal(*(np.asarray(Image.open(folder / name)) for folder in (straight, resumed)))


def test_a_run_of_train_ddpm_is_adapted(tmp_path, finished_run):
    finetune(tmp_path / "run", finished_run, "--max_train_steps=2", "--method=norm")
    config = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config
    assert config.prediction_type == "v_prediction" and config.beta_schedule == "squaredcos_cap_v2"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_learned_variance_is_left_out_and_the_mean_stays(tmp_path, prediction_type):
    unet, images = small_unet(in_channels=3, out_channels=6).eval(), torch.randn(2, 3, 8, 8)
    scheduler = DDPMScheduler(prediction_type=prediction_type, variance_type="learned_range")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "base")
    loaded = load_pretrained(str(tmp_path / "base")).unet
    assert torch.equal(loaded(images, 5).sample, unet(images, 5).sample[:, :3])
    finetune(tmp_path / "run", tmp_path / "base", "--max_train_steps=1", "--image_mode=RGB")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.config.out_channels == 3 and pipeline.scheduler.config.prediction_type == prediction_type
    assert len(pipeline(num_inference_steps=2).images) == 1


def test_images_are_converted_to_the_channels_and_the_size_of_the_model(tmp_path, base):
    for k in range(9):
        Image.new("RGB", (20, 12), (20 * k, 40, 90)).save(tmp_path / f"{k}.png")
    finetune(tmp_path / "out" / "run", base, f"--train_data_dir={tmp_path}", "--max_train_steps=1")
    config = UNet2DModel.load_config(tmp_path / "out" / "run" / "unet")
    assert (config["in_channels"], config["sample_size"]) == (1, 8)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--pretrained_model_name_or_path=google/ddpm-celebahq-256"],
            "Without a network, give the output of train_ddpm.py",
        ),
        (
            ["--pretrained_model_name_or_path=./missing"],
            r"\./missing: there is no such folder\. Expected a saved pipeline",
        ),
        (["--resolution=9"], "needs multiples of 2. Try --resolution 8"),
        (["--guidance_prompt=a face", "--clip_model_name_or_path=./missing"], "Expected a CLIP model"),
        (["--validation_split=test"], "--validation_split test: digits has the one split train"),
        (["--validation_split=train[90%:]"], r"shares images with --dataset_split train, .* 'train\[:90%\]'"),
        (["--prior_dataset_name=./missing"], r"--prior_dataset_name \./missing: there is no such file or folder"),
    ],
)
def test_what_cannot_work_is_refused_with_advice(tmp_path, base, flags, message):
    with pytest.raises(UserError, match=message):
        finetune(tmp_path / "run", base, *flags)
    assert not (tmp_path / "run" / "training_args.json").exists()


def test_a_pipeline_of_another_kind_is_refused(tmp_path, base):
    config = json.loads((base / "model_index.json").read_text())
    import shutil

    shutil.copytree(base, tmp_path / "other")
    config["unet"] = ["diffusers", "UNet2DConditionModel"]
    (tmp_path / "other" / "model_index.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be loaded as a DDPMPipeline|Expected a UNet2DModel"):
        finetune(tmp_path / "run", tmp_path / "other")


def test_two_steerings_at_once_and_no_images_are_refused(capsys):
    with pytest.raises(SystemExit):
        finetune_faces.parse_args(["--guidance_color=red", "--guidance_prompt=a face"])
    assert "exclude each other. Give one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune_faces.parse_args(["--guidance_color=bleen"])
    assert "--guidance_color bleen: there is no such colour. Expected a name such as teal" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune_faces.parse_args([])
    assert "no images to adapt to were given. Give --train_data_dir DIR or --dataset_name" in capsys.readouterr().err


def test_more_steps_than_noise_levels_are_refused(tmp_path):
    DDPMPipeline(small_unet(), DDPMScheduler(num_train_timesteps=30)).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"there are only 30 noise levels\. Give at most that many"):
        finetune(tmp_path / "run", tmp_path / "base", "--num_inference_steps=40")


def test_no_path_of_this_machine_is_in_what_is_published(adapted, base):
    published = [path for path in adapted.rglob("*") if path.is_file() and path.name != "training_args.json"]
    published = [path for path in published if not {"logs", "training_state"} & set(path.parts)]
    published = [path for path in published if "checkpoint-" not in str(path)]
    assert len(published) > 8
    for path in published:
        assert str(base).encode() not in path.read_bytes() and str(adapted).encode() not in path.read_bytes(), path


def test_bad_images_of_a_validation_set_are_skipped_if_asked_for(tmp_path, base):
    for k in range(9):
        Image.new("L", (12, 12), 20 * k).save(tmp_path / f"{k}.png")
    (tmp_path / "prior").mkdir()
    for name in ("a", "b"):
        Image.new("L", (12, 12), 99).save(tmp_path / "prior" / f"{name}.png")
    (tmp_path / "prior" / "c.png").write_bytes(b"")
    flags = [f"--prior_dataset_name={tmp_path}/prior", "--max_train_steps=1"]
    with pytest.raises(UserError, match="the file is empty"):
        finetune(tmp_path / "one", base, *flags)
    assert finetune(tmp_path / "two", base, *flags, "--max_bad_images=100") == 0
