"""train_conditional.py and its tools: classes, guidance, two ways to load the result, labels of many kinds."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_weights, events, exit_code, interrupt, parse, scalars, train
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, UNet2DModel
from PIL import Image
from sklearn.datasets import load_digits

import evaluate
import sample
import train_conditional
import train_latent
from utils import UserError
from utils.data.train_data import load_train_data
from utils.diffusion.class_conditional import class_numbers, guided_output
from utils.diffusion.classes import GuidedModel, add_class_embedding, cycle_labels, group_by_class
from utils.diffusion.sampling import sample_images
from utils.diffusion.schedulers import make_sampler
from utils.evaluation.class_statistics import asked_classes
from utils.pictures import make_grid

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NAMES = [str(k) for k in range(10)]


def run(folder, *flags):
    return train(folder, "--unet=tiny", *flags, script=train_conditional)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run; do not change it."""
    folder = tmp_path_factory.mktemp("conditional") / "run"
    flags = ["--report_to=tensorboard", "--num_samples=20", "--sample_steps=2", "--logging_steps=2"]
    flags += ["--dataset_split=train[:1500]", "--validation_split=train[1500:]", "--validation_steps=3"]
    flags += ["--learning_rate=0.03"]  # at first a class changes nothing
    assert run(folder, *flags) == 0
    return folder


# ------------------------------------------------------------------------------------------------------ files of a run


def test_the_grid_has_a_row_for_each_class_and_the_curves_their_losses(finished):
    assert Image.open(finished / "samples.png").height == 10 * 68 + 4 + 24
    tags = set(events(finished).Tags()["scalars"])
    assert {f"loss_per_label/{name}" for name in NAMES} <= tags
    assert [picture.step for picture in events(finished).Images("samples")] == [2, 4, 6]
    assert list(scalars(finished, "loss/validation_held_out")) == [3, 6]


def test_one_folder_loads_with_diffusers_alone_and_with_its_own_file(finished):
    def drawn(pipeline, *arguments, **options):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipeline(*arguments, num_inference_steps=3, generator=generator, output_type="np", **options).images

    stock = drawn(ConsistencyModelPipeline.from_pretrained(finished), 3, class_labels=[7, 3, 7])
    own = DiffusionPipeline.from_pretrained(finished, custom_pipeline=str(finished), trust_remote_code=True)
    assert np.array_equal(stock, drawn(own, ["7", 3, 7]))
    assert not np.allclose(stock, drawn(own, ["7", 3, 7], guidance_scale=2.0), atol=1e-3)
    assert not np.allclose(stock[0], drawn(own, ["7", 3, 7], guidance_scale=0.0)[0], atol=1e-4)
    with pytest.raises(ValueError, match=r"no class 'eleven'\. Expected a number from 0 to 9, or one of 0, 1, 2"):
        own(["eleven"])


def test_checkpoints_and_card(finished):
    for folder in (finished, finished / "checkpoint-6"):
        assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "ConsistencyModelPipeline"
        assert "class ClassConditionalPipeline" in (folder / "pipeline.py").read_text()
        assert UNet2DModel.load_config(folder / "unet")["_class_names"] == NAMES
    card = (finished / "README.md").read_text()
    assert "It has 10 classes" in card and "class_labels=[0, 1, 2, 3]" in card
    assert "guidance_scale=1.5" in card and "`pipeline.py`" in card and str(finished) not in card


def test_a_stream_of_a_folder_of_folders_resumes_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(30):
        path = tmp_path / "images" / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(path)
    flags = [f"--train_data_dir={tmp_path / 'images'}", "--streaming"]
    for name in ("straight", "cut"):
        assert train(tmp_path / name, "--unet=tiny", "--num_samples=6", *flags, script=train_conditional) == 0
    assert UNet2DModel.load_config(tmp_path / "cut" / "unet")["_class_names"] == ["a", "b", "c"]
    interrupt(tmp_path / "cut", "checkpoint-3")
    assert train(tmp_path / "cut", "--unet=tiny", "--num_samples=6", *flags, script=train_conditional) == 0
    assert equal_weights(tmp_path / "straight" / WEIGHTS, tmp_path / "cut" / WEIGHTS)


