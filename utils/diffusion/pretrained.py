"""Weights and configs that come from elsewhere, and whether model, images and noise schedule fit each other."""

import logging
from pathlib import Path

import torch
from diffusers import DDPMPipeline, LCMScheduler, SchedulerMixin, UNet2DModel

from .. import UserError
from ..args import size_of

logger = logging.getLogger(__name__)


def load_pretrained(name_or_path: str, conditional: bool = False, flow: bool = False) -> DDPMPipeline:
    """A pipeline with its weights, from a folder or the Hub; a learned variance is left out.

    Args:
        conditional: whether its UNet may want class labels.
        flow: whether it was trained on straight paths, by train_flow.py, instead of with a ``DDPMScheduler``.

    Raises:
        UserError: it cannot be loaded, or is not a UNet2DModel that predicts one value per channel, or two.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    refuse_missing(flag, name_or_path)
    try:
        index = DDPMPipeline.load_config(name_or_path)
        if str((index.get("unet") or [""])[0]).startswith("own_net_"):
            raise UserError(
                f"{flag}: its net is code of its author's own. In a script that has the class, "
                "as_diffusers_model(Net).from_pretrained(FOLDER/unet) starts from its weights, see docs/extending.md"
            )
        others = other_parts(index)
        if others:
            raise UserError(f"{flag}: a pipeline with {others} besides; expected one of unet and scheduler alone")
        pipeline = DDPMPipeline.from_pretrained(name_or_path, variant=variant_of(Path(name_or_path) / "unet"))
    except UserError:
        raise
    except Exception as error:  # the Hub client, diffusers and safetensors share no class of errors
        raise UserError(
            f"{flag}: cannot be loaded as a DDPMPipeline: {type(error).__name__}: {shorten(error)}. "
            "Expected a Hub id, or a folder with model_index.json: without a network the output of train_ddpm.py, or "
            "what `hf download ID --local-dir DIR` fetched elsewhere"
        ) from error
    unet = pipeline.unet
    check_noise(pipeline.scheduler, flag, flow)
    if isinstance(pipeline.scheduler, LCMScheduler):
        raise UserError(f"{flag}: draws in a few steps already; adapt its teacher, and distill that again")
    check_embeddings(unet.config, flag)
    local = Path(name_or_path).exists()
    unet.register_to_config(_name_or_path=None if local else name_or_path)  # no path of this machine is saved again
    if not isinstance(unet, UNet2DModel):
        raise UserError(f"{flag}: its unet is a {type(unet).__name__}; expected a UNet2DModel (unconditional)")
    if unet.class_embedding is not None and not conditional:
        raise UserError(
            f"{flag}: its unet takes class labels; expected an unconditional one. train_conditional.py continues it"
        )
    channels = unet.config.in_channels
    if channels not in (1, 3):
        more = " A model that is given a condition is continued by the script that trained it." * (channels == 2)
        raise UserError(f"{flag}: its unet takes {channels} channels; expected 1 or 3.{more}")
    leave_out_variance(unet, pipeline.scheduler, flag)
    return pipeline


def variant_of(folder: Path) -> str | None:
    """``fp16`` where a folder has weights of that variant only; None otherwise."""
    files = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def other_parts(index: dict, known: tuple[str, ...] = ("unet", "scheduler")) -> str:
    """Return the parts of a pipeline that are none of these, with their classes; "" if there are none.

    Args:
        index: content of ``model_index.json``.
    """
    parts = {name: part[1] for name, part in index.items() if isinstance(part, (list, tuple)) and name[0] != "_"}
    return ", ".join(f"{name} ({kind})" for name, kind in parts.items() if kind and name not in known)


def leave_out_variance(unet: UNet2DModel, scheduler: SchedulerMixin, said: str) -> None:
    """Cut the outputs of a model that predicts a variance, too (Nichol & Dhariwal 2021, arXiv:2102.09672) to its mean.

    Args:
        said: the flag or name that the user knows the model by.

    Raises:
        UserError: it has another number of outputs.
    """
    channels = unet.config.in_channels
    if unet.config.out_channels == 2 * channels:
        logger.info(f"{said} predicts a variance, too (arXiv:2102.09672): its mean is used, the variance is not")
        last = unet.conv_out
        unet.conv_out = torch.nn.Conv2d(last.in_channels, channels, last.kernel_size, padding=last.padding)
        unet.conv_out.load_state_dict({"weight": last.weight[:channels], "bias": last.bias[:channels]})
        unet.register_to_config(out_channels=channels)
        scheduler.register_to_config(variance_type="fixed_small")
    elif unet.config.out_channels != channels:
        raise UserError(
            f"{said}: {channels} channels in, {unet.config.out_channels} out; expected as many, or twice. A model that "
            "is given a condition beside the noisy images is drawn by the script that trained it"
        )


def check_noise(scheduler: SchedulerMixin, said: str, flow: bool = False) -> None:
    """Refuse a scheduler whose model was not trained with the noise of a ``DDPMScheduler``, or on straight paths.

    Args:
        said: the flag or name that the user knows the model by.
        flow: expect straight paths.

    Raises:
        UserError: says what it is.
    """
    config = scheduler.config
    prediction = config.get("prediction_type")
    if flow and config.get("use_flow_sigmas") and prediction in ("flow_prediction", "sample"):
        return
    if flow:
        raise UserError(
            f"{said}: its {type(scheduler).__name__} (prediction_type {prediction}) is of no model that was trained on "
            "straight paths; expected the output of train_flow.py"
        )
    if config.get("use_flow_sigmas"):
        raise UserError(
            f"{said}: the model was trained on straight paths; expected the noise of a DDPMScheduler. train_flow.py "
            "continues it"
        )
    ddpm = "beta_schedule" in config
    if not (ddpm and prediction in ("epsilon", "sample", "v_prediction")):
        raise UserError(
            f"{said}: its {type(scheduler).__name__} (prediction_type {prediction}) does not have the noise of a "
            "DDPMScheduler; expected a model that was trained with betas and predicts epsilon, sample or v_prediction"
        )


def check_embeddings(config, said: str) -> None:
    """Refuse a UNet that is told the noise level or the class in a way that nothing here knows.

    Raises:
        UserError: says what it wants.
    """
    if config.get("time_embedding_type") == "fourier":
        raise UserError(
            f"{said}: its UNet has fourier embeddings of the noise level, as score models; expected positional"
        )
    if config.get("class_embed_type"):
        raise UserError(
            f"{said}: its UNet has class_embed_type {config['class_embed_type']!r}; expected num_class_embeds"
        )


def image_shape(config) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model of this config draws.

    Raises:
        UserError: the config does not say.
    """
    size = size_of(config.sample_size)
    if size is None:
        raise UserError("the model's config.json has no sample_size; write the size of its images there, such as 32")
    return config.in_channels, *size


