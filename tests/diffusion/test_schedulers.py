"""utils/diffusion/schedulers.py against diffusers, the papers and closed forms."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.optimization import get_scheduler

from utils import UserError
from utils.diffusion.flow import FlowScheduler
from utils.diffusion.flow import make_sampler as make_flow_sampler
from utils.diffusion.linear_mix import LinearMixScheduler
from utils.diffusion.pretrained import check_noise_scheduler, leave_out_variance
from utils.diffusion.sampling import sample_batch, sample_images
from utils.diffusion.schedulers import (
    SAMPLER_CLASSES,
    make_sampler,
    min_snr_weights,
    pipeline_scheduler,
    signal_and_noise,
)

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_min_snr_weights_amount_to_the_same_loss_on_the_clean_image(prediction_type):
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    timesteps = torch.tensor([1, 50, 200, 500, 900])
    clean, noise, wrong = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64)
    noisy = noise_scheduler.add_noise(clean, noise, timesteps)
    alpha_bar = noise_scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    noise_of_wrong = (noisy - a * wrong) / s  # predicts `wrong` in each parametrization
    output = {"epsilon": noise_of_wrong, "sample": wrong, "v_prediction": a * noise_of_wrong - s * wrong}
    target = {"epsilon": noise, "sample": clean, "v_prediction": a * noise - s * clean}
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    error = (output[prediction_type] - target[prediction_type]).square().mean((1, 2, 3))
    expected = snr.clamp(max=5) * (wrong - clean).square().mean((1, 2, 3))
    assert torch.allclose(min_snr_weights(noise_scheduler, timesteps, 5.0) * error, expected, rtol=1e-4)


def test_min_snr_weights_are_finite_where_nothing_is_left_of_the_image():
    for prediction_type in PREDICTIONS:
        noise_scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction_type)
        assert noise_scheduler.alphas_cumprod[-1] < 1e-6
        weights = min_snr_weights(noise_scheduler, torch.arange(1000), 5.0)
        assert weights.isfinite().all() and (weights >= 0).all() and weights.max() <= 5


def test_samplers_know_every_noise_schedule():
    for beta_schedule in SCHEDULES:
        noise_scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type="v_prediction")
        for name, kind in SAMPLER_CLASSES.items():
            sampler = make_sampler(name, noise_scheduler)
            assert isinstance(sampler, kind)
            assert torch.allclose(sampler.alphas_cumprod, noise_scheduler.alphas_cumprod, atol=1e-6)
            assert sampler.config.prediction_type == "v_prediction"
            sampler.set_timesteps(25)
            assert sampler.timesteps[0] == 999  # trailing: begins at pure noise
            again = kind.from_config(dict(sampler.config))
            assert torch.equal(again.alphas_cumprod, sampler.alphas_cumprod)


class Oracle(torch.nn.Module):
    """Model that predicts `clean` for every image."""

    def __init__(self, noise_scheduler, clean):
        super().__init__()
        self.noise_scheduler, self.clean = noise_scheduler, clean

    def forward(self, noisy, timestep):
        alpha_bar = self.noise_scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = (noisy - a * self.clean) / s
        kind = self.noise_scheduler.config.prediction_type
        sample = {"epsilon": noise, "sample": self.clean.expand_as(noisy), "v_prediction": a * noise - s * self.clean}
        return type("Output", (), {"sample": sample[kind]})


@pytest.mark.parametrize("name", SAMPLER_CLASSES)
@pytest.mark.parametrize(
    "prediction_type, zero_snr",
    [("epsilon", False), ("sample", False), ("v_prediction", False), ("sample", True), ("v_prediction", True)],
)
def test_a_perfect_model_is_sampled_perfectly(accelerator, name, prediction_type, zero_snr):
    clean = torch.tensor(np.random.default_rng(0).uniform(-0.9, 0.9, (1, 1, 4, 4)), dtype=torch.float32)
    noise_scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )
    oracle, sampler = Oracle(noise_scheduler, clean), make_sampler(name, noise_scheduler)
    images = sample_images(oracle, sampler, accelerator, 2, (1, 4, 4), 20, 2, seed=0)
    expected = ((clean + 1) * 127.5).round().byte().numpy()
    assert np.abs(images.astype(int) - expected).max() <= 3


def test_every_sampler_ends_in_a_pipeline_that_runs(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    for name in SAMPLER_CLASSES:
        noise_scheduler = DDPMScheduler()
        scheduler = pipeline_scheduler(name, noise_scheduler)
        DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / name)
        pipeline = DDPMPipeline.from_pretrained(tmp_path / name, use_safetensors=True)
        pipeline.scheduler.set_timesteps(25)
        assert pipeline.scheduler.timesteps[0] == 999
        assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_schedule_warms_up_and_ends_at_zero(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    lr_scheduler = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    rates = []
    for _ in range(100):
        rates.append(lr_scheduler.get_last_lr()[0])
        optimizer.step()
        lr_scheduler.step()
    assert rates[0] == 0 and rates[10] == max(rates) == 1.0
    assert rates[-1] < 0.02 and lr_scheduler.get_last_lr()[0] < 1e-9


@pytest.mark.parametrize("name", SAMPLER_CLASSES)
def test_an_error_of_predicted_noise_is_not_magnified_in_the_first_step(name):
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon")
    sampler = make_sampler(name, noise_scheduler)
    sampler.set_timesteps(25)
    sample = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    # The model's prediction is wrong by 5 %, because the noise is really `sample`
    step = sampler.step(1.05 * sample, sampler.timesteps[0], sample)
    assert step.prev_sample.abs().max() < 2 * sample.abs().max()


# ------------------------------------------------------------------------------------- linear mixing with uniform noise


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "sde-dpmsolver++", "ddpm"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_more_steps_do_not_make_an_error_worse(name, prediction_type):
    """If a model predicts images that are too bright by a tenth, the noise in its inputs keeps a small deviation.

    With diffusers' default DDIM, which clips the image and keeps the noise, the deviation is 11 after 100 steps.
    """
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    wanted = 1.1 * torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    sampler, noise = make_sampler(name, noise_scheduler), []

    def watch(given, predicted):
        signal, scale = signal_and_noise(noise_scheduler, sampler.timesteps[len(noise)], given)
        noise.append(((given - signal * wanted.clamp(-1, 1)) / scale).abs().max().item())

    sample_batch(
        Oracle(noise_scheduler, wanted), sampler, np.arange(2), (1, 4, 4), 100, 0, torch.device("cpu"), watch=watch
    )
    assert len(noise) == 100 and max(noise) < 4.5


class Gaussian(torch.nn.Module):
    """The exact model of normal values with a standard deviation of 0.3, which predicts noise."""

    def __init__(self, noise_scheduler, channels=1):
        super().__init__()
        self.noise_scheduler, self.channels = noise_scheduler, channels

    def forward(self, noisy, timesteps):
        signal, noise = (value.view(-1, 1, 1, 1) for value in signal_and_noise(self.noise_scheduler, timesteps, noisy))
        output = noise * noisy / (0.09 * signal**2 + noise**2)
        if self.noise_scheduler.config.prediction_type == "flow_prediction":
            output = output - 0.09 * signal * noisy / (0.09 * signal**2 + noise**2)
        return UNet2DOutput(sample=output.repeat(1, self.channels, 1, 1))


def deviation_of(model, sampler, steps):
    drawn = sample_batch(model, sampler, np.arange(8), (1, 16, 16), steps, 0, torch.device("cpu"))
    return drawn.std().item()


@pytest.mark.parametrize("steps", [60, 150])
@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_samplers_reach_the_distribution_with_any_number_of_steps(name, steps):
    noise_scheduler = DDPMScheduler()
    deviation = deviation_of(Gaussian(noise_scheduler), make_sampler(name, noise_scheduler), steps)
    assert deviation == pytest.approx(0.3, abs=0.025)


def test_numbers_of_steps_for_which_rounding_adds_one_are_refused():
    for levels in (100, 1000):
        noise_scheduler, refused = DDPMScheduler(num_train_timesteps=levels), set()
        samplers = [make_sampler(name, noise_scheduler) for name in SAMPLER_CLASSES]
        for steps, sampler in itertools.product(range(1, 101), samplers):
            sampler.set_timesteps(steps)
            if sampler.timesteps.min() < 0 or len(sampler.timesteps) > steps:
                refused.add(steps)
        for steps in refused:
            with pytest.raises(UserError, match=f"--num_inference_steps {steps}: rounding in diffusers"):
                check_noise_scheduler(noise_scheduler, steps)
        for steps in {*range(1, 101)} - refused:
            check_noise_scheduler(noise_scheduler, steps)
        assert refused == ({29, 31, 58, 62, 97} if levels == 100 else {61})


def test_a_flow_with_a_shift_takes_more_steps_than_there_are_whole_timesteps():
    path = FlowScheduler(1000, "flow_prediction", 4.0)
    assert deviation_of(Gaussian(path), make_flow_sampler("dpmsolver++", path), 400) == pytest.approx(0.3, abs=0.02)


def test_a_model_that_also_predicts_a_variance_draws_with_its_own_scheduler():
    scheduler = DDPMScheduler(variance_type="learned_range")
    unet = UNet2DModel(8, 1, 2, block_out_channels=(8,), down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
                       norm_num_groups=4)  # fmt: skip
    leave_out_variance(unet, scheduler, "--x y")
    assert deviation_of(Gaussian(scheduler), scheduler, 250) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_saved_ddim_draws_what_the_grids_show(prediction_type):
    """Images are too bright, as above."""
    noise_scheduler = DDPMScheduler(prediction_type=prediction_type)
    model = Oracle(noise_scheduler, 1.5 * torch.linspace(-1, 1, 16).view(1, 1, 4, 4))
    given = {"grid": [], "pipeline": []}
    sampler = make_sampler("ddim", noise_scheduler)
    watch = lambda sample, predicted: given["grid"].append(sample)  # noqa: E731
    sample = sample_batch(model, sampler, np.arange(2), (1, 4, 4), 20, 0, torch.device("cpu"), watch=watch)
    given["grid"].append(sample)
    saved, sample = pipeline_scheduler("ddim", noise_scheduler), given["grid"][0]
    saved.set_timesteps(20)
    for timestep in saved.timesteps:  # as in DDPMPipeline
        given["pipeline"].append(sample)
        sample = saved.step(model(sample, timestep).sample, timestep, sample, generator=None).prev_sample
    given["pipeline"].append(sample)
    for mine, theirs in zip(*given.values(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-2)


def test_linear_mix_is_a_straight_line_in_float32():
    scheduler = LinearMixScheduler()
    clean, noise = torch.rand(5, 1, 4, 4) * 2 - 1, torch.rand(5, 1, 4, 4) * 2 - 1
    timesteps = torch.tensor([0.0, 250.0, 500.0, 900.0, 1000.0])
    mixed = scheduler.add_noise(clean, noise, timesteps)
    assert mixed.dtype == torch.float32
    for k, amount in enumerate([0, 0.25, 0.5, 0.9, 1]):
        assert torch.allclose(mixed[k], (1 - amount) * clean[k] + amount * noise[k], atol=1e-6)
    assert torch.equal(mixed[0], clean[0]) and torch.equal(mixed[-1], noise[-1])


@pytest.mark.parametrize("steps", [1, 5, 40])
def test_a_step_is_eulers_method_and_moves_a_fraction_of_the_way(steps):
    scheduler = LinearMixScheduler()
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and scheduler.timesteps[0] == 1000
    sample = torch.rand(2, 1, 4, 4) * 2 - 1
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = torch.tanh(sample)  # some model
        amount, next_amount = (steps - i) / steps, (steps - i - 1) / steps
        velocity = (sample - prediction) / amount  # dx/da of the flow
        euler = sample + (next_amount - amount) * velocity
        fraction = sample + (prediction - sample) / (steps - i)
        result = scheduler.step(prediction, timestep, sample)
        assert torch.allclose(result.prev_sample, euler, atol=1e-6)
        assert torch.allclose(result.prev_sample, fraction, atol=1e-6)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    assert torch.equal(sample, prediction)  # the last step reaches the clean image


def test_sampling_with_the_true_images_follows_the_line_of_training():
    scheduler = LinearMixScheduler(num_train_timesteps=10)
    scheduler.set_timesteps(7)
    clean, noise = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)
    sample = noise
    for timestep in scheduler.timesteps:
        assert torch.allclose(sample, scheduler.add_noise(clean, noise, timestep[None]), atol=1e-6)
        sample = scheduler.step(clean, timestep, sample).prev_sample


def test_linear_mix_is_saved_and_loaded_as_other_schedulers_are(tmp_path):
    LinearMixScheduler(num_train_timesteps=50).save_pretrained(tmp_path)
    assert LinearMixScheduler.from_pretrained(tmp_path).config.num_train_timesteps == 50
    assert len(LinearMixScheduler()) == 1000