def test_labels_are_dropped_by_sample_id_and_nothing_else_changes(tmp_path, monkeypatch):
    told, original = {}, UNet2DModel.forward

    def forward(self, images, timesteps, class_labels=None, **options):
        if self.training:
            told.setdefault(share, []).append((images.clone(), class_labels.clone()))
        return original(self, images, timesteps, class_labels, **options)

    monkeypatch.setattr(UNet2DModel, "forward", forward)
    for share in (0.0, 0.3, 1.0):
        flags = ["--train_batch_size=200", "--max_train_steps=3", "--model_guidance=0"]
        run(tmp_path / str(share), f"--class_dropout_prob={share}", *flags)
    for one, other in zip(told[0.0], told[0.3], strict=True):
        assert torch.equal(one[0], other[0])
        kept = other[1] < 10
        assert torch.equal(one[1][kept], other[1][kept]) and 0.2 < 1 - kept.float().mean() < 0.4
    assert all((labels < 10).all() for _, labels in told[0.0]) and all((labels == 10).all() for _, labels in told[1.0])


@pytest.mark.parametrize(
    "script, flags",
    [(train_conditional, []), (train_conditional, ["--model_guidance=0", "--guidance_scale=2"]),
     (train_latent, ["--class_conditional", "--guidance_scale=2"])],
)  # fmt: skip
def test_guidance_without_a_trained_null_class_is_refused(capsys, script, flags):
    with pytest.raises(SystemExit):
        script.parse_args([*flags, "--class_dropout_prob=0"])
    assert "--class_dropout_prob 0 trains no null class" in capsys.readouterr().err
    script.parse_args([*flags, "--class_dropout_prob=0", "--pretrained_model_name_or_path=x"])


# ------------------------------------------------------------------------------------------------------------- guidance


def test_model_guidance_moves_the_conditional_target_away_from_the_unconditional_output(tmp_path, monkeypatch):
    seen, mse_loss, forward = {}, F.mse_loss, UNet2DModel.forward

    def spy_loss(output, target, **options):
        seen.setdefault(weight, []).append((output.detach(), target))
        return mse_loss(output, target, **options)

    def spy_forward(self, images, timesteps, class_labels=None, **options):
        if self.training:
            seen.setdefault("labels", []).append((class_labels.clone(), torch.is_grad_enabled()))
        return forward(self, images, timesteps, class_labels, **options)

    monkeypatch.setattr(F, "mse_loss", spy_loss)
    monkeypatch.setattr(UNet2DModel, "forward", spy_forward)
    monkeypatch.setattr(
        "utils.diffusion.pretrained.zero_init", lambda unet: unet
    )  # a zero-initialized UNet would have the same output for all classes
    for weight in (0.0, 0.4):
        seen["labels"] = []
        flags = ["--max_train_steps=1", "--train_batch_size=64", "--class_dropout_prob=0.5"]
        run(tmp_path / str(weight), *flags, f"--model_guidance={weight}")
    (labels, gradient), (unsaid, none) = seen["labels"]
    assert gradient and not none and (unsaid == 10).all()
    (output, target), (same, plain) = seen[0.4][0], seen[0.0][0]
    assert torch.equal(output, same)
    moved = (target - plain).flatten(1).abs().amax(1)
    assert (moved[labels == 10] < 1e-6).all() and (moved[labels < 10] > 1e-6).all()
    without = (target - plain) / -0.4 + output  # the unconditional output, for every image
    nothing_said = labels == 10
    assert torch.allclose(without[nothing_said], output[nothing_said], atol=1e-5)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        num_class_embeds=11,
    )  # fmt: skip
    model.register_to_config(_class_names=[str(k) for k in range(10)])
    return model.eval()


def test_the_scale_is_exact_where_it_is_one_call(unet):
    noisy, timesteps, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999]), torch.tensor([7, 3, 0, 9])
    with torch.no_grad():
        conditional = unet(noisy, timesteps, labels).sample
        without = unet(noisy, timesteps, torch.full((4,), 10)).sample
        assert torch.equal(guided_output(unet, noisy, timesteps, labels, 1.0, 10), conditional)
        assert torch.equal(guided_output(unet, noisy, timesteps, labels, 0.0, 10), without)
        guided = guided_output(unet, noisy, timesteps, labels, 2.5, 10)
    assert torch.allclose(guided, without + 2.5 * (conditional - without), atol=1e-5)
    assert not torch.equal(conditional, without)


def test_image_k_does_not_depend_on_the_batch(unet, accelerator):
    from diffusers import DDPMScheduler

    model = GuidedModel(unet, 2.0)
    sampler = make_sampler("dpmsolver++", DDPMScheduler(prediction_type="v_prediction"))
    inputs = cycle_labels([7, 3, 1], "cpu")
    drawn = [
        sample_images(model, sampler, accelerator, 7, (1, 8, 8), 3, size, 0, model_inputs=inputs) for size in (2, 7)
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert not model.training


def test_rows_by_class():
    images = np.arange(12, dtype=np.uint8).reshape(12, 1, 1, 1)
    rows, captions = group_by_class(images[:11], ["a", "b", "c"])
    assert rows.ravel().tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8] and captions == ["a", "b", "c"]
    assert group_by_class(images[:2], ["a", "b", "c"])[1] == ["a", "b"]


