"""Train an autoencoder, which turns images into latents for train_latent.py and latents into images.

    accelerate launch --quiet --config_file accelerate_config.yaml train_autoencoder.py --dataset_name digits --resolution 32 --max_train_steps 600

This command trains an autoencoder of digits in a minute on 2 CPU cores. The output folder is an AutoencoderKL:

    AutoencoderKL.from_pretrained("outputs/autoencoder")

The encoder reduces an image 2, 4 or 8 times in each direction, and returns the mean and the variance of normal latents
(arXiv:1312.6114, arXiv:2112.10752). The decoder reconstructs the image from latents that are drawn from them. The loss
is the mean absolute error, a structural term, and the Kullback-Leibler divergence from standard normal latents.
"""

from utils.args import Parser, add_common_arguments, integer
from utils.diffusion.unets import add_speed_arguments
from utils.exits import run_script, training_script

STRUCTURE_WEIGHT = 0.2  # weight of 1 - SSIM beside the mean absolute error
KL_WEIGHT = 1e-2  # weight of the divergence per value of the latents. Larger weights give smoother latents and blur
MEASURED_IMAGES = 256  # number of training images by which the scale of the latents is measured


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    group = parser.group("model")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--autoencoder", choices=("small", "base"), help="architecture, see utils/diffusion/autoencoders.py: small (for a CPU, the default), or base (with --downsampling 8, that of Stable Diffusion)")
    one.add_argument("--pretrained_model_name_or_path", help="AutoencoderKL with the initial weights")
    group.add_argument("--downsampling", type=int, choices=(2, 4, 8), help="image pixels per latent in each direction (default: 4, or that of the pretrained autoencoder)")
    group.add_argument("--latent_channels", type=integer(1), help="channels of the latents (default: 4, or those of the pretrained autoencoder)")
    add_speed_arguments(parser)
    add_common_arguments(parser, draws=False)
    parser.set_defaults(output_dir="outputs/autoencoder", train_batch_size=8, num_samples=12, sample_batch_size=8)
    return parser.parse(argv, learning_rate=3e-3)
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.autoencoders import (
        check_size,
        describe_latents,
        image_config,
        latent_statistics,
        load_autoencoder,
        make_autoencoder,
        reconstruct,
        structural_similarity,
    )
    from utils.diffusion.unets import prepare_unet
    from utils.pictures import from_uint8, make_grid, to_uint8
    from utils.randomness import sample_noise
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_autoencoder", title="Autoencoder", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_autoencoder(start, "--pretrained_model_name_or_path", trainable=True) if start else None
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(args, accelerator, pretrained and image_config(pretrained))
    if run.already_finished(train_data):
        return

    # Model
    autoencoder = make_autoencoder(
        args.autoencoder, args.downsampling, args.latent_channels, train_data.channels, pretrained
    )
    latent_shape = check_size(autoencoder, train_data.size)
    autoencoder.register_to_config(sample_size=train_data.sample_size)
    prepare_unet(autoencoder, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(autoencoder, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Optimizer and learning rate; the schedule counts optimizer steps
    learning_rate = choose_learning_rate(args.learning_rate, autoencoder)
    optimizer = make_optimizer(  # or any of torch.optim
        args.optimizer, autoencoder, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(autoencoder, optimizer, lr_scheduler)

    # Samples
    shown = train_data.examples_to_show(args.num_samples)["images"]
    measured = train_data.examples(MEASURED_IMAGES)["images"]
    how = accelerator.device, args.sample_batch_size, run.stop_requested

    def draw(count):
        return to_uint8(reconstruct(autoencoder, from_uint8(train_data.shown(count)), *how))

    def sample():
        reconstructions = reconstruct(autoencoder, shown, *how)
        differences = (reconstructions - shown) / 2
        psnr = -10 * differences.square().mean(dim=(1, 2, 3)).log10().mean()
        rows = {"images": shown, f"reconstructions, {psnr:.1f} dB": reconstructions, "differences": differences}
        return {"samples": make_grid(to_uint8(torch.cat(list(rows.values()))), captions=list(rows))}

    def save_model(folder):
        autoencoder.register_to_config(**latent_statistics(autoencoder, measured))
        autoencoder.save_pretrained(folder)

    # Train
    for batch in run.steps(model, ema_model, None, draw, sample, save_model, caption=describe_latents(autoencoder)):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness
        noise = sample_noise(args.seed, "noise", sample_ids, latent_shape, accelerator.device)

        with accelerator.accumulate(model):
            reconstructions, mean, log_variance = (output.float() for output in model(clean_images, noise))
            absolute = (reconstructions - clean_images).abs().mean(dim=(1, 2, 3))  # (B,)
            structure = 1 - structural_similarity(reconstructions, clean_images)
            divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean(dim=(1, 2, 3)) / 2
            losses = absolute + STRUCTURE_WEIGHT * structure + KL_WEIGHT * divergence
            loss = losses.mean()
            accelerator.backward(loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        if run.end_of_step(losses, None, grad_norm, batch.get("labels")):  # once per optimizer step
            lr_scheduler.step()
            ema_model.step(autoencoder.parameters())
    run.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
