"""An nn.Module of the user is saved and loaded as a model of diffusers, with its code."""

import sys

import children
import pytest
import torch
from conftest import exit_code, parse
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from torch import nn

import sample
import train_ddpm
from utils import UserError
from utils.diffusion import unets
from utils.diffusion.linear_mix import LinearMixPipeline, LinearMixScheduler
from utils.diffusion.own_nets import as_diffusers_model
from utils.diffusion.pipelines import load_pipeline

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, sample_size, in_channels, out_channels, width=8):
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, noisy, timesteps):
        assert timesteps.shape == noisy.shape[:1]
        return self.last(torch.tanh(self.first(noisy) + timesteps.view(-1, 1, 1, 1) / 1000))
"""
SHAPE = dict(sample_size=8, in_channels=1, out_channels=1)


class Raw(nn.Module):
    """Module that is not a model of diffusers, but is called like one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, noisy, timesteps):
        return unets_output(self.conv(noisy))


def unets_output(sample):
    from diffusers.models.unets.unet_2d import UNet2DOutput

    return UNet2DOutput(sample=sample)


@pytest.fixture
def net(tmp_path, monkeypatch):
    """Return the class of a net in a file of its own."""

    def write(text=NET, name="a_net"):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop(name, None)
        return __import__(name).Net

    return write


def test_what_is_saved_loads_with_diffusers_alone_and_draws_the_same(tmp_path, net):
    model = as_diffusers_model(net())(**SHAPE, width=4)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "saved")
    LinearMixPipeline(model, LinearMixScheduler()).save_pretrained(tmp_path / "mixed")
    code = (
        "from diffusers import DiffusionPipeline\nimport torch\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True)\n"
        f"torch.save((pipeline.unet(torch.ones(2, 1, 8, 8), 5).sample, dict(pipeline.unet.config)), 'output')\n"
        "assert len(pipeline(batch_size=2, num_inference_steps=2).images) == 2\n"
    )
    code, said = children.run(code, folder=tmp_path)
    assert code == 0, said
    output, config = torch.load(tmp_path / "output", weights_only=True)
    assert torch.equal(output, model(torch.ones(2, 1, 8, 8), torch.tensor(5)).sample) and config["width"] == 4
    for folder in ("saved", "mixed"):
        loaded, _, space = load_pipeline(str(tmp_path / folder), trust_remote_code=True)
        assert torch.equal(loaded(torch.ones(2, 1, 8, 8), torch.tensor([5, 5])).sample, output)
        assert space.shape == (1, 8, 8)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "mixed", trust_remote_code=True)
    assert type(pipeline.unet).__name__ == "Net" and len(pipeline(num_inference_steps=2).images) == 1


def test_code_of_a_net_runs_only_if_it_is_asked_for(tmp_path, net):
    text = NET + f"\nopen({str(tmp_path / 'ran')!r}, 'a').write('x')\n"
    model = as_diffusers_model(net(text))(**SHAPE)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "saved")
    (tmp_path / "ran").unlink()
    flags = [str(tmp_path / "saved"), f"--output_dir={tmp_path}/drawn", "--num_samples=2", "--num_inference_steps=2"]
    with pytest.raises(UserError, match=r"its net Net is code .* Read unet/own_net_\w+\.py .* --trust_remote_code"):
        sample.main(sample.parse_args(flags))
    assert not (tmp_path / "ran").exists()
    assert exit_code(sample.main, sample.parse_args([*flags, "--trust_remote_code"])) == 0
    assert (tmp_path / "ran").exists() and len([*(tmp_path / "drawn" / "images").iterdir()]) == 2


def test_other_code_in_the_same_folder_takes_the_place_of_the_first(tmp_path, net):
    for text in (NET, NET.replace("tanh", "sin")):
        model = as_diffusers_model(net(text))(**SHAPE)
        DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "saved")
    assert len([*(tmp_path / "saved" / "unet").glob("*.py")]) == 1
    loaded = load_pipeline(str(tmp_path / "saved"), trust_remote_code=True)[0]
    assert torch.equal(loaded(torch.ones(1, 1, 8, 8), 3).sample, model(torch.ones(1, 1, 8, 8), 3).sample)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            NET.replace("sample_size, ", ""),
            r"Net does not take sample_size\. Expected them as arguments of its __init__",
        ),
        ("import blocks\n" + NET, "a_net.py imports blocks, which is not an installed package"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path, net, text, said):
    (tmp_path / "blocks.py").write_text("")
    with pytest.raises(UserError, match=said):
        as_diffusers_model(net(text))


def test_a_net_without_a_file_is_refused():
    space = {}
    exec(NET, space)
    with pytest.raises(UserError, match=r"Net cannot be saved: its code is not in a file\. Expected a separate file"):
        as_diffusers_model(space["Net"])


def test_a_module_that_diffusers_cannot_save_is_found_out_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(unets, "make_unet", lambda *arguments: Raw())
    args = parse("--output_dir", tmp_path / "run", "--optimizer=adamw")
    with pytest.raises(
        UserError, match=r"pipeline of a Raw cannot be saved: .*as_diffusers_model of utils/diffusion/own_nets\.py"
    ):
        train_ddpm.main(args)
    assert not [*(tmp_path / "run").glob("checkpoint-*")] and not [*(tmp_path / "run").glob(".tmp-*")]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("return self.last(", "return self.last.weight.sum() + 0 * torch.tanh(", "returned"),
        ("return self.last(torch.tanh(", "return (self.last(torch.tanh(", None),
        ("self.last = nn.Conv2d(width, out_channels", "self.last = nn.Conv2d(width, 3", r"returned \(2, 3, 8, 8\)"),
    ],
)
def test_an_output_of_another_shape_is_refused(net, old, new, said):
    text = NET.replace(old, new)
    if said is None:  # a tuple
        text = text.replace("/ 1000))", "/ 1000)), 0)")
    model = as_diffusers_model(net(text))(**SHAPE)
    with pytest.raises(ValueError, match=said or "returned tuple; expected a tensor of shape"):
        model(torch.ones(2, 1, 8, 8), torch.tensor([5, 5]))


def test_a_net_of_a_package_beside_the_script_is_refused(tmp_path, net, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"imports nets, which is not an installed package"):
        as_diffusers_model(net("import nets\n" + NET))
    with pytest.raises(UserError, match=r"was given a Raw object\. Expected a class"):
        as_diffusers_model(Raw())


def test_to_start_from_an_own_net_says_how(tmp_path, net):
    DDPMPipeline(as_diffusers_model(net())(**SHAPE), DDPMScheduler()).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"its net is code .* as_diffusers_model\(Net\)\.from_pretrained"):
        train_ddpm.main(parse("--output_dir", tmp_path / "run", f"--pretrained_model_name_or_path={tmp_path}/saved"))
    again = as_diffusers_model(net()).from_pretrained(tmp_path / "saved" / "unet")
    assert again.config.width == 8