def test_an_unconditional_model_gets_classes_and_draws_what_it_drew(finished_run, tmp_path):
    plain = UNet2DModel.from_pretrained(finished_run, subfolder="unet").eval()
    noisy, timesteps = torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 990])
    with torch.no_grad():
        before = plain(noisy, timesteps).sample
        after = add_class_embedding(plain, NAMES)(noisy, timesteps, torch.tensor([0, 5, 10])).sample
    assert torch.equal(before, after)
    flags = [f"--pretrained_model_name_or_path={finished_run}", "--max_train_steps=2"]
    assert train(tmp_path / "run", *flags, script=train_conditional) == 0
    again = [f"--pretrained_model_name_or_path={tmp_path}/run", "--max_train_steps=2"]
    assert train(tmp_path / "again", *again, script=train_conditional) == 0
    faces = [*again, "--dataset_name=faces", "--image_mode=L"]
    with pytest.raises(UserError, match=r"has 10 classes .*, but none of the classes of the images \(face\)"):
        train(tmp_path / "faces", *faces, script=train_conditional)


# --------------------------------------------------------------------------------------------------------------- labels


def table(tmp_path, labels, feature=None):
    """Write a parquet file of small images with these labels."""
    images = [Image.new("L", (8, 8), 10 * k) for k in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), "kind": feature or datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "kind": labels}, features=features).to_parquet(tmp_path / "x.parquet")
    return f"--dataset_name={tmp_path}/x.parquet"


@pytest.mark.parametrize(
    "labels, kind, names, expected",
    [
        (["dog", "cat", "dog", None] * 3, "string", ["cat", "dog"], [1, 0, 1, -1]),
        ([20, 3, 100, 3] * 3, "int64", ["3", "20", "100"], [1, 0, 2, 0]),
        ([1, 0, -1, 1] * 3, "int32", ["0", "1"], [1, 0, -1, 1]),
    ],
)
def test_integers_and_strings_become_classes(accelerator, tmp_path, labels, kind, names, expected):
    flags = [table(tmp_path, labels, datasets.Value(kind)), "--label_column=kind", "--train_batch_size=4"]
    data = load_train_data(parse(*flags), accelerator, conditional=True)
    assert data.label_names == names
    batch = next(data.batches(range(0, 1)))
    shown = ((batch["images"][:, 0, 0, 0] + 1) * 127.5 / 10).round().long()  # index of each image
    assert batch["labels"].tolist() == [expected[k % 4] for k in shown]


@pytest.mark.parametrize(
    "make, flags, message",
    [
        (lambda t: table(t, ["a"] * 9), [], "has no columns of class labels. Name one with --label_column"),
        (lambda t: table(t, ["a"] * 9), ["--label_column=sort"], "--label_column sort: not a column of class"),
    ],
)
def test_labels_that_cannot_be_learned_are_refused(tmp_path, make, flags, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", make(tmp_path), *flags)


def test_a_folder_of_folders_has_their_names_as_classes(tmp_path):
    for kind in ("cats", "dogs"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for k in range(5):
            Image.new("L", (8, 8), 20 * k).save(tmp_path / "images" / kind / f"{k}.png")
    assert run(tmp_path / "run", f"--train_data_dir={tmp_path}/images", "--max_train_steps=1") == 0
    assert UNet2DModel.load_config(tmp_path / "run" / "unet")["_class_names"] == ["cats", "dogs"]


def test_class_numbers():
    config = {"num_class_embeds": 4, "_class_names": ["cat", "dog", "7"]}
    assert class_numbers(["dog", "0", 1, " 7"], config) == [1, 0, 1, 2]
    for wrong in ("3", "-1", "bird", ""):
        with pytest.raises(ValueError, match="Expected a number from 0 to 2, or one of cat, dog, 7"):
            class_numbers([wrong], config)
    config = {"num_class_embeds": 4, "_class_names": ["1", "2", "3"]}  # names of classes before their numbers
    assert class_numbers(["1", 1, 0, np.int64(2), "3"], config) == [0, 1, 0, 2, 2]
    with pytest.raises(ValueError, match="there is no class '0'"):
        class_numbers(["0"], config)


# ---------------------------------------------------------------------------------------------------------------- tools


def drawn(model, folder, *flags):
    args = sample.parse_args([str(model), f"--output_dir={folder}", "--num_inference_steps=2", *flags])
    code = exit_code(sample.main, args)
    return code, np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))])


