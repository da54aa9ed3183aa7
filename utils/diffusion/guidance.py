"""Guidance of samples by a loss on predicted images: a colour, a sentence, or your own function.

A guidance function takes predicted clean images (B, C, H, W) in [-1, 1] and returns a loss for each, (B,). At every
step its gradient moves the model's prediction before the sampler uses it:

    x_0  <-  x_0 - scale * sqrt(1 - alpha_bar_t) * gradient / 2

The factor is the noise level at timestep t. Guidance is strong at high noise levels and vanishes at the end, where the
model alone decides the details. The loss of an image should be a mean over its pixels. Its gradient is multiplied by
their number, so that the effect of a scale does not depend on the resolution. With the squared distance to a target, a
scale of 1 at pure noise moves the prediction onto the target, and larger scales overshoot. Other losses, and gradients
through the model, need other scales, which you find by experiment.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from PIL import ImageColor

from .. import UserError
from ..pictures import from_uint8
from .schedulers import output_for, predicted_images, signal_and_noise

GuidanceFunction = Callable[[torch.Tensor], torch.Tensor]


class Guidance:
    """A guidance function with its strength and mode.

    Args:
        function: guidance function, called with float32 images. Random numbers from torch's global generator are the
            same at the same timestep of every run.
        scale: guidance strength, 0 for none. The module's docstring explains a scale of 1.
        mode: ``direct`` takes the gradient with respect to the predicted image. ``net`` takes it through the model,
            with respect to its noisy input (DPS, Chung et al. 2022, arXiv:2209.14687). That is slower, but keeps the
            images closer to those of the model.
        space: space that the model denoises in, see ``spaces``. The default is pixels.
    """

    def __init__(
        self, function: GuidanceFunction, scale: float, mode: str = "direct",
        space=None,
    ):  # fmt: skip
        self.function, self.scale, self.mode = function, scale, mode
        self.decode = None if space is None or space.in_unit_range else space.decode

    def predict(self, model, scheduler: SchedulerMixin, sample: torch.Tensor, timestep) -> torch.Tensor:
        """Return the guided counterpart of ``model(sample, timestep).sample``, in float32."""
        with torch.set_grad_enabled(self.mode == "net"):
            sample = sample.detach().requires_grad_(self.mode == "net")
            output = model(scheduler.scale_model_input(sample, timestep), timestep).sample.float()
            predicted = predicted_images(scheduler, output, sample, timestep)
        with torch.enable_grad(), torch.random.fork_rng([sample.device] if sample.is_cuda else []):
            torch.manual_seed(int(timestep))
            # The values are clipped and the gradient is not, because early predictions exceed [-1, 1] by far
            clip = lambda images: images + (images.clamp(-1, 1) - images).detach()  # noqa: E731
            predicted = predicted if self.decode else clip(predicted)
            at = sample if self.mode == "net" else predicted.requires_grad_()
            images = clip(self.decode(predicted)) if self.decode else predicted
            losses = self.function(images)
            if losses.shape != sample.shape[:1]:
                raise UserError(
                    f"the guidance function returned shape {tuple(losses.shape)}. Expected one loss per image"
                )
            losses = losses * images[0].numel()  # Scaled here, because the gradient would underflow in fp16
            (gradient,) = torch.autograd.grad(losses.sum(), at)
        _, noise_level = signal_and_noise(scheduler, timestep, sample)
        step = self.scale * noise_level * gradient / 2
        return output_for(scheduler, predicted.detach() - step, sample.detach(), timestep)


def make_guidance(args, device: torch.device, **options) -> Guidance | None:
    """Return the guidance that the flags of ``guidance_args`` ask for, or None.

    Args:
        options: further arguments of ``Guidance``.
    """
    if args.guidance_color:
        function = color_loss(args.guidance_color)
    elif args.guidance_prompt:
        function = clip_loss(args.guidance_prompt, args.clip_model_name_or_path, device)
    else:
        return None
    return Guidance(function, args.guidance_scale, args.guidance_mode, **options)


def color_loss(color: str) -> GuidanceFunction:
    """Return a guidance function: the mean squared distance of the pixels to a colour.

    Args:
        color: name or ``#rrggbb``, in Pillow's syntax. Grey images are compared with its lightness.

    Raises:
        ValueError: there is no such colour.
    """
    target = from_uint8(torch.tensor(ImageColor.getrgb(color)[:3]))
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as in Pillow's conversion to grey

    def loss(images):
        wanted = target if images.shape[1] == 3 else (target * weights).sum()[None]
        return (images - wanted.to(images)[:, None, None]).square().mean(dim=(1, 2, 3))

    return loss


def clip_loss(prompt: str, model_name_or_path: str, device: torch.device, num_cutouts: int = 8) -> GuidanceFunction:
    """Return a guidance function: the CLIP distance (arXiv:2103.00020) of random cut-outs to a sentence.

    The loss is half the squared angle between their features, averaged over cut-outs. It is 0 for equal features and
    1.2 for orthogonal ones.

    Args:
        prompt: description of the images.
        model_name_or_path: CLIP model on the Hub, or a folder.
        num_cutouts: number of random square cut-outs, new ones at every timestep. Their side is at least half that of
            the image.

    Raises:
        UserError: the model cannot be loaded, or is not a CLIP model.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        kind = AutoConfig.from_pretrained(model_name_or_path).model_type
        if kind != "clip":
            raise ValueError(f"it is a model of type {kind}")
        clip = CLIPModel.from_pretrained(model_name_or_path)
        tokens = AutoTokenizer.from_pretrained(model_name_or_path)([prompt], truncation=True, return_tensors="pt")
    except Exception as error:  # The Hub client, transformers and tokenizers share no base class of errors
        raise UserError(
            f"--clip_model_name_or_path {model_name_or_path}: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Expected a CLIP model: a Hub id such as openai/clip-vit-base-patch32, or a folder"
        ) from error
    clip = clip.to(device).eval().requires_grad_(False)
    size = clip.config.vision_config.image_size
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))

    def features(output):
        return F.normalize(output.pooler_output, dim=-1)

    with torch.no_grad():
        text = features(clip.get_text_features(**tokens.to(device)))

    def loss(images):
        images = ((images.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std
        height, width = images.shape[2:]
        cutouts = []
        for share, top, left in torch.rand(num_cutouts, 3).tolist():
            side = round(min(height, width) * (0.5 + share / 2))
            y, x = round(top * (height - side)), round(left * (width - side))
            cutout = images[:, :, y : y + side, x : x + side]
            smooth = images.device.type != "mps"  # MPS has no gradient of it
            cutouts.append(F.interpolate(cutout, (size, size), mode="bilinear", antialias=smooth))
        chords = (features(clip.get_image_features(torch.cat(cutouts))) - text).norm(dim=-1)
        return (2 * chords.div(2).arcsin().square()).view(num_cutouts, -1).mean(0)

    return loss
