"""Conversion of your own net, an ordinary ``nn.Module``, to a model that diffusers saves and loads.

    unet = as_diffusers_model(Net)(**train_data.model_shape, width=64)

The net is built from keyword arguments that JSON can hold, with ``sample_size``, ``in_channels``, ``out_channels``
among them. It is called with noisy images (B, C, H, W) and timesteps (B,), and returns a tensor (B, C, H, W). Its class
is in a separate file that imports installed packages only. It sets no ``config``, ``device`` or ``dtype``, because
diffusers defines these. The file is saved with the weights:

    DDPMPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import ast
import hashlib
import inspect
import sys
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from .. import UserError

HEAD = """

# What follows was added when the model was saved: it makes the class one that diffusers saves and loads
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput


"""


def model_class(net: type) -> type:
    """Return a model of diffusers with the config, weights and output of a class of nets."""

    class Model(net, ModelMixin, ConfigMixin):
        __init__ = register_to_config(net.__init__)

        def forward(self, sample, timestep, *inputs, return_dict=True, **options):
            timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
            output = super().forward(sample, timesteps, *inputs, **options)
            output = getattr(output, "sample", output)
            expected = (len(sample), self.config.out_channels, *sample.shape[2:])
            if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
                found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
                raise ValueError(f"{net.__name__} returned {found}; expected a tensor of shape {expected}")
            return UNet2DOutput(sample=output) if return_dict else (output,)

    Model.__name__ = Model.__qualname__ = net.__name__
    return Model


def as_diffusers_model(net: type) -> type:
    """Return a diffusers model class for a class of nets. It saves its code with its weights.

    Raises:
        UserError: the class does not take the shape of images, its code is not in a file, or that file imports a
            module that is not installed.
    """
    if not isinstance(net, type):
        raise UserError(f"as_diffusers_model was given a {type(net).__name__} object. Expected a class, such as Net")
    taken = inspect.signature(net.__init__).parameters
    if missing := [name for name in ("sample_size", "in_channels", "out_channels") if name not in taken]:
        raise UserError(
            f"{net.__name__} does not take {', '.join(missing)}. Expected them as arguments of its __init__, "
            "because the config of the saved model needs them"
        )
    model, code = model_class(net), _code_of(net)
    # diffusers caches modules by name, so other code needs another name
    module = f"own_net_{hashlib.sha256(code.encode()).hexdigest()[:12]}"
    save = model.save_pretrained

    def save_pretrained(self, save_directory, **options):
        save(self, save_directory, **options)
        for earlier in Path(save_directory).glob("own_net_*.py"):
            earlier.unlink()
        Path(save_directory, f"{module}.py").write_text(code, encoding="utf-8")

    model.save_pretrained, model.__module__ = save_pretrained, module
    return model


def _code_of(net: type) -> str:
    """Return the text of the file that defines a class, with the lines that let diffusers load it."""
    expected = "Expected a separate file for the net, such as net.py, that imports installed packages only"
    try:
        file = Path(inspect.getsourcefile(net))
        text = file.read_text(encoding="utf-8")
    except (OSError, TypeError) as error:
        raise UserError(f"{net.__name__} cannot be saved: its code is not in a file. {expected}") from error
    if HEAD in text:  # A loaded model has these lines already
        return text
    for name in sorted(_imported(text)):
        if name.startswith(".") or _is_here(name, file.parent):
            found = f"{file.name} imports {name}, which is not an installed package"
            raise UserError(f"{net.__name__} cannot be saved: {found}. {expected}")
    return f"{text.rstrip()}{HEAD}{inspect.getsource(model_class)}\n\n{net.__name__} = model_class({net.__name__})\n"


def _is_here(name: str, folder: Path) -> bool:
    """Return whether a module is beside the net or the script, where no other machine has it."""
    places = {folder.resolve(), Path.cwd().resolve(), Path(sys.path[0] or ".").resolve()}
    return any((place / path).exists() for place in places for path in (f"{name}.py", name))


def _imported(text: str) -> set[str]:
    """Return the names of the packages that a module imports. Relative names begin with a dot."""
    nodes = [*ast.walk(ast.parse(text))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name if name.startswith(".") else name.split(".")[0] for name in names}