def test_sample_draws_what_is_asked_for(finished, tmp_path):
    code, all_classes = drawn(finished, tmp_path / "all", "--num_samples=20")
    assert code == 0 and Image.open(tmp_path / "all" / "grid.png").height == 10 * 68 + 4
    code, sevens = drawn(finished, tmp_path / "sevens", "--num_samples=8", "--class_labels=7")
    assert code == 0 and np.array_equal(sevens[7], all_classes[7]) and not np.array_equal(sevens[1], all_classes[1])
    code, guided = drawn(
        finished, tmp_path / "guided", "--num_samples=8", "--class_labels=7", "--guidance_scale=3", "--gif"
    )
    assert code == 0 and not np.array_equal(guided, sevens) and (tmp_path / "guided" / "walk.gif").is_file()


def test_classes_are_interpolated_at_fixed_noise(finished, tmp_path):
    _, plain = drawn(finished, tmp_path / "plain", "--num_samples=2", "--class_labels=3,8")
    _, walk = drawn(finished, tmp_path / "walk", "--num_samples=5", "--class_labels=3,8,1", "--interpolate", "0", "0")
    _, ends = drawn(finished, tmp_path / "ends", "--num_samples=1", "--class_labels=3")
    assert np.array_equal(walk[0], ends[0]) and np.array_equal(walk[0], plain[0])
    assert all(not np.array_equal(walk[k], walk[k + 1]) for k in range(4))
    _, eight = drawn(finished, tmp_path / "eight", "--num_samples=2", "--class_labels=8,8", "--interpolate", "0", "0")
    assert np.array_equal(walk[2], eight[0]) and np.array_equal(eight[0], eight[1])
    guided = ["--num_samples=2", "--class_labels=3,8", "--interpolate", "0", "1", "--guidance_scale=2"]
    assert drawn(finished, tmp_path / "guided", *guided)[0] == 0
    _, many = drawn(finished, tmp_path / "many", "--num_samples=20", "--interpolate", "0", "1")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "many" / "grid.png")), np.asarray(make_grid(many[:, None])))


@pytest.mark.parametrize("label", ["eleven", "10", "-1"])
def test_a_class_that_is_not_there_is_refused_with_those_that_are(finished, tmp_path, label):
    with pytest.raises(UserError, match=rf"--class_labels {label}: .* from 0 to 9, or one of 0, 1, 2, 3"):
        sample.main(sample.parse_args([str(finished), f"--output_dir={tmp_path}", f"--class_labels={label}"]))


def test_classes_of_an_unconditional_model_are_refused(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"this model is unconditional\. Leave the flag out"):
        sample.main(sample.parse_args([str(finished_run), f"--output_dir={tmp_path}", "--class_labels=7"]))


def test_a_reference_with_hidden_labels_asks_for_all_classes_equally():
    labelled = (np.zeros((5, 2)), np.full(5, -1), NAMES)
    real = SimpleNamespace(labels=lambda: (None, NAMES), labelled=lambda *given: labelled, images=lambda split: [0] * 5)
    real.args = SimpleNamespace(reference_split="test")
    assert np.bincount(asked_classes(NAMES, real, None, None, 25).labels).tolist() == [3] * 5 + [2] * 5


def test_evaluate_asks_for_the_classes_of_the_reference(finished, tmp_path):
    flags = ["--reference=digits", "--reference_split=train[:1500]", "--num_samples=150"]
    flags += ["--num_inference_steps=2", "--guidance_scale=1,2", f"--output_dir={tmp_path}"]
    flags += ["--validation_loss", "--num_validation_images=20"]
    assert exit_code(evaluate.main, evaluate.parse_args([str(finished), *flags])) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["images"] for row in results["denoising_losses"]] == ["train[:1500]", "150 of train[:1500]"]
    rows = {row["model"]: row for row in results["results"]}
    assert {"run guidance 1", "run guidance 2"} <= set(rows) and (tmp_path / "guidance.png").is_file()
    for name in ("run guidance 1", "run guidance 2"):
        table = np.array(results["by_class"][name]["confusion"])
        asked = np.bincount(np.array(load_digits().target[:1500]), minlength=10) / 10
        assert (
            table.sum() == 150 and np.abs(table.sum(1) - asked).max() < 15
        )  # about as often as the reference has them
        assert rows[name]["class_accuracy"] == pytest.approx(np.trace(table) / 150)
        assert set(results["by_class"][name]["fd_by_class"]) == set(NAMES)
    with pytest.raises(UserError, match="--reference has face"):
        faces = [flag.replace("digits", "faces").replace("1500", "50") for flag in flags] + ["--features=pixels"]
        evaluate.main(evaluate.parse_args([str(finished), *faces]))
