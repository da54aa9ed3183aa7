"""UNets that come from elsewhere, and whether they fit the images."""

import json
import logging
import os
import re
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel

from . import UserError
from .basic_unet import BasicUNet
from .schedulers import LinearMixScheduler, make_sampler

logger = logging.getLogger(__name__)


def load_pretrained(name_or_path: str) -> DDPMPipeline:
    """An unconditional pipeline with its weights, from a folder or the Hub; a learned variance is left out.

    Raises:
        UserError: it cannot be loaded, or is not a UNet2DModel that predicts one value per channel, or two.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    _refuse_missing(flag, name_or_path)
    try:
        pipeline = DDPMPipeline.from_pretrained(name_or_path)
    except Exception as error:  # the Hub client, diffusers and safetensors share no class of errors
        raise UserError(
            f"{flag}: cannot be loaded as a DDPMPipeline: {type(error).__name__}: {_short(error)}. "
            "Expected a Hub id, or a folder with model_index.json: without a network the output of train_ddpm.py, or "
            "what `hf download ID --local-dir DIR` fetched elsewhere"
        ) from error
    unet = pipeline.unet
    local = Path(name_or_path).exists()
    unet.register_to_config(_name_or_path=None if local else name_or_path)  # no path of this machine is saved again
    if not isinstance(unet, UNet2DModel):
        raise UserError(f"{flag}: its unet is a {type(unet).__name__}; expected a UNet2DModel (unconditional)")
    if unet.class_embedding is not None:
        raise UserError(f"{flag}: its unet wants class labels; expected an unconditional one")
    channels = unet.config.in_channels
    if unet.config.out_channels == 2 * channels:
        logger.info(
            f"{name_or_path} predicts a variance, too (arXiv:2102.09672): its mean is used, the variance is not"
        )
        last = unet.conv_out
        unet.conv_out = torch.nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        unet.conv_out.load_state_dict({"weight": last.weight[:channels], "bias": last.bias[:channels]})
        unet.register_to_config(out_channels=channels)
        pipeline.scheduler.register_to_config(variance_type="fixed_small")
    elif unet.config.out_channels != channels:
        raise UserError(f"{flag}: {channels} channels in, {unet.config.out_channels} out; expected as many, or twice")
    return pipeline


def load_pipeline(name_or_path: str) -> tuple[ModelMixin, SchedulerMixin]:
    """UNet and scheduler of a pipeline that can draw images by itself, without running code that comes with it.

    Args:
        name_or_path: a folder or Hub id: the output of these scripts, a ``DDPMPipeline``, or a ``UNet2DModel`` alone,
            which then gets a ``DDPMScheduler``.

    Raises:
        UserError: it cannot be loaded, or consists of other classes.
    """
    ours = {"BasicUNet": BasicUNet, "LinearMixScheduler": LinearMixScheduler}
    _refuse_missing("", name_or_path)
    expected = "expected a pipeline with model_index.json, made by these scripts or a DDPMPipeline, or a UNet2DModel"
    try:
        try:
            index = DiffusionPipeline.load_config(name_or_path)
        except (OSError, ValueError):  # no pipeline; perhaps a model
            if UNet2DModel.load_config(name_or_path).get("_class_name") != "UNet2DModel":
                raise
            return UNet2DModel.from_pretrained(name_or_path), DDPMScheduler()
        classes = [index.get(part, [None, None])[1] for part in ("unet", "scheduler")]
        unet_class, scheduler_class = (ours.get(str(name), getattr(diffusers, str(name), None)) for name in classes)
        if unet_class not in (UNet2DModel, BasicUNet) or scheduler_class is None:
            raise UserError(f"{name_or_path}: its parts are {' and '.join(map(str, classes))}; {expected}")
        unet = unet_class.from_pretrained(name_or_path, subfolder="unet")
        return unet, scheduler_class.from_pretrained(name_or_path, subfolder="scheduler")
    except UserError:
        raise
    except Exception as error:  # the Hub client, diffusers and safetensors share no class of errors
        reason = f"{type(error).__name__}: {_short(error)}"
        raise UserError(f"{name_or_path} cannot be loaded: {reason}; {expected}") from error


def _refuse_missing(flag: str, name_or_path: str) -> None:
    """A path that is not there would be looked for on the Hub, for a minute where there is no network."""
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path[0] in "./~" or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if looks_local and not path.exists():
        raise UserError(f"{flag or name_or_path}: there is no such folder; expected a saved pipeline, or a Hub id")


def _short(error: Exception) -> str:
    """The first 160 characters: libraries append advice about their own functions."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


