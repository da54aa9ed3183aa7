"""distill_few_steps.py: training of the student, its sampler, and the tools that support it."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from conftest import equal_weights, exit_code, interrupt, scalars, slow, train
from diffusers import ConsistencyModelPipeline, DDPMPipeline, DDPMScheduler, LCMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file

import distill_few_steps
import evaluate
import finetune_faces
import sample
import train_conditional
import train_ddpm
import train_flow
from distill_few_steps import trajectory_end
from utils import UserError
from utils.diffusion.few_steps import make_few_step_sampler
from utils.diffusion.pipelines import choose_sampler, load_pipeline
from utils.diffusion.schedulers import make_sampler, output_for
from utils.randomness import sample_noise
from utils.training.loop import Run

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
TYPES = ("epsilon", "sample", "v_prediction")


def run(folder, teacher, *flags):
    return train(folder, f"--pretrained_model_name_or_path={teacher}", *flags, script=distill_few_steps)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Return folders of tiny teachers: one for each prediction type, one with classes, one of straight paths."""
    folder, made = tmp_path_factory.mktemp("teachers"), {}
    scripts = {"flow": train_flow, "classes": train_conditional}
    for name in (*TYPES, *scripts):
        flags = [f"--prediction_type={name}"] if name in TYPES else ["--unet=tiny"]
        flags += ["--learning_rate=0.03"] if name == "classes" else []  # at first a class changes nothing
        made[name] = folder / name
        assert train(made[name], "--max_train_steps=3", *flags, script=scripts.get(name, train_ddpm)) == 0
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teachers):
    """Return the folder of a finished run; do not change it."""
    folder = tmp_path_factory.mktemp("few") / "run"
    flags = ["--report_to=tensorboard", "--sample_steps=3", "--evaluate_steps=3", "--num_evaluation_samples=130"]
    assert run(folder, teachers["v_prediction"], *flags) == 0
    return folder


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("prediction_type", TYPES)
def test_training_and_the_sampler_mean_the_same_image(prediction_type):
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    sampler = make_few_step_sampler(noise_scheduler, 8)
    noise_scheduler = DDPMScheduler.from_config(sampler.config)
    images, noise = torch.rand(4, 1, 4, 4) * 1.8 - 0.9, torch.randn(4, 1, 4, 4)
    timesteps = torch.tensor([0, 124, 499, 874])
    noisy = noise_scheduler.add_noise(images, noise, timesteps)
    output = output_for(sampler, images, noisy, timesteps.view(-1, 1, 1, 1))
    ends = trajectory_end(sampler, output, noisy, timesteps)
    for k, timestep in enumerate(timesteps):
        sampler.set_timesteps(timesteps=[int(timestep)])
        stepped = sampler.step(output[k : k + 1], timestep, noisy[k : k + 1])
        assert torch.allclose(stepped.denoised, ends[k : k + 1], atol=1e-5)
    assert torch.equal(ends[0], noisy[0]) and torch.allclose(ends[1:], images[1:], atol=2e-3)


