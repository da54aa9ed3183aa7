"""utils/diffusion/autoencoders.py: the loss's structural term, the scale of latents, and autoencoders of others."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, LDMPipeline, UNet2DModel, VQModel
from skimage.metrics import structural_similarity as reference_similarity

from utils import UserError
from utils.diffusion import autoencoders
from utils.diffusion.autoencoders import (
    check_size,
    choose_autoencoder,
    downsampling_of,
    fold_normalization,
    latent_statistics,
    load_autoencoder,
    make_autoencoder,
    structural_similarity,
)
from utils.diffusion.schedulers import make_noise_scheduler, make_sampler
from utils.diffusion.spaces import Latents

BLOCKS = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
SMALL = dict(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, **BLOCKS)


def small(**options):
    torch.manual_seed(0)
    return AutoencoderKL(in_channels=1, out_channels=1, **SMALL, **options).eval()


def test_the_structural_similarity_is_that_of_skimage():
    rng = np.random.default_rng(0)
    images, others = rng.uniform(-1, 1, (2, 2, 3, 20, 24)).astype(np.float32)
    others = 0.7 * images + 0.3 * others
    found = structural_similarity(torch.from_numpy(images), torch.from_numpy(others)).tolist()
    for first, second, value in zip(images, others, found, strict=True):
        expected = reference_similarity(
            first, second, channel_axis=0, data_range=2, win_size=7, use_sample_covariance=False
        )
        # skimage leaves out a border of half a window, so both average only windows that fit
        assert value == pytest.approx(expected, abs=1e-5)
    assert structural_similarity(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)).item() == 1  # smaller than a window


def test_the_statistics_normalise_the_latents(monkeypatch):
    model = small()
    images = torch.rand(40, 1, 16, 16) * 2 - 1
    monkeypatch.setattr(autoencoders, "PIXELS_AT_ONCE", 7 * 16 * 16 + 100)
    counts, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda images: counts.append(len(images)) or encode(images))
    values = latent_statistics(model, images)
    assert counts == [7] * 5 + [5]
    with torch.no_grad():
        distribution = model.encode(images).latent_dist
    drawn = distribution.mean + distribution.std * torch.randn(200, *distribution.mean.shape)
    scaled = (drawn - values["shift_factor"]) * values["scaling_factor"]
    assert abs(scaled.mean()) < 0.01 and abs(scaled.std() - 1) < 0.01
    by_channel = drawn.transpose(0, 2).flatten(1)
    assert torch.allclose(by_channel.mean(1), torch.tensor(values["latents_mean"]), atol=0.02)
    assert torch.allclose(by_channel.std(1), torch.tensor(values["latents_std"]), rtol=0.02)


@pytest.mark.parametrize("convolutions", [True, False], ids=["with 1x1", "without"])
@pytest.mark.parametrize("how", ["channels", "scalars"])
def test_folding_the_normalisation_changes_no_image(how, convolutions):
    model = small(use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    images = torch.rand(6, 1, 16, 12) * 2 - 1
    values = latent_statistics(model, images)
    model.register_to_config(**values)
    if how == "scalars":
        model.register_to_config(latents_mean=None, latents_std=None)
    with torch.no_grad():
        before = model.encode(images).latent_dist
        decoded = model.decode(before.mean).sample
    folded = fold_normalization(model, "--vae")
    assert folded is model and model.config.scaling_factor == 1 and not model.config.shift_factor
    after = latent_statistics(model, images)
    with torch.no_grad():
        distribution = model.encode(images).latent_dist
        assert torch.allclose(model.decode(distribution.mean).sample, decoded, atol=1e-4)
    shift, scale = values["shift_factor"], values["scaling_factor"]
    if how == "scalars":
        assert torch.allclose(distribution.mean, (before.mean - shift) * scale, atol=1e-4)
        assert torch.allclose(distribution.std, before.std * scale, rtol=1e-3)
    else:
        assert after["latents_mean"] == pytest.approx([0] * 3, abs=1e-3)
        assert after["latents_std"] == pytest.approx([1] * 3, abs=1e-3)


def test_a_folded_autoencoder_is_saved_and_loaded(tmp_path):
    model = small(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.3, scaling_factor=0.5)
    images = torch.rand(2, 1, 16, 16)
    fold_normalization(model, "--vae").save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again.encode(images).latent_dist.mean, model.encode(images).latent_dist.mean)
        assert torch.equal(again(images).sample, model(images).sample)


def test_an_autoencoder_without_a_shift_stays_as_it_is(tmp_path):
    model = small(scaling_factor=0.18215)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fold_normalization(model, "--vae")
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.config.scaling_factor == 0.18215
    other = VQModel(in_channels=1, out_channels=1, num_vq_embeddings=8, **SMALL)
    other.register_to_config(shift_factor=0.1)
    with pytest.raises(UserError, match=r"this VQModel have a shift.* Expected an AutoencoderKL"):
        fold_normalization(other, "--vae")


REAL = {  # the shapes of public autoencoders, with random weights and few channels inside
    "Stable Diffusion, f8c4": (
        lambda: AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            scaling_factor=0.18215,
        ),
        8, (4, 8, 8),
    ),
    "FLUX, f8c16 with scale and shift, without 1x1 convolutions": (
        lambda: AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        ),
        8, (16, 8, 8),
    ),
    "DC-AE, f32c32": (
        lambda: AutoencoderDC(
            in_channels=3, latent_channels=32, encoder_block_out_channels=(8, 8, 8, 16, 32, 32),
            decoder_block_out_channels=(8, 8, 8, 16, 32, 32), attention_head_dim=8, encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
            encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41407,
        ),
        32, (32, 2, 2),
    ),
    "TAESD, f8c4": (
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8), latent_channels=4,
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
        ),
        8, (4, 8, 8),
    ),
    "CompVis/ldm-celebahq-256, f4c3": (
        lambda: VQModel(
            in_channels=3, out_channels=3, latent_channels=3, num_vq_embeddings=16, block_out_channels=(8, 8, 8),
            norm_num_groups=4, down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        ),
        4, (3, 16, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_autoencoders_of_others_are_loaded_and_draw(tmp_path, name):
    make, factor, shape = REAL[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "alone")
    model = choose_autoencoder(str(tmp_path / "alone"))
    assert downsampling_of(model) == factor
    space = Latents(model, (3, 64, 64))
    assert space.shape == shape and space.downsampling == factor
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, deviation = space.distribution(images)
    assert mean.shape == (2, *shape) and (deviation is None) == (type(model) is not AutoencoderKL)
    assert space.decode(mean).shape == images.shape
    unet = UNet2DModel(
        sample_size=shape[1], in_channels=shape[0], out_channels=shape[0], block_out_channels=(8,), norm_num_groups=4,
        down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"], add_attention=False, layers_per_block=1,
    )  # fmt: skip
    sampler = make_sampler("dpmsolver++", make_noise_scheduler(None, dict(clip_sample=False)))
    LDMPipeline(model, unet, sampler).save_pretrained(tmp_path / "pipeline")
    drawn = LDMPipeline.from_pretrained(tmp_path / "pipeline")(num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    assert type(load_autoencoder(str(tmp_path / "pipeline"), "--vae")) is type(model)  # that of a pipeline


def test_what_is_no_autoencoder_is_refused(tmp_path, finished_run, monkeypatch):
    monkeypatch.setattr(autoencoders, "DEFAULT", str(tmp_path / "nothing"))
    with pytest.raises(
        UserError, match=r"there is no autoencoder in .*\. Train one with train_autoencoder.py, or name"
    ):
        choose_autoencoder(None)
    with pytest.raises(UserError, match="this DDPMPipeline has no autoencoder"):
        load_autoencoder(str(finished_run), "--vae")
    with pytest.raises(UserError, match=r"is a UNet2DModel\. Expected an AutoencoderKL or AutoencoderTiny"):
        load_autoencoder(str(finished_run / "unet"), "--vae")
    with pytest.raises(UserError, match="there is no such folder"):
        load_autoencoder("./nothing", "--vae")
    VQModel(in_channels=1, out_channels=1, num_vq_embeddings=8, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a VQModel\. Expected an AutoencoderKL, or a pipeline"):
        load_autoencoder(str(tmp_path), "--pretrained_model_name_or_path", trainable=True)


def test_a_pretrained_autoencoder_has_its_own_shape():
    model = small()
    assert make_autoencoder(None, None, 3, 1, model) is model
    for asked, message in [
        ((None, 4, None, 1), "--downsampling 4: the pretrained autoencoder has 2"),
        ((None, None, 4, 1), "--latent_channels 4: the pretrained autoencoder has 3"),
        ((None, None, None, 3), "channels of images 3: the pretrained autoencoder has 1"),
    ]:
        with pytest.raises(UserError, match=message):
            make_autoencoder(*asked, model)
    with pytest.raises(UserError, match=r"images of 15 x 16 pixels.*multiples of 2\. Try --resolution 16"):
        check_size(model, (15, 16))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_sizes_make_latents_of_the_asked_shape(factor):
    for name in (None, "base"):
        with torch.device("meta"):
            model = make_autoencoder(name, factor, 5, 3)
        assert downsampling_of(model) == factor and check_size(model, (32, 48)) == (5, 32 // factor, 48 // factor)
