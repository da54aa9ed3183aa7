"""Conditions of train_paired.py: images that the model is given beside noise, as further channels of its input.

A condition is made from each training image, or it is a second picture of each image (``paired``):

    lowres:4   the image at a quarter of its width and height     gray      its brightness
    inpaint    the image without a box                            outline   its edges
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from .. import UserError
from ..args import nearest_resolution
from ..pictures import from_uint8, to_uint8
from ..randomness import uniform

PAIRED = "paired"
COLUMN = "condition"  # name of the column with the second pictures


class Condition:
    """One kind of condition.

    Pictures are what a user has, such as a smaller image. Inputs are the channels that the model is given. The first C
    channels of an input are the best guess without a model: enlarged, grey, or with a grey hole.

    Args:
        kind: ``lowres:FACTOR``, ``gray``, ``inpaint``, ``outline`` or ``paired``.
        image_channels: number of channels of the images, C.
        seed: seed of the boxes of ``inpaint``.
        may_be_left_out: whether the condition is left out at random in training, so that guidance is possible.
        picture_channels: number of channels of a second picture: C, or 1 for grey ones.
        value_range: values of second pictures that became -1 and 1, if they had more than 8 bits.

    Attributes:
        factor: ratio of the sides of the image to those of the picture.
        channels: number of channels of an input: C, and for ``inpaint`` one more, which is 1 in the hole.
        mode: mode of a picture in Pillow.
    """

    def __init__(
        self, kind: str, image_channels: int, seed: int = 0, may_be_left_out: bool = False,
        picture_channels: int | None = None, value_range: tuple[float, float] | None = None,
    ):  # fmt: skip
        self.may_be_left_out, self.value_range = may_be_left_out, value_range and tuple(value_range)
        self.picture_channels = 1 if kind in ("gray", "outline") else picture_channels or image_channels
        self.kind, self.image_channels, self.seed = kind, image_channels, seed
        self.factor = int(kind.partition(":")[2]) if kind.startswith("lowres:") else 1
        self.channels = image_channels + (kind == "inpaint")
        self.mode = "L" if self.picture_channels == 1 else "RGB"

    @classmethod
    def of_model(cls, config) -> "Condition | None":
        """Return the condition of a model with this config, or None for a model without one."""
        if config.get("in_channels", 0) <= config.get("out_channels", 0):
            return None
        known = config.get("_condition", {"kind": PAIRED})
        return cls(image_channels=config["out_channels"], **known)

    @classmethod
    def from_args(cls, args, train_data) -> "Condition":
        """Return the condition of a training run: that of the flags, or the images' column ``condition``.

        Raises:
            UserError: both are given, the sizes or channels do not fit, the column holds no images, or there is
                nothing to colour.
        """
        channels, (height, width) = train_data.channels, train_data.size
        if column := train_data.layout.columns.get(COLUMN):
            found = train_data.layout.channels.get(COLUMN)
            if column.kind != "image":
                raise UserError(
                    f"columns: {COLUMN} has the kind {column.kind}. Expected image, such as a map with a "
                    "colour for each class"
                )
            if args.condition:
                raise UserError(
                    f"--condition {args.condition}: the images have a column {COLUMN} already. Leave the flag out"
                )
            if found not in (1, channels):
                advice = ". --image_mode RGB converts the images" * (found == 3)
                raise UserError(
                    f"the condition has {found} channels, but the images have {channels}. Expected the same "
                    f"number, or 1{advice}"
                )
            ranges = train_data.layout.ranges.get(COLUMN)
            return cls(PAIRED, channels, args.seed, args.condition_dropout_prob > 0, found, ranges)
        condition = cls(args.condition or "lowres:4", channels, args.seed, args.condition_dropout_prob > 0)
        if condition.kind == "gray" and channels == 1:
            raise UserError("--condition gray: the images are grey already. Expected images with colour")
        factor = condition.factor
        if height % factor or width % factor:
            raise UserError(
                f"--condition {condition.kind}: {height} x {width} pixels are not multiples of {factor}. Try "
                f"--resolution {nearest_resolution((height, width), factor)}"
            )
        return condition

    @property
    def config(self) -> dict:
        """Entries that the model's config keeps under ``_condition``, for ``of_model``."""
        known = {"kind": self.kind, "may_be_left_out": self.may_be_left_out}
        if self.kind == PAIRED:
            known |= {"picture_channels": self.picture_channels, "value_range": self.value_range}
        return known

    def pictures(self, batch: dict) -> torch.Tensor:
        """Return the pictures that belong to a batch of images.

        Args:
            batch: ``images`` (B, C, H, W) in [-1, 1], and ``condition`` for ``paired``. The box of ``inpaint`` depends
                on ``sample_ids``, or without them on the position in the batch.

        Returns:
            float32 (B, K, h, w) in [-1, 1], rounded to 8 bits. K is 1 for ``gray`` and ``outline``. For
            ``inpaint`` K is C + 1: in the box, colours are 0 and the last channel is 1.
        """
        images = batch["images"]
        if self.kind == PAIRED:
            return batch[COLUMN]
        if self.kind == "inpaint":
            sample_ids = batch.get("sample_ids", np.arange(len(images)))
            hole = _boxes(self.seed, sample_ids, images.shape[2:], images.device)
            return torch.cat([images.where(hole == 0, 0.0), hole], dim=1)
        if self.factor > 1:
            size = [side // self.factor for side in images.shape[2:]]
            return _eight_bits(F.interpolate(images, size, mode="bicubic", antialias=True))
        weights = (0.299, 0.587, 0.114) if self.image_channels == 3 else (1.0,)  # ITU-R BT.601, as in Pillow
        grey = sum(weight * images[:, k : k + 1] for k, weight in enumerate(weights))
        return _eight_bits(grey) if self.kind == "gray" else _outline(grey)

    def input_of(self, pictures: torch.Tensor) -> torch.Tensor:
        """Turn pictures (B, K, h, w) into the channels that the model is given, float32 (B, ``channels``, H, W)."""
        if self.factor > 1:
            size = [side * self.factor for side in pictures.shape[2:]]
            pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return pictures.expand(-1, max(pictures.shape[1], self.image_channels), -1, -1)

    def model_inputs(self, batch: dict) -> dict[str, torch.Tensor]:
        """Return the input that belongs to a batch, by the name under which the model takes it, see ``Run.steps``."""
        return {"condition": self.input_of(self.pictures(batch))}

    def show(self, pictures: torch.Tensor) -> np.ndarray:
        """Return pictures (B, K, h, w) enlarged to the size of images without smoothing: uint8 (B, C, H, W)."""
        shown = to_uint8(pictures[:, : self.image_channels])
        shown = shown.repeat(self.factor, axis=2).repeat(self.factor, axis=3)
        return np.repeat(shown, self.image_channels // shown.shape[1], axis=1)

    def null(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return inputs of the same shape without content: grey, and for ``inpaint`` a hole everywhere."""
        null = torch.zeros_like(inputs)
        null[:, self.image_channels :] = 1
        return null

    def keep_known(self, images: np.ndarray, inputs: torch.Tensor) -> np.ndarray:
        """Return samples with the known pixels of ``inpaint`` restored. Other samples are returned unchanged.

        Args:
            images: samples, uint8 (B, C, H, W).
            inputs: their inputs in turn, (N, K, H, W).
        """
        if self.kind != "inpaint":
            return images
        inputs = inputs[np.arange(len(images)) % len(inputs)].cpu()
        return np.where(inputs[:, -1:].numpy() > 0.5, images, to_uint8(inputs[:, :-1]))

    def save_picture(self, picture: torch.Tensor, path: Path) -> None:
        """Save a picture (K, h, w) as PNG, for ``inpaint`` with a transparent hole."""
        channels = to_uint8(picture)
        if self.kind == "inpaint":
            channels[-1] = np.where(picture[-1].cpu() > 0.5, 0, 255)
        modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
        array = channels[0] if len(channels) == 1 else channels.transpose(1, 2, 0)
        Image.fromarray(array, modes[len(channels)]).save(path)

    def picture_from(self, image: Image.Image) -> torch.Tensor:
        """Return a file's image as a picture (1, K, h, w): the inverse of ``save_picture``.

        Raises:
            UserError: the condition is ``inpaint``, and no part of the image is transparent.
        """
        picture = from_uint8(np.atleast_3d(image.convert(self.mode)).transpose(2, 0, 1).copy())
        if self.kind == "inpaint":
            hole = torch.from_numpy(np.asarray(image.convert("RGBA").getchannel("A")) < 128)[None].float()
            if not hole.any():
                raise UserError("no part of the picture is transparent. Expected a hole to fill, or --mask")
            picture = torch.cat([picture.where(hole == 0, 0.0), hole])
        return picture[None]


class GuidedByCondition:
    """A model with a condition and classifier-free guidance (arXiv:2207.12598), called like the model itself.

    The output is unconditional + scale (conditional - unconditional). Unconditional is the output for ``null``. It is
    meaningful only if the condition was left out at random in training.

    Args:
        model: model that takes ``condition=``.
        condition: the condition.
        scale: guidance scale. With 1 the model is evaluated once, without guidance. Other values need twice the time.

    Raises:
        UserError: the scale is not 1, and the condition was never left out in training.
    """

    def __init__(self, model: torch.nn.Module, condition: Condition, scale: float):
        self.model, self.null, self.scale = model, condition.null, scale
        if scale != 1 and not condition.may_be_left_out:
            raise UserError(
                f"--guidance_scale {scale:g}: the model was always given its condition in training. Expected 1, or a "
                "model trained with --condition_dropout_prob"
            )
        self.eval, self.train = model.eval, model.train

    @property
    def training(self) -> bool:
        return self.model.training

    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, condition: torch.Tensor) -> UNet2DOutput:
        if self.scale == 1:
            return self.model(noisy, timesteps, condition=condition)
        both = torch.cat([self.null(condition), condition])
        output = self.model(torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps]), condition=both).sample
        unconditional, conditional = output.float().chunk(2)
        return UNet2DOutput(sample=unconditional + self.scale * (conditional - unconditional))


def arrange(inputs: np.ndarray, samples: np.ndarray, true: torch.Tensor | None) -> tuple[np.ndarray, list[str]]:
    """Arrange inputs, samples and true images in rows, for ``pictures.make_grid``.

    Args:
        inputs: inputs as ``Condition.show`` returns them, uint8 (N, C, H, W).
        samples: samples of all inputs in turn, uint8 (S x N, C, H, W).
        true: true images, (N, C, H, W) in [-1, 1], or None.

    Returns:
        uint8 (R x N, C, H, W), and the captions of the R rows.
    """
    rows = len(samples) // len(inputs)
    shown, captions = [inputs, samples[: rows * len(inputs)]], ["input", *["samples", *[""] * rows][:rows]]
    if true is not None:
        shown, captions = [*shown, to_uint8(true)], [*captions, "true image"]
    return np.concatenate(shown), captions


def _eight_bits(images: torch.Tensor) -> torch.Tensor:
    """Round images in [-1, 1] to 8 bits, because a user's picture comes from a file."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def _outline(grey: torch.Tensor) -> torch.Tensor:
    """Return white lines, 1 on -1, where the Sobel gradient exceeds its mean by more than one standard deviation."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=grey.device)
    both = torch.stack([across, across.T])[:, None]
    slope = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), both).square().sum(dim=1, keepdim=True).sqrt()
    limit = slope.mean(dim=(1, 2, 3), keepdim=True) + slope.std(dim=(1, 2, 3), keepdim=True)
    return (slope > limit).float() * 2 - 1


def _boxes(seed: int, sample_ids: np.ndarray, size: tuple[int, int], device="cpu") -> torch.Tensor:
    """Return a box for each image, each side 1/4 to 3/4 of the image's: float32 (B, 1, H, W), 1 inside."""
    inside = []
    for axis, side in zip(("vertical", "horizontal"), size, strict=True):
        length = np.rint(side * (0.25 + 0.5 * uniform(seed, f"{axis} length of the box", sample_ids)))
        start = np.floor((side - length + 1) * uniform(seed, f"{axis} start of the box", sample_ids))
        positions = np.arange(side)
        found = (positions >= start[:, None]) & (positions < (start + length)[:, None])
        inside.append(torch.from_numpy(found).to(device))
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).float()