def calls_of(monkeypatch, folder, teacher, *flags):
    """Return the inputs of the nets in one training step: (images, timesteps, classes).

    Returns:
        Calls of the teacher up to the ends of its trajectories, the call of the student, that of the fake model as it
        learns, and the calls of teacher and fake model that compare the distributions.
    """
    seen, forward = [], UNet2DModel.forward

    def spy(self, images, timesteps, class_labels=None, **options):
        learns = next(self.parameters()).requires_grad
        seen.append((self, learns, self.training, (images.detach().clone(), timesteps.clone(), class_labels)))
        return forward(self, images, timesteps, class_labels, **options)

    with monkeypatch.context() as patch:
        patch.setattr(UNet2DModel, "forward", spy)
        run(folder, teacher, "--train_batch_size=40", "--max_train_steps=1", "--num_samples=1", *flags)
    ((student, call),) = [(net, call) for net, _, training, call in seen if training]
    start = next(place for place, (_, _, training, _) in enumerate(seen) if training)
    learning, fake = [call for net, learns, _, call in seen[start:] if learns and net is not student][:2]
    *asked, teacher = [call for _, learns, _, call in seen if not learns]
    return asked, call, learning, (teacher, fake)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_student_learns_from_points_of_the_trajectories_of_the_teacher(
    tmp_path, monkeypatch, teachers, prediction_type
):
    teacher = teachers[prediction_type]
    monkeypatch.setattr(distill_few_steps, "POINTS_PER_TRAJECTORY", 5)
    monkeypatch.setattr(distill_few_steps, "TEACHER_STEPS", 2)
    flags = ["--solver_steps=8"]
    asked, (points, timesteps, _), learning, (by_teacher, by_fake) = calls_of(
        monkeypatch, tmp_path / "run", teacher, *flags
    )
    trajectory = asked[-8:]  # the first two calls drew the teacher's row
    assert [call[1][0].item() for call in trajectory] == [999, 874, 749, 624, 499, 374, 249, 124]
    ids = np.arange(0, 40, 5)
    # Nothing but noise
    assert torch.allclose(trajectory[0][0], sample_noise(0, "noise", ids, (1, 8, 8)), atol=1e-3)
    pipeline = DDPMPipeline.from_pretrained(teacher)
    solver = make_sampler("dpmsolver++", DDPMScheduler.from_config(pipeline.scheduler.config))
    solver.set_timesteps(8)
    images = trajectory[0][0]
    for call, timestep in zip(trajectory, solver.timesteps, strict=True):
        assert torch.allclose(call[0], images, atol=1e-4)
        with torch.no_grad():
            output = pipeline.unet(images, timestep).sample
        images = solver.step(output, timestep, images).prev_sample
    places = [int((999 - t + 60) // 125) for t in timesteps.tolist()]
    for k, place in enumerate(places):
        assert timesteps[k] == trajectory[place][1][0] and torch.equal(points[k], trajectory[place][0][k // 5])
    assert 0 in places and np.mean(places) < 3  # nearer to noise
    # Both models get the same noisy images of the student
    assert torch.equal(by_teacher[0], by_fake[0]) and torch.equal(by_teacher[1], by_fake[1])
    for images, timesteps, _ in (learning, by_fake):
        assert images.shape == points.shape and len(set(timesteps.tolist())) > 20
    assert not torch.equal(learning[1], by_fake[1])


def test_a_student_that_is_consistent_has_nothing_to_learn(tmp_path, monkeypatch, teachers):
    """Teacher and student predict the only image, so every trajectory ends there, for any interval."""
    image, losses = torch.full((1, 8, 8), 0.5), []
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    original = UNet2DModel.forward

    def forward(self, images, timesteps, class_labels=None, **options):
        output = original(self, images, timesteps, class_labels, **options)
        known = output_for(scheduler, image, images, timesteps.expand(len(images)).view(-1, 1, 1, 1))
        output.sample = output.sample * 0 + known + wrong * torch.is_grad_enabled()
        return output

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    flags = ["--report_to=tensorboard", "--logging_steps=1"]
    for wrong in (0.0, 0.3):
        folder = tmp_path / str(wrong)
        assert run(folder, teachers["v_prediction"], *flags) == 0
        losses.append(list(scalars(folder, "loss/train").values()))
    assert max(losses[0]) < 1e-3 < 0.02 < min(losses[1]), losses


def test_samples_move_only_where_the_distributions_differ(tmp_path, monkeypatch, teachers):
    """At first the fake model is the teacher. With a learning rate of 0 it stays so, and matching changes nothing."""
    for name, rate, weight in (("without", 1e-3, 0.0), ("equal", 0.0, 50.0), ("different", 1e-3, 50.0)):
        monkeypatch.setattr(distill_few_steps, "FAKE_LEARNING_RATE", rate)
        monkeypatch.setattr(distill_few_steps, "MATCHING_WEIGHT", weight)
        assert run(tmp_path / name, teachers["v_prediction"], "--max_train_steps=2", "--lr_warmup_steps=0") == 0
    assert equal_weights(tmp_path / "without" / WEIGHTS, tmp_path / "equal" / WEIGHTS)
    assert not equal_weights(tmp_path / "without" / WEIGHTS, tmp_path / "different" / WEIGHTS)


def test_each_flag_and_constant_of_the_objective_changes_the_result(tmp_path, monkeypatch, teachers):
    run(tmp_path / "plain", teachers["v_prediction"], "--max_train_steps=2")
    assert Image.open(tmp_path / "plain" / "samples.png").height == 4 * 68 + 4 + 24
    with monkeypatch.context() as patch:
        patch.setattr(distill_few_steps, "TEACHER_STEPS", 3)
        run(tmp_path / "calls", teachers["v_prediction"], "--max_train_steps=2")
    pictures = [Image.open(tmp_path / name / "samples.png") for name in ("plain", "calls")]
    assert pictures[0].height == pictures[1].height and pictures[0].tobytes() != pictures[1].tobytes()
    run(tmp_path / "solver", teachers["v_prediction"], "--max_train_steps=2", "--solver_steps=4")
    assert not equal_weights(tmp_path / "plain" / WEIGHTS, tmp_path / "solver" / WEIGHTS)
    for name, value in dict(POINTS_PER_TRAJECTORY=2, NOISY_POINTS=1, HUBER_C=1, MATCHING_WEIGHT=0).items():
        with monkeypatch.context() as patch:
            patch.setattr(distill_few_steps, name, value)
            run(tmp_path / name, teachers["v_prediction"], "--max_train_steps=2")
        assert not equal_weights(tmp_path / "plain" / WEIGHTS, tmp_path / name / WEIGHTS), name


def test_classes_stay_with_their_trajectories_and_the_guidance_of_the_teacher_is_learnt(
    tmp_path, monkeypatch, teachers
):
    flags = ["--solver_steps=2", "--class_dropout_prob=0.3"]
    asked, (points, timesteps, labels), learning, _ = calls_of(
        monkeypatch, tmp_path / "plain", teachers["classes"], *flags
    )
    assert torch.equal(labels, asked[-1][2].repeat_interleave(4)) and len(set(labels.tolist())) > 2 and 10 in labels
    assert torch.equal(labels, learning[2])
    guided, (others, _, same), _, (by_teacher, by_fake) = calls_of(
        monkeypatch, tmp_path / "guided", teachers["classes"], *flags, "--teacher_guidance_scale=3"
    )
    assert torch.equal(by_fake[2], labels)
    assert torch.equal(by_teacher[2], torch.cat([torch.full_like(labels, 10), labels]))
    assert torch.equal(labels, same) and len(guided[-1][0]) == 20 and (guided[-1][2][:10] == 10).all()
    second, with_class = timesteps == 499, labels < 10
    assert torch.equal(points[~second], others[~second])
    assert not torch.allclose(points[second & with_class], others[second & with_class], atol=1e-3)
    assert torch.allclose(points[second & ~with_class], others[second & ~with_class], atol=1e-5)
    with pytest.raises(UserError, match="--teacher_guidance_scale: the teacher has no classes"):
        run(tmp_path / "none", teachers["sample"], "--teacher_guidance_scale=3")


@pytest.mark.parametrize("kind", [slow("v_prediction"), slow("epsilon"), "classes"])
def test_resuming_equals_never_having_stopped(tmp_path, teachers, kind):
    flags = ["--random_flip", "--report_to=tensorboard"]
    for name in ("straight", "cut"):
        assert run(tmp_path / name, teachers[kind], *flags) == 0
    interrupt(tmp_path / "cut", "checkpoint-3")
    run(tmp_path / "cut", teachers[kind], *flags)
    assert equal_weights(tmp_path / "straight" / WEIGHTS, tmp_path / "cut" / WEIGHTS)
    for name in ("model.safetensors", "optimizer.bin", "model_1.safetensors", "optimizer_1.bin"):
        first, second = (tmp_path / run / "checkpoint-6" / "training_state" / name for run in ("straight", "cut"))
        assert first.read_bytes() == second.read_bytes()
    for tag in ("loss/matching", "loss/fake_model"):
        curve = scalars(tmp_path / "straight", tag)
        assert list(curve) == [1, 2, 3, 4, 5, 6] and curve == scalars(tmp_path / "cut", tag)
    assert (tmp_path / "straight" / "samples.png").read_bytes() == (tmp_path / "cut" / "samples.png").read_bytes()


# --------------------------------------------------------------------------------------------------- files of a run


def test_the_output_is_a_pipeline_of_diffusers_at_one_two_and_four_calls(finished, recwarn, capfd):
    pipeline = DDPMPipeline.from_pretrained(finished)
    assert isinstance(pipeline.scheduler, LCMScheduler) and pipeline.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"8 x 1\.0 is smaller than `num_inference_steps`: 1000"):
        pipeline()  # a thousand sampling steps, at timesteps that it was not trained on
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(num_inference_steps=calls, generator=torch.Generator().manual_seed(0), output_type="np").images
        for calls in (1, 2, 4)
    ]
    assert all(np.isfinite(image).all() and image.shape == (1, 8, 8, 1) for image in images)
    assert not np.allclose(images[0], images[1]) and not np.allclose(images[1], images[2])
    assert "ignored" not in capfd.readouterr().err  # parameters of another scheduler
    card = (finished / "README.md").read_text()
    assert "num_inference_steps=2" in card and "`LCMScheduler`" in card and str(finished) not in card
    assert "## People" not in card  # neither the teacher nor the student saw other images than digits


def test_the_grid_has_the_teacher_and_one_two_and_four_calls(finished):
    picture = Image.open(finished / "samples.png")
    assert picture.height == 4 * 68 + 4 + 24 and sorted(path.name for path in (finished / "samples").iterdir())
    assert list(scalars(finished, "metrics/fd_digits_N130")) == [3, 6]
    assert (finished / "best" / "model_index.json").is_file()
    state = finished / "checkpoint-6" / "training_state"
    assert sorted(path.name for path in state.glob("*.safetensors")) == [
        "model.safetensors",
        "model_1.safetensors",
    ]  # not the teacher's


def test_classes_stay(tmp_path, teachers):
    assert run(tmp_path / "run", teachers["classes"]) == 0
    config = UNet2DModel.load_config(tmp_path / "run" / "unet")
    assert config["num_class_embeds"] == 11 and config["_class_names"] == [str(k) for k in range(10)]
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "run")
    assert isinstance(pipeline.scheduler, LCMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(1, class_labels=[k], num_inference_steps=2, generator=torch.manual_seed(0), output_type="np").images
        for k in (3, 7)
    ]
    assert images[0].shape == (1, 8, 8, 1) and not np.array_equal(*images)
    flags = [str(tmp_path / "run"), f"--output_dir={tmp_path / 'drawn'}", "--class_labels=3,7", "--num_samples=4"]
    assert exit_code(sample.main, sample.parse_args(flags)) == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "It has 10 classes" in card and "guidance_scale" not in card


# ------------------------------------------------------------------------------------------------------------- tools


def test_the_tools_draw_it_with_two_calls_and_with_no_other_sampler(tmp_path, finished, teachers):
    flags = [str(finished), f"--output_dir={tmp_path / 'drawn'}", "--num_samples=4"]
    assert exit_code(sample.main, sample.parse_args(flags)) == 0
    settings = json.loads((tmp_path / "drawn" / "sampling_args.json").read_text())
    assert settings["num_inference_steps"] == 2
    # Two steps are the default, so the settings are the same
    assert exit_code(sample.main, sample.parse_args([*flags, "--num_inference_steps=2"])) == 0
    own, usual = load_pipeline(str(finished))[1], load_pipeline(str(teachers["v_prediction"]))[1]
    assert choose_sampler(own, "lcm", 4) is not usual
    with pytest.raises(UserError, match=r"--sampler ddim: the model was trained for a few large steps\. Expected lcm"):
        choose_sampler(own, "ddim", 25)
    with pytest.raises(UserError, match=r"--sampler lcm: the model was trained for many small steps\. lcm is for"):
        choose_sampler(usual, "lcm", 2)
    with pytest.raises(UserError, match=r"--sampler lcm: the model was trained for many"):
        choose_sampler(load_pipeline(str(teachers["flow"]))[1], "lcm", 2)
    for flags in (["--gif"], ["--guidance_color=white"]):
        flags = [str(finished), f"--output_dir={tmp_path / flags[0].strip('-')}", "--num_samples=2", *flags]
        assert exit_code(sample.main, sample.parse_args(flags)) == 0


def test_a_sweep_compares_it_with_its_teacher(tmp_path, capsys, finished, teachers):
    student = tmp_path / "student"
    shutil.copytree(finished, student)
    flags = [
        "--reference=digits",
        "--reference_split=train[:200]",
        "--held_out_split=train[200:]",
        "--num_samples=20",
        f"--output_dir={tmp_path / 'e'}",
    ]
    sweep = [str(student), str(teachers["v_prediction"]), *flags, "--sweep", "lcm:1,2", "ddim:3"]
    assert exit_code(evaluate.main, evaluate.parse_args(sweep)) == 0
    rows = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    assert [row["model"] for row in rows[1:-1]] == ["student lcm 1", "student lcm 2", "v_prediction ddim 3"]
    assert f"{student} is not evaluated with ddim" in capsys.readouterr().out
    assert Image.open(tmp_path / "e" / "sweep.png").width > 100
    with pytest.raises(
        UserError, match=r"--sweep: ddim cannot draw with .*student, which has the scheduler LCMScheduler"
    ):
        evaluate.main(evaluate.parse_args([str(student), *flags, "--sweep", "ddim:3"]))
    best = [str(student), *flags, "--sweep", "lcm:1,4", "--write_best"]
    assert exit_code(evaluate.main, evaluate.parse_args(best)) == 0
    assert isinstance(DDPMPipeline.from_pretrained(student).scheduler, LCMScheduler)


def test_what_cannot_be_distilled_is_refused(tmp_path, capsys, monkeypatch, finished, teachers):
    with pytest.raises(UserError, match="Expected the noise of a DDPMScheduler"):
        run(tmp_path / "flow", teachers["flow"])
    for script in (distill_few_steps, train_ddpm, finetune_faces):
        with pytest.raises(UserError, match=r"this is already a few-step model\. Adapt its teacher"):
            train(tmp_path / "again", f"--pretrained_model_name_or_path={finished}", script=script)
    with pytest.raises(UserError, match="--solver_steps 7 does not divide the teacher's 1000 noise levels"):
        run(tmp_path / "seven", teachers["sample"], "--solver_steps=7")
    with monkeypatch.context() as patch:
        original = Run.__init__

        def init(self, *arguments, **options):
            original(self, *arguments, **options)
            patch.setattr(type(self.accelerator), "mixed_precision", "fp16")  # as on a GPU

        patch.setattr(Run, "__init__", init)
        with pytest.raises(UserError, match="--mixed_precision fp16 and --gradient_accumulation_steps exclude each"):
            run(tmp_path / "fp16", teachers["sample"], "--gradient_accumulation_steps=2")
    with pytest.raises(UserError, match="is a few-step model with too few noise levels"):
        sample.main(sample.parse_args([str(finished), f"--output_dir={tmp_path / 's'}", "--init_image=x.png"]))
    for flags, said in (
        (["--validation_split=train"], "--validation_split: the denoising loss does not measure a few-step model"),
        (["--num_inference_steps=9"], "--num_inference_steps 9 is more than --solver_steps 8"),
        (["--train_batch_size=30"], "--train_batch_size 30 is not a multiple of 4"),
        ([], "the following arguments are required: --pretrained_model_name_or_path"),
    ):
        with pytest.raises(SystemExit) as stopped:
            distill_few_steps.parse_args([*flags, *(["--pretrained_model_name_or_path=x"] if flags else [])])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_teacher_must_be_the_same_when_a_run_resumes(tmp_path, teachers):
    teacher = tmp_path / "teacher"
    shutil.copytree(teachers["sample"], teacher)
    assert run(tmp_path / "run", teacher) == 0
    interrupt(tmp_path / "run", "checkpoint-3")
    shutil.copy(teachers["epsilon"] / WEIGHTS, teacher / WEIGHTS)
    with pytest.raises(UserError, match=r"teacher was '[0-9a-f]{16}', is '"):
        run(tmp_path / "run", teacher)


def test_a_schedule_that_the_sampler_lacks_is_passed_on_as_betas(tmp_path, monkeypatch):
    monkeypatch.setitem(train_ddpm.NOISE, "num_train_timesteps", 40)
    assert train(tmp_path / "teacher", "--max_train_steps=1", "--beta_schedule=sigmoid") == 0
    # The teacher has only 40 timesteps, so all of them are used
    monkeypatch.setattr(distill_few_steps, "TEACHER_STEPS", 41)
    assert run(tmp_path / "run", tmp_path / "teacher", "--max_train_steps=1") == 0
    saved = DDPMPipeline.from_pretrained(tmp_path / "run").scheduler
    assert torch.allclose(saved.alphas_cumprod, DDPMScheduler(40, beta_schedule="sigmoid").alphas_cumprod)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved.set_timesteps(4)
    assert saved.timesteps.tolist() == [39, 29, 19, 9]


def test_the_student_starts_as_its_teacher(tmp_path, teachers):
    flags = ["--learning_rate=0", "--max_train_steps=1"]
    assert run(tmp_path / "run", teachers["sample"], *flags) == 0
    before, after = (load_file(folder / WEIGHTS) for folder in (teachers["sample"], tmp_path / "run"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
