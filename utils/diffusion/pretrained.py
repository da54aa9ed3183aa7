"""Loading of pretrained weights and configs, and checks that model, images and noise schedule fit each other."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline, LCMScheduler, SchedulerMixin, UNet2DModel

from .. import UserError, counted
from ..args import nearest_resolution, size_of
from ..saved import AUTOENCODERS, refuse_missing, shorten, variant_of
from .autoencoders import image_config, load_autoencoder

logger = logging.getLogger(__name__)


@dataclass
class Pretrained:
    """A pretrained pipeline: its UNet, scheduler and, if it draws latents, autoencoder."""

    unet: UNet2DModel
    scheduler: SchedulerMixin
    autoencoder: torch.nn.Module | None = None

    @property
    def image_config(self):
        """Return size and channels of its images, for ``load_train_data``."""
        if not self.autoencoder:
            return self.unet.config
        return image_config(self.autoencoder, self.unet.config)


def load_pretrained(
    name_or_path: str, conditional: bool = False, flow: bool | None = False, condition: bool = False,
    latent: bool = False,
) -> Pretrained:  # fmt: skip
    """Load a pipeline to start training from. A learned variance is left out.

    Args:
        name_or_path: folder or Hub id.
        conditional: whether its UNet may take class labels.
        flow: whether a model of train_flow.py is expected, trained on straight paths instead of with a
            ``DDPMScheduler``. None allows both.
        condition: whether its UNet may take a condition as further channels, as models of train_paired.py do.
        latent: whether it may be a pipeline with an autoencoder, as those of train_latent.py.

    Raises:
        UserError: the pipeline cannot be loaded, or its model is not a UNet2DModel that predicts one or two values
            per channel.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    refuse_missing(flag, name_or_path)
    try:
        index = DDPMPipeline.load_config(name_or_path)
        if str((index.get("unet") or [""])[0]).startswith("own_net_"):
            raise UserError(
                f"{flag}: its net is code that is saved with the model. In a script that has the class, start from its "
                "weights with as_diffusers_model(Net).from_pretrained(FOLDER/unet), see docs/extending.md"
            )
        known = ["unet", "scheduler"]
        if condition and index["_class_name"] == "LDMSuperResolutionPipeline":
            if not diffusers.AutoencoderKL.load_config(name_or_path, subfolder="vqvae").get("_identity"):
                raise UserError(f"{flag}: this pipeline denoises latents. Expected the output of train_paired.py")
            known.append("vqvae")
        if latent:
            known += ["transformer", *AUTOENCODERS]
        others = other_parts(index, known)
        if others:
            expected = "unet, scheduler and an autoencoder" if latent else "unet and scheduler"
            raise UserError(f"{flag}: this pipeline also has {others}. Expected only {expected}")
        if "transformer" in index:  # a DiTPipeline
            if index["transformer"][1] != "UNet2DModel":
                raise UserError(f"{flag}: its transformer is a {index['transformer'][1]}. Expected a UNet2DModel")
            unet = UNet2DModel.from_pretrained(name_or_path, subfolder="transformer")
            kind = getattr(diffusers, index["scheduler"][1])
            pipeline = Pretrained(unet, kind.from_pretrained(name_or_path, subfolder="scheduler"))
        else:
            found = DDPMPipeline.from_pretrained(name_or_path, variant=variant_of(Path(name_or_path) / "unet"))
            pipeline = Pretrained(found.unet, found.scheduler)
        if latent and any(index.get(part) for part in AUTOENCODERS):
            pipeline.autoencoder = load_autoencoder(name_or_path, "--pretrained_model_name_or_path")
    except UserError:
        raise
    except Exception as error:  # The Hub client, diffusers and safetensors share no base class of errors
        kind = "pipeline" if latent else "DDPMPipeline"
        raise UserError(
            f"{flag}: cannot be loaded as a {kind}: {type(error).__name__}: {shorten(error)}. "
            "Expected a Hub id, or a folder with model_index.json. Without a network, give the output of train_ddpm.py "
            "or the folder DIR of `hf download ID --local-dir DIR`"
        ) from error
    unet = pipeline.unet
    check_noise(pipeline.scheduler, flag, pipeline.scheduler.config.get("use_flow_sigmas") if flow is None else flow)
    if isinstance(pipeline.scheduler, LCMScheduler):
        raise UserError(f"{flag}: this is already a few-step model. Adapt its teacher, and distil the adapted teacher")
    check_embeddings(unet.config, flag)
    local = Path(name_or_path).exists()
    # Otherwise a local path would be saved with the new model
    unet.register_to_config(_name_or_path=None if local else name_or_path)
    if not isinstance(unet, UNet2DModel):
        raise UserError(f"{flag}: its unet is a {type(unet).__name__}. Expected a UNet2DModel (unconditional)")
    if unet.class_embedding is not None and not conditional:
        raise UserError(
            f"{flag}: its unet takes class labels. Expected an unconditional one. For this model use "
            f"{'train_latent.py --class_conditional' if pipeline.autoencoder else 'train_conditional.py'}"
        )
    has_condition = condition and unet.config.out_channels < unet.config.in_channels
    channels = unet.config.out_channels if has_condition else unet.config.in_channels
    if channels not in (1, 3) and not pipeline.autoencoder:
        more = " For a model with a condition use the script that trained it." * (channels == 2)
        raise UserError(f"{flag}: its unet takes {channels} channels. Expected 1 or 3.{more}")
    if not has_condition:
        leave_out_variance(unet, pipeline.scheduler, flag)
    return pipeline