def refuse_missing(flag: str, name_or_path: str) -> None:
    """A path that is not there would be looked for on the Hub, for a minute where there is no network."""
    if not name_or_path:
        raise UserError(f"{flag or 'the model'}: an empty name; expected a saved pipeline, or a Hub id")
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path[0] in "./~" or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if looks_local and not path.exists():
        raise UserError(f"{flag or name_or_path}: there is no such folder; expected a saved pipeline, or a Hub id")


def shorten(error: Exception) -> str:
    """The first 160 characters: libraries append advice about their own functions."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


def unet_from_config(name_or_path: str, **overrides) -> UNet2DModel:
    """A UNet2DModel with random weights.

    Args:
        name_or_path: a JSON file, a folder with config.json, or a Hub id.
        overrides: values that replace those of the config.

    Raises:
        UserError: there is no such config, or diffusers or torch refuse it.
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
    except Exception as error:  # torch's layers raise what they like
        raise UserError(f"--model_config_name_or_path: no UNet2DModel can be made of it: {error}") from error
    check_embeddings(unet.config, f"--model_config_name_or_path {name_or_path}")
    if unet.class_embedding is not None and "num_class_embeds" not in overrides:
        raise UserError(
            f"--model_config_name_or_path {name_or_path}: its UNet wants class labels; expected an unconditional one"
        )
    return zero_init(unet)


def zero_init(unet: UNet2DModel) -> UNet2DModel:
    """Zero the last layer of each residual and attention block and of the UNet, as Ho et al. 2020, unlike diffusers.

    At first each block passes on what it is given, and the UNet predicts zero.
    """
    for name, layer in unet.named_modules():
        if name.endswith(("conv2", "to_out.0", "conv_out")):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    return unet


def check_fit(
    unet: torch.nn.Module, noise_scheduler: SchedulerMixin, shape: tuple[int, int, int], num_inference_steps: int,
    in_channels: int | None = None,
) -> None:  # fmt: skip
    """Refuse a model, images, a noise schedule and a number of sampling steps that do not fit each other.

    Of a model only what its config says is checked.

    Args:
        shape: (C, H, W) of what the model denoises.
        in_channels: number of channels that it takes, where it is given a condition beside them; by default C.

    Raises:
        UserError: wrong number of channels; a resolution that cannot be halved as often as the model halves it, or cut
            into its patches; see also ``check_noise_scheduler``.
    """
    check_noise_scheduler(noise_scheduler, num_inference_steps)
    config = getattr(unet, "config", {})
    channels, height, width = shape
    taken = config.get("in_channels") or channels
    if in_channels is None and taken != channels:
        convert = {1: "--image_mode L converts them", 3: "--image_mode RGB converts them"}.get(
            taken, "where it is given a condition beside them, say so by in_channels="
        )
        raise UserError(f"the images have {channels} channels, the model takes {taken}; {convert}")
    given = config.get("out_channels") or channels
    if in_channels not in (None, taken) or given != channels:
        raise UserError(
            f"the model takes {taken} channels and returns {given}; expected {in_channels or channels} and {channels}, "
            f"to denoise {channels} channels{' beside a condition' * bool(in_channels)}"
        )
    factor, does = 1, ""
    if type(unet).__module__.startswith(("diffusers.", __package__)):  # another's config may mean something else
        factor, does = config.get("patch_size") or 1, "cuts them into patches"
        if "block_out_channels" in config:
            halvings = len(config["block_out_channels"]) - 1
            factor, does = 2**halvings, f"halves them {halvings} times"
    if height % factor or width % factor:
        near = [max(factor, round(side / factor) * factor) for side in (height, width)]
        raise UserError(
            f"images of {height} x {width} pixels: this model {does}, so it needs multiples of {factor}; "
            f"try --resolution {near[0] if near[0] == near[1] else '{}x{}'.format(*near)}"
        )


def check_noise_scheduler(noise_scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Refuse what cannot be trained, and more sampling steps than there are noise levels.

    Raises:
        UserError: says which flag to change.
    """
    config = noise_scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        raise UserError(
            "rescale_betas_zero_snr needs the prediction type v_prediction or sample: at its last timestep the input "
            "is nothing but noise, and to predict that noise teaches nothing about images"
        )
    if num_inference_steps > config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: there are only {config.num_train_timesteps} noise levels; "
            "give at most that many"
        )
