"""The pipeline of models that predict the clean image from a mixture with noise.

``save_pretrained`` puts this file, and the files of classes that diffusers does not have, into the folder. So it loads
where this repository is not installed:

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import inspect
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class LinearMixPipeline(DiffusionPipeline):
    """Unconditional images, from noise towards the model's predictions in equal steps.

    Args:
        unet: called as ``unet(images, timestep).sample``; predicts clean images.
        scheduler: a ``LinearMixScheduler``, or another whose ``noise_distribution`` is ``uniform`` or ``normal``.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 40,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            batch_size: number of images.
            generator: one, or one for each image.
            num_inference_steps: calls of the model.
            output_type: ``pil``, ``np`` for floats in [0, 1] (B, H, W, C), or ``pt`` for floats in [0, 1] (B, C, H, W).
        """
        config = self.unet.config
        shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
        images = randn_tensor(shape, generator, self._execution_device, torch.float32)
        if self.scheduler.noise_distribution == "uniform":
            images = torch.erf(images / 2**0.5)  # a normal variable's distribution function, scaled to [-1, 1]
        self.scheduler.set_timesteps(num_inference_steps, device=images.device)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            prediction = self.unet(images.to(self.unet.dtype), timestep).sample
            images = self.scheduler.step(prediction.float(), timestep, images).prev_sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory, **options) -> None:
        """As every pipeline's, with the code of the classes that diffusers does not have.

        Each of them must stand in a file that imports installed packages only.
        """
        if options.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) would leave the code out; use pipeline.push_to_hub(id)")
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text())
        for name, part in {"_class_name": self, **self.components}.items():
            if not type(part).__module__.startswith("diffusers."):
                file = Path(inspect.getfile(type(part)))
                shutil.copyfile(file, (folder if part is self else folder / name) / file.name)
                index[name] = [file.stem, type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
