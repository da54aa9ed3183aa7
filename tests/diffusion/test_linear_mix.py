"""utils/diffusion/linear_mix.py: a saved scheduler loads without this repository."""

import json

import children
import numpy as np
import torch
from diffusers import UNet2DModel

from utils.diffusion.basic_unet import BasicUNet
from utils.diffusion.linear_mix import LinearMixPipeline, LinearMixScheduler

STRANGER = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained('saved', trust_remote_code=True)
import numpy, sys, torch
assert not any(name == 'utils' or name.startswith('utils.') for name in sys.modules)
pipeline.set_progress_bar_config(disable=True)
numpy.save('images.npy', pipeline(3, torch.Generator().manual_seed(7), 4, 'np').images)
pipeline.save_pretrained('again')
"""


def pipeline(unet=None):
    torch.manual_seed(0)
    pipeline = LinearMixPipeline(
        unet or BasicUNet(sample_size=8, block_out_channels=(8, 8, 8)), LinearMixScheduler(100)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, seed=7, **options):
    return pipeline(
        batch_size=3, generator=torch.Generator().manual_seed(seed), num_inference_steps=4, **options
    ).images


def test_a_stranger_loads_it_draws_the_same_and_saves_it_again(tmp_path):
    mine = pipeline()
    mine.save_pretrained(tmp_path / "saved")
    for folder in ("saved", "again"):
        code, said = children.run(STRANGER.replace("'saved'", f"'{folder}'"), folder=tmp_path)
        assert code == 0, said
        assert np.array_equal(np.load(tmp_path / "images.npy"), draw(mine, output_type="np"))
        (tmp_path / "images.npy").unlink()


def test_only_the_code_that_diffusers_lacks_is_saved(tmp_path):
    unet = UNet2DModel(
        8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipeline(unet).save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")}
    assert files == {"linear_mix.py", "scheduler/linear_mix.py"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["_class_name"] == ["linear_mix", "LinearMixPipeline"]
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_outputs_and_generators():
    images = draw(pipeline(), output_type="np")
    assert images.shape == (3, 8, 8, 1) and images.min() >= 0 and images.max() <= 1
    assert draw(pipeline(), output_type="pt").shape == (3, 1, 8, 8)
    assert draw(pipeline())[0].size == (8, 8)
    assert not np.array_equal(images, draw(pipeline(), seed=8, output_type="np"))
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    alone = pipeline()(1, [torch.Generator().manual_seed(2)], 4, "np").images
    assert np.allclose(pipeline()(3, generators, 4, "np").images[2], alone[0], atol=1e-6)


def test_it_starts_from_uniform_noise():
    seen = []
    drawing = pipeline()
    drawing.unet.register_forward_pre_hook(lambda unet, inputs: seen.append(inputs[0]))
    drawing(batch_size=64, generator=torch.Generator().manual_seed(0), num_inference_steps=1)
    assert seen[0].abs().max() <= 1 and abs(seen[0].var() - 1 / 3) < 0.01 and abs(seen[0].mean()) < 0.01
