"""utils/training/optimizer.py: Muon's steps are correct, and its state survives."""

import json

import numpy as np
import pytest
import torch
from conftest import scalars, train
from diffusers import UNet2DModel

import finetune_faces
import train_ddpm
from utils import UserError
from utils.diffusion.basic_unet import BasicUNet
from utils.diffusion.unets import UNETS
from utils.training.optimizer import Muon, as_matrix, make_optimizer, memory_order, orthogonal_factors

OPTIONS = dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8)


def unet(**options):
    return UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **UNETS["tiny"], **options)


def newton_schulz(matrix):
    """Compute the iteration as Jordan writes it, step by step, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def orthogonal(matrix):
    (factor,) = orthogonal_factors([matrix])
    return factor @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ factor


@pytest.mark.parametrize("shape", [(32, 288), (64, 64), (16, 17)])
@pytest.mark.parametrize("rank", [3, 1000])
def test_a_step_is_orthogonal(shape, rank):
    torch.manual_seed(0)
    rank = min(rank, *shape)
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    result = orthogonal(matrix)
    assert torch.allclose(result.double(), newton_schulz(matrix), atol=1e-4)
    assert torch.allclose(orthogonal(matrix.T), result.T, atol=1e-4)  # the smaller product is computed
    values = torch.linalg.svdvals(result)[:rank]
    assert (
        values.quantile(0.1) > 0.3 and values.max() < 1.25 and values.median() > 0.65
    )  # a random square is near singular
    assert torch.allclose(orthogonal(1e-6 * matrix), result, atol=1e-2)  # the size of the gradient does not matter
    assert orthogonal(torch.zeros(shape)).abs().max() == 0


def test_matrices_are_worked_on_together_and_come_out_as_alone():
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((32, 288), (16, 144), (64, 32), (32, 32), (16, 17))]
    for matrix, factor in zip(matrices, orthogonal_factors(matrices), strict=True):
        assert torch.allclose(factor, orthogonal_factors([matrix])[0], atol=1e-5)


@pytest.mark.parametrize("shape", [(32, 16, 3, 3), (16, 32, 1, 1), (16, 16)])
def test_a_matrix_is_a_view_in_every_memory_format(shape):
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout == torch.channels_last and len(shape) < 4:
            continue
        weight = torch.randn(shape).to(memory_format=layout)
        matrix = as_matrix(weight, memory_order(weight))
        assert matrix.shape == (shape[0], weight[0].numel()) and matrix.data_ptr() == weight.data_ptr()
        assert torch.equal(matrix.sort(1).values, weight.flatten(1).sort(1).values)


def test_gradients_in_another_memory_format_move_the_weights_alike():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(32, 16, 3, 3).to(memory_format=torch.channels_last))
        optimizer = Muon([weight], [torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        for _ in range(2):
            weight.grad = torch.randn(32, 16, 3, 3).to(memory_format=layout)
            optimizer.step()
        results.append(weight.detach())
    assert torch.allclose(*results, atol=1e-6)


def test_hidden_matrices_get_muon_and_all_other_weights_adamw():
    for model in (unet(), unet(num_class_embeds=10), BasicUNet(in_channels=3, out_channels=3)):
        optimizer = make_optimizer("muon", model, **OPTIONS)
        others, matrices = (group["params"] for group in optimizer.param_groups)
        names = {weight: name for name, weight in model.named_parameters()}
        assert {*others} | {*matrices} == {*names} and not {*others} & {*matrices}
        assert all(weight.ndim == 4 for weight in matrices) and len(matrices) >= 4
        ends = {names[weight] for weight in others if weight.ndim > 1}
        kinds = {"conv_in", "conv_out"} if isinstance(model, UNet2DModel) else {"down_convs.0", "up_convs.2"}
        assert kinds <= {name.removesuffix(".weight") for name in ends}
        assert all(name.removesuffix(".weight") in kinds or "emb" in name for name in ends)


def test_the_first_step_by_hand():
    weight, bias = torch.nn.Parameter(torch.ones(16, 16, 3, 3)), torch.nn.Parameter(torch.ones(16))
    optimizer = Muon([weight], [bias], lr=0.1, weight_decay=0.5, betas=(0.9, 0.99), eps=1e-8)
    torch.manual_seed(1)
    gradient = torch.randn_like(weight)
    weight.grad, bias.grad = gradient.clone(), torch.full_like(bias, 3.0)
    optimizer.step()
    expected = 0.95 - 0.1 * 0.2 * np.sqrt(144) * newton_schulz(gradient.flatten(1)).view_as(weight)
    assert torch.allclose(weight.double(), expected, atol=1e-4)
    assert torch.allclose(bias, torch.full_like(bias, 0.95 - 0.1))  # Adam's first step is the rate


def test_a_restored_state_continues_bit_for_bit():
    def steps(model, optimizer, first, last):
        for number in range(first, last):
            images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
            model(images, number).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(0)
    whole, halves = unet(), unet()
    halves.load_state_dict(whole.state_dict())
    steps(whole, make_optimizer("muon", whole, **OPTIONS), 0, 4)
    first = make_optimizer("muon", halves, **OPTIONS)
    steps(halves, first, 0, 2)
    second = make_optimizer("muon", halves, **OPTIONS)
    second.load_state_dict(first.state_dict())
    steps(halves, second, 2, 4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))


class TensorRate(torch.optim.AdamW):
    """AdamW with its rate as a tensor that must not be replaced, as torchao's optimizers have."""

    def __init__(self, weights, **options):
        super().__init__(weights, **options)
        self.rates = [torch.tensor(group["lr"]) for group in self.param_groups]
        for group, rate in zip(self.param_groups, self.rates, strict=True):
            group["lr"] = rate

    def step(self, closure=None):
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups)
        return super().step(closure)


def test_a_rate_that_is_a_tensor_is_recorded_and_resumed(tmp_path, monkeypatch):
    make = lambda name, model, **options: TensorRate(model.parameters(), **options)  # noqa: E731
    monkeypatch.setattr("utils.training.optimizer.make_optimizer", make)
    flags = ["--report_to=tensorboard", "--lr_scheduler=linear"]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "halves", *flags, "--max_train_steps=3")
    train(tmp_path / "halves", *flags)
    assert json.loads((tmp_path / "straight" / "training_args.json").read_text())["learning_rate"] == 1e-3
    rates = [scalars(tmp_path / name, "optimizer/learning_rate") for name in ("straight", "halves")]
    assert rates[0] and [rates[0][k] for k in (4, 5, 6)] == [rates[1][k] for k in (4, 5, 6)]


def test_which_optimizer_is_chosen(monkeypatch):
    def kind(*flags, script=train_ddpm):
        return type(make_optimizer(script.parse_args([*flags]).optimizer, unet(), **OPTIONS)).__name__

    assert (kind(), kind("--dataset_name=digits", script=finetune_faces), kind("--optimizer=adamw")) == (
        "Muon",
        "AdamW",
        "AdamW",
    )
    assert kind("--pretrained_model_name_or_path=x") == "AdamW"
    assert kind("--pretrained_model_name_or_path=x", "--optimizer=muon") == "Muon"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs bitsandbytes .* or torchao\. Run pip install torchao, or choose adamw"):
        kind("--optimizer=adamw8bit")
