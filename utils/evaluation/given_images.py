"""The pictures that a user gives to a model with a condition: inputs, or finished images to make inputs from."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .. import UserError
from ..data.images import choose_range
from ..data.pixels import cover_size, high_bit_values, to_eight_bits
from ..diffusion.conditions import PAIRED, Condition
from ..pictures import from_uint8
from ..sources.decoding import decode_image
from ..sources.folders import image_extensions
from ..training.checkpoints import file_hash
from ..training.output_dir import read_arguments

logger = logging.getLogger(__name__)


class GivenImages:
    """Inputs of a model with a condition, from ``--condition_image`` or ``--true_image``.

    Args:
        args: flags ``condition_image``, ``true_image``, ``mask`` and ``model``.
        condition: condition of the model.
        window: (H, W) that the model was trained on. Smaller inputs are extended to it, and smaller second pictures
            enlarged.
        scale: ratio of the sides of a drawn image to those of its input, for models in a latent space.

    Attributes:
        names: paths of the files.
        inputs: inputs of the model, float32 (N, K, H, W), extended.
        size: (H, W) of the images without the extension.
        shown: inputs as a picture shows them, uint8 (N, C, h, w).
        true: true images, float32 (N, C, h, w) in [-1, 1], or None.
        digest: hash of the files.

    Raises:
        UserError: a file is missing or not an image, the files differ in size, or the flags do not fit the condition.
    """

    def __init__(self, args, condition: Condition, window: tuple[int, int], scale: int = 1):
        self.args, self.condition, self.window, self.scale, self.true = args, condition, window, scale, None
        if not (args.condition_image or args.true_image):
            also = "" if condition.kind == PAIRED else ", or --true_image with finished images to make inputs from"
            raise UserError(f"{args.model} draws from a picture. Give --condition_image FILE or a folder{also}")
        if args.mask and condition.kind != "inpaint":
            raise UserError(
                f"--mask: the condition of {args.model} is {condition.kind}. Expected a model trained "
                "with --condition inpaint"
            )
        if condition.kind == PAIRED and not args.condition_image:
            raise UserError(f"--true_image: {args.model} was trained on pairs. Also give --condition_image")
        self.names = given_files(args)
        files = [*self.names]
        if args.condition_image:
            pictures = [self._picture(path) for path in self.names]
            if args.true_image:
                files += (others := _partners(self.names, args))
                self.true = _stack([self._image(path, "--true_image") for path in others], others)
            pictures = _stack(pictures, self.names)
        else:
            self.true = _stack([self._image(path, "--true_image") for path in self.names], self.names)
            factor = condition.factor
            height, width = (side // factor * factor for side in self.true.shape[2:])
            if not (height and width):
                raise UserError(f"--true_image {self.names[0]}: fewer than {factor} pixels on a side. Expected more")
            if (height, width) != self.true.shape[2:]:
                logger.warning(f"--true_image: cut to {width} x {height} pixels, multiples of {factor}")
            self.true = self.true[..., :height, :width]
            pictures = condition.pictures({"images": self.true})
        if args.mask:
            files.append(Path(args.mask))
        self.digest = file_hash(*files)[:12]
        inputs = condition.input_of(pictures)
        self.size = tuple(side * scale for side in inputs.shape[2:])
        self.shown = condition.show(pictures).repeat(scale, axis=2).repeat(scale, axis=3)
        if self.true is not None and self.true.shape[2:] != self.size:
            sizes = " and ".join("{1} x {0}".format(*size) for size in (self.true.shape[2:], self.size))
            raise UserError(f"--true_image: true and drawn images have {sizes} pixels. Expected the same size")
        self.inputs = extend(inputs, window)

    def _image(self, path: Path, flag: str) -> torch.Tensor:
        mode = "L" if self.condition.image_channels == 1 else "RGB"
        image = self._enlarge(read_picture(path, flag, mode, self.args.model))
        return from_uint8(np.atleast_3d(image).transpose(2, 0, 1).copy())

    def _enlarge(self, image: Image.Image) -> Image.Image:
        return enlarge(image, self.condition, self.window, self.scale)

    def _picture(self, path: Path) -> torch.Tensor:
        condition, flag = self.condition, "--condition_image"
        if condition.kind == PAIRED:
            image = open_picture(path, flag)
            own_range = choose_range("auto", high_bit_values([image]), say=False)
            image = to_eight_bits(image, condition.mode, str(path), condition.value_range or own_range, logger.warning)
            return condition.picture_from(self._enlarge(image))[0]
        if condition.kind != "inpaint":
            return condition.picture_from(read_picture(path, flag, condition.mode, self.args.model))[0]
        image = open_picture(path, flag)
        if image.mode not in ("LA", "La", "PA", "P", "RGBA"):  # other modes are opaque, and may have more than 8 bits
            image = read_picture(path, flag, condition.mode, self.args.model)
        if self.args.mask:
            mask = open_picture(self.args.mask, "--mask").convert("L")
            check_same_size(mask, image)
            image = image.convert("RGBA")
            image.putalpha(mask.point(lambda value: 0 if value >= 128 else 255))
        try:
            return condition.picture_from(image)[0]
        except UserError as error:
            raise UserError(f"{flag} {path}: {error}") from None

    def model_inputs(self, sample_ids: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the inputs of samples: sample k has input k modulo N."""
        return {"condition": self.inputs[np.asarray(sample_ids) % len(self.inputs)]}

    def finish(self, sample_ids: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Remove the extension from samples, uint8 (B, C, H, W), and restore the known pixels of ``inpaint``."""
        images = self.condition.keep_known(images, self.inputs[sample_ids % len(self.inputs)])
        return images[..., : self.size[0], : self.size[1]]


def enlarge(picture: Image.Image, condition: Condition, window: tuple[int, int], scale: int) -> Image.Image:
    """Return a picture of a pair that covers a window of (H, W), as training enlarges it. Others stay as they are.

    Args:
        scale: see ``GivenImages``. If a drawn image is larger than its input, small inputs are the usual ones.
    """
    covered = cover_size(picture.size, window)
    too_small = condition.kind == PAIRED and scale == 1 and covered[0] > picture.width
    return picture.resize(covered, Image.Resampling.BICUBIC) if too_small else picture


def extend(inputs: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """Repeat the last row and column of inputs (N, K, H, W) that are smaller than a window of (H, W)."""
    missing = [max(0, side - size) for side, size in zip(window, inputs.shape[2:], strict=True)]
    return F.pad(inputs, (0, missing[1], 0, missing[0]), mode="replicate")


def open_picture(path: str | Path, flag: str) -> Image.Image:
    """Return the image of a file that a flag names.

    Raises:
        UserError: the file does not exist or is not an image.
    """
    if not Path(path).is_file():
        raise UserError(f"{flag} {path}: there is no such file. Expected a picture")
    return decode_image(str(path), f"{flag} {path}")


def check_same_size(mask: Image.Image, picture: Image.Image) -> None:
    """Refuse a mask with a size that differs from that of its picture."""
    if mask.size != picture.size:
        sizes = ["{} x {}".format(*image.size[::-1]) for image in (mask, picture)]
        raise UserError(
            f"--mask: the mask has {sizes[0]} pixels (height x width), and the picture {sizes[1]}. Expected a "
            "mask in the size of the picture"
        )


def read_picture(path: str | Path, flag: str, mode: str, model: str) -> Image.Image:
    """Return a picture in ``L`` or ``RGB``. A picture of high bit depth is scaled like the model's training images.

    Args:
        path: image file.
        flag: flag that names it, for messages.
        mode: ``L`` or ``RGB``.
        model: folder or Hub id of the model. If the range of its training images is not known, the picture's own range
            is used.

    Raises:
        UserError: the file does not exist or is not an image.
    """
    image = open_picture(path, flag)
    known, image_range = scaled_from(model)
    image_range = image_range if known else choose_range("auto", high_bit_values([image]), say=False)
    return to_eight_bits(image, mode, str(path), image_range, logger.warning)


def scaled_from(model: str) -> tuple[bool, tuple[float, float] | None]:
    """Return whether the scaling of a model's training images is known, and the values that became black and white."""
    found = read_arguments(model)
    return "scaled_from" in found, found.get("scaled_from") and tuple(found["scaled_from"])


def given_files(args) -> list[Path]:
    """Return the files of ``--condition_image`` or, without it, of ``--true_image``, sorted by name.

    Raises:
        UserError: there is none.
    """
    return _files("--condition_image" if args.condition_image else "--true_image", args)


def _files(flag: str, args) -> list[Path]:
    """Return the file that a flag names, or the pictures of the folder, sorted by name."""
    path = Path(vars(args)[flag[2:]]).expanduser()
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in image_extensions())
    if not found:
        inside = {file.parent for file in path.rglob("*") if file.suffix.lower() in image_extensions()}
        problem = "holds no pictures" if path.is_dir() else "does not exist"
        problem += f" except in sub-folders, such as {min(inside)}" if inside else ""
        raise UserError(f"{flag} {path} {problem}. Expected a picture, or a folder of pictures")
    return found


