"""train_flow.py and utils/diffusion/flow.py: straight paths, their samplers, and the tools that support them."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_weights, exit_code, train
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import evaluate
import finetune_faces
import sample
import train_flow
from utils import UserError
from utils.args import SOLVERS
from utils.diffusion.flow import FlowScheduler, make_flow, make_sampler, shifted
from utils.diffusion.pipelines import choose_sampler, load_pipeline, training_scheduler
from utils.diffusion.sampling import sample_images
from utils.diffusion.schedulers import output_for, predicted_images
from utils.randomness import sample_noise

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def run(folder, *flags):
    return train(folder, "--unet=tiny", *flags, script=train_flow)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow") / "run"
    # A new UNet predicts zero, and must change in a few steps
    flags = ["--num_inference_steps=5", "--learning_rate=1e-2"]
    assert run(folder, *flags) == 0
    return folder


# ------------------------------------------------------------------------------------------------------------ the path


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
@pytest.mark.parametrize(
    "make", [lambda p: FlowScheduler(1000, p), lambda p: make_sampler("euler", FlowScheduler(1000, p))]
)
def test_outputs_and_images_are_two_ways_to_say_the_same(make, prediction_type):
    scheduler = make(prediction_type)
    images, noise = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    timesteps = torch.tensor([10.0, 500.0, 999.0])
    noisy = FlowScheduler().add_noise(images, noise, timesteps)
    levels = (timesteps / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(noisy, (1 - levels) * images + levels * noise)
    output = output_for(scheduler, images, noisy, timesteps.view(-1, 1, 1, 1))
    expected = noise - images if prediction_type == "flow_prediction" else images
    assert torch.allclose(output, expected, atol=1e-4)
    assert torch.allclose(predicted_images(scheduler, output, noisy, timesteps.view(-1, 1, 1, 1)), images, atol=1e-5)


class Field:
    """Model with the velocity of a curved flow, which counts its function evaluations."""

    training, eval, train = False, lambda self: self, lambda self, mode=True: self

    def __init__(self):
        self.asked = []

    def __call__(self, noisy, timesteps, **inputs):
        self.asked.append(float(timesteps[0]))
        level = (timesteps / 1000).view(-1, 1, 1, 1).float()
        velocity = torch.cos(4 * level) * noisy + level**2
        return type("Output", (), {"sample": velocity})


def drawn(accelerator, name, calls, shift=1.0):
    field = Field()
    sampler = make_sampler(name, FlowScheduler(flow_shift=shift))
    images = sample_images(field, sampler, accelerator, 2, (1, 4, 4), calls, 2, seed=0)
    return images.astype(int), field.asked


def plain_euler(calls):
    """Integrate without a scheduler, from the noise that samples start from."""
    field, sample = Field(), sample_noise(0, "samples", np.arange(2), (1, 4, 4))
    levels = [1 - k / calls for k in range(calls + 1)]
    for here, there in itertools.pairwise(levels):
        sample = sample + (there - here) * field(sample, torch.full((2,), 1000 * here)).sample
    return ((sample.clamp(-1, 1) + 1) * 127.5).round().numpy().astype(int)


@pytest.mark.parametrize("calls", [1, 4, 25])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_call_of_the_model_counts_and_is_made_once(accelerator, name, calls):
    _, asked = drawn(accelerator, name, calls)
    assert len(asked) == calls and asked[0] >= 999 and asked == sorted(asked, reverse=True)
    assert asked[-1] >= 970 / calls  # none is spent on the last thousandth


def test_the_saved_scheduler_is_eulers_method_in_first_order(accelerator):
    """Equality holds up to the start at 0.999 and the rounding of timesteps to whole numbers."""
    for calls in (2, 10, 40):
        images, _ = drawn(accelerator, "euler", calls)
        assert np.abs(images - plain_euler(calls)).max() <= 2


def test_the_second_order_is_nearer_with_as_many_calls(accelerator):
    exact, _ = drawn(accelerator, "dpmsolver++", 999)
    errors = {name: np.abs(drawn(accelerator, name, 9)[0] - exact).mean() for name in SOLVERS}
    assert errors["dpmsolver++"] < errors["euler"]


def test_a_shift_moves_training_and_sampling_towards_noise(accelerator, tmp_path):
    sizes = (28, 28), (64, 64), (256, 256), (128, 512)
    shifts = [make_flow(None, None, size).config.flow_shift for size in sizes]
    assert shifts == [1, 1, 4, 4] and make_flow(None, 2.0, (8, 8)).config.flow_shift == 2
    levels = np.linspace(0, 1, 5)
    assert np.allclose(shifted(levels, 1), levels) and (shifted(levels, 3)[1:-1] > levels[1:-1]).all()
    for name in SOLVERS:
        _, asked = drawn(accelerator, name, 5, shift=3.0)
        assert asked[-1] > drawn(accelerator, name, 5)[1][-1] * 1.5
    run(tmp_path / "run", "--flow_shift=3", "--max_train_steps=3")
    saved = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert saved["flow_shift"] == 3 and saved["use_flow_sigmas"] and saved["final_sigmas_type"] == "zero"
    run(tmp_path / "plain", "--max_train_steps=3")
    assert not equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "plain" / WEIGHTS)


# ------------------------------------------------------------------------------------------------------------- training


def test_the_output_is_a_pipeline_of_diffusers(finished):
    pipeline = DDPMPipeline.from_pretrained(finished)
    assert isinstance(pipeline.scheduler, DPMSolverMultistepScheduler)
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=3).images[0].size == (8, 8)
    card = (finished / "README.md").read_text()
    assert "# Flow-matching model trained on" in card and "flow-matching" in card and "flow\\_shift" in card


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
def test_the_loss_falls_and_is_that_of_the_velocity(tmp_path, monkeypatch, prediction_type):
    seen, mse_loss, forward = [], F.mse_loss, UNet2DModel.forward

    def spy(output, target, **options):
        seen.append((output.detach(), target, mse_loss(output, target).item()))
        return mse_loss(output, target, **options)

    monkeypatch.setattr(F, "mse_loss", spy)
    flags = ["--max_train_steps=40", "--mixed_precision=bf16", "--learning_rate=4e-3"]
    run(tmp_path / "run", f"--prediction_type={prediction_type}", *flags)
    assert all(output.dtype == target.dtype == torch.float32 for output, target, _ in seen)
    losses = [loss for *_, loss in seen]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    saved = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config.prediction_type
    assert saved == {"velocity": "flow_prediction"}.get(prediction_type, prediction_type)

    # a perfect model would have no loss
    known = {}

    def clean(self, images, timesteps, **options):
        output = forward(self, images, timesteps)
        return type("Output", (), {"sample": output.sample * 0 + known["images"]}) if self.training else output

    def add_noise(self, images, noise, timesteps):
        known["images"] = images
        return original(self, images, noise, timesteps)

    if prediction_type == "sample":
        original = FlowScheduler.add_noise
        monkeypatch.setattr(FlowScheduler, "add_noise", add_noise)
        monkeypatch.setattr(UNet2DModel, "forward", clean)
        seen.clear()
        flags = ["--prediction_type=sample", "--max_train_steps=1", "--weighting_scheme=uniform"]
        run(tmp_path / "known", *flags)
        (output, target, _), *_ = seen
        assert torch.equal(output, target)


def test_each_flag_and_constant_of_the_objective_changes_the_result(tmp_path, monkeypatch):
    run(tmp_path / "plain", "--max_train_steps=3")
    for flag in ("--weighting_scheme=uniform", "--prediction_type=sample"):
        folder = tmp_path / flag.strip("-").split("=")[0]
        run(folder, "--max_train_steps=3", flag)
        assert not equal_weights(tmp_path / "plain" / WEIGHTS, folder / WEIGHTS), flag
    for name, value in dict(LOGIT_MEAN=1, LOGIT_STD=0.5).items():
        with monkeypatch.context() as patch:
            patch.setattr(train_flow, name, value)
            run(tmp_path / name, "--max_train_steps=3")
        assert not equal_weights(tmp_path / "plain" / WEIGHTS, tmp_path / name / WEIGHTS), name


@pytest.mark.parametrize("name", SOLVERS)
def test_each_sampler_draws_and_a_pipeline_is_saved(tmp_path, name):
    assert run(tmp_path / "run", f"--sampler={name}", "--max_train_steps=1", "--num_inference_steps=3") == 0
    order = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config.solver_order
    assert order == (1 if name == "euler" else 2)


def test_training_continues_from_a_flow_and_from_nothing_else(tmp_path, finished, finished_run):
    start = f"--pretrained_model_name_or_path={finished}"
    assert train(tmp_path / "on", start, "--max_train_steps=1", "--learning_rate=0", script=train_flow) == 0
    state = [folder / "checkpoint-6" / "training_state" / "model.safetensors" for folder in (finished,)]
    averaged = load_file(finished / WEIGHTS)
    assert all(torch.equal(value, averaged[key]) for key, value in load_file(tmp_path / "on" / WEIGHTS).items())
    assert state[0].is_file()
    clean = ["--prediction_type=sample", "--flow_shift=2", "--max_train_steps=1"]
    assert run(tmp_path / "clean", *clean) == 0
    clean = f"--pretrained_model_name_or_path={tmp_path / 'clean'}"
    assert train(tmp_path / "cleaner", clean, "--max_train_steps=1", script=train_flow) == 0
    saved = DDPMPipeline.from_pretrained(tmp_path / "cleaner").scheduler.config
    assert saved.prediction_type == "sample" and saved.flow_shift == 2
    with pytest.raises(UserError, match="was not trained on straight paths"):
        other = f"--pretrained_model_name_or_path={finished_run}"
        train(tmp_path / "other", other, script=train_flow)
    with pytest.raises(UserError, match=r"Expected the noise of a DDPMScheduler\. For this model use train_flow\.py"):
        train(tmp_path / "adapted", start)


# ---------------------------------------------------------------------------------------------------------------- tools


def test_the_tools_know_straight_paths(tmp_path, finished):
    def draw(name, *flags):
        flags = [f"--output_dir={tmp_path / name}", "--num_samples=4", "--num_inference_steps=5", *flags]
        assert exit_code(sample.main, sample.parse_args([str(finished), *flags])) == 0
        return np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name / "images").glob("*.png"))])

    plain = draw("plain")
    pictures = [draw("euler", "--sampler=euler"), draw("walk", "--interpolate", "0", "1")]
    pictures += [draw("guided", "--guidance_color=white", "--gif")]
    pictures += [draw("started", f"--init_image={tmp_path / 'plain' / 'images' / '000000.png'}", "--strength=0.4")]
    assert all(not np.array_equal(plain, picture) for picture in pictures)
    assert pictures[2].mean() > plain.mean()
    near = np.abs(pictures[3].astype(int) - plain[0]).mean() < np.abs(plain[1:].astype(int) - plain[0]).mean()
    assert near  # an image that starts from a picture stays near it
    flags = [str(finished), "--reference=digits", "--reference_split=train[:200]", "--held_out_split=train[200:400]"]
    flags += ["--num_samples=20", f"--output_dir={tmp_path / 'e'}", "--validation_loss", "--num_validation_images=9"]
    flags += ["--sweep", "dpmsolver++:3,5", "euler:3"]
    assert exit_code(evaluate.main, evaluate.parse_args(flags)) == 0
    results = json.loads((tmp_path / "e" / "results.json").read_text())
    assert len(results["results"]) == 5 and all(0 < row["loss"] < 3 for row in results["denoising_losses"])


def test_samplers_of_the_other_noise_are_refused_and_the_other_way_round(finished, finished_run):
    _, flow, _ = load_pipeline(str(finished))
    assert isinstance(training_scheduler(flow), FlowScheduler)
    for name in ("ddpm", "ddim", "unipc"):
        with pytest.raises(UserError, match=rf"--sampler {name}: .* straight paths\. Expected dpmsolver\+\+, euler"):
            choose_sampler(flow, name, 5)
    _, ddpm, _ = load_pipeline(str(finished_run))
    with pytest.raises(UserError, match=r"--sampler euler is for models of train_flow\.py"):
        choose_sampler(ddpm, "euler", 5)


def test_the_best_of_a_sweep_is_written(tmp_path, finished):
    import shutil

    shutil.copytree(finished, tmp_path / "run")
    flags = [
        str(tmp_path / "run"),
        "--reference=digits",
        "--reference_split=train[:200]",
        "--held_out_split=train[200:]",
        "--num_samples=20",
    ]
    flags += ["--sweep", "euler:3,4", "--write_best", f"--output_dir={tmp_path / 'e'}"]
    assert exit_code(evaluate.main, evaluate.parse_args(flags)) == 0
    saved = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler.config
    assert saved.solver_order == 1 and saved.use_flow_sigmas


def test_a_model_that_predicts_the_image_is_adapted_with_the_loss_it_was_trained_with(tmp_path, monkeypatch):
    base, seen, mse_loss = tmp_path / "base", [], torch.nn.functional.mse_loss
    train(base, "--unet=tiny", "--max_train_steps=1", "--prediction_type=sample", script=train_flow)

    def spy_loss(output, target, **options):
        seen.append(target)
        return mse_loss(output, target, **options)

    monkeypatch.setattr(torch.nn.functional, "mse_loss", spy_loss)
    flags = [f"--pretrained_model_name_or_path={base}", "--train_batch_size=32", "--max_train_steps=1"]
    train(tmp_path / "run", *flags, script=finetune_faces)
    assert seen[0].std() > 1.1  # noise - image, and not the image, which is within [-1, 1]