def add_input_channels(unet: UNet2DModel, in_channels: int) -> UNet2DModel:
    """Return a trained UNet that takes further channels, for a condition. At first they do not change its output.

    Raises:
        UserError: the UNet already takes another number of further channels.
    """
    first, taken = unet.conv_in, unet.config.in_channels
    if taken == in_channels:
        return unet
    if taken != unet.config.out_channels:
        raise UserError(
            f"the pretrained model takes {taken} channels with its condition, but these images and their condition "
            f"have {in_channels}. Expected the same kind of condition, or a model without one"
        )
    unet.conv_in = torch.nn.Conv2d(in_channels, first.out_channels, first.kernel_size, padding=first.padding)
    torch.nn.init.zeros_(unet.conv_in.weight)
    unet.conv_in.weight.data[:, :taken], unet.conv_in.bias.data = first.weight.data, first.bias.data
    unet.register_to_config(in_channels=in_channels)
    return unet


def other_parts(index: dict, known: Sequence[str] = ("unet", "scheduler")) -> str:
    """Return the other parts of a pipeline with their classes, or "" if there are none.

    Args:
        index: content of ``model_index.json``.
        known: names of parts to leave out.
    """
    parts = {name: part[1] for name, part in index.items() if isinstance(part, (list, tuple)) and name[0] != "_"}
    return ", ".join(f"{name} ({kind})" for name, kind in parts.items() if kind and name not in known)


def leave_out_variance(unet: UNet2DModel, scheduler: SchedulerMixin, flag_label: str) -> None:
    """Remove the outputs for a learned variance (Nichol & Dhariwal 2021, arXiv:2102.09672), if there are any.

    Args:
        flag_label: flag and name of the model, for messages.

    Raises:
        UserError: the model has another number of outputs.
    """
    channels = unet.config.in_channels
    if unet.config.out_channels == 2 * channels:
        logger.info(f"{flag_label} also predicts a variance (arXiv:2102.09672). Only its mean is used.")
        last = unet.conv_out
        unet.conv_out = torch.nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        unet.conv_out.load_state_dict({"weight": last.weight[:channels], "bias": last.bias[:channels]})
        unet.register_to_config(out_channels=channels)
        scheduler.register_to_config(variance_type="fixed_small")
        if hasattr(scheduler, "variance_type"):  # DDPMScheduler.step reads the attribute
            scheduler.variance_type = "fixed_small"
    elif unet.config.out_channels != channels:
        raise UserError(
            f"{flag_label}: {channels} channels in, {unet.config.out_channels} out. Expected the same "
            "number, or twice as many. For a model with a condition use the script that trained it"
        )


