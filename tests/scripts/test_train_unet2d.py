"""train_unet2d.py: parts of its UNet that train_basic.py's does not have. The rest is in test_train_basic.py."""

import torch
from conftest import count, train
from diffusers import UNet2DModel

import train_unet2d


def unet_of(folder):
    return UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).eval()


def test_size_and_parts():
    unet = UNet2DModel(28, 1, 1, **train_unet2d.UNET)
    assert 1.6e6 < count(unet) < 1.8e6
    kinds = [type(module).__name__ for module in unet.modules()]
    assert "GroupNorm" in kinds and "Attention" in kinds
    down, up = unet.down_blocks[0].downsamplers[0], unet.up_blocks[0].upsamplers[0]
    assert count(down) > 0 and count(up) > 0  # training changes it
    assert len(unet.down_blocks[0].resnets) == 2


def test_timestep_conditioning_can_be_switched_off_for_good(tmp_path):
    images, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 900.0])
    flags = ["--max_train_steps=3", "--checkpointing_steps=100", "--learning_rate=0.03"]
    train(tmp_path / "with", *flags, script=train_unet2d)
    train(tmp_path / "without", *flags, "--timestep_conditioning", "false", script=train_unet2d)
    with torch.no_grad():
        told, untold = unet_of(tmp_path / "with"), unet_of(tmp_path / "without")
        assert not torch.allclose(told(images, timesteps).sample, told(images, 500).sample, atol=1e-4)
        assert torch.equal(untold(images, timesteps).sample, untold(images, 500).sample)


def test_dropout_is_there_in_training_only(tmp_path, monkeypatch):
    monkeypatch.setitem(train_unet2d.UNET, "dropout", 0.5)
    train(tmp_path / "run", "--max_train_steps=3", "--learning_rate=0.03", script=train_unet2d)
    unet, images = unet_of(tmp_path / "run"), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(unet(images, 5).sample, unet(images, 5).sample)
        unet.train()
        assert not torch.equal(unet(images, 5).sample, unet(images, 5).sample)


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    for name, flags in (("plain", []), ("checkpointing", ["--gradient_checkpointing"])):
        train(tmp_path / name, "--max_train_steps=2", *flags, script=train_unet2d)
    plain, checkpointing = unet_of(tmp_path / "plain"), unet_of(tmp_path / "checkpointing")
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), checkpointing.parameters(), strict=True)
    )
