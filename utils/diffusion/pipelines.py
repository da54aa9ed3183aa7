"""Loading of trained models for sampling: UNet, scheduler, sampler, and interpolation of noise."""

import inspect
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DModel
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from huggingface_hub import snapshot_download

from .. import UserError, read_record
from ..args import SAMPLERS
from ..saved import AUTOENCODERS, NETS, refuse_missing, shorten, variant_of
from . import flow, schedulers
from .basic_unet import BasicUNet
from .few_steps import is_compatible, is_few_step
from .identity import is_identity
from .linear_mix import LinearMixScheduler
from .pretrained import (
    check_embeddings,
    check_noise,
    check_noise_scheduler,
    image_shape,
    leave_out_variance,
    other_parts,
)
from .sampling import sample_images
from .spaces import Latents, Pixels
from .unets import concatenate_condition


def load_pipeline(name_or_path: str, trust_remote_code: bool = False) -> tuple[ModelMixin, SchedulerMixin, Pixels]:
    """Load the UNet, the scheduler and the space of a pipeline.

    The UNet of an ``LDMSuperResolutionPipeline`` takes ``condition=``, see ``conditions.Condition.of_model``.

    Args:
        name_or_path: folder or Hub id of the output of these scripts, a ``DDPMPipeline``, an ``LDMPipeline``, a
            ``DiTPipeline`` with a ``UNet2DModel``, or a ``UNet2DModel`` alone, to which a ``DDPMScheduler`` is added. A
            learned variance is left out.
        trust_remote_code: whether code that is saved with the model may run. Only nets of ``own_nets`` need it.

    Raises:
        UserError: the pipeline cannot be loaded, or consists of other classes.
    """
    ours = {"BasicUNet": BasicUNet, "LinearMixScheduler": LinearMixScheduler}
    refuse_missing("", name_or_path)
    expected = "Expected a model of these scripts that draws, a DDPMPipeline, an LDMPipeline or a UNet2DModel"
    try:
        folder = Path(name_or_path).expanduser()
        if not folder.exists():
            kinds = ["*.json", "*.safetensors", "*.bin", *(["*.py"] if trust_remote_code else [])]
            patterns = dict(allow_patterns=kinds, ignore_patterns="checkpoint-*")
            folder = Path(snapshot_download(name_or_path, **patterns))
        if (folder / "model_index.json").is_file():
            index = read_record(folder / "model_index.json")
            if others := other_parts(index, (*NETS, "scheduler", *AUTOENCODERS)):
                raise UserError(f"{name_or_path}: this pipeline also has {others}. {expected}")
            parts = ("transformer" if "transformer" in index else "unet", "scheduler")
            classes = [index.get(part, [None, None])[1] for part in parts]
        else:  # Not a pipeline, but perhaps a model
            index, parts = {}, ("unet", "scheduler")
            classes = [UNet2DModel.load_config(folder).get("_class_name"), None]
        unet_class, scheduler_class = (ours.get(str(name), getattr(diffusers, str(name), None)) for name in classes)
        code = f"{index.get('unet', [''])[0]}.py"
        if code.startswith("own_net_"):  # A net of ``own_nets``
            if not trust_remote_code:
                raise UserError(
                    f"{name_or_path}: its net {classes[0]} is code that is saved with the model. Read unet/{code} "
                    "there. Then give --trust_remote_code to run it"
                )
            unet_class = get_class_from_dynamic_module(
                folder / "unet", code, class_name=classes[0], trust_remote_code=True
            )
        elif unet_class not in (UNet2DModel, BasicUNet):
            unet_class = None
        if unet_class is None or (classes[1] and scheduler_class is None):
            kinds = " and ".join(str(kind) for kind in classes if kind)
            latent = ". For an autoencoder, train a model of its latents: train_latent.py --vae FOLDER"
            advice = latent if str(classes[0]).startswith("Autoencoder") else ""
            raise UserError(f"{name_or_path}: its parts are {kinds}. {expected}{advice}")
        # As in DiffusionPipeline, a part without a folder is beside model_index.json
        places = [folder / part if (folder / part).is_dir() else folder for part in parts]
        unet = unet_class.from_pretrained(places[0], variant=variant_of(places[0]))
        check_embeddings(unet.config, name_or_path)
        scheduler = scheduler_class.from_pretrained(places[1]) if scheduler_class else DDPMScheduler()
        if index.get("_class_name") == "LDMSuperResolutionPipeline":
            concatenate_condition(unet)
        else:
            leave_out_variance(unet, scheduler, name_or_path)
        space = Pixels(image_shape(unet.config))
        for part in AUTOENCODERS:
            if kind := index.get(part, [None, None])[1]:
                autoencoder = getattr(diffusers, kind).from_pretrained(folder / part, variant=variant_of(folder / part))
                space = space if is_identity(autoencoder) else Latents.of_shape(autoencoder, space.shape)
        if index.get("_class_name") == "LDMSuperResolutionPipeline":
            space.scale = 1.0  # This pipeline does not scale latents
        if not space.in_unit_range and "clip_sample" not in scheduler.config:
            scheduler.register_to_config(clip_sample=False)  # Otherwise other samplers would clip latents
        return unet, scheduler, space
    except UserError:
        raise
    except Exception as error:  # The Hub client, diffusers and safetensors share no base class of errors
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise UserError(f"{name_or_path} cannot be loaded: {reason}. {expected}") from error


