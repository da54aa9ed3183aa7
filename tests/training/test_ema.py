"""utils/training/ema.py: comparison with a closed form, and safe swapping of weights."""

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from utils import UserError
from utils.training.ema import EMA


def small_unet(channels=32):
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(channels,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_average_of_constant_and_changing_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, max_decay=0.9, inv_gamma=1.0, power=0.75)
    expected, value = None, 0.0
    for step in range(1, 60):
        value += 1.0
        with torch.no_grad():
            model.weight.fill_(value)
        ema.step(model.parameters())
        decay = min(0.9, 1 - (1 + (step - 1)) ** -0.75) if step > 1 else 0.0
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert abs(ema.cur_decay_value - decay) < 1e-9
    assert abs(ema.shadow_params[0].item() - expected) < 1e-3


def test_swapping_in_and_out_is_exact_even_when_something_fails():
    model = small_unet()
    ema = EMA(model, 0.9, 1.0, 0.75)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    own, average = weights(model), [value.clone() for value in ema.shadow_params]
    with ema.averaged_weights(model):
        assert equal(weights(model), average)
    assert equal(weights(model), own)
    with pytest.raises(RuntimeError, match="in between"), ema.averaged_weights(model):
        raise RuntimeError("in between")
    assert equal(weights(model), own) and equal(ema.shadow_params, average)


def test_saved_average_is_loaded_bit_for_bit(tmp_path):
    model = small_unet()
    ema = EMA(model, 0.99, 1.0, 0.75)
    with torch.no_grad():
        model.conv_in.weight.add_(0.1)
    for _ in range(5):
        ema.step(model.parameters())
    with ema.averaged_weights(model):
        model.save_pretrained(tmp_path)
    other = EMA(small_unet(), 0.99, 1.0, 0.75)
    other.load(load_file(tmp_path / "diffusion_pytorch_model.safetensors"), optimization_step=5)
    assert equal(ema.shadow_params, other.shadow_params)
    assert other.cur_decay_value == ema.cur_decay_value
    for average in (ema, other):
        average.step(model.parameters())
    assert equal(ema.shadow_params, other.shadow_params)


def test_average_of_another_model_is_refused():
    with pytest.raises(UserError, match=r"do not fit the model, for example conv_in\.weight"):
        EMA(small_unet(32), 0.99, 1.0, 0.75).load(small_unet(64).state_dict(), 1)


def test_disabled_average_does_nothing():
    model = small_unet()
    ema, own = EMA(model, 0.9, 1.0, 0.75, enabled=False), weights(model)
    ema.step(model.parameters())
    with ema.averaged_weights(model):
        assert equal(weights(model), own)
    assert ema.shadow_params == []
