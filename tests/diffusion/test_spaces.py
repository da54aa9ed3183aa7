"""Latents: models that denoise latents instead of pixels, and pipelines with an autoencoder."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import exit_code, train
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LDMPipeline,
    UNet2DModel,
    VQModel,
)  # fmt: skip
from PIL import Image

import evaluate
import finetune_faces
import sample
from utils import UserError
from utils.diffusion.guidance import Guidance
from utils.diffusion.pipelines import load_pipeline
from utils.diffusion.pretrained import check_fit, load_pretrained
from utils.diffusion.sampling import sample_batch
from utils.diffusion.schedulers import make_sampler
from utils.diffusion.spaces import Latents, Pixels
from utils.diffusion.unets import UNETS

BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
SMALL = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, **BLOCKS)


def autoencoder(kind, channels=1):
    torch.manual_seed(0)
    if kind is AutoencoderTiny:
        return kind(
            channels, channels, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=2,
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        )  # fmt: skip
    more = dict(num_vq_embeddings=16) if kind is VQModel else {}
    return kind(in_channels=channels, out_channels=channels, scaling_factor=0.5, **SMALL, **more)


def unet(shape):
    torch.manual_seed(1)
    return UNet2DModel(sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], **UNETS["tiny"])


@pytest.fixture(scope="module", params=[pytest.param(AutoencoderKL, marks=pytest.mark.slow), VQModel], ids=["kl", "vq"])
def pipeline_folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / request.param.__name__
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False)
    LDMPipeline(autoencoder(request.param), unet((2, 8, 8)), scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderTiny, VQModel])
def test_latents_are_scaled_as_in_diffusers_and_cost_no_gradient(kind):
    model = autoencoder(kind)
    space = Latents(model, (1, 16, 16))
    assert space.shape == (2, 8, 8) and space.model_shape == dict(sample_size=8, in_channels=2, out_channels=2)
    assert Latents.of_shape(model, (2, 8, 8)).image_shape == (1, 16, 16)
    latents = space.encode(torch.rand(3, 1, 16, 16))
    assert latents.shape == (3, 2, 8, 8) and not latents.requires_grad
    expected = model.decode(latents / model.config.scaling_factor).sample
    assert torch.equal(space.decode(latents), expected)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_what_an_autoencoder_does_not_take_is_refused():
    with pytest.raises(UserError, match=r"takes 1 channel, but the images have 3\. --image_mode L converts them"):
        Latents(autoencoder(AutoencoderKL), (3, 16, 16))
    with pytest.raises(UserError, match=r"images of 15 x 15 pixels: this autoencoder needs multiples of 2"):
        Latents(autoencoder(AutoencoderKL), (1, 15, 15))


def test_samples_are_those_of_the_pipeline(pipeline_folder):
    pipeline = LDMPipeline.from_pretrained(pipeline_folder)
    noise = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    images = pipeline(3, torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np").images
    model, scheduler, space = load_pipeline(str(pipeline_folder))
    samples = sample_batch(
        model, scheduler, np.arange(3), space.shape, 4, 0, torch.device("cpu"), noise=lambda sample_ids: noise
    )
    with torch.no_grad():
        drawn = (space.decode(samples) / 2 + 0.5).clamp(0, 1)
    assert np.allclose(drawn.permute(0, 2, 3, 1), images, atol=1e-5)


def test_a_public_kind_of_latent_pipeline_is_adapted(tmp_path, pipeline_folder):
    """Adapt a pipeline like CompVis/ldm-celebahq-256, which draws the latents of a VQModel."""
    base = tmp_path / "base"
    shutil.copytree(pipeline_folder, base)
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    config |= dict(prediction_type="epsilon", clip_sample=True)  # the default of a scheduler, which would cut latents
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    flags = [f"--pretrained_model_name_or_path={base}", "--learning_rate=1e-2", "--method=lora", "--lora_rank=2"]
    assert train(tmp_path / "run", *flags, script=finetune_faces) == 0
    pipeline = LDMPipeline.from_pretrained(tmp_path / "run")
    assert not pipeline.scheduler.config.thresholding and pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline(num_inference_steps=2).images[0].size == (16, 16)
    for sampler in ("ddpm", "sde-dpmsolver++"):
        with pytest.raises(UserError, match=f"--sampler {re.escape(sampler)} adds noise at each step"):
            train(tmp_path / sampler, *flags, f"--sampler={sampler}", script=finetune_faces)


def test_other_samplers_of_a_loaded_pipeline_do_not_clip_latents(tmp_path):
    """DPMSolverMultistepScheduler has no clip_sample. The autoencoder has only weights of half precision."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="epsilon")
    LDMPipeline(autoencoder(VQModel), unet((2, 8, 8)), scheduler).save_pretrained(tmp_path / "x", variant="fp16")
    _, own, space = load_pipeline(str(tmp_path / "x"))
    assert space.shape == (2, 8, 8)
    for name in ("ddpm", "ddim", "dpmsolver++", "unipc"):
        config = make_sampler(name, own).config
        assert not config.get("thresholding") and not (name == "ddpm" and config.clip_sample), name


