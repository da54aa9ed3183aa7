"""Train a minimal denoiser: a hand-written UNet that predicts images from their mixtures with uniform noise.

    accelerate launch --quiet --config_file accelerate_config.yaml train_basic.py --dataset_name digits

This command draws digits after a minute on 2 CPU cores. The output folder is a pipeline that contains its own code:

    DiffusionPipeline.from_pretrained("outputs/basic", trust_remote_code=True)

An image x_0 is mixed with a random amount a of uniform noise u, x_a = (1 - a) x_0 + a u. A UNet of six convolutions
learns to predict x_0 without the amount a as an input. Sampling starts from noise and moves towards the predictions in
small steps. train_unet2d.py uses a better UNet, and train_ddpm.py also changes the noise.
"""

from utils.args import Parser, add_common_arguments
from utils.exits import run_script, training_script


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/basic", num_inference_steps=40)
    return parser.parse(argv)


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.basic_unet import BasicUNet
    from utils.diffusion.illustrations import show_denoising, show_walk
    from utils.diffusion.linear_mix import LinearMixPipeline, LinearMixScheduler
    from utils.diffusion.pretrained import check_fit
    from utils.pictures import make_grid
    from utils.randomness import sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import make_optimizer

    run = Run(args, "train_basic", title="Basic denoiser", constants=globals())
    accelerator = run.accelerator

    # Data
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(args, accelerator)
    if run.already_finished(train_data):
        return

    # Model
    unet = BasicUNet(**train_data.model_shape)
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
            model_output = model(noisy_images).sample.float()
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
