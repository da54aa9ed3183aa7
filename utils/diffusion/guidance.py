"""Steering samples towards what a function of the image likes: a colour, a sentence, or one's own ten lines.

A guidance function takes predicted clean images (B, C, H, W) in [-1, 1] and returns a loss for each, (B,); lower is
better. At every step its gradient moves the model's prediction before the sampler uses it:

    x_0  <-  x_0 - scale * sqrt(1 - alpha_bar_t) * gradient / 2

The factor is the noise left at timestep t (not at the loop's index): steering is firm while the image is undecided and
lets go as it is finished, so that the model has the last word. The loss of an image should be a mean over its pixels;
its gradient is multiplied by their number, so that a scale means the same at every resolution. With the squared
distance to a target, a scale of 1 goes all the way at pure noise, and more overshoots. Other losses, and gradients
taken through the model, need scales of their own: try, and look.
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
    """A guidance function, and how it acts on a sampler.

    Args:
        function: see above. It is given float32. Random numbers from torch's global generator are the same at the same
            timestep of every run.
        scale: how firmly; 0 does nothing. See above for what 1 means.
        mode: ``direct`` takes the gradient with respect to the predicted image. ``net`` takes it through the model,
            with respect to its noisy input (as DPS does, Chung et al. 2022, arXiv:2209.14687): slower, and what the
            model would not draw is suppressed.
        space: that the model denoises in, see ``spaces``; by default pixels.
    """

    def __init__(
        self, function: GuidanceFunction, scale: float, mode: str = "direct",
        space=None,
    ):  # fmt: skip
        self.function, self.scale, self.mode = function, scale, mode
        self.decode = None if space is None or space.in_unit_range else space.decode

    def predict(self, model, scheduler: SchedulerMixin, sample: torch.Tensor, timestep) -> torch.Tensor:
        """The guided model's output for a sampler's step: like ``model(sample, timestep).sample``, in float32."""
        with torch.set_grad_enabled(self.mode == "net"):
            sample = sample.detach().requires_grad_(self.mode == "net")
            output = model(scheduler.scale_model_input(sample, timestep), timestep).sample.float()
            predicted = predicted_images(scheduler, output, sample, timestep)
        with torch.enable_grad(), torch.random.fork_rng([sample.device] if sample.is_cuda else []):
            torch.manual_seed(int(timestep))
            # Clipped to the range of images, but for the gradient: before the end predictions of noise exceed it by far
            clip = lambda images: images + (images.clamp(-1, 1) - images).detach()  # noqa: E731
            predicted = predicted if self.decode else clip(predicted)
            at = sample if self.mode == "net" else predicted.requires_grad_()
            images = clip(self.decode(predicted)) if self.decode else predicted
            losses = self.function(images)
            if losses.shape != sample.shape[:1]:
                raise UserError(
                    f"the guidance function returned shape {tuple(losses.shape)}; expected one loss an image"
                )
            losses = losses * images[0].numel()  # before the gradient is taken, for fp16 has no small numbers
            (gradient,) = torch.autograd.grad(losses.sum(), at)
        _, noise_level = signal_and_noise(scheduler, timestep, sample)
        step = self.scale * noise_level * gradient / 2
        return output_for(scheduler, predicted.detach() - step, sample.detach(), timestep)


def make_guidance(args, device: torch.device, **options) -> Guidance | None:
    """Make the guidance that the flags of ``guidance_args`` ask for, or None.

    Args:
        options: of ``Guidance``.
    """
    if args.guidance_color:
        function = color_loss(args.guidance_color)
    elif args.guidance_prompt:
        function = clip_loss(args.guidance_prompt, args.clip_model_name_or_path, device)
    else:
        return None
    return Guidance(function, args.guidance_scale, args.guidance_mode, **options)


def color_loss(color: str) -> GuidanceFunction:
    """Mean squared distance of the pixels to a colour.

    Args:
        color: a name or ``#rrggbb``, as Pillow understands it. Grey images are compared with its lightness.

    Raises:
        ValueError: there is no such colour.
    """
    target = from_uint8(torch.tensor(ImageColor.getrgb(color)[:3]))
    weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's conversion to grey

    def loss(images):
        wanted = target if images.shape[1] == 3 else (target * weights).sum()[None]
        return (images - wanted.to(images)[:, None, None]).square().mean(dim=(1, 2, 3))

    return loss


def clip_loss(prompt: str, model_name_or_path: str, device: torch.device, num_cutouts: int = 8) -> GuidanceFunction:
    """Distance between a sentence and random cut-outs of the images, in the space of a CLIP model (arXiv:2103.00020).

    The loss is half the squared angle between their features, mean over cut-outs: 0 where they agree, 1.2 where they
    have nothing to do with each other.

    Args:
        prompt: what the images should show.
        model_name_or_path: a CLIP model on the Hub, or a folder.
        num_cutouts: squares of at least half the image's side, others at every timestep.

    Raises:
        UserError: the model cannot be loaded, or is not CLIP.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPModel
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        kind = AutoConfig.from_pretrained(model_name_or_path).model_type
        if kind != "clip":
            raise ValueError(f"it is a model of type {kind}")
        clip = CLIPModel.from_pretrained(model_name_or_path)
        tokens = AutoTokenizer.from_pretrained(model_name_or_path)([prompt], truncation=True, return_tensors="pt")
    except Exception as error:  # the Hub client, transformers and tokenizers share no class of errors
        raise UserError(
            f"--clip_model_name_or_path {model_name_or_path}: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Expected a CLIP model: a Hub id such as openai/clip-vit-base-patch32, or a folder with its files"
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
            cutouts.append(F.interpolate(cutout, (size, size), mode="bilinear", antialias=True))
        chords = (features(clip.get_image_features(torch.cat(cutouts))) - text).norm(dim=-1)
        return (2 * chords.div(2).arcsin().square()).view(num_cutouts, -1).mean(0)

    return loss
