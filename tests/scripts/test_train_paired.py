"""train_paired.py, and how sample.py and evaluate.py use its models."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import equal_weights, exit_code, scalars, slow, train
from diffusers import LDMSuperResolutionPipeline
from PIL import Image
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import evaluate
import sample
import train_flow
import train_paired
from utils import UserError
from utils.diffusion.conditions import Condition
from utils.diffusion.pipelines import load_pipeline
from utils.diffusion.pretrained import load_pretrained
from utils.diffusion.sampling import sample_batch
from utils.diffusion.spaces import Pixels
from utils.evaluation.given_images import GivenImages
from utils.evaluation.models import partner_columns

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# A user without this repository runs this code, in a process of its own
STRANGER = """
import sys, numpy as np, torch
from diffusers import LDMSuperResolutionPipeline
pipeline = LDMSuperResolutionPipeline.from_pretrained(sys.argv[1])
condition = torch.from_numpy(np.load(sys.argv[2]))
images = pipeline(condition, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
assert not any(name.split(".")[0] == "utils" for name in sys.modules)
np.save(sys.argv[3], images)
"""


def run(folder, *flags):
    return train(folder, "--unet=tiny", *flags, script=train_paired)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a model that enlarges 4 x 4 digits to 8 x 8, and supports guidance."""
    folder = tmp_path_factory.mktemp("paired") / "run"
    flags = ["--condition=lowres:2", "--num_inference_steps=5", "--learning_rate=1e-2", "--num_samples=8"]
    flags += ["--dataset_split=train[:1500]", "--validation_split=train[1500:]", "--condition_dropout_prob=0.2"]
    assert run(folder, *flags, "--report_to=tensorboard") == 0
    return folder


def draw_like_the_card(folder):
    """Run the code of a model's card, and return its image."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(f"{folder.name}/condition.png", f"{folder}/condition.png").replace(
        f"'{folder.name}'", repr(str(folder))
    )
    drawn = {}
    exec(code.replace("pipeline(cond", "image = pipeline(cond").replace(".save('sample.png')", ""), drawn)
    return drawn["image"]


def colour_folder(folder, count=16, size=(12, 8), **changes):
    """Write pictures with a colour that depends on the place, and return them by name."""
    pictures = {}
    for k in range(count):
        y, x = np.mgrid[: size[1], : size[0]]
        picture = np.stack([(x * 20 + k * 9) % 256, (y * 30 + k * 5) % 256, (x * y + 40 * k) % 256], axis=2)
        pictures[f"{k:02}.png"] = Image.fromarray(picture.astype(np.uint8))
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (pictures | changes).items():
        picture.save(folder / name)
    return pictures


# ------------------------------------------------------------------------------------------------------------- training


def test_a_stranger_draws_what_we_draw(tmp_path, finished):
    condition = torch.rand(2, 1, 8, 8) * 2 - 1
    np.save(tmp_path / "condition.npy", condition.numpy())
    names = [str(finished), str(tmp_path / "condition.npy"), str(tmp_path / "drawn.npy")]
    result = subprocess.run([sys.executable, "-c", STRANGER, *names], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    unet, own, space = load_pipeline(str(finished))
    assert type(space) is Pixels and space.shape == (1, 8, 8)  # the identity is left out
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = dict(noise=lambda ids: noise, model_inputs=lambda ids: {"condition": condition})
    ours = sample_batch(unet, own, np.arange(2), (1, 8, 8), 5, 0, torch.device("cpu"), **inputs)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - np.load(tmp_path / "drawn.npy")).max() < 1e-4
    assert ours.std() > 0.05


def test_the_card_has_code_that_draws(finished):
    card = (finished / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card and "2104.07636" in card
    assert "It enlarges images by a factor of 2." in card
    assert draw_like_the_card(finished).size == (8, 8)
    picture = np.asarray(Image.open(finished / "samples.png"))
    assert (finished / "condition.png").is_file() and picture.std() > 30
    assert Image.open(finished / "condition.png").size == (4, 4)
    assert len(scalars(finished, "loss/validation_held_out")) >= 1


def test_the_loss_is_that_of_the_velocity_with_a_condition(tmp_path, monkeypatch):
    seen, mse_loss = [], F.mse_loss

    def spy(output, target, **options):
        seen.append((output.dtype, target.dtype, mse_loss(output, target).item()))
        return mse_loss(output, target, **options)

    monkeypatch.setattr(F, "mse_loss", spy)
    flags = ["--max_train_steps=40", "--mixed_precision=bf16", "--learning_rate=4e-3", "--train_batch_size=16"]
    run(tmp_path / "paired", "--condition=lowres:2", *flags)
    losses = [loss for *_, loss in seen]
    assert all(first == second == torch.float32 for first, second, _ in seen)
    seen.clear()
    train(tmp_path / "flow", "--unet=tiny", *flags, script=train_flow)
    without = [loss for *_, loss in seen]
    assert np.mean(losses[-20:]) < 0.75 * np.mean(without[-20:])  # the condition helps
    assert np.mean(without[-20:]) < 0.6 * np.mean(without[:5])


@pytest.mark.parametrize("kind", ["lowres:4", "gray", "inpaint", "outline"])
def test_each_kind_of_condition_trains_and_loads(tmp_path, kind):
    colour_folder(tmp_path / "images")
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition={kind}", "--max_train_steps=1"]
    assert run(tmp_path / "run", *flags, "--resolution=8x12") == 0
    unet, _, space = load_pipeline(str(tmp_path / "run"))
    condition = Condition.of_model(unet.config)
    assert condition.kind == kind and unet.config.in_channels == 3 + condition.channels and space.shape == (3, 8, 12)
    pipeline = LDMSuperResolutionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(torch.zeros(1, condition.channels, 8, 12), num_inference_steps=1).images[0].size == (12, 8)
    assert draw_like_the_card(tmp_path / "run").size == (12, 8)


def test_pairs_come_from_a_folder_or_a_column_and_change_the_model(tmp_path, monkeypatch):
    colour_folder(tmp_path / "images")
    for picture in (tmp_path / "images").glob("*.png"):
        (tmp_path / "grey").mkdir(exist_ok=True)
        Image.open(picture).convert("L").save(tmp_path / "grey" / picture.name)
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'grey'}", "--max_train_steps=2"]
    assert run(tmp_path / "folder", *flags) == 0
    seen, forward = [], train_paired_input(monkeypatch)
    forward(seen)
    assert run(tmp_path / "again", *flags) == 0
    assert equal_weights(tmp_path / "folder" / WEIGHTS, tmp_path / "again" / WEIGHTS)
    condition = seen[0]  # grey in all three channels
    assert condition.shape[1] == 6 and torch.equal(condition[:, 3], condition[:, 4])
    config = json.loads((tmp_path / "folder" / "unet" / "config.json").read_text())
    assert config["_condition"]["kind"] == "paired"
    (tmp_path / "grey" / "03.png").unlink()
    with pytest.raises(UserError, match=r"no partner for 1 of 16 images: .*03\.png"):
        run(tmp_path / "missing", *flags)
    colour_folder(tmp_path / "grey", **{"05.png": Image.new("L", (40, 8))})
    with pytest.raises(UserError, match=r"05\.png.* has 40 x 8 pixels beside an image of 12 x 8"):
        run(tmp_path / "sizes", *flags)


def test_partners_keep_their_range_and_their_channels(tmp_path, capsys):
    """A grey partner of 16 bits is given to the model in sampling as it was in training."""
    colour_folder(tmp_path / "images")
    (tmp_path / "depth").mkdir()
    for k in range(16):
        values = np.linspace(0, 4095, 96).reshape(8, 12) * (k + 1) / 16
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / "depth" / f"{k:02}.png")
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'depth'}", "--max_train_steps=1"]
    assert run(tmp_path / "run", *flags) == 0
    condition = Condition.of_model(load_pipeline(str(tmp_path / "run"))[0].config)
    assert condition.value_range == (0, 4095) and condition.picture_channels == 1
    args = SimpleNamespace(condition_image=str(tmp_path / "depth" / "07.png"), true_image=None, mask=None)
    args.model = str(tmp_path / "run")
    given = GivenImages(args, condition, (8, 12))
    expected = np.linspace(0, 4095, 96).reshape(8, 12) / 2 / 4095 * 2 - 1
    assert given.inputs.shape == (1, 3, 8, 12) and np.abs(given.inputs[0, 0].numpy() - expected).max() < 0.01
    Image.new("RGB", (12, 8), (255, 0, 0)).save(tmp_path / "red.png")
    args.condition_image = str(tmp_path / "red.png")
    red = GivenImages(args, condition, (8, 12)).inputs
    assert torch.equal(red[:, 0], red[:, 1])  # it becomes grey, as in training
    (tmp_path / "depth").rename(tmp_path / "moved")
    flags[1] = f"--condition_dir={tmp_path / 'moved'}"
    assert run(tmp_path / "run", *flags[:2], "--max_train_steps=2") == 0  # the same pictures in another place


@pytest.mark.parametrize(("white", "dtype"), [(65535, np.uint16), (255, np.float32), (1, np.float32), (255, np.uint8)])
def test_second_pictures_have_a_range_of_their_own(tmp_path, white, dtype):
    """Those of 16 bits that use the full range, of floats, and of 8 bits, beside images that use a part of 16 bits."""
    steps = np.linspace(0, 1, 96).reshape(8, 12)
    for k in range(8):
        for name, values in (("images", steps * 4000), ("pairs", steps * white * (1 - k / 10))):
            (tmp_path / name).mkdir(exist_ok=True)
            array = values.astype(np.uint16 if name == "images" else dtype)
            Image.fromarray(array).save(tmp_path / name / f"{k}.tif")
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'pairs'}", "--max_train_steps=1"]
    assert run(tmp_path / "run", *flags) == 0
    condition = Condition.of_model(load_pipeline(str(tmp_path / "run"))[0].config)
    given = SimpleNamespace(
        condition_image=str(tmp_path / "pairs" / "5.tif"), true_image=None, mask=None, model=str(tmp_path / "run")
    )
    inputs = GivenImages(given, condition, (8, 12)).inputs[0, 0].numpy()
    assert np.abs(inputs - (steps - 1)).max() < 0.02  # half of the range
    columns = partner_columns(
        SimpleNamespace(condition_dir=str(tmp_path / "pairs"), condition_column=None),
        SimpleNamespace(condition=condition),
    )
    assert columns["condition"].value_range == condition.value_range
    assert condition.value_range == (None if dtype == np.uint8 else (0, white))


def test_small_second_pictures_are_enlarged(tmp_path):
    """Their sides are rounded, so that their aspect ratios differ a little. Folders may be links."""
    colour_folder(tmp_path / "elsewhere" / "images" / "a", size=(100, 67))
    for picture in (tmp_path / "elsewhere" / "images" / "a").glob("*.png"):
        (tmp_path / "elsewhere" / "pairs" / "a").mkdir(exist_ok=True, parents=True)
        Image.open(picture).resize((13, 8)).save(tmp_path / "elsewhere" / "pairs" / "a" / picture.name)
    for name in ("images", "pairs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").symlink_to(tmp_path / "elsewhere" / name / "a")
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'pairs'}", "--max_train_steps=1"]
    flags += ["--resolution=16x24", "--center_crop"]
    assert run(tmp_path / "run", *flags) == 0
    condition = Condition.of_model(load_pipeline(str(tmp_path / "run"))[0].config)
    picture = tmp_path / "pairs" / "a" / "03.png"
    given = SimpleNamespace(condition_image=str(picture), true_image=None, mask=None, model=str(tmp_path / "run"))
    inputs = GivenImages(given, condition, (16, 24)).inputs
    assert inputs.shape == (1, 3, 16, 26)  # no narrower than in training, and not cropped
    expected = np.asarray(Image.open(picture).resize((26, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(np.rint((inputs[0].numpy() + 1) * 127.5), expected)
    given.true_image = str(picture)  # of the same size
    assert GivenImages(given, condition, (16, 24)).true.shape == (1, 3, 16, 26)


def test_one_second_picture_for_images_of_two_splits_is_refused(tmp_path):
    for split in ("train", "test"):
        colour_folder(tmp_path / "images" / split, 8)
    colour_folder(tmp_path / "pairs", 8)
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'pairs'}", "--max_train_steps=1"]
    with pytest.raises(
        UserError, match=r"00 is the partner of an image in train and of one in test \(8 partners in all\)"
    ):
        run(tmp_path / "run", *flags, "--validation_split=test")
    for number, picture in enumerate(sorted((tmp_path / "images" / "test").glob("*.png"))):
        picture.rename(picture.with_name(f"{number + 50}.png"))
    for number, picture in enumerate(colour_folder(tmp_path / "other", 8)):
        (tmp_path / "other" / picture).rename(tmp_path / "pairs" / f"{number + 50}.png")
    assert run(tmp_path / "run", *flags, "--validation_split=test") == 0


def test_a_hole_in_a_picture_of_16_bits_keeps_its_grey_levels(tmp_path):
    Image.fromarray(np.full((8, 8), 20000, np.uint16)).save(tmp_path / "deep.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "model").mkdir()
    record = {"scaled_from": [0, 40000]}
    (tmp_path / "model" / "training_args.json").write_text(json.dumps(record))
    args = SimpleNamespace(
        condition_image=str(tmp_path / "deep.png"), true_image=None, mask=str(tmp_path / "mask.png"),
        model=str(tmp_path / "model"),
    )  # fmt: skip
    inputs = GivenImages(args, Condition("inpaint", 1), (8, 8)).inputs[0]
    assert inputs[0, :, :4].abs().max() < 0.01 and (inputs[1, :, 4:] == 1).all() and not inputs[1, :, :4].any()


@pytest.mark.parametrize("kind", ["mask", "vector"])
def test_a_column_that_holds_no_images_is_refused(tmp_path, monkeypatch, kind):
    from utils.data import train_data
    from utils.data.columns import Column
    from utils.data.own_images import OwnImages

    values = np.zeros((20, 8, 8) if kind == "mask" else (20, 5), np.uint8)
    images = OwnImages(np.zeros((20, 8, 8), np.uint8), columns={"condition": Column(values, kind=kind)})
    load = train_data.load_train_data
    monkeypatch.setattr(train_data, "load_train_data", lambda *a, columns, **o: load(*a, own_images=images, **o))
    with pytest.raises(UserError, match=f"condition has the kind {kind}. Expected image"):
        run(tmp_path / "run")


def train_paired_input(monkeypatch):
    """Return a function that lets the UNet append its inputs in training to a list."""
    from diffusers import UNet2DModel

    forward = UNet2DModel.forward

    def watch(seen):
        def spy(self, sample, *arguments, **options):
            if self.training:
                seen.append(sample.detach().clone())
            return forward(self, sample, *arguments, **options)

        monkeypatch.setattr(UNet2DModel, "forward", spy)

    return watch


def test_the_condition_is_left_out_at_random(tmp_path, monkeypatch):
    seen = []
    train_paired_input(monkeypatch)(seen)
    flags = ["--max_train_steps=4", "--train_batch_size=64", "--condition=inpaint"]
    run(tmp_path / "run", *flags, "--condition_dropout_prob=0.3")
    inputs = torch.cat(seen)
    left_out = (inputs[:, 1:2] == 0).flatten(1).all(1) & (inputs[:, 2:] == 1).flatten(1).all(1)
    assert len(inputs) == 256 and 0.2 < left_out.float().mean() < 0.4


def test_training_starts_from_a_flow_or_a_model_of_the_same_condition(tmp_path, finished):
    assert train(tmp_path / "flow", "--unet=tiny", "--max_train_steps=2", script=train_flow) == 0
    start = f"--pretrained_model_name_or_path={tmp_path / 'flow'}"
    flags = ["--max_train_steps=1", "--learning_rate=0"]
    assert train(tmp_path / "on", start, *flags, "--condition=outline", script=train_paired) == 0
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("flow", "on"))
    assert after["conv_in.weight"].shape[1] == 2 and not after["conv_in.weight"][:, 1].any()
    assert torch.equal(after["conv_in.weight"][:, :1], before["conv_in.weight"])
    assert all(torch.equal(before[name], after[name]) for name in before if name != "conv_in.weight")
    start = f"--pretrained_model_name_or_path={finished}"
    assert train(tmp_path / "more", start, *flags, "--condition=lowres:2", script=train_paired) == 0
    assert equal_weights(finished / WEIGHTS, tmp_path / "more" / WEIGHTS)
    with pytest.raises(
        UserError, match="takes 2 channels with its condition, but these images and their condition have 3"
    ):
        train(tmp_path / "other", start, *flags, "--condition=inpaint", script=train_paired)
    with pytest.raises(UserError, match=r"also has vqvae \(AutoencoderKL\)"):
        train(tmp_path / "flow2", start, *flags, script=train_flow)


def test_conditions_that_do_not_fit_are_refused(tmp_path, capsys):
    for flag, said in {
        "--condition=gray": "the images are grey already",
        "--condition=lowres:3": "8 x 8 pixels are not multiples of 3. Try --resolution 9",
    }.items():
        with pytest.raises(UserError, match=said):
            run(tmp_path / "run", flag)
    with pytest.raises(SystemExit):
        train_paired.parse_args(["--condition=blur"])
    assert "'blur' is neither lowres:FACTOR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_paired.parse_args(["--condition=gray", "--condition_dir=x"])
    colour_folder(tmp_path / "images")
    colour_folder(tmp_path / "pairs")
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'pairs'}", "--image_mode=L"]
    with pytest.raises(UserError, match="the condition has 3 channels, but the images have 1"):
        run(tmp_path / "mode", *flags)
    with pytest.raises(UserError, match="--condition_dir nowhere: there is no such folder"):
        run(tmp_path / "none", f"--train_data_dir={tmp_path / 'images'}", "--condition_dir=nowhere")
    with pytest.raises(UserError, match="condition_dropout_prob"):
        run(tmp_path / "guided", "--guidance_scale=2")


# ---------------------------------------------------------------------------------------------------------------- tools


def draw(model, folder, *flags):
    flags = [f"--output_dir={folder}", "--num_inference_steps=2", *map(str, flags)]
    assert exit_code(sample.main, sample.parse_args([str(model), *flags])) == 0
    return [np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return a folder with two digits of 8 x 8 pixels in ``true``, and the same at half their size in ``small``."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("pictures")
    (folder / "true").mkdir()
    (folder / "small").mkdir()
    for k, digit in enumerate(load_digits().images[-2:]):
        picture = Image.fromarray((digit * 255 / 16).round().astype(np.uint8))
        picture.save(folder / "true" / f"{k}.png")
        picture.resize((4, 4), Image.Resampling.BICUBIC).save(folder / "small" / f"{k}.png")
    return folder


def test_samples_are_drawn_from_pictures_and_resume(tmp_path, finished, pictures):
    small, true = pictures / "small", pictures / "true"
    whole = draw(finished, tmp_path / "both", f"--condition_image={small}", f"--true_image={true}")
    assert len(whole) == 8 and not np.array_equal(whole[0], whole[2])  # four samples for each of two inputs
    one = draw(finished, tmp_path / "one", f"--condition_image={small / '0.png'}", "--num_samples=1")
    assert np.array_equal(one[0], whole[0])
    (tmp_path / "both" / "images" / "000005.png").unlink()
    resumed = draw(finished, tmp_path / "both", f"--condition_image={small}", f"--true_image={true}")
    assert all(map(np.array_equal, whole, resumed))
    made = draw(finished, tmp_path / "made", f"--true_image={true}")
    assert np.abs(np.stack(made).astype(int) - np.stack(whole)).max() < 40  # the input differs by rounding
    guided = draw(finished, tmp_path / "guided", f"--true_image={true}", "--guidance_scale=3")
    assert not np.array_equal(guided[0], made[0])
    grid = Image.open(tmp_path / "both" / "grid.png")
    assert grid.height > 5 * grid.width // 4  # two columns of six pictures


def test_pictures_of_any_size_are_drawn(tmp_path, finished):
    Image.new("L", (9, 3), 90).save(tmp_path / "wide.png")
    (wide,) = draw(finished, tmp_path / "wide", f"--condition_image={tmp_path / 'wide.png'}", "--num_samples=1")
    assert wide.shape == (6, 18)  # twice as large: wider than the training images, but not as high


def test_a_hole_is_filled_and_the_rest_stays(tmp_path, finished_run, pictures):
    true = pictures / "true" / "0.png"
    picture, mask = np.asarray(Image.open(true)), np.zeros((8, 8), np.uint8)
    mask[2:6, 3:7] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run(tmp_path / "inpaint", "--condition=inpaint", "--max_train_steps=1") == 0
    flags = [f"--mask={tmp_path / 'mask.png'}", "--num_samples=2"]
    trained = draw(tmp_path / "inpaint", tmp_path / "trained", f"--condition_image={true}", *flags)
    other = draw(finished_run, tmp_path / "other", f"--init_image={true}", *flags)  # never trained for it
    for drawn in trained + other:
        assert np.array_equal(drawn[mask == 0], picture[mask == 0])
        assert not np.array_equal(drawn[mask > 0], picture[mask > 0])
    alpha = Image.merge("LA", [Image.open(true), Image.fromarray(255 - mask)])
    alpha.save(tmp_path / "alpha.png")
    again = draw(
        tmp_path / "inpaint", tmp_path / "alpha", f"--condition_image={tmp_path / 'alpha.png'}", "--num_samples=2"
    )
    assert all(map(np.array_equal, again, trained))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], r"draws from a picture\. Give --condition_image FILE or a folder, or --true_image"),
        (["--condition_image=nowhere"], "--condition_image nowhere does not exist"),
        (["--condition_image={small}", "--mask={small}/0.png"], "Expected a model trained with --condition inpaint"),
        (["--condition_image={small}", "--true_image={small}"], "have 4 x 4 and 8 x 8 pixels. Expected the same size"),
        (["--true_image={root}/tiny.png"], "fewer than 2 pixels on a side"),
        (["--condition_image={root}/mixed"], "a.png and b.png differ in size: 4 x 4 and 5 x 4"),
        (["--condition_image={small}", "--true_image={root}/mixed"], "no file for 2 of 2 inputs: 0.png, 1.png"),
        (["--condition_image={small}", "--true_image={root}/twice"], r"several files have the name 0 \(1 such names\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(tmp_path, finished, pictures, flags, said):
    (pictures / "mixed").mkdir(exist_ok=True)
    Image.new("L", (4, 4)).save(pictures / "mixed" / "a.png")
    Image.new("L", (5, 4)).save(pictures / "mixed" / "b.png")
    Image.new("L", (8, 1)).save(pictures / "tiny.png")
    (pictures / "twice").mkdir(exist_ok=True)
    for name in ("0.png", "0.bmp"):
        Image.new("L", (8, 8)).save(pictures / "twice" / name)
    flags = [flag.format(small=pictures / "small", root=pictures) for flag in flags]
    with pytest.raises(UserError, match=said):
        draw(finished, tmp_path / "out", *flags)


def test_masks_that_do_not_fit_are_refused(tmp_path, finished_run, pictures, capsys):
    true = pictures / "true" / "0.png"
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    Image.new("L", (9, 8), 255).save(tmp_path / "wide.png")
    for mask, said in (("black", "no part of it is white"), ("wide", "mask has 8 x 9 pixels"), ("x", "no such file")):
        with pytest.raises(UserError, match=said):
            draw(finished_run, tmp_path / mask, f"--init_image={true}", f"--mask={tmp_path / mask}.png")
    for flag in ("--sampler=ddim", "--strength=0.3", "--gif"):
        with pytest.raises(SystemExit):
            sample.parse_args(["model", f"--init_image={true}", "--mask=m.png", flag])
        assert "Leave them out" in capsys.readouterr().err


def test_models_without_a_condition_refuse_pictures(tmp_path, finished_run, pictures):
    with pytest.raises(UserError, match=r"takes no condition\. Expected a model of train_paired\.py"):
        draw(finished_run, tmp_path / "out", f"--condition_image={pictures / 'small'}")


def test_a_public_super_resolution_model_draws(tmp_path, pictures):
    """Models such as CompVis/ldm-super-resolution-4x-openimages take a small picture beside latents of its size."""
    from diffusers import DDIMScheduler, UNet2DModel, VQModel

    torch.manual_seed(0)
    down, up = ["DownBlock2D"] * 2, ["UpBlock2D"] * 2
    small = dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, add_attention=False)
    unet = UNet2DModel(8, in_channels=6, out_channels=3, down_block_types=down, up_block_types=up, **small)
    blocks = dict(down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
    vqvae = VQModel(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16, **blocks)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    LDMSuperResolutionPipeline(vqvae, unet, scheduler).save_pretrained(tmp_path / "public")
    Image.new("RGB", (8, 6), (90, 30, 200)).save(tmp_path / "small.png")
    drawn = draw(tmp_path / "public", tmp_path / "out", f"--condition_image={tmp_path / 'small.png'}")
    assert len(drawn) == 4 and drawn[0].shape == (12, 16, 3) and not np.array_equal(drawn[0], drawn[1])
    assert load_pipeline(str(tmp_path / "public"))[2].scale == 1  # this pipeline decodes latents as they are
    with pytest.raises(UserError, match="this pipeline denoises latents"):
        load_pretrained(str(tmp_path / "public"), condition=True)
    with pytest.raises(UserError, match="draws latents from a condition"):
        evaluate.main(
            evaluate.parse_args([str(tmp_path / "public"), "--reference=digits", f"--output_dir={tmp_path / 'e'}"])
        )


def test_evaluation_compares_with_the_true_images(tmp_path, finished):
    flags = [str(finished), "--reference=digits", "--reference_split=train[:200]", "--held_out_split=train[1500:1530]"]
    flags += ["--num_samples=40", "--num_inference_steps=2", f"--output_dir={tmp_path}", "--sample_batch_size=64"]
    assert exit_code(evaluate.main, evaluate.parse_args([*flags, "--guidance_scale=1,2", "--validation_loss"])) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    names = [row["model"] for row in rows]
    assert names[1:4] == ["run: input, without the model", "run guidance 1", "run guidance 2"]
    assert all({"psnr", "psnr_mean8", "class_accuracy"} <= {*row} for row in rows[2:4]) and "ssim" not in rows[2]
    assert rows[1]["N"] == rows[2]["N"] == 40 and "psnr_mean8" not in rows[1]
    assert rows[2]["psnr"] < rows[2]["psnr_mean8"]  # the mean of samples has less error than one of them


@pytest.mark.slow
def test_two_processes_evaluate_like_one(tmp_path, finished):
    import children

    flags = [str(finished), "--reference=digits", "--reference_split=train[:200]", "--held_out_split=train[1500:1520]"]
    flags += ["--num_samples=20", "--num_inference_steps=1", "--features=pixels"]
    rows = []
    for processes in (1, 2):
        script, folder = Path(evaluate.__file__), tmp_path / str(processes)
        code, said = children.run(script, *flags, f"--output_dir={folder}", processes=processes, folder=tmp_path)
        assert code == 0, said
        rows.append(json.loads((folder / "results.json").read_text())["results"])
    for one, two in zip(*rows, strict=True):
        assert one.get("psnr_mean8") == pytest.approx(two.get("psnr_mean8"), abs=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image():
    from utils.evaluation.restoration import REPEATS, Restoration

    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (3, 1, 16, 16), dtype=np.uint8)
    blocks = [(true, np.array([7, 8, 9]))]
    reference = SimpleNamespace(held_out_split="test", blocks=lambda *_: iter([(*blocks[0], None)]))
    found = Restoration(reference, Condition("lowres:2", 1), SimpleNamespace(shape=(1, 16, 16)), 5, {})
    assert found.total == 5 + (REPEATS - 1) * 3
    numbers = found.numbers(np.arange(found.total))
    assert numbers[:5].tolist() == [0, 1, 2, 0, 1] and np.bincount(numbers[:3]).tolist() == [1, 1, 1]
    assert np.bincount(numbers[[*range(3), *range(5, found.total)]]).tolist() == [REPEATS] * 3
    samples = np.clip(true[numbers] + rng.normal(0, 20, (found.total, 1, 16, 16)), 0, 255).astype(np.uint8)
    scores = {}
    kept = np.concatenate(list(found.measured(iter(np.array_split(samples, 4)), scores)))
    assert np.array_equal(kept, samples[:5])
    psnr = [peak_signal_noise_ratio(true[k], samples[i], data_range=255) for i, k in enumerate(numbers[:5])]
    options = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    ssim = [structural_similarity(true[k, 0], samples[i, 0], **options) for i, k in enumerate(numbers[:5])]
    assert scores["psnr"] == pytest.approx(np.mean(psnr)) and scores["ssim"] == pytest.approx(np.mean(ssim))
    chosen = [*range(3), *range(5, found.total)]
    means = [
        np.rint(np.mean([samples[i] for i in chosen if numbers[i] == k], axis=0)).astype(np.uint8) for k in range(3)
    ]
    expected = np.mean([peak_signal_noise_ratio(t, m, data_range=255) for t, m in zip(true, means, strict=True)])
    assert scores["psnr_mean8"] == pytest.approx(expected) and expected > np.mean(psnr) + 5
    spreads = [np.var([samples[i] for i in chosen if numbers[i] == k], axis=0, ddof=1).mean() for k in range(3)]
    assert scores["spread"] == pytest.approx(np.mean(spreads) ** 0.5)


def test_detail_is_1_for_the_true_images_and_less_for_a_blur():
    from PIL import ImageFilter

    from utils.evaluation.restoration import _fine_energy

    sharp = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32), dtype=np.uint8)
    blurred = [np.asarray(Image.fromarray(x[0]).filter(ImageFilter.GaussianBlur(1)))[None] for x in sharp]
    assert _fine_energy(np.stack(blurred)) < 0.2 * _fine_energy(sharp)
    wave = np.broadcast_to(128 + 100 * np.cos(np.arange(32) * np.pi / 8), (1, 1, 32, 32)).astype(np.uint8)
    assert _fine_energy(wave) < 1e-3 * _fine_energy(sharp)  # a period of sixteen pixels is coarse


def test_pairs_are_evaluated_with_their_folder(tmp_path):
    for split, count in (("train", 40), ("test", 12)):
        colour_folder(tmp_path / "images" / split, count)
        for picture in (tmp_path / "images" / split).glob("*.png"):
            (tmp_path / "pairs" / split).mkdir(exist_ok=True, parents=True)
            mode = "RGB" if split == "train" else "L"  # all that are held out happen to be grey
            Image.open(picture).rotate(180).convert(mode).save(tmp_path / "pairs" / split / picture.name)
    flags = [f"--train_data_dir={tmp_path / 'images'}", f"--condition_dir={tmp_path / 'pairs'}", "--max_train_steps=1"]
    assert run(tmp_path / "run", *flags, "--validation_split=test") == 0
    flags = [str(tmp_path / "run"), f"--reference={tmp_path / 'images'}", "--num_samples=12", "--features=pixels"]
    flags += [f"--output_dir={tmp_path / 'e'}", "--num_inference_steps=1"]
    assert exit_code(evaluate.main, evaluate.parse_args(flags)) == 0
    rows = json.loads((tmp_path / "e" / "results.json").read_text())["results"]
    psnr = []
    for name in sorted((tmp_path / "images" / "test").glob("*.png")):
        true, given = np.asarray(Image.open(name)), np.asarray(Image.open(name).rotate(180).convert("L").convert("RGB"))
        psnr.append(peak_signal_noise_ratio(true, given, data_range=255))
    assert rows[1]["psnr"] == pytest.approx(np.mean(psnr), abs=0.01)


@pytest.mark.parametrize("public", [True, slow(False)])
def test_what_shows_images_is_pushed_only_if_they_are_public(tmp_path, finished, public):
    import shutil

    from utils.publishing.hub import Hub

    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    record["public_data"] = "digits" if public else "me/private"  # the Hub does not answer
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(record))
    (tmp_path / "sent").mkdir()
    Hub(tmp_path / "run", "me/model")._fill(tmp_path / "sent")
    sent = {path.name for path in (tmp_path / "sent").iterdir()}
    assert {"samples.png", "condition.png"} & sent == ({"samples.png", "condition.png"} if public else set())
    card = (tmp_path / "sent" / "README.md").read_text()
    assert ('hf_hub_download("me/model", "condition.png")' in card.replace("'", '"')) is public
    assert ("your_picture.png" in card) is not public and "vqvae" in sent
