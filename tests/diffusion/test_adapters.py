"""utils/diffusion/adapters.py: which weights are trained, and adapters that are merged into weights."""

import pytest
import torch
from conftest import count
from diffusers import UNet2DModel
from safetensors.torch import load_file

from utils import UserError
from utils.diffusion.adapters import base_weights, choose_trainable, distance_to_base, merged, save_adapter

TARGETS = ["to_q", "to_out.0", "conv1"]


def unet(attention=True):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"), add_attention=False,
    ).eval()  # fmt: skip


def learning(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_method_chooses_its_weights():
    for method in ("full", "attention", "norm"):
        model = unet()
        choose_trainable(model, method, 4, TARGETS, 0)
        names = learning(model)
        everything = {name for name, _ in model.named_parameters()}
        if method == "full":
            assert names == everything
        elif method == "attention":
            assert names == {name for name in everything if ".attentions." in name} and len(names) == 10
        else:
            assert names == {n for n in everything if n.endswith(".bias") or "norm" in n.split(".")[-2]}
            assert "conv_norm_out.weight" in names and "conv_in.weight" not in names
    assert count(unet()) > 20 * sum(p.numel() for n, p in unet().named_parameters() if n.endswith(".bias"))


def test_adapters_change_nothing_until_they_learn_and_only_they_learn():
    model, images = unet(), torch.randn(2, 1, 8, 8)
    before = model(images, 5).sample
    base = base_weights(model)
    choose_trainable(model, "lora", 4, TARGETS, 0)
    assert torch.equal(model(images, 5).sample, before)
    assert distance_to_base(model, base) == 0
    assert learning(model) and all(".lora_" in name for name in learning(model))


def disturb(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_merged_weights_do_what_the_adapters_do_and_leave_them_in_place():
    model, images = unet(), torch.randn(2, 1, 8, 8)
    base, plain_output = base_weights(model), model(images, 5).sample
    choose_trainable(model, "lora", 4, TARGETS, 0)
    disturb(model)
    adapted = model(images, 5).sample
    plain = merged(model)
    assert type(plain) is UNet2DModel and set(dict(plain.named_parameters())) == set(base)
    assert torch.allclose(plain(images, 5).sample, adapted, atol=1e-4)
    assert not torch.allclose(adapted, plain_output, atol=1e-2)
    assert torch.equal(model(images, 5).sample, adapted)
    moved = {name for name, parameter in plain.named_parameters() if not torch.equal(parameter, base[name])}
    assert moved and all(name.split(".")[-2] in ("to_q", "0", "conv1") for name in moved)
    weights = [(dict(plain.named_parameters())[name] - base[name]).square().sum() for name in base]
    expected = (sum(weights) / sum(weight.square().sum() for weight in base.values())).sqrt()
    assert distance_to_base(model, base) == pytest.approx(expected.item(), rel=1e-4)
    assert merged(unet()).config == unet().config


def test_both_loaders_of_peft_add_the_saved_adapter_to_any_base(tmp_path):
    from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict

    model, images = unet(), torch.randn(2, 1, 8, 8)
    choose_trainable(model, "lora", 4, TARGETS, 0)
    disturb(model)
    save_adapter(model, tmp_path / "adapter")
    other = unet()
    inject_adapter_in_model(LoraConfig.from_pretrained(tmp_path / "adapter"), other)
    set_peft_model_state_dict(other, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert torch.allclose(other(images, 5).sample, model(images, 5).sample, atol=1e-6)
    loaded = PeftModel.from_pretrained(unet(), tmp_path / "adapter")
    assert torch.allclose(loaded(images, 5).sample, merged(model)(images, 5).sample, atol=1e-5)
    another = unet()
    with torch.no_grad():
        another.conv_in.weight.mul_(2)
    plain = another(images, 5).sample
    loaded = PeftModel.from_pretrained(another, tmp_path / "adapter")(images, 5).sample
    model.conv_in.weight.data.mul_(2)
    assert torch.allclose(loaded, model(images, 5).sample, atol=1e-5) and not torch.allclose(loaded, plain, atol=1e-2)
    save_adapter(unet(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_the_unet_does_not_have_is_refused():
    with pytest.raises(UserError, match=r"--method attention: this UNet has no such layers. Choose full, norm or lora"):
        choose_trainable(unet(attention=False), "attention", 4, TARGETS, 0)
    with pytest.raises(UserError, match=r"LORA_TARGETS to_z: this UNet has no such layers. It has .*conv1.*to_q"):
        choose_trainable(unet(), "lora", 4, ["to_z"], 0)


def test_the_number_of_trainable_weights_is_logged(caplog):
    model = unet()
    total = count(model)
    with caplog.at_level("INFO", logger="utils.diffusion.adapters"):
        choose_trainable(model, "norm", 4, TARGETS, 0)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert 0 < trainable < total
    assert f"--method norm: {trainable:,} trainable weights, and {total:,} weights" in caplog.text
