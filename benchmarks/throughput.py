"""Compare the images/s of our training step and of a plain one, with the same UNet, batch and loss, in one run.

    python benchmarks/throughput.py --unet small --resolution 28

The plain step is that of a usual example script. It uses float32 or bf16 autocast, decodes and resizes images one by
one in the training process, and calls ``.item()`` in every step. Its AdamW is not fused, and its EMA updates
parameters one by one. Our step is that of train_ddpm.py, with its caches and utils. Flags after -- go to train_ddpm.py.

Blocks of steps alternate between the variants, so that a busy machine disturbs all of them equally. Medians are over
blocks. The convolutions of the UNet are also timed alone, forward and backward, as a limit for every script. To time
whole commands of another script, such as diffusers' own, use benchmarks/beside.py.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

import train_ddpm
from utils.data.train_data import load_train_data
from utils.diffusion.unets import UNETS
from utils.hardware import device_name, set_up_process
from utils.randomness import logit_normal, sample_noise, uniform
from utils.sources.sources import ImageSource, load_source
from utils.training.ema import EMA
from utils.training.optimizer import make_optimizer


class Ours:
    """The loop of train_ddpm.py, without logging and saving."""

    def __init__(self, args, accelerator, unet, noise_scheduler):
        self.args, self.accelerator, self.scheduler = args, accelerator, noise_scheduler
        self.data = load_train_data(args, accelerator)
        if accelerator.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        if args.compile:
            unet.compile()
        optimizer = make_optimizer(args.optimizer, unet, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8)
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.ema = EMA(unet, 0.999)
        self.batches = self.data.batches(range(10**6))
        self.losses = []

    def step(self):
        batch = next(self.batches)
        images, numbers = batch["images"], batch["sample_ids"]
        noise = sample_noise(0, "noise", numbers, images.shape[1:], images.device)
        size = self.data.global_batch_size
        fractions = (numbers % size + uniform(0, "timesteps", numbers)) / size
        fractions = logit_normal(fractions, train_ddpm.LOGIT_MEAN, train_ddpm.LOGIT_STD)
        timesteps = torch.from_numpy(fractions * 1000).long().to(images.device)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = self.scheduler.get_velocity(images, noise, timesteps)
        losses = F.mse_loss(self.model(noisy, timesteps).sample.float(), target, reduction="none").mean((1, 2, 3))
        self.accelerator.backward(losses.mean())
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.model.parameters())
        self.losses.append(losses.mean().detach())


class Plain:
    """The loop of the usual example script."""

    def __init__(self, args, accelerator, unet, noise_scheduler, precision):
        self.device, self.scheduler, self.precision = accelerator.device, noise_scheduler, precision
        self.unet = unet.to(self.device)
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
        self.ema = EMAModel(unet.parameters(), use_ema_warmup=True)
        self.ema.to(self.device)
        import datasets

        dataset, _ = load_source(ImageSource.from_args(args), accelerator)
        dataset = dataset.cast_column("image", datasets.Image())
        mode = {1: "L", 3: "RGB"}[unet.config.in_channels]

        def transform(examples):
            size = (args.resolution, args.resolution)
            images = [np.asarray(image.convert(mode).resize(size), np.float32) for image in examples["image"]]
            return {"input": [torch.from_numpy(np.atleast_3d(i)).permute(2, 0, 1) / 127.5 - 1 for i in images]}

        dataset.set_transform(transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
        self.batches = (batch for _ in range(10**6) for batch in loader)

    def step(self):
        images = next(self.batches)["input"].to(self.device)
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=self.device)
        noisy = self.scheduler.add_noise(images, noise, timesteps)
        target = self.scheduler.get_velocity(images, noise, timesteps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            loss = F.mse_loss(self.unet(noisy, timesteps).sample.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.item()


def convolutions_alone(unet, images: torch.Tensor, timesteps: torch.Tensor, precision: torch.dtype, blocks: int):
    """Return the seconds and the floating-point operations of all convolutions of the UNet, forward and backward."""
    calls, seconds, operations = [], 0.0, 0

    def record(module, inputs, output):
        key = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
        calls.append((key, inputs[0].shape, output.shape))

    handles = [m.register_forward_hook(record) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    with torch.no_grad():
        unet(images, timesteps)
    for handle in handles:
        handle.remove()
    layout = torch.channels_last if images.device.type == "cuda" else torch.contiguous_format
    for (key, shape, out), count in Counter(calls).items():
        convolution = torch.nn.Conv2d(*key).to(images.device, precision, memory_format=layout)
        inputs = torch.randn(shape, device=images.device, dtype=precision).to(memory_format=layout).requires_grad_()
        gradient = torch.randn(out, device=images.device, dtype=precision).to(memory_format=layout)
        times = []
        for _ in range(blocks + 2):
            start = now(images.device)
            convolution(inputs).backward(gradient)
            times.append(now(images.device) - start)
        seconds += count * statistics.median(times[2:])
        # The factor 6 is a product and a sum, for one forward and two backward passes
        operations += count * 6 * out.numel() * key[0] * math.prod(key[2])
    return seconds, operations


def now(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def profile(variant, device: torch.device, steps: int = 3) -> None:
    """Print the ten operations that take the most time."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + (device.type == "cuda")]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            variant.step()
        now(device)
    by = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--unet", choices=UNETS, default="small")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=7, help="number of blocks per median")
    parser.add_argument("--steps", type=int, default=3, help="number of steps in a block")
    parser.add_argument(
        "--profile", action="store_true", help="table of the operations that take the most time in our step"
    )
    parser.add_argument("flags", nargs="*", help="flags for train_ddpm.py, such as --compile, after --")
    options = parser.parse_args()
    names = ("dataset_name", "unet", "resolution", "train_batch_size")
    args = train_ddpm.parse_args([*(f"--{name}={getattr(options, name)}" for name in names), *options.flags])

    set_up_process()  # as every script does
    accelerator = Accelerator(mixed_precision="bf16")
    device = accelerator.device
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def unet():
        torch.manual_seed(0)
        channels = 3 if args.image_mode == "RGB" else 1
        shape = dict(sample_size=options.resolution, in_channels=channels, out_channels=channels)
        return UNet2DModel(**shape, **UNETS[options.unet])

    variants = {
        "plain, float32": Plain(args, accelerator, unet(), noise_scheduler, "no"),
        "plain, bf16": Plain(args, accelerator, unet(), noise_scheduler, "bf16"),
        "train_ddpm.py, bf16": Ours(args, accelerator, unet(), noise_scheduler),
    }
    seconds = {name: [] for name in variants}
    for block in range(options.blocks + 1):
        for name, variant in variants.items():
            start = now(device)
            for _ in range(options.steps):
                variant.step()
            if block:  # the first block is a warm-up
                seconds[name].append((now(device) - start) / options.steps)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["train_ddpm.py, bf16"]
    size = f"{options.resolution} pixels, batch {options.train_batch_size}"
    print(f"{device_name(device)}, --unet {options.unet}, {size}, N={options.blocks} {' '.join(options.flags)}")
    for name, median in medians.items():
        rate = options.train_batch_size / median
        print(f"{name:22}{median * 1e3:8.1f} ms/step{rate:8.0f} images/s   ours is {median / ours:.2f} times as fast")
    images = next(variants["train_ddpm.py, bf16"].batches)["images"]
    timesteps = torch.zeros(len(images), dtype=torch.long, device=device)
    for name, precision in (("plain, float32", torch.float32), ("train_ddpm.py, bf16", torch.bfloat16)):
        alone, operations = convolutions_alone(unet().to(device), images, timesteps, precision, options.blocks)
        rate, share = operations / alone / 1e12, alone / medians[name]
        print(f"{name:22}{alone * 1e3:8.1f} ms for its convolutions alone, {share:.0%} of a step, {rate:.2f} TFLOP/s")
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, all variants together")
    if options.profile:
        profile(variants["train_ddpm.py, bf16"], device)


if __name__ == "__main__":
    main()
