"""utils/diffusion/basic_unet.py: the net that stage 1 trains."""

import pytest
import torch
from conftest import count

from utils.diffusion.basic_unet import BasicUNet


def test_it_has_the_size_that_the_readme_names():
    assert count(BasicUNet()) == 309_057


@pytest.mark.parametrize("channels, size", [(1, 8), (1, 28), (3, 32), (5, 4)])
def test_any_channels_and_any_size_divisible_by_four(channels, size):
    unet = BasicUNet(sample_size=size, in_channels=channels, out_channels=channels)
    images = torch.randn(2, channels, size, size + 4)
    assert unet(images).sample.shape == images.shape
    assert torch.equal(unet(images, 3).sample, unet(images, torch.tensor([1, 900]), return_dict=False)[0])


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images of \(10, 8\) pixels\. Expected sides divisible by 4"):
        BasicUNet()(torch.zeros(1, 1, 10, 8))


def test_predictions_are_not_confined_and_every_weight_learns():
    torch.manual_seed(0)
    unet = BasicUNet()
    predicted = unet(torch.randn(4, 1, 8, 8)).sample
    assert predicted.min() < 0 < predicted.max()
    (10 * predicted).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in unet.parameters())


def test_it_is_saved_and_loaded_as_other_models_are(tmp_path):
    unet = BasicUNet(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), kernel_size=3)
    unet.save_pretrained(tmp_path)
    loaded = BasicUNet.from_pretrained(tmp_path, use_safetensors=True)
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(unet(images).sample, loaded(images).sample)
    assert loaded.config.sample_size == 8
