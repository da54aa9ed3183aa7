"""The noise scheduler and pipeline of train_basic.py and train_unet2d.py: linear mixing of images with uniform noise.

The pipeline's ``save_pretrained`` copies this file, and the files of other classes that diffusers does not have, into
the model's folder. Therefore the pipeline loads without this repository:

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import inspect
import json
import shutil
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class LinearMixScheduler(SchedulerMixin, ConfigMixin):
    """Linear mixing of images with uniform noise, and Euler steps from noise to predicted images.

        x_a = (1 - a) x_0 + a u,    u uniform in [-1, 1],    a in [0, 1],    timestep = a T

    This is the straight path of rectified flow (Liu et al. 2022, arXiv:2209.03003, Sec. 2.1) from a uniform instead of
    a normal base distribution. Along this path, dx_a/da = u - x_0 = (x_a - x_0) / a, so a model that predicts x_0 gives
    the flow's velocity, and ``step`` is Euler's method on it. With n equal steps, step i starts at a = (n - i) / n:

        x + (-1/n) (x - x_0) / a  =  x + (x_0 - x) / (n - i)

    So step i moves the sample towards the prediction by 1/(n - i) of their distance.

    Args:
        num_train_timesteps: T, the timestep of pure noise. Timesteps are real numbers in [0, T].
    """

    order = 1
    init_noise_sigma = 1.0
    noise_distribution = "uniform"  # in [-1, 1]

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(1)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return x_a for images and uniform noise (B, C, H, W) and timesteps (B,) in [0, T], in the images' dtype."""
        amounts = (timesteps / self.config.num_train_timesteps).to(original_samples).view(-1, 1, 1, 1)
        return (1 - amounts) * original_samples + amounts * noise

    def signal_and_noise(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of image and noise, 1 - a and a: float32, in the shape of ``timesteps``."""
        amounts = timesteps / self.config.num_train_timesteps
        return 1 - amounts, amounts

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose n equal steps from T to 0. ``timesteps`` is T, T (n-1)/n, ..., T/n."""
        self.num_inference_steps = num_inference_steps
        steps_left = torch.arange(num_inference_steps, 0, -1, device=device)
        self.timesteps = steps_left * (self.config.num_train_timesteps / num_inference_steps)

    def scale_model_input(self, sample: torch.Tensor, timestep=None) -> torch.Tensor:
        """Return the sample unchanged. The interface of diffusers requires this method."""
        return sample

    def step(
        self, model_output: torch.Tensor, timestep: float | torch.Tensor, sample: torch.Tensor, return_dict: bool = True
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor]:
        """Make one Euler step.

        Args:
            model_output: predicted clean images, (B, C, H, W).
            timestep: timestep of ``sample``, one of ``timesteps``.
            sample: current samples, (B, C, H, W).

        Returns:
            ``prev_sample``, the samples at the timestep minus T/n, and ``pred_original_sample``. Without
            ``return_dict``, a tuple of ``prev_sample`` only.
        """
        fraction = self.timesteps[-1] / timestep  # 1/(n - i); 1 in the last step
        prev_sample = sample + fraction * (model_output - sample)
        if not return_dict:
            return (prev_sample,)
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=model_output)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class LinearMixPipeline(DiffusionPipeline):
    """A pipeline that draws unconditional images in equal steps from noise to images.

    Args:
        unet: model called as ``unet(images, timestep).sample``, which predicts clean images.
        scheduler: ``LinearMixScheduler``, or another with a ``noise_distribution`` of ``uniform`` or ``normal``.
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
            generator: one generator, or one for each image.
            num_inference_steps: number of sampling steps.
            output_type: ``pil``, ``np`` for floats in [0, 1] (B, H, W, C), or ``pt`` for floats in [0, 1] (B, C, H, W).
        """
        size = self.unet.config.sample_size
        shape = (batch_size, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        images = randn_tensor(shape, generator, self._execution_device, torch.float32)
        if self.scheduler.noise_distribution == "uniform":
            images = torch.erf(images / 2**0.5)  # The normal distribution function, scaled to [-1, 1]
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
        """Save the pipeline, with the code of the classes that diffusers does not have.

        Each of these classes must be in a file that imports installed packages only.
        """
        if options.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) would leave the code out. Use pipeline.push_to_hub(id)")
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        for name, part in {"_class_name": self, **self.components}.items():
            module = type(part).__module__
            if not (module.startswith("diffusers.") or (folder / name / f"{module}.py").is_file()):
                file = Path(inspect.getfile(type(part)))
                shutil.copyfile(file, (folder if part is self else folder / name) / file.name)
                index[name] = [file.stem, type(part).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
