"""utils/diffusion/guidance.py: guidance moves samples along the gradient of its loss."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from utils import UserError
from utils.diffusion.guidance import Guidance, clip_loss, color_loss
from utils.diffusion.linear_mix import LinearMixScheduler
from utils.diffusion.sampling import sample_images
from utils.diffusion.schedulers import SAMPLER_CLASSES, make_sampler, output_for, predicted_images

PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Output:
    def __init__(self, sample):
        self.sample = sample


class Toy(torch.nn.Module):
    """A smooth nonlinear net, in float64 so that finite differences are exact enough."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, sample, timestep):
        return Output(torch.tanh(self.conv(sample)) + 0.1 * sample)


def unet(channels=3):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predicted_images_and_outputs_are_inverse_and_fit_add_noise(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    clean, noise = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(2, 1, 4, 4)
    timesteps = torch.tensor([50, 700])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    shaped = timesteps.view(-1, 1, 1, 1)
    output = output_for(scheduler, clean, noisy, shaped)
    expected = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timesteps)}
    assert torch.allclose(output, expected[prediction_type], atol=1e-4)
    assert torch.allclose(predicted_images(scheduler, output, noisy, shaped), clean, atol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("mode", ["direct", "net"])
def test_the_prediction_moves_by_the_gradient(monkeypatch, mode, prediction_type):
    """Compare with finite differences. The net's output stays float64 here."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    net, scheduler = Toy(), DDIMScheduler(prediction_type=prediction_type)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    sample, timestep, scale = 0.1 * torch.randn(1, 3, 4, 4, dtype=torch.float64), 400, 0.3

    def function(images):
        return (images - 0.5).pow(4).mean(dim=(1, 2, 3))

    def loss_at(point):
        with torch.no_grad():
            if mode == "direct":
                return function(point).item()
            return function(predicted_images(scheduler, net(point, timestep).sample, point, timestep)).item()

    with torch.no_grad():
        plain = predicted_images(scheduler, net(sample, timestep).sample, sample, timestep)
    assert plain.abs().max() < 1  # so that nothing is clipped
    output = Guidance(function, scale, mode).predict(net, scheduler, sample, timestep)
    moved = predicted_images(scheduler, output, sample, timestep)
    noise_level = (1 - scheduler.alphas_cumprod[timestep]).sqrt()
    start = plain if mode == "direct" else sample
    for index in [(0, 0, 0, 0), (0, 1, 2, 3), (0, 2, 3, 1)]:
        nudge = torch.zeros_like(start)
        nudge[index] = 1e-5
        gradient = (loss_at(start + nudge) - loss_at(start - nudge)) / 2e-5
        expected = plain[index] - scale * noise_level * gradient * 48 / 2
        assert moved[index].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["direct", "net"])
def test_the_function_is_given_images_in_their_range_and_the_gradient_passes(mode):
    net, scheduler, seen = unet(), DDPMScheduler(), []

    def function(images):
        seen.append(images)
        return (images - 0.5).square().mean(dim=(1, 2, 3))

    sample = torch.randn(2, 3, 8, 8)
    plain = net(sample, 999).sample
    assert predicted_images(scheduler, plain, sample, 999).abs().max() > 10
    output = Guidance(function, 1.0, mode).predict(net, scheduler, sample, 999)
    assert seen[0].abs().max() <= 1
    images = predicted_images(scheduler, output, sample, 999)
    assert (images - 0.5).abs().mean() < (seen[0] - 0.5).abs().mean() or mode == "net"
    assert output.isfinite().all() and not torch.allclose(output, plain, atol=1e-5)


def test_the_timestep_and_not_the_loop_decides_how_firmly():
    net, scheduler = unet(), DDPMScheduler(prediction_type="sample")
    guidance, sample = Guidance(color_loss("white"), 1.0), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        moves = [
            (guidance.predict(net, scheduler, sample, timestep) - net(sample, timestep).sample).norm()
            / (net(sample, timestep).sample - 1).norm()
            for timestep in (999, 500, 10)
        ]
    expected = [(1 - scheduler.alphas_cumprod[timestep]).sqrt() for timestep in (999, 500, 10)]
    assert torch.allclose(torch.stack(moves), torch.stack(expected), rtol=1e-4)


@pytest.mark.parametrize("name", SAMPLER_CLASSES)
@pytest.mark.parametrize("mode", ["direct", "net"])
def test_colour_guidance_halves_the_distance_with_every_sampler(accelerator, name, mode):
    net = unet()
    sampler = make_sampler(name, DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"))
    target = np.array([[255, 0, 0]]).reshape(1, 3, 1, 1)

    def distance(guidance):
        images = sample_images(net, sampler, accelerator, 4, (3, 8, 8), 10, 4, 0, guidance=guidance)
        return np.abs(images.astype(float) - target).mean()

    assert distance(Guidance(color_loss("red"), 1.0, mode)) < 0.5 * distance(None)


def test_guidance_works_on_the_first_stages_and_on_grey_images(accelerator):
    class Follows(torch.nn.Module):
        """Net that returns its input."""

        def forward(self, sample, timestep):
            return Output(sample)

    net = Follows()
    white = Guidance(color_loss("#ffffff"), 1.0)
    plain, guided = (
        sample_images(net, LinearMixScheduler(), accelerator, 4, (1, 8, 8), 10, 4, 0, guidance=guidance)
        for guidance in (None, white)
    )
    assert guided.mean() > plain.mean() + 40


def test_own_functions_may_draw_random_numbers_and_leave_no_trace(accelerator):
    """The image does not depend on the batch, and torch's global generator is unchanged."""
    net, sampler = unet(), make_sampler("ddim", DDPMScheduler())

    def function(images):
        return (images - torch.rand(3, 1, 1)).square().mean(dim=(1, 2, 3))

    state = torch.get_rng_state()
    alone, together = (
        sample_images(net, sampler, accelerator, 3, (3, 8, 8), 4, size, 0, guidance=Guidance(function, 0.5))
        for size in (1, 3)
    )
    assert np.abs(alone.astype(int) - together).max() <= 1
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UserError, match="Expected one loss per image"):
        sample_images(
            net, sampler, accelerator, 2, (3, 8, 8), 4, 2, 0, guidance=Guidance(lambda images: images.mean(), 1)
        )


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """Return the folder of a tiny CLIP model with random weights, in the real classes."""
    folder = tmp_path_factory.mktemp("clip")
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=60, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    vision = dict(image_size=16, patch_size=8)
    torch.manual_seed(0)
    configs = dict(text_config={**small, **text}, vision_config={**small, **vision})
    CLIPModel(CLIPConfig(**configs, projection_dim=16)).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{letter}</w>" for letter in letters]]
    CLIPTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["direct", "net"])
def test_clip_guidance_lowers_the_clip_loss(accelerator, clip_folder, mode):
    net, sampler = unet(), make_sampler("ddim", DDPMScheduler(prediction_type="v_prediction"))
    function = clip_loss("a smiling face", str(clip_folder), torch.device("cpu"))

    def measure(guidance):
        images = sample_images(net, sampler, accelerator, 4, (3, 8, 8), 10, 4, 0, guidance=guidance)
        torch.manual_seed(0)
        with torch.no_grad():
            return function(torch.from_numpy(images) / 127.5 - 1)

    plain, guided = measure(None), measure(Guidance(function, 300.0, mode))
    assert plain.shape == (4,) and (plain >= 0).all()
    assert guided.mean() < 0.95 * plain.mean()


def test_bad_models_are_refused_with_advice(tmp_path):
    with pytest.raises(UserError, match="Expected a CLIP model"):
        clip_loss("a face", str(tmp_path), torch.device("cpu"))
