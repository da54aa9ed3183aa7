"""Any trained model as something to draw with: its UNet, its scheduler, and the sampler that was asked for."""

import time

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel

from .. import UserError
from .basic_unet import BasicUNet
from .linear_mix import LinearMixScheduler
from .pretrained import check_noise_scheduler, refuse_missing, shorten
from .sampling import sample_images
from .schedulers import make_sampler


def load_pipeline(name_or_path: str) -> tuple[ModelMixin, SchedulerMixin]:
    """UNet and scheduler of a pipeline that can draw images by itself, without running code that comes with it.

    Args:
        name_or_path: a folder or Hub id: the output of these scripts, a ``DDPMPipeline``, or a ``UNet2DModel`` alone,
            which then gets a ``DDPMScheduler``.

    Raises:
        UserError: it cannot be loaded, or consists of other classes.
    """
    ours = {"BasicUNet": BasicUNet, "LinearMixScheduler": LinearMixScheduler}
    refuse_missing("", name_or_path)
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
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise UserError(f"{name_or_path} cannot be loaded: {reason}; {expected}") from error


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


def training_scheduler(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that noised the training images of the model that carries this one: DDPM's, or linear mixing."""
    return scheduler if isinstance(scheduler, LinearMixScheduler) else DDPMScheduler.from_config(scheduler.config)


def estimate_seconds(model, sampler, accelerator, count, shape, num_inference_steps, batch_size, *rest, **options):
    """How long ``sample_images`` with the same arguments will take: float, from one model call on one batch."""
    times = []
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        once = min(count, batch_size * accelerator.num_processes)
        sample_images(model, sampler, accelerator, once, shape, 1, batch_size, *rest, **options)
        times.append(time.perf_counter() - start)
    return times[-1] * num_inference_steps * -(-count // once)


def slerp(first: torch.Tensor, second: torch.Tensor, fraction: float | torch.Tensor) -> torch.Tensor:
    """Spherical interpolation (Shoemake 1985): between two normal noises the result is normal noise again.

    Args:
        first, second: (B, ...).
        fraction: 0 gives ``first``, 1 gives ``second``; one, or one for each sample (B,).
    """
    flat = [noise.flatten(1) for noise in (first, second)]
    cosine = torch.nn.functional.cosine_similarity(*flat, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine).clamp(min=1e-6)
    fraction = torch.as_tensor(fraction, dtype=first.dtype, device=first.device)
    weights = torch.sin((1 - fraction) * angle) / torch.sin(angle), torch.sin(fraction * angle) / torch.sin(angle)
    return sum(w.view(-1, *[1] * (first.dim() - 1)) * noise for w, noise in zip(weights, (first, second), strict=True))
