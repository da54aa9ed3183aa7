"""The pipeline of class-conditional models, with classifier-free guidance.

The model's last class is the null class. ``save_pretrained`` writes a folder that loads in two ways:

    pipeline = ConsistencyModelPipeline.from_pretrained(folder)  # diffusers alone, without guidance
    pipeline(batch_size=2, class_labels=[7, 3])

    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)  # this file
    pipeline(["7", "3"], guidance_scale=2.0)

This file is copied into the folder as ``pipeline.py``, so it imports installed packages only.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


def guided_output(
    model: Callable,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor,
    scale: float,
    null_class: int,
) -> torch.Tensor:
    """Return unconditional + scale (conditional - unconditional), as Imagen and diffusers define the scale.

    Classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598.

    Args:
        model: model called as ``model(noisy, timesteps, class_labels).sample``.
        noisy: noisy images (B, C, H, W).
        timesteps, class_labels: (B,).
        scale: guidance scale. 1 gives the conditional output and 0 the unconditional one, each by an evaluation on B
            images. Other scales need an evaluation on 2 B images.
        null_class: label of the unconditional model.
    """
    unconditional = torch.full_like(class_labels, null_class)
    if scale in (0, 1):
        return model(noisy, timesteps, class_labels if scale else unconditional).sample.float()
    labels = torch.cat([unconditional, class_labels])
    both = model(torch.cat([noisy, noisy]), torch.cat([timesteps] * 2), labels).sample
    without, conditional = both.float().chunk(2)
    return without + scale * (conditional - without)


class ClassConditionalPipeline(DiffusionPipeline):
    """A pipeline that draws images of given classes.

    Args:
        unet: ``UNet2DModel`` with ``num_class_embeds`` one larger than the number of classes. Its config holds their
            names as ``_class_names``.
        scheduler: scheduler of diffusers with a ``step`` that takes a generator.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        guidance_scale: float = 1.0,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image for each label.

        Args:
            class_labels: names or numbers of classes, or a single one.
            guidance_scale: guidance strength. 1 is the conditional model, 0 the unconditional one. Larger scales give
                more recognisable and less varied images.
            num_inference_steps: number of sampling steps. With guidance, each takes two function evaluations.
            generator: one generator, or one for each image.
            output_type: ``pil``, ``np`` for floats in [0, 1] (B, H, W, C), or ``pt`` for floats in [0, 1] (B, C, H, W).

        Raises:
            ValueError: there is no such class.
        """
        config, device = self.unet.config, self._execution_device
        single = isinstance(class_labels, (int, str))
        labels = torch.tensor(class_numbers([class_labels] if single else class_labels, config), device=device)
        size = config.sample_size
        shape = (len(labels), config.in_channels, *((size, size) if isinstance(size, int) else size))
        images = randn_tensor(shape, generator, device, torch.float32) * self.scheduler.init_noise_sigma
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noisy = self.scheduler.scale_model_input(images, timestep).to(self.unet.dtype)
            output = guided_output(
                self.unet, noisy, timestep.expand(len(labels)), labels, guidance_scale, config.num_class_embeds - 1
            )
            images = self.scheduler.step(output.float(), timestep, images, generator=generator).prev_sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory, **options) -> None:
        """Save as a ``ConsistencyModelPipeline``, which draws without guidance, with this file beside it.

        That pipeline draws square images only. Images of other shapes need this file.
        """
        if options.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) would leave the code out. Upload the saved folder")
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["_class_name"] = "ConsistencyModelPipeline"
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(__file__, folder / "pipeline.py")


def class_names(config) -> list[str]:
    """Return the names of a model's classes: their numbers if they have no names, [] without classes."""
    return list(config.get("_class_names") or map(str, range(config.get("num_class_embeds") or 0)))


def class_numbers(labels: Sequence[int | str], config) -> list[int]:
    """Return the numbers of classes given by name or number.

    Args:
        labels: names, or numbers from 0 up. A string of digits that is not a name counts as a number, unless all names
            consist of digits.
        config: config of a UNet with classes, see ``ClassConditionalPipeline``.

    Raises:
        ValueError: there is no such class. The message lists the names that exist.
    """
    names, numbers = class_names(config), []
    known = {name: number for number, name in enumerate(names)}
    if not all(map(str.isdecimal, names)):  # A class called "1" may have another number
        known = {str(number): number for number in range(len(names))} | known
    for label in labels:
        number = known.get(label.strip(), -1) if isinstance(label, str) else int(label)
        if not 0 <= number < len(names):
            shown = f"0 to {len(names) - 1}, or one of " + ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
            raise ValueError(f"there is no class {label!r}. Expected a number from {shown}")
        numbers.append(number)
    return numbers