def test_a_model_of_latents_is_no_model_of_pixels_for_train_paired(pipeline_folder):
    with pytest.raises(UserError, match=r"this pipeline also has vqvae"):
        load_pretrained(str(pipeline_folder), condition=True)


def test_samplers_clip_pixels_and_no_latents():
    """The model predicts noise. Clean images far outside of [-1, 1] are clipped if the scheduler is set to do so."""
    for clips in (True, False):
        scheduler = DDPMScheduler(prediction_type="epsilon", clip_sample=clips)
        for name in ("ddpm", "ddim", "dpmsolver++", "unipc"):
            config = make_sampler(name, scheduler).config
            assert config.get("clip_sample" if name == "ddpm" else "thresholding") == clips, name


def test_sample_draws_interpolates_starts_from_pictures_and_is_steered(tmp_path, pipeline_folder):
    Image.new("L", (16, 16), 200).save(tmp_path / "picture.png")
    for name, flags in {
        "plain": ["--gif"],
        "between": ["--interpolate", "0", "3", "--gif"],
        "started": [f"--init_image={tmp_path}/picture.png"],
        "steered": ["--guidance_color=white", "--guidance_scale=2"],
    }.items():
        flags = [
            str(pipeline_folder),
            "--num_samples=4",
            "--num_inference_steps=3",
            f"--output_dir={tmp_path}/{name}",
            *flags,
        ]
        assert exit_code(sample.main, sample.parse_args(flags)) == 0
        assert Image.open(tmp_path / name / "images" / "000000.png").size == (16, 16)
        assert Image.open(tmp_path / name / "grid.png").width > 64
    plain, steered = (
        np.mean([np.array(Image.open(path)) for path in (tmp_path / name / "images").iterdir()])
        for name in ("plain", "steered")
    )
    assert steered > plain
    settings = json.loads((tmp_path / "plain" / "sampling_args.json").read_text())
    assert len(settings["autoencoder"]) == 16


def test_guidance_sees_decoded_images():
    space = Latents(autoencoder(AutoencoderKL), (1, 16, 16))
    shapes = []

    def loss(images):
        shapes.append(tuple(images.shape))
        assert images.abs().max() <= 1
        return images.square().mean(dim=(1, 2, 3))

    scheduler = DDIMScheduler(prediction_type="v_prediction")
    model = unet((2, 8, 8))
    for mode in ("direct", "net"):
        output = Guidance(loss, 1.0, mode, space).predict(model, scheduler, torch.randn(2, 2, 8, 8), torch.tensor(500))
        assert output.shape == (2, 2, 8, 8)
    assert shapes == [(2, 1, 16, 16)] * 2


def test_evaluate_compares_decoded_images(tmp_path, pipeline_folder):
    flags = [
        "--reference=digits",
        "--features=pixels",
        "--num_samples=20",
        "--num_inference_steps=2",
        "--validation_loss",
    ]
    args = evaluate.parse_args([str(pipeline_folder), f"--output_dir={tmp_path}", "--num_validation_images=8", *flags])
    assert exit_code(evaluate.main, args) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["N"] for row in results["results"] if row["model"] == pipeline_folder.name] == [20]


def test_a_pipeline_with_further_parts_is_refused_by_name(tmp_path, pipeline_folder):
    with pytest.raises(
        UserError, match=r"this pipeline also has vqvae \((AutoencoderKL|VQModel)\)\. Expected only unet"
    ):
        load_pretrained(str(pipeline_folder))
    start = f"--pretrained_model_name_or_path={pipeline_folder}"
    with pytest.raises(UserError, match=r"vqvae"):
        train(tmp_path / "run", start)
    folder = shutil.copytree(pipeline_folder, tmp_path / "other")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"this pipeline also has text_encoder \(CLIPTextModel\)\. Expected"):
        load_pipeline(str(folder))


def test_check_fit_is_told_how_many_channels_the_model_takes():
    scheduler = DDPMScheduler()
    model = UNet2DModel(sample_size=8, in_channels=3, out_channels=1, **UNETS["tiny"])
    check_fit(model, scheduler, (1, 8, 8), 10, in_channels=3)
    with pytest.raises(
        UserError, match=r"takes 3 channels and returns 1\. Expected 2 and 1, to denoise 1 channel with"
    ):
        check_fit(model, scheduler, (1, 8, 8), 10, in_channels=2)
    with pytest.raises(UserError, match=r"the images have 1 channel, but the model takes 3\. --image_mode RGB"):
        check_fit(model, scheduler, (1, 8, 8), 10)


def test_pixels_are_what_they_are():
    space, images = Pixels((1, 8, 12)), torch.rand(2, 1, 8, 12)
    assert space.encode(images) is images and space.decode(images) is images
    assert space.model_shape["sample_size"] == (8, 12) and space.fingerprint is None
