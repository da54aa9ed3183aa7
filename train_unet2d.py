"""Train a UNet2DModel on images mixed with uniform noise: train_basic.py with a better architecture.

    accelerate launch --quiet --config_file accelerate_config.yaml train_unet2d.py --dataset_name digits

This command draws digits after minutes on 2 CPU cores. The output folder is a pipeline that contains its own code:

    DiffusionPipeline.from_pretrained("outputs/unet2d", trust_remote_code=True)

The noise, the target and the sampling are those of train_basic.py. The UNet is deeper and is conditioned on the noise
level. It has normalization and attention layers, and learns its down- and upsampling. train_ddpm.py changes the noise.
"""

from utils.args import Parser, add_common_arguments
from utils.diffusion.unets import add_speed_arguments
from utils.exits import run_script, training_script

UNET = dict(  # 1.7 M parameters; every line but the first adds a feature that the UNet of train_basic.py lacks
    block_out_channels=(32, 64, 64),
    layers_per_block=2,  # residual layers of two convolutions per resolution, one more in each up block
    norm_num_groups=32,  # GroupNorm before each convolution
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),  # attention at the lower resolutions
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=64,  # one head; diffusers' default of 8 makes eight heads and nearly doubles the step time
    downsample_type="conv",  # learned; train_basic.py uses max pooling
    upsample_type="conv",  # a convolution follows the upsampling
    dropout=0.0,  # in the residual layers
)


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.switch(parser.group("model"), "--timestep_conditioning", True, "conditioning of the UNet on the noise level")
    add_speed_arguments(parser)
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/unet2d", num_inference_steps=40)
    return parser.parse(argv)
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from diffusers import UNet2DModel
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.illustrations import show_denoising, show_walk
    from utils.diffusion.linear_mix import LinearMixPipeline, LinearMixScheduler
    from utils.diffusion.pretrained import check_fit, zero_init
    from utils.diffusion.unets import prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import make_optimizer

    run = Run(args, "train_unet2d", title="UNet2D denoiser", constants=globals())
    accelerator = run.accelerator

    # Data
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(args, accelerator)
    if run.already_finished(train_data):
        return

    # Model
    unet = zero_init(UNet2DModel(**train_data.model_shape, **UNET))
    if not args.timestep_conditioning:  # the timestep embedding stays zero
        torch.nn.init.zeros_(unet.time_embedding.linear_2.weight)
        torch.nn.init.zeros_(unet.time_embedding.linear_2.bias)
        unet.time_embedding.requires_grad_(False)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = LinearMixScheduler()
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    check_fit(unet, noise_scheduler, train_data.image_shape, args.num_inference_steps)

    # Optimizer and learning rate; the schedule counts optimizer steps
    optimizer = make_optimizer(  # or any of torch.optim
        args.optimizer, unet, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)

    # Samples
    examples = train_data.examples(8)["images"].to(accelerator.device)

    def draw(count, num_inference_steps=args.num_inference_steps):
        return run.sample_images(unet, noise_scheduler, count, train_data.image_shape, num_inference_steps)

    def sample():
        return {
            "samples": make_grid(draw(args.num_samples)),
            "denoising": show_denoising(unet, noise_scheduler, examples, args.seed),
            "walk": show_walk(unet, noise_scheduler, 8, train_data.image_shape, 5, args.seed, accelerator.device),
        }

    def save_pipeline(folder):
        LinearMixPipeline(unet, noise_scheduler).save_pretrained(folder)

    # Train
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{args.num_inference_steps} steps, seed {args.seed}",
    ):  # fmt: skip
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness

        # Noise and timesteps are float32, whatever the precision of the UNet
        noise = sample_noise(args.seed, "noise", sample_ids, train_data.image_shape, accelerator.device, "uniform")
        fractions = uniform(args.seed, "timesteps", sample_ids)  # fractions of noise, in [0, 1)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).float().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # x_a = (1 - a) x_0 + a u

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            target = clean_images
            losses = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = losses.mean()
            accelerator.backward(loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        if run.end_of_step(losses, timesteps, grad_norm, batch.get("labels")):  # once per optimizer step
            lr_scheduler.step()
            ema_model.step(unet.parameters())
    run.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