def check_noise(scheduler: SchedulerMixin, flag_label: str, flow: bool = False) -> None:
    """Refuse a model that was not trained with the noise of a ``DDPMScheduler`` or, with ``flow``, on straight paths.

    Args:
        scheduler: scheduler of the model.
        flag_label: flag and name of the model, for messages.
        flow: whether straight paths are expected.

    Raises:
        UserError: the model was trained with other noise.
    """
    config = scheduler.config
    prediction = config.get("prediction_type")
    if flow and config.get("use_flow_sigmas") and prediction in ("flow_prediction", "sample"):
        return
    if flow:
        raise UserError(
            f"{flag_label}: a model with a {type(scheduler).__name__} (prediction_type {prediction}) was not trained "
            "on straight paths. Expected the output of train_flow.py"
        )
    if config.get("use_flow_sigmas"):
        raise UserError(
            f"{flag_label}: the model was trained on straight paths. Expected the noise of a DDPMScheduler. For this "
            "model use train_flow.py"
        )
    ddpm = "beta_schedule" in config
    if not (ddpm and prediction in ("epsilon", "sample", "v_prediction")):
        raise UserError(
            f"{flag_label}: its {type(scheduler).__name__} (prediction_type {prediction}) does not have the noise of a "
            "DDPMScheduler. Expected a model that was trained with betas and predicts epsilon, sample or v_prediction"
        )


def check_embeddings(config, flag_label: str) -> None:
    """Refuse a UNet with unsupported embeddings of the noise level or the class.

    Args:
        config: config of the UNet.
        flag_label: flag and name of the model, for messages.

    Raises:
        UserError: its embeddings are not supported.
    """
    if config.get("time_embedding_type") == "fourier":
        raise UserError(
            f"{flag_label}: its UNet has fourier embeddings of the noise level, as score models have. Expected "
            "positional ones"
        )
    if config.get("class_embed_type"):
        raise UserError(
            f"{flag_label}: its UNet has class_embed_type {config['class_embed_type']!r}. Expected num_class_embeds"
        )