def _partners(files: list[Path], args) -> list[Path]:
    """Return the true image of each file: the only one, or the one with the same name."""
    others = _files("--true_image", args)
    if len(files) == len(others) == 1:
        return others
    counts = Counter(other.stem for other in others)
    if several := [file.stem for file in files if counts[file.stem] > 1]:
        raise UserError(
            f"--true_image {args.true_image}: several files have the name {several[0]} ({len(several)} such names). "
            "Expected one file for each input"
        )
    by_name = {other.stem: other for other in others}
    if missing := [file.name for file in files if file.stem not in by_name]:
        raise UserError(
            f"--true_image {args.true_image} has no file for {len(missing)} of {len(files)} inputs: "
            f"{', '.join(missing[:3])}. Expected files with the names of the inputs"
        )
    return [by_name[file.stem] for file in files]


def _stack(images: list[torch.Tensor], files: list[Path]) -> torch.Tensor:
    """Return images (N, C, H, W) of one size."""
    for image, file in zip(images, files, strict=True):
        if image.shape != images[0].shape:
            sizes = " and ".join(f"{image.shape[2]} x {image.shape[1]}" for image in (images[0], image))
            raise UserError(f"{files[0].name} and {file.name} differ in size: {sizes}. Resize them, or give one file")
    return torch.stack(images)
