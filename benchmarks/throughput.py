"""Images/s of this project's training step beside a plain one: same UNet, same batch, same loss, one run.

    python benchmarks/throughput.py --unet small --resolution 28

The plain step is that of the usual example script: float32 (and, in a second column, bf16 autocast), images decoded and
resized one by one in the DataLoader's process, AdamW not fused, an EMA parameter by parameter, ``.item()`` every step.
Ours is what train_ddpm.py does, with its caches and its utils. Blocks of steps alternate between the variants, so that
a noisy machine disturbs all alike; medians are over blocks.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

import train_ddpm
from utils.data import load_train_data
from utils.data.sources import ImageSource, load_source
from utils.hardware import device_name, set_up_process
from utils.randomness import sample_noise, uniform
from utils.training.ema import EMA


class Ours:
    """The loop of train_ddpm.py, without logging and saving."""

    def __init__(self, args, accelerator, unet, noise_scheduler):
        self.args, self.accelerator, self.scheduler = args, accelerator, noise_scheduler
        self.data = load_train_data(args, accelerator)
        if accelerator.device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        if args.compile:
            unet.compile()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
        self.model, self.optimizer = accelerator.prepare(unet, optimizer)
        self.ema = EMA(unet, 0.999, 1.0, 0.75)
        self.batches = self.data.batches(0, 10**6)
        self.losses = []

    def step(self):
        batch = next(self.batches)
        images, numbers = batch["images"], batch["sample_ids"]
        noise = sample_noise(0, "noise", numbers, images.shape[1:], images.device)
        size = self.data.global_batch_size
        fractions = (numbers % size + uniform(0, "timesteps", numbers)) / size
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

        def transform(examples):
            size = (args.resolution, args.resolution)
            images = [np.asarray(image.convert("L").resize(size), np.float32) for image in examples["image"]]
            return {"input": [torch.from_numpy(image)[None] / 127.5 - 1 for image in images]}

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


def convolution_ratio(options) -> float:
    """How many times as fast a convolution is in bf16 as in float32: more than this, no step of them can gain."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        convolution = torch.nn.Conv2d(64, 64, 3, padding=1).to(dtype)
        size = (options.train_batch_size, 64, options.resolution, options.resolution)
        images, times = torch.randn(size, dtype=dtype, requires_grad=True), []
        for _ in range(2 * options.blocks):
            start = time.perf_counter()
            convolution(images).sum().backward()
            times.append(time.perf_counter() - start)
        seconds[dtype] = statistics.median(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--unet", choices=train_ddpm.UNETS, default="small")
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=7, help="N of each median")
    parser.add_argument("--steps", type=int, default=3, help="steps in a block")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    flags = [f"--{name}={getattr(options, name)}" for name in ("dataset_name", "resolution", "train_batch_size")]
    args = train_ddpm.parse_args([*flags, *(["--compile"] if options.compile else [])])

    set_up_process()  # as every script does
    accelerator = Accelerator(mixed_precision="bf16")
    noise_scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    def unet():
        torch.manual_seed(0)
        shape = dict(sample_size=options.resolution, in_channels=1, out_channels=1)
        return UNet2DModel(**shape, **train_ddpm.UNETS[options.unet])

    variants = {
        "plain, float32": Plain(args, accelerator, unet(), noise_scheduler, "no"),
        "plain, bf16": Plain(args, accelerator, unet(), noise_scheduler, "bf16"),
        "train_ddpm.py, bf16": Ours(args, accelerator, unet(), noise_scheduler),
    }
    seconds = {name: [] for name in variants}
    for block in range(options.blocks + 1):
        for name, variant in variants.items():
            start = time.perf_counter()
            for _ in range(options.steps):
                variant.step()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            if block:  # the first is warm-up
                seconds[name].append((time.perf_counter() - start) / options.steps)
    if accelerator.device.type == "cpu":
        ratio = convolution_ratio(options)
        print(f"a 3x3 convolution of 64 channels, forward and backward: bf16 is {ratio:.1f} times as fast as float32")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["train_ddpm.py, bf16"]
    print(f"{device_name(accelerator.device)}, --unet {options.unet}, {options.resolution} pixels, N={options.blocks}")
    for name, median in medians.items():
        rate = options.train_batch_size / median
        print(f"{name:22}{median * 1e3:8.0f} ms/step{rate:8.0f} images/s   ours is {median / ours:.2f} times as fast")
    if accelerator.device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB, all variants together")


if __name__ == "__main__":
    main()