def image_shape(config) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the images that a model of this config draws.

    Raises:
        UserError: the config has no ``sample_size``.
    """
    size = size_of(config.sample_size)
    if size is None:
        raise UserError("the model's config.json has no sample_size. Add the size of its images there, such as 32")
    return config.out_channels, *size


def unet_from_config(name_or_path: str, **overrides) -> UNet2DModel:
    """Make a UNet2DModel with random weights.

    Args:
        name_or_path: JSON file, folder with config.json, or Hub id.
        overrides: values that replace those of the config.

    Raises:
        UserError: there is no such config, or no model can be made from it.
    """
    try:
        path = Path(name_or_path)
        config = UNet2DModel._dict_from_json_file(path) if path.is_file() else UNet2DModel.load_config(name_or_path)
    except Exception as error:
        raise UserError(
            f"--model_config_name_or_path {name_or_path}: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Expected a JSON file, a folder with config.json, or a Hub id"
        ) from error
    try:
        unet = UNet2DModel.from_config({**config, **overrides})
    except Exception as error:  # torch's layers raise errors of many classes
        raise UserError(
            f"--model_config_name_or_path {name_or_path}: no UNet2DModel can be made from it: {error}"
        ) from error
    check_embeddings(unet.config, f"--model_config_name_or_path {name_or_path}")
    if unet.class_embedding is not None and "num_class_embeds" not in overrides:
        raise UserError(
            f"--model_config_name_or_path {name_or_path}: its UNet takes class labels. Expected an unconditional one"
        )
    return zero_init(unet)


def zero_init(unet: UNet2DModel) -> UNet2DModel:
    """Set the last layer of each residual and attention block, and of the UNet, to zero.

    At initialization each block is then the identity, and the UNet predicts zero. Ho et al. 2020 do so, but diffusers
    does not.
    """
    for name, layer in unet.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return unet


def check_fit(
    unet: torch.nn.Module, noise_scheduler: SchedulerMixin, shape: tuple[int, int, int], num_inference_steps: int,
    in_channels: int | None = None, downsampling: int = 1,
) -> None:  # fmt: skip
    """Refuse a model, images, a noise schedule and a number of sampling steps that do not fit each other.

    Only the config of the model is checked.

    Args:
        shape: (C, H, W) in the space that the model denoises in.
        in_channels: number of input channels of a model with a condition. The default is C.
        downsampling: image pixels per latent in each direction, for models of latents.

    Raises:
        UserError: the number of channels is wrong, or the resolution is not divisible by the model's
            downsampling factor or patch size. See also ``check_noise_scheduler``.
    """
    check_noise_scheduler(noise_scheduler, num_inference_steps)
    config = getattr(unet, "config", {})
    channels, height, width = shape
    taken = config.get("in_channels") or channels
    if in_channels is None and taken != channels:
        convert = {1: "--image_mode L converts them", 3: "--image_mode RGB converts them"}.get(
            taken, "For a model with a condition, give in_channels="
        )
        raise UserError(f"the images have {counted(channels, 'channel')}, but the model takes {taken}. {convert}")
    given = config.get("out_channels") or channels
    if in_channels not in (None, taken) or given != channels:
        raise UserError(
            f"the model takes {taken} channels and returns {given}. Expected {in_channels or channels} and {channels}, "
            f"to denoise {counted(channels, 'channel')}{' with a condition' * bool(in_channels)}"
        )
    factor, does = 1, ""
    # In other configs, these entries may have another meaning
    if type(unet).__module__.startswith(("diffusers.", __package__)):
        factor, does = config.get("patch_size") or 1, "cuts them into patches"
        if "block_out_channels" in config:
            halvings = len(config["block_out_channels"]) - 1
            factor, does = 2**halvings, f"halves them {halvings} times"
    if height % factor or width % factor:
        factor, height, width = (number * downsampling for number in (factor, height, width))
        does = does.replace("them", "their latents" if downsampling > 1 else "them")
        raise UserError(
            f"images of {height} x {width} pixels: this model {does}, so it needs multiples of {factor}. "
            f"Try --resolution {nearest_resolution((height, width), factor)}"
        )


def check_noise_scheduler(noise_scheduler: SchedulerMixin, num_inference_steps: int, trailing: bool = True) -> None:
    """Refuse a noise schedule unsuited to the prediction type, and numbers of sampling steps that do not fit it.

    Args:
        trailing: whether samples are drawn with timesteps of "trailing" spacing, as ``schedulers.make_sampler`` does.

    Raises:
        UserError: they do not fit. The message names the setting to change.
    """
    config = noise_scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr needs the prediction type v_prediction or sample. At the last timestep the input "
            "is pure noise, so predicting that noise teaches nothing about images"
        )
    if num_inference_steps > config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: there are only {config.num_train_timesteps} noise levels. "
            "Give at most that many"
        )
    levels = config.num_train_timesteps
    if trailing and "beta_schedule" in config and not config.get("use_flow_sigmas"):
        # diffusers computes timesteps in this way. For some numbers, rounding adds one below zero, which means noise
        fits = lambda n: len(np.arange(levels, 0, -levels / n)) == n  # noqa: E731
        if not fits(num_inference_steps):
            near = min(filter(fits, range(1, levels + 1)), key=lambda n: abs(n - num_inference_steps))
            raise UserError(
                f"--num_inference_steps {num_inference_steps}: rounding in diffusers would add a step. Give {near}"
            )
