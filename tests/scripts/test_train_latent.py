"""train_autoencoder.py, train_latent.py, and how other scripts use their models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal_weights, exit_code, parse, scalars, slow, train
from diffusers import AutoencoderKL, DiTPipeline, LDMPipeline
from PIL import Image

import distill_few_steps
import evaluate
import finetune_faces
import sample
import train_autoencoder
import train_flow
import train_latent
from utils import UserError
from utils.data.latents import LatentCache
from utils.data.own_images import OwnImages
from utils.data.train_data import load_train_data
from utils.diffusion.autoencoders import choose_autoencoder
from utils.diffusion.classes import GuidedModel
from utils.diffusion.pipelines import load_pipeline
from utils.diffusion.sampling import sample_batch
from utils.diffusion.spaces import Latents
from utils.publishing.hub import Hub

FILE = "diffusion_pytorch_model.safetensors"
# A user without this repository runs this code, in a process of its own
STRANGER = """
import sys, numpy as np, torch
from diffusers import DiTPipeline, LDMPipeline

def draw(kind, folder, call):
    pipeline = kind.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    return call(pipeline, num_inference_steps=5, generator=generator, output_type="np").images

drawn = np.stack([{calls}])
assert not any(name.split(".")[0] == "utils" for name in sys.modules)
np.save("drawn.npy", drawn)
"""


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, finished_autoencoder):
    """Return a function from further flags to the folder of a finished run in latents of digits."""
    folder, known = tmp_path_factory.mktemp("latent"), {}

    def run(*flags):
        if flags not in known:
            known[flags] = folder / f"run{len(known)}"
            steps = ["--learning_rate=1e-2", "--max_train_steps=20", "--num_inference_steps=5", "--num_samples=10"]
            start = [f"--vae={finished_autoencoder}", "--unet=tiny", *steps]
            assert train(known[flags], *start, *flags, script=train_latent) == 0
        return known[flags]

    return run


# ---------------------------------------------------------------------------------------------------------- autoencoder


def test_an_autoencoder_learns_and_is_loaded_by_diffusers_alone(tmp_path):
    flags = ["--downsampling=2", "--max_train_steps=60", "--report_to=tensorboard", "--validation_steps=30"]
    flags += ["--dataset_split=train[:1500]", "--validation_split=train[1500:]", "--evaluate_steps=60"]
    flags += ["--features=pixels", "--num_evaluation_samples=20", "--label_column=label", "--random_flip"]
    assert train(tmp_path / "run", *flags, script=train_autoencoder) == 0
    losses = list(scalars(tmp_path / "run", "loss/train").values())
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    quality = scalars(tmp_path / "run", "metrics/psnr_held_out")
    assert list(quality) == [30, 60] and quality[60] > quality[30] > 5
    assert scalars(tmp_path / "run", "metrics/fd_pixels_N20")[60] > 0  # of reconstructions
    assert len(scalars(tmp_path / "run", "loss_per_label/3")) > 1
    for folder in ("run", "run/checkpoint-60", "run/best"):
        model = AutoencoderKL.from_pretrained(tmp_path / folder)
        images = torch.rand(3, 1, 8, 8) * 2 - 1
        with torch.no_grad():
            latents = model.encode(images).latent_dist.mode()
        assert latents.shape == (3, 4, 4, 4) and model.config["_class_name"] == "AutoencoderKL"
        assert model.config.scaling_factor > 0 and len(model.config.latents_std) == 4
    picture = np.asarray(Image.open(tmp_path / "run" / "samples.png"))
    assert picture.std() > 20


def test_the_card_of_an_autoencoder_has_code_that_runs(finished_autoencoder, monkeypatch):
    card = (finished_autoencoder / "README.md").read_text()
    assert "This model encodes 8 x 8 grey images" in card and "- autoencoder\n" in card and "2112.10752" in card
    code = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace(repr(finished_autoencoder.name), repr(str(finished_autoencoder))), names)
    assert names["images"].shape == (1, 1, 8, 8)


@pytest.mark.parametrize("data", ["digits", "own images"])
def test_pictures_of_an_autoencoder_are_pushed_only_for_public_images(tmp_path, finished_autoencoder, data):
    shutil.copytree(finished_autoencoder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    record["public_data"] = data
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(record))
    (tmp_path / "sent").mkdir()
    Hub(tmp_path / "run", "me/autoencoder")._fill(tmp_path / "sent")
    sent = {path.name for path in (tmp_path / "sent").iterdir()} - {"samples"}
    expected = {"config.json", FILE, "README.md", "training_args.json"}
    assert sent == expected | ({"samples.png"} if data == "digits" else set())


def test_training_starts_from_a_pretrained_autoencoder(tmp_path, finished_autoencoder):
    flags = [f"--pretrained_model_name_or_path={finished_autoencoder}", "--learning_rate=0", "--optimizer=adamw"]
    assert train(tmp_path / "run", *flags, "--resolution=12", script=train_autoencoder) == 0
    assert equal_weights(tmp_path / "run" / FILE, finished_autoencoder / FILE)
    with pytest.raises(UserError, match="--latent_channels 7: the pretrained autoencoder has 4"):
        train(tmp_path / "other", *flags, "--latent_channels=7", script=train_autoencoder)


def test_it_is_not_drawn_from_and_not_measured_like_a_model(tmp_path, finished_autoencoder):
    with pytest.raises(UserError, match="Expected a model of these scripts that draws"):
        exit_code(sample.main, sample.parse_args([str(finished_autoencoder), f"--output_dir={tmp_path}"]))
    flags = [str(finished_autoencoder), "--reference=digits", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match="Expected a model of these scripts that draws"):
        exit_code(evaluate.main, evaluate.parse_args(flags))


# -------------------------------------------------------------------------------------------------------------- latents


def data(accelerator, finished_autoencoder, *flags, own_images=None):
    args = parse("--output_dir=unused", *flags, script=train_latent)
    train_data = load_train_data(args, accelerator, own_images=own_images)
    space = Latents(choose_autoencoder(str(finished_autoencoder)), train_data.image_shape)
    train_data.encode_with(space)
    return train_data, space


@pytest.mark.parametrize("flags", [(), ("--random_flip",)], ids=["plain", "flipped"])
def test_cached_latents_are_those_of_the_images(accelerator, finished_autoencoder, flags):
    cached, space = data(accelerator, finished_autoencoder, *flags)
    plain, _ = data(accelerator, finished_autoencoder, *flags, "--cache_images=never", "--dataloader_num_workers=0")
    assert isinstance(cached.prepare(), LatentCache) and plain.prepare() is None
    mirrored = 0
    for batch, other in zip(cached.batches(range(3)), plain.batches(range(3)), strict=True):
        assert "images" not in batch and batch["latents"].shape == (8, 4, 4, 4)
        assert torch.allclose(batch["latents"], other["latents"], atol=1e-5)
        assert torch.equal(batch["labels"], other["labels"]) if "labels" in other else True
        mean, deviation = space.distribution(other["images"])
        drawn = (batch["latents"] - mean) / deviation
        assert 0.8 < drawn.std() < 1.2  # noise of deviation 1 around the mean
        unflipped = space.distribution(other["images"].flip(-1))[0].flip(-1)
        mirrored += (unflipped - mean).abs().max().item() > 1e-3
    assert mirrored == 3  # the latents of mirrored images differ from mirrored latents, which would fail above


def test_each_sample_draws_other_latents_and_a_resume_the_same(accelerator, finished_autoencoder):
    images = OwnImages(np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8))
    train_data, _ = data(accelerator, finished_autoencoder, own_images=images)
    first, second = (batch["latents"] for batch in train_data.batches([0, 1]))  # two epochs of the same eight images
    order = [np.argsort(batch.flatten(1).sum(1)) for batch in (first, second)]
    assert not torch.equal(first[order[0]], second[order[1]])
    (again,) = (batch["latents"] for batch in train_data.batches([1]))
    assert torch.equal(again, second)


def test_images_that_are_cropped_at_random_are_encoded_as_they_come(accelerator, finished_autoencoder, caplog):
    images = OwnImages(np.random.default_rng(0).integers(0, 255, (8, 8, 12), dtype=np.uint8))
    caplog.set_level("INFO")
    train_data, space = data(accelerator, finished_autoencoder, "--resolution=8", own_images=images)
    assert not isinstance(train_data.prepare(), LatentCache) and "--center_crop allows the cache" in caplog.text
    (batch,) = train_data.batches([0])
    mean, deviation = space.distribution(batch["images"])
    assert ((batch["latents"] - mean) / deviation).std() < 1.5
    flags = ["--resolution=8", "--center_crop"]
    train_data, _ = data(accelerator, finished_autoencoder, *flags, own_images=images)
    assert isinstance(train_data.prepare(), LatentCache)


def test_the_file_of_latents_is_found_again_and_belongs_to_its_autoencoder(
    accelerator, finished_autoencoder, tmp_path, caplog
):
    flags = [f"--cache_images={tmp_path}", "--random_flip", "--dataset_split=train[:40]"]
    caplog.set_level("INFO")
    first, space = data(accelerator, finished_autoencoder, *flags)
    (batch,) = first.batches([0])
    assert "The latents are kept in" in caplog.text
    second, _ = data(accelerator, finished_autoencoder, *flags)
    (again,) = second.batches([0])
    assert torch.equal(batch["latents"], again["latents"]) and "Using the latents in" in caplog.text
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    space.scale = 2.0
    scaled, _ = data(accelerator, finished_autoencoder, *flags)
    scaled.encode_with(space)
    (twice,) = scaled.batches([0])
    assert torch.allclose(twice["latents"], 2 * batch["latents"], atol=1e-5)
    space.autoencoder.quant_conv.bias.data += 1
    third, _ = data(accelerator, finished_autoencoder, *flags)
    third.encode_with(Latents(space.autoencoder, (1, 8, 8)))
    (other,) = third.batches([0])
    assert not torch.allclose(batch["latents"], other["latents"], atol=0.1)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3
    for file in tmp_path.glob("*/pixels"):
        assert file.stat().st_size == 40 * 2 * 2 * 4 * 4 * 4 * 4  # images, variants, mean and deviation, latents, bytes


# ------------------------------------------------------------------------------------------------------------- training


def ours(folder, scale=None, classes=None):
    """Draw what the stranger draws, with the functions of this project."""
    unet, own, space = load_pipeline(str(folder))
    noise = torch.randn(2, *space.shape, generator=torch.Generator().manual_seed(0))
    options = dict(noise=lambda ids: noise)
    if classes:
        unet = GuidedModel(unet, scale)
        options["model_inputs"] = lambda ids: {"class_labels": torch.tensor(classes)}
    samples = sample_batch(unet, own, np.arange(2), space.shape, 5, 0, torch.device("cpu"), **options)
    with torch.no_grad():
        return (space.decode(samples) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def test_a_stranger_draws_what_we_draw(tmp_path, latent_run):
    plain, conditional = latent_run(), latent_run("--class_conditional")
    cases = [
        ("LDMPipeline", plain, "batch_size=2", None),
        ("LDMPipeline", plain / "checkpoint-20", "batch_size=2", None),
        ("DiTPipeline", conditional, "[7, 3], guidance_scale=1", 1),
        ("DiTPipeline", conditional, "pipeline.get_label_ids(['7', '3']), guidance_scale=2", 2),
    ]
    calls = [
        f"draw({kind}, {str(folder)!r}, lambda pipeline, **options: pipeline({arguments}, **options))"
        for kind, folder, arguments, _ in cases
    ]
    result = subprocess.run(
        [sys.executable, "-c", STRANGER.format(calls=", ".join(calls))], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    for (_, folder, _, scale), drawn in zip(cases, np.load(tmp_path / "drawn.npy"), strict=True):
        expected = ours(folder, scale, [7, 3] if scale else None)
        assert np.abs(drawn - expected).max() < 1e-4 and drawn.std() > 0.05
    assert np.abs(ours(conditional, 2, [7, 3]) - ours(conditional, 1, [7, 3])).max() > 1e-2


def test_a_guided_model_of_latents_has_its_null_class_at_1000(latent_run):
    pipeline = DiTPipeline.from_pretrained(latent_run("--class_conditional"))
    assert pipeline.transformer.config.num_class_embeds == 1001
    assert pipeline.labels == {str(digit): digit for digit in range(10)}
    assert pipeline.vae.config.scaling_factor == 1 and not pipeline.vae.config.shift_factor
    card = (latent_run("--class_conditional") / "README.md").read_text()
    assert "pipeline.get_label_ids(['0', '1', '2', '3']), guidance_scale=1" in card


def test_latents_have_deviation_one_in_training(latent_run, accelerator, finished_autoencoder):
    train_data, _ = data(accelerator, finished_autoencoder)
    latents = torch.cat([batch["latents"] for batch in train_data.batches(range(40))])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(4), atol=0.2)
    # The saved config has no normalisation, because it is part of the weights
    assert LDMPipeline.from_pretrained(latent_run()).vqvae.config.latents_mean is None


def test_checkpoints_share_the_autoencoder(latent_run):
    first, second = (latent_run() / f"checkpoint-{step}" / "vqvae" / FILE for step in (18, 20))
    assert first.stat().st_ino == second.stat().st_ino
    assert not any(
        name.startswith("vqvae") for name in (path.name for path in first.parents[1].glob("training_state/*"))
    )


def test_a_run_does_not_resume_with_another_autoencoder(tmp_path, latent_run, finished_autoencoder):
    shutil.copytree(latent_run(), tmp_path / "run")
    other = shutil.copytree(finished_autoencoder, tmp_path / "autoencoder")
    flags = ["--unet=tiny", "--learning_rate=1e-2", "--max_train_steps=22", "--num_inference_steps=5"]
    assert train(tmp_path / "run", f"--vae={other}", *flags, script=train_latent) == 0  # the same one elsewhere
    model = AutoencoderKL.from_pretrained(other)
    model.quant_conv.bias.data += 0.1
    model.save_pretrained(other)
    for steps in (22, 24):  # a finished run, and one to resume
        flags[2] = f"--max_train_steps={steps}"
        with pytest.raises(UserError, match=r"autoencoder was '.*', is '"):
            train(tmp_path / "run", f"--vae={other}", *flags, script=train_latent)


def test_impossible_images_and_flags_are_refused(tmp_path, finished_autoencoder, latent_run):
    def refused(*flags, script=train_latent):
        with pytest.raises(UserError) as error:
            train(tmp_path / "run", "--unet=tiny", *flags, script=script)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return str(error.value)

    vae = f"--vae={finished_autoencoder}"
    assert "draw squares only. Give --resolution 8" in refused(vae, "--resolution=8x16")
    assert "halves their latents 2 times, so it needs multiples of 8. Try --resolution 16" in refused(
        vae, "--resolution=12"
    )
    assert "takes 1 channel" in refused(vae, "--image_mode=RGB")
    start = f"--pretrained_model_name_or_path={latent_run()}"
    with pytest.raises(UserError, match=r"has its own autoencoder\. Leave the flag out"):
        train(tmp_path / "run", vae, start, script=train_latent)
    assert train(tmp_path / "flow", "--unet=tiny", "--max_train_steps=1", script=train_flow) == 0
    with pytest.raises(UserError, match="this pipeline draws pixels"):
        train(tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path / 'flow'}", script=train_latent)


@pytest.mark.parametrize("flag", ["--guidance_scale=2", "--class_dropout_prob=0.2"])
def test_flags_of_classes_need_classes(capsys, flag):
    with pytest.raises(SystemExit):
        parse(flag, script=train_latent)
    assert f"{flag.partition('=')[0]} needs --class_conditional" in capsys.readouterr().err
    parse(flag, "--class_conditional", script=train_latent)


def test_all_parts_of_a_model_of_latents_are_pushed(tmp_path, latent_run):
    for name, flags, parts in (("a", (), ("unet", "vqvae")), ("b", ("--class_conditional",), ("transformer", "vae"))):
        (tmp_path / name).mkdir()
        Hub(latent_run(*flags), "me/latent")._fill(tmp_path / name)
        sent = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*") if path.is_file()}
        expected = {f"{part}/{file}" for part in parts for file in ("config.json", FILE)}
        expected |= {"README.md", "model_index.json", "scheduler/scheduler_config.json", "training_args.json"}
        assert sent == expected | {"samples.png"}
        assert "outputs" not in json.loads((tmp_path / name / "training_args.json").read_text())["arguments"].get(
            "vae", ""
        )


def test_the_message_about_classes_names_the_flag(tmp_path, latent_run):
    start = f"--pretrained_model_name_or_path={latent_run('--class_conditional')}"
    with pytest.raises(UserError, match=r"takes class labels.*For this model use train_latent\.py --class_conditional"):
        train(tmp_path / "run", start, script=train_latent)


def test_training_continues_from_a_pipeline_of_latents(tmp_path, latent_run):
    base = latent_run("--class_conditional")
    flags = [f"--pretrained_model_name_or_path={base}", "--learning_rate=0", "--max_train_steps=2"]
    flags += ["--class_conditional", "--num_samples=10"]
    assert train(tmp_path / "run", *flags, script=train_latent) == 0
    assert equal_weights(tmp_path / "run" / "transformer" / FILE, base / "transformer" / FILE)
    assert equal_weights(tmp_path / "run" / "vae" / FILE, base / "vae" / FILE)


# --------------------------------------------------------------------------------------------------- the other scripts


@pytest.mark.parametrize("method", [slow("full"), "lora"])
def test_a_model_of_latents_is_adapted(tmp_path, latent_run, method):
    base = latent_run()
    flags = [f"--pretrained_model_name_or_path={base}", f"--method={method}", "--learning_rate=1e-2", "--random_flip"]
    flags += ["--guidance_color=white", "--num_inference_steps=5", "--validation_split=train[1500:]"]
    flags += ["--dataset_split=train[:1500]"]
    assert train(tmp_path / "run", *flags, script=finetune_faces) == 0
    assert not equal_weights(tmp_path / "run" / "unet" / FILE, base / "unet" / FILE)
    assert equal_weights(tmp_path / "run" / "vqvae" / FILE, base / "vqvae" / FILE)
    pipeline = LDMPipeline.from_pretrained(tmp_path / "run")
    assert np.asarray(pipeline(num_inference_steps=3).images[0]).shape == (8, 8)
    assert {"samples.png", "guided.png", "nearest.png", "before_after.png"} <= {p.name for p in tmp_path.glob("run/*")}
    with pytest.raises(UserError, match="--sampler ddpm: the model was trained on straight paths"):
        train(tmp_path / "other", *flags, "--sampler=ddpm", script=finetune_faces)


def test_a_model_of_straight_paths_in_pixels_is_adapted(tmp_path):
    assert train(tmp_path / "base", "--unet=tiny", script=train_flow) == 0
    flags = [f"--pretrained_model_name_or_path={tmp_path / 'base'}", "--learning_rate=1e-2"]
    assert train(tmp_path / "run", *flags, script=finetune_faces) == 0
    scheduler = json.loads((tmp_path / "run" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["use_flow_sigmas"] and scheduler["prediction_type"] == "flow_prediction"


def test_samples_of_classes_are_drawn_interpolated_and_measured(tmp_path, latent_run):
    folder = str(latent_run("--class_conditional"))
    for name, flags in {
        "classes": ["--class_labels=7,3", "--guidance_scale=2", "--gif"],
        "between": ["--interpolate", "0", "1", "--class_labels=7,3"],
        "coloured": ["--guidance_color=white"],
    }.items():
        flags = [folder, "--num_samples=4", "--num_inference_steps=3", f"--output_dir={tmp_path / name}", *flags]
        assert exit_code(sample.main, sample.parse_args(flags)) == 0
        assert Image.open(tmp_path / name / "images" / "000000.png").size == (8, 8)
    flags = ["--reference=digits", "--features=pixels", "--num_samples=20", "--num_inference_steps=2"]
    flags += ["--validation_loss", "--num_validation_images=8", f"--output_dir={tmp_path}"]
    assert exit_code(evaluate.main, evaluate.parse_args([folder, *flags])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = [row for row in results["results"] if row["model"].startswith(Path(folder).name)]
    assert row["N"] == 20 and row["weights"]


def test_a_model_of_latents_is_not_distilled(tmp_path, latent_run):
    with pytest.raises(UserError, match="this pipeline also has vqvae"):
        train(tmp_path, f"--pretrained_model_name_or_path={latent_run()}", script=distill_few_steps)