def load_config(name_or_path: str, **overrides) -> dict:
    """The config of a UNet2DModel (a JSON file, a folder with config.json, or a Hub id), without weights."""
    try:
        path = Path(name_or_path)
        config = UNet2DModel._dict_from_json_file(path) if path.is_file() else UNet2DModel.load_config(name_or_path)
    except Exception as error:
        raise UserError(
            f"--model_config_name_or_path {name_or_path}: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Expected a JSON file, a folder with config.json, or a Hub id"
        ) from error
    return {**config, **overrides}


def make_unet(config: dict) -> UNet2DModel:
    """A UNet2DModel with random weights.

    Raises:
        UserError: diffusers or torch refuse the config.
    """
    try:
        return UNet2DModel.from_config(config)
    except Exception as error:  # torch's layers raise what they like
        raise UserError(f"--model_config_name_or_path: no UNet2DModel can be made of it: {error}") from error


def image_format(unet: UNet2DModel) -> dict:
    """The images that a model was made for, as ``load_train_data`` takes them."""
    modes = {1: "L", 3: "RGB"}
    if unet.config.in_channels not in modes:
        raise UserError(f"the pretrained model takes {unet.config.in_channels} channels; expected 1 or 3")
    return {"resolution": unet.config.sample_size, "image_mode": modes[unet.config.in_channels]}


def check_fit(unet: UNet2DModel, resolution: int, channels: int) -> None:
    """Refuse images that the model cannot take.

    Raises:
        UserError: wrong number of channels, or a resolution that cannot be halved as often as the model halves it.
    """
    if unet.config.in_channels != channels:
        raise UserError(
            f"the images have {channels} channels, the model takes {unet.config.in_channels}; --image_mode "
            f"{ {1: 'L', 3: 'RGB'}.get(unet.config.in_channels, '?') } converts them"
        )
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if resolution % factor:
        near = max(factor, round(resolution / factor) * factor)
        raise UserError(
            f"images of {resolution} pixels: this UNet halves them {len(unet.config.block_out_channels) - 1} times, so "
            f"it needs a multiple of {factor}; try --resolution {near}"
        )


def check_noise_scheduler(noise_scheduler, num_inference_steps: int) -> None:
    """Refuse what cannot be trained, and more sampling steps than there are noise levels.

    Raises:
        UserError: says which flag to change.
    """
    config = noise_scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        raise UserError(
            "--rescale_betas_zero_snr needs --prediction_type v_prediction or sample: at its last timestep the input "
            "is nothing but noise, and to predict that noise teaches nothing about images"
        )
    if num_inference_steps > config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: there are only {config.num_train_timesteps} noise levels; "
            "give at most that many"
        )


def choose_sampler(own: SchedulerMixin, name: str | None, num_inference_steps: int) -> SchedulerMixin:
    """The sampler called ``name`` for a model that came with the scheduler ``own``, or that one without a name.

    Raises:
        UserError: linear mixing has no other sampler; see also ``check_noise_scheduler``.
    """
    if isinstance(own, LinearMixScheduler):
        if name:
            raise UserError(
                f"--sampler {name}: the model was trained on linear mixing, which has its own; drop the flag"
            )
        return own
    check_noise_scheduler(own, num_inference_steps)
    return make_sampler(name, own) if name else own


def check_writable(name: str) -> None:
    """Refuse a pipeline whose scheduler cannot be replaced.

    Raises:
        UserError: no folder, not a DDPMPipeline, or a checkpoint, whose files are listed with their hashes.
    """
    index = Path(name) / "model_index.json"
    if not index.is_file():
        raise UserError(f"--write_best: {name} is not a folder with a pipeline; expected the output of train_ddpm.py")
    if (Path(name) / "manifest.json").exists():
        raise UserError(f"--write_best: {name} is a checkpoint, and stays as it was saved; give the run's folder")
    pipeline_class = json.loads(index.read_text())["_class_name"]
    if pipeline_class != "DDPMPipeline":
        raise UserError(f"--write_best: {name} is a {pipeline_class}, which has one sampler; expected a DDPMPipeline")


def write_scheduler(folder: Path, scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Put another scheduler into a saved DDPMPipeline, and into the lines of its README.md that load it."""
    changes = {}
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    changes["model_index.json"] = json.dumps(index, indent=2) + "\n"
    changes["scheduler/scheduler_config.json"] = scheduler.to_json_string()
    if (folder / "README.md").is_file():
        card = re.sub(
            r"num_inference_steps=\d+", f"num_inference_steps={num_inference_steps}", (folder / "README.md").read_text()
        )
        changes["README.md"] = re.sub(
            r"saved scheduler is `\w+`", f"saved scheduler is `{type(scheduler).__name__}`", card
        )
    for name, text in changes.items():  # each of them complete or as it was
        staging = folder / f"{name}.tmp"
        staging.write_text(text)
        os.replace(staging, folder / name)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in model.parameters())
