"""evaluate.py: floors, ceilings, copies, and clear errors."""

import itertools
import json
import shutil
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from conftest import exit_code
from diffusers import DDPMPipeline
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
from utils import UserError
from utils.evaluation.class_statistics import digit_probabilities, digit_statistics
from utils.evaluation.features import DIGITS_WEIGHTS, load_extractor
from utils.evaluation.sweep import best_setting, plot_sweep

REAL = ["--reference=digits", "--reference_split=train[:900]", "--held_out_split=train[900:]"]


def run(output_dir, *flags):
    args = evaluate.parse_args([f"--output_dir={output_dir}", "--num_samples=300", *REAL, *map(str, flags)])
    assert exit_code(evaluate.main, args) == 0
    results = json.loads((output_dir / "results.json").read_text())
    return {row["model"]: row for row in results["results"]}, results


@pytest.fixture(scope="module")
def digits():
    return np.rint(load_digits().images * (255 / 16)).astype(np.uint8)


@pytest.fixture(scope="module")
def copies(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    for k, image in enumerate(digits[:300]):
        Image.fromarray(image).save(folder / f"{k:04}.png")
    return folder


def test_the_table_ranks_models_between_floor_and_ceiling(tmp_path, finished_run, copies, capsys):
    rows, facts = run(tmp_path / "out", finished_run, copies, "--num_inference_steps=2")
    floor, ceiling = rows["floor: held-out images"], rows["noise, for comparison"]
    model, copied = rows[finished_run.name], rows[str(copies)]
    assert copied["fd_digits"] < floor["fd_digits"] < model["fd_digits"] < 1.5 * ceiling["fd_digits"]
    assert ceiling["fd_digits"] > 5 * floor["fd_digits"]
    for row in rows.values():
        assert row["N"] == 300 and row["fd_digits_error"] > 0
        assert all(0 <= row[key] <= 1 for key in ("precision", "recall", "coverage", "copies", "confidence"))
    assert ceiling["coverage"] < 0.1 < floor["coverage"]
    assert model["sampler"] == "DPMSolverMultistepScheduler" and model["steps"] == 2 and model["images_per_second"] > 0
    assert (
        facts["features"] == "digits"
        and len(facts["features_hash"]) == 12
        and facts["reference_split"] == "train[:900]"
    )
    said = capsys.readouterr().out
    assert "about 0." in said and "| floor: held-out images  " in said and " ± " in said
    assert "|------" in said and (tmp_path / "out" / "results.md").is_file()
    for name in ("samples.png", "nearest.png"):
        assert Image.open(tmp_path / "out" / name).width > 8 * 64


def test_samples_survive_a_stop_and_a_mistake(tmp_path, finished_run, capsys, monkeypatch):
    """Samples are saved in blocks, and do not depend on the process that draws them."""
    from utils.evaluation import kept_samples, models

    monkeypatch.setattr(kept_samples, "BLOCK", 10)
    original, drawn = models.sample_images, []

    def stopped(*arguments, first, **options):
        if first == 20 and len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(first)
        return original(*arguments, first=first, **options)

    monkeypatch.setattr(models, "sample_images", stopped)
    flags = [finished_run, "--num_inference_steps=1", "--num_samples=30", "--sample_batch_size=10", "--features=pixels"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *flags)
    drawn.append("stopped")
    again, _ = run(tmp_path / "out", *flags)
    assert drawn == [0, 10, "stopped", 20] and "10 of 30 images. The others are kept" in capsys.readouterr().out
    digits, _ = run(tmp_path / "out", *flags, "--features=digits")  # the samples are not drawn again
    assert len(drawn) == 4 and "1 steps: kept in" in capsys.readouterr().out
    assert digits[finished_run.name]["images_per_second"] == again[finished_run.name]["images_per_second"] > 0
    whole, _ = run(tmp_path / "other", *flags)
    assert whole[finished_run.name]["fd_pixels"] == again[finished_run.name]["fd_pixels"]
    for changed in ("--sampler=unipc", "--mixed_precision=bf16"):
        drawn.clear()
        run(tmp_path / "out", *flags, changed, "--num_samples=10")
        assert drawn == [0], changed
    next((tmp_path / "other").rglob("0000010-0000020.npz")).write_bytes(b"PK")
    drawn.clear()
    run(tmp_path / "other", *flags)
    assert drawn == [10]


@pytest.mark.slow
def test_samples_are_found_again_by_another_process(tmp_path, finished_run):
    """The order of sets differs between processes."""
    flags = [
        finished_run,
        "--num_inference_steps=1",
        "--num_samples=30",
        "--sampler=ddim",
        f"--output_dir={tmp_path}",
        *REAL,
    ]
    for said_then in ("about 0", "1 steps: kept in"):
        code, said = children.run(Path(evaluate.__file__), *flags)
        assert code == 0 and said_then in said, said


def test_copies_of_training_images_are_flagged_and_held_out_ones_are_not(tmp_path, copies):
    rows, _ = run(tmp_path / "out", copies, "--features=pixels")
    assert rows[str(copies)]["copies"] > 0.95
    assert rows["floor: held-out images"]["copies"] < 0.05
    assert rows["noise, for comparison"]["copies"] < 0.2


def test_another_split_than_trained_on_is_reported(tmp_path, finished_run, capsys):
    run(tmp_path / "out", finished_run, "--num_inference_steps=1", "--features=pixels")
    assert "was trained on train, not on --reference_split train[:900]" in capsys.readouterr().out


def test_too_few_images_are_reported(tmp_path, copies, capsys):
    run(tmp_path / "out", copies, "--num_samples=100")
    assert "100 images for 64 features. fd is reliable only with at least twice as many" in capsys.readouterr().out


@pytest.fixture(scope="module")
def held_out(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    for k, image in enumerate(digits[900:1350]):
        Image.fromarray(image).save(folder / f"{k:04}.png")
    return folder


def test_a_folder_of_held_out_images_is_not_flagged(tmp_path, held_out, copies):
    """The digits in the folder are not those that set the threshold."""
    rows, _ = run(tmp_path / "out", held_out, copies, "--held_out_split=train[1350:]")
    assert rows[str(held_out)]["copies"] < 0.1 < 0.95 < rows[str(copies)]["copies"]
    assert rows[str(held_out)]["fd_digits"] < 0.1 * rows["noise, for comparison"]["fd_digits"]


def test_a_sweep_has_a_row_for_each_setting(tmp_path, finished_run):
    rows, _ = run(tmp_path / "out", finished_run, "--features=pixels", "--sweep", "ddim:1,2", "unipc:2")
    name = finished_run.name
    assert {f"{name} ddim 1", f"{name} ddim 2", f"{name} unipc 2"} <= set(rows)
    assert rows[f"{name} unipc 2"]["sampler"] == "UniPCMultistepScheduler" and "fd_pixels" in rows[f"{name} unipc 2"]


def test_models_of_one_name_are_told_apart(tmp_path, finished_run):
    first, second = (shutil.copytree(finished_run, tmp_path / run / "best") for run in ("one", "two"))
    rows, _ = run(tmp_path / "out", first, second, finished_run, "--num_inference_steps=1")
    assert list(rows)[1:-1] == [str(first), str(second), finished_run.name]


def test_a_line_of_the_sweep_is_one_sampler_at_one_scale():
    rows = [dict(model="floor: held-out images", N=10, fd_digits=1.0)]
    for name, steps, scale in itertools.product(["ddim", "ddpm"], [10, 20], [1, 2]):
        rows.append(
            dict(model=f"a 10 {name} {steps} guidance {scale}", steps=steps, fd_digits=2.0, fd_digits_error=0.1)
        )
    lines = plot_sweep(rows).axes[0].get_legend_handles_labels()[1]
    assert lines[1:] == [f"a 10 {name} guidance {scale}" for name in ("ddim", "ddpm") for scale in (1, 2)]


def test_the_best_of_a_sweep_goes_into_the_pipeline(tmp_path, finished_run, capsys):
    model = tmp_path / "model"
    shutil.copytree(finished_run, model)
    rows, _ = run(tmp_path / "out", model, "--write_best", "--sweep", "ddpm:1", "ddim:2,8", "--num_samples=150")
    assert Image.open(tmp_path / "out" / "sweep.png").width == 840
    tried = [row for row in rows.values() if "steps" in row]
    best = min(tried, key=lambda row: row["fd_digits"])
    near = [row for row in tried if row["fd_digits"] <= best["fd_digits"] + best["fd_digits_error"]]
    chosen = min(near, key=lambda row: row["steps"])
    pipeline = DDPMPipeline.from_pretrained(model, use_safetensors=True)
    assert type(pipeline.scheduler).__name__ == chosen["sampler"]
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert f"now has the scheduler {chosen['sampler']}" in capsys.readouterr().out
    card = (model / "README.md").read_text()
    assert f"num_inference_steps={chosen['steps']}" in card and f"saved scheduler is `{chosen['sampler']}`" in card
    assert not list(model.rglob("*.tmp"))


@pytest.mark.parametrize(
    "kind, message", [("checkpoint-6", "is a checkpoint"), ("nowhere", "is not a folder with a pipeline")]
)
def test_a_pipeline_that_must_stay_is_not_written_to(tmp_path, finished_run, kind, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", finished_run / kind, "--write_best", "--sweep", "ddim:2")
    with pytest.raises(SystemExit):
        evaluate.parse_args(["x", "--reference=digits", "--write_best"])
    with pytest.raises(SystemExit):
        evaluate.parse_args(["x", "--reference=digits", "--write_best", "--sweep", "unipc:2"])
    for flags in (["--sweep", "ddim:²"], ["--sweep", "ddim:2", "--sampler=ddpm"]):
        with pytest.raises(SystemExit):
            evaluate.parse_args(["x", "--reference=digits", *flags])


def test_the_best_setting_is_the_cheapest_within_the_error():
    def row(steps, fd):
        return dict(steps=steps, fd_digits=fd, fd_digits_error=0.5)

    tried = [("a", row(100, 3.0)), ("b", row(20, 3.4)), ("c", row(10, 3.6))]
    assert best_setting(tried) == ("b", 20)


def test_the_denoising_loss_of_both_splits(tmp_path, finished_run):
    _, facts = run(tmp_path / "out", finished_run, "--features=pixels", "--num_inference_steps=1", "--validation_loss")
    trained, held_out = facts["denoising_losses"]
    assert trained["images"] == "train[:900]" and held_out["images"] == "train[900:]"
    for row in (trained, held_out):
        levels = [row[f"{k}-{k + 249}"] for k in (0, 250, 500, 750)]
        assert row["loss"] == pytest.approx(np.mean(levels)) and min(levels) > 0
    assert trained["loss"] == pytest.approx(held_out["loss"], rel=0.2)
    assert "Denoising loss on fixed" in (tmp_path / "out" / "results.md").read_text()


def test_the_digit_net_recognises_digits(digits):
    assert DIGITS_WEIGHTS.stat().st_size < 600_000
    card = DIGITS_WEIGHTS.with_suffix(".md").read_text()
    assert load_extractor("digits").hash in card
    assert float(card.split("It classifies ")[1].split("%")[0]) >= 99.3
    statistics = digit_statistics(digit_probabilities(digits[:, None]))  # not MNIST, but 8x8 digits
    assert statistics["confidence"] > 0.8 and statistics["class_distance"] < 0.05
    images = np.random.default_rng(0).integers(0, 255, (300, 1, 28, 28), dtype=np.uint8)
    noise = digit_statistics(digit_probabilities(images))
    assert noise["class_distance"] > 0.3


def test_features_do_not_depend_on_the_batch(digits):
    extractor = load_extractor("digits")
    whole = extractor(digits[:40, None])
    assert whole.shape == (40, 64) and whole.dtype == np.float32
    assert np.allclose(whole[7:9], extractor(digits[7:9, None]), atol=1e-4)


def test_transformers_features(tmp_path, digits):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    features = load_extractor(f"dinov2={tmp_path}")(digits[:3, None])
    assert features.shape == (3, 32) and features.std() > 0


@pytest.mark.parametrize(
    "name, message", [("inception", "needs torch-fidelity"), ("dinov2=./no", "--features dinov2: ./no")]
)
def test_missing_features_are_refused_with_advice(name, message):
    with pytest.raises(UserError, match=message):
        load_extractor(name)


def test_wrong_input_is_refused_with_advice(tmp_path, capsys):
    (tmp_path / "mixed").mkdir()
    with pytest.raises(UserError, match="it holds no image files"):
        run(tmp_path / "out", tmp_path / "mixed")
    for k in range(8, 14):
        Image.new("L", (max(9, k), 9)).save(tmp_path / "mixed" / f"{k}.png")
    with pytest.raises(
        UserError, match=r"images of 5 sizes, such as \(9, 9\) and \(10, 9\)\. Expected one size\. Give --resolution"
    ):
        run(tmp_path / "out", tmp_path / "mixed")
    few = shutil.copytree(tmp_path / "mixed", tmp_path / "few")
    for k in range(9, 14):
        (few / f"{k}.png").unlink()
    with pytest.raises(UserError, match=r"few: 1 images\. Expected at least 6"):
        run(tmp_path / "out", few)
    splits = ["--reference_split=train[:1]", "--held_out_split=train[1:]"]
    with pytest.raises(UserError, match=r"mixed, train\[:1\]: 1 images\. Expected at least 6"):
        run(tmp_path / "out", few, f"--reference={tmp_path / 'mixed'}", *splits)
    with pytest.raises(
        UserError, match=r"--held_out_split train\[800:\] shares images with --reference_split train\[:900\]"
    ):
        run(tmp_path / "out", few, "--held_out_split=train[800:]")
    with pytest.raises(UserError, match="--held_out_split test: digits has the one split train"):
        run(tmp_path / "out", tmp_path / "mixed", "--held_out_split=test")
    with pytest.raises(SystemExit):
        evaluate.parse_args(["x", "--reference=digits", "--sweep", "ddim:ten"])
    assert "--sweep ddim:ten: expected SAMPLER:STEPS,STEPS" in capsys.readouterr().err


def test_without_a_held_out_split_some_are_taken_away_or_none(tmp_path, copies, held_out, capsys):
    def evaluate_by(reference, name):
        flags = [str(copies), f"--reference={reference}", f"--output_dir={tmp_path / name}", "--features=pixels"]
        assert exit_code(evaluate.main, evaluate.parse_args([*flags, "--num_samples=30"])) == 0
        return json.loads((tmp_path / name / "results.json").read_text())

    found = evaluate_by(held_out, "tenth")
    held_out_images = len([*held_out.iterdir()])
    assert found["public_reference"] == "own images"
    assert found["held_out_split"] == "30 of train" and found["results"][0]["N"] == 30  # as many as samples
    assert f"30 of its {held_out_images} images are held out" in capsys.readouterr().err
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(held_out.iterdir())[:20]:
        shutil.copy(path, few)
    found, (said, warned) = evaluate_by(few, "none"), capsys.readouterr()
    assert found["held_out_split"] is None and "too few to hold some out" in warned
    assert [row["model"] for row in found["results"]] == [str(copies), "noise, for comparison"]
    # Nothing is held out, and pixels have no precision
    assert not {"copies", "precision", "density"} & set(found["results"][0])
    assert "| model " in said and "features_hash" in said and "All columns are in results.md" in said