def choose_sampler(
    own: SchedulerMixin, name: str | None, num_inference_steps: int, steered: bool = False
) -> SchedulerMixin:
    """Return the sampler for a model, ready for its first step.

    Args:
        own: scheduler that was saved with the model.
        name: name of the sampler, or None for ``own``.
        num_inference_steps: number of sampling steps.
        steered: whether guidance, ``--init_image`` or ``--gif`` is used. They need the noise of a ``DDPMScheduler``,
            linear mixing or a straight path.

    Raises:
        UserError: the model was not trained for this sampler, or ``own`` does not have the interface of diffusers'
            samplers. See also ``check_noise_scheduler``.
    """
    path = is_flow(own)
    if isinstance(own, LinearMixScheduler) and not path:
        if name:
            raise UserError(
                f"--sampler {name}: the model was trained on linear mixing, which has its own sampler. Leave the flag "
                "out"
            )
        return own
    kind = type(own).__name__
    if name and not is_compatible(name, own):
        trained = "for many small steps. lcm is for models of distill_few_steps.py"
        if is_few_step(own):
            trained = "for a few large steps. Expected lcm"
        raise UserError(f"--sampler {name}: the model was trained {trained}")
    if name and not path:
        check_noise(own, f"--sampler {name}")
        if name not in (*SAMPLERS, "lcm"):
            raise UserError(f"--sampler {name} is for models of train_flow.py. Expected {', '.join(SAMPLERS)}")
    elif not name:
        try:
            inspect.signature(own.step).bind("model_output", "timestep", "sample")
            called = hasattr(own, "init_noise_sigma") and hasattr(own, "scale_model_input")
        except (AttributeError, TypeError):
            called = False
        if not called:
            raise UserError(
                f"the model's {kind} does not have the interface of a DDPMScheduler. Draw with the model's own pipeline"
            )
        if steered and not (path or (hasattr(own, "alphas_cumprod") and own.init_noise_sigma == 1)):
            raise UserError(
                f"the model's {kind} does not have the noise of a DDPMScheduler. Guidance, --init_image and --gif need "
                "it. Give a --sampler, or leave these flags out"
            )
    trailing = bool(name) or own.config.get("timestep_spacing") == "trailing"
    check_noise_scheduler(own, num_inference_steps, trailing)
    sampler = own if name in (None, "lcm") else (flow if path else schedulers).make_sampler(name, own)
    try:
        sampler.set_timesteps(num_inference_steps)
    except Exception as error:  # Each scheduler has its own rules and errors
        kind = type(sampler).__name__
        raise UserError(
            f"--num_inference_steps {num_inference_steps}: {kind} refuses this number: {shorten(error)}"
        ) from error
    return sampler


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Return whether a model with this scheduler was trained on straight paths to normal noise."""
    return isinstance(scheduler, flow.FlowScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


def default_steps(scheduler: SchedulerMixin) -> int:
    """Return the default number of sampling steps of a model with this scheduler."""
    return 2 if is_few_step(scheduler) else 40


def saved_scheduler(name: str, own: SchedulerMixin, latent: bool = False) -> SchedulerMixin:
    """Return the scheduler to save in a pipeline that draws with this sampler.

    Args:
        name: name of the sampler.
        own: scheduler of the model.
        latent: whether the pipeline draws latents.

    Raises:
        UserError: a pipeline of latents cannot use the sampler.
    """
    if is_few_step(own):
        return own
    kept = schedulers.make_sampler if latent else schedulers.pipeline_scheduler
    scheduler = (flow.make_sampler if is_flow(own) else kept)(name, own)
    if latent and adds_noise(scheduler):
        raise UserError(
            f"--sampler {name} adds noise at each step. LDMPipeline passes no generator to it, so a seed would not "
            "repeat its images. Expected ddim, dpmsolver++ or unipc"
        )
    return scheduler


def training_scheduler(scheduler: SchedulerMixin, space: Pixels | None = None) -> SchedulerMixin:
    """Return the scheduler that added noise in training, for a model with this scheduler.

    Args:
        scheduler: scheduler of the model.
        space: space that the model denoises in. In latents, samplers do not clip. The default is pixels.
    """
    if isinstance(scheduler, LinearMixScheduler) and not is_flow(scheduler):
        return scheduler
    if is_flow(scheduler):
        return flow.FlowScheduler(
            *(scheduler.config[k] for k in ("num_train_timesteps", "prediction_type", "flow_shift"))
        )
    check_noise(scheduler, "the denoising loss")
    clips = {} if space is None or space.in_unit_range else {"clip_sample": False}
    return DDPMScheduler.from_config(scheduler.config, **clips)


def estimate_seconds(model, sampler, accelerator, count, shape, num_inference_steps, batch_size, *rest, **options):
    """Return the estimated seconds of ``sample_images`` with the same arguments, from one step of one batch."""
    times = []
    for _ in range(2):  # The first one is a warm-up
        start = time.perf_counter()
        once = min(count, batch_size * accelerator.num_processes)
        sample_images(model, sampler, accelerator, once, shape, 1, batch_size, *rest, **options)
        times.append(time.perf_counter() - start)
    return times[-1] * num_inference_steps * -(-count // once)


def interpolation_sampler(own: SchedulerMixin) -> str | None:
    """Return the name of a deterministic sampler for interpolation, or None to keep ``own``.

    A sampler that adds noise at every step loses the interpolated noise that it started from, so the images would not
    change smoothly. Few-step models have no other sampler, so they interpolate smoothly in a single step only.
    """
    return "dpmsolver++" if adds_noise(own) else None


def adds_noise(scheduler: SchedulerMixin) -> bool:
    """Return whether a sampler adds noise at every step. False for few-step models, which have no other sampler."""
    return isinstance(scheduler, DDPMScheduler) or str(scheduler.config.get("algorithm_type")).startswith("sde")


def interpolate_noise(scheduler, first: torch.Tensor, second: torch.Tensor, fractions: torch.Tensor) -> torch.Tensor:
    """Interpolate between two starting noises of this scheduler, see ``slerp``.

    Uniform noise in [-1, 1], as in linear mixing, is mapped to normal noise, interpolated, and mapped back.

    Args:
        first, second: starting noises, (1, C, H, W).
        fractions: positions between them in [0, 1], (B,).

    Returns:
        Noises (B, C, H, W) of the same distribution.
    """
    ends = [end.expand(len(fractions), -1, -1, -1) for end in (first, second)]
    if getattr(scheduler, "noise_distribution", "normal") == "normal":
        return slerp(*ends, fractions)
    normal = slerp(*(torch.erfinv(end.clamp(-1 + 1e-6, 1 - 1e-6)) * 2**0.5 for end in ends), fractions)
    return torch.erf(normal / 2**0.5)


def slerp(first: torch.Tensor, second: torch.Tensor, fraction: float | torch.Tensor) -> torch.Tensor:
    """Interpolate spherically (Shoemake 1985), so that normal noises give normal noise.

    Args:
        first, second: ends of the interpolation, (B, ...).
        fraction: position from ``first`` at 0 to ``second`` at 1: a single number, or one for each sample (B,).
    """
    flat = [noise.flatten(1) for noise in (first, second)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine).clamp(min=1e-6)
    fraction = torch.as_tensor(fraction, dtype=first.dtype, device=first.device)
    weights = torch.sin((1 - fraction) * angle) / torch.sin(angle), torch.sin(fraction * angle) / torch.sin(angle)
    return sum(w.view(-1, *[1] * (first.dim() - 1)) * noise for w, noise in zip(weights, (first, second), strict=True))
