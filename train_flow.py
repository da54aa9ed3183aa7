"""Train a flow-matching model on straight paths from noise to images (arXiv:2209.03003, arXiv:2210.02747).

    accelerate launch --quiet --config_file accelerate_config.yaml train_flow.py --dataset_name digits

This command draws digits after a few minutes on 2 CPU cores. The output folder is a DDPMPipeline:

    DDPMPipeline.from_pretrained("outputs/flow")

An image is mixed with noise, x_s = (1 - s) x_0 + s noise, as in train_basic.py. A UNet that is conditioned on s learns
the velocity: the mean of noise - x_0 over all pairs of noise and image that can give x_s. Sampling starts from noise
and follows the velocity backwards.
"""

from utils.args import SOLVERS, Parser, add_common_arguments, real
from utils.diffusion.unets import add_unet_arguments
from utils.exits import run_script, training_script

DROPOUT = 0.0  # in the residual blocks of --unet
# --weighting_scheme logit_normal: a larger mean gives more noise, a smaller deviation fewer timesteps near 0 and T
LOGIT_MEAN, LOGIT_STD = 0.4, 1.0


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_unet_arguments(parser)
    group = parser.group("flow (defaults: those shown, or the pretrained pipeline's)")
    group.add_argument("--prediction_type", choices=("velocity", "sample"), help="target: the velocity (noise - image), or the clean image with a loss on the velocity that it implies (arXiv:2511.13720, default: velocity)")
    group.add_argument("--weighting_scheme", choices=("uniform", "logit_normal"), default="logit_normal", help="density of timesteps in training: uniform, or higher in the middle (arXiv:2403.03206)")
    group.add_argument("--flow_shift", type=real(0.01, 100), help="shift of the timesteps towards noise, for larger images, in training and sampling (arXiv:2403.03206, default: 1 up to 64 pixels, then proportional to the side)")
    group.add_argument("--sampler", choices=SOLVERS, default="dpmsolver++", help="scheduler that draws samples")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/flow", num_inference_steps=25)
    return parser.parse(argv)
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMPipeline
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.flow import make_flow, make_sampler, shifted
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.unets import make_unet, prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_flow", title="Flow-matching model", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_pretrained(start, flow=True) if start else None
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(args, accelerator, pretrained and pretrained.unet.config)
    if run.already_finished(train_data):
        return

    # Model
    if pretrained:
        unet = pretrained.unet
        unet.register_to_config(sample_size=train_data.sample_size)
    else:
        unet = make_unet(args.unet, args.model_config_name_or_path, train_data.model_shape, DROPOUT)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = make_flow(args.prediction_type, args.flow_shift, train_data.size, pretrained)
    num_train_timesteps, prediction_type = (
        noise_scheduler.config[k] for k in ("num_train_timesteps", "prediction_type")
    )
    check_fit(unet, noise_scheduler, train_data.image_shape, args.num_inference_steps)
    sampler = make_sampler(args.sampler, noise_scheduler)

    # Optimizer and learning rate; the schedule counts optimizer steps
    learning_rate = choose_learning_rate(args.learning_rate, unet)
    optimizer = make_optimizer(  # or any of torch.optim
        args.optimizer, unet, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)

    # Samples
    def draw(count, num_inference_steps=args.num_inference_steps):
        return run.sample_images(unet, sampler, count, train_data.image_shape, num_inference_steps)

    def sample():
        return {"samples": make_grid(draw(args.num_samples))}

    def save_pipeline(folder):
        DDPMPipeline(unet, sampler).save_pretrained(folder)

    # Train
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{args.sampler}, {args.num_inference_steps} steps, seed {args.seed}",
    ):  # fmt: skip
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness

        # Noise and timesteps are float32, whatever the precision of the UNet
        noise = sample_noise(args.seed, "noise", sample_ids, train_data.image_shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", sample_ids)  # fractions of T, in [0, 1)
        positions = sample_ids % train_data.global_batch_size
        fractions = (positions + fractions) / train_data.global_batch_size  # one from each equal part of [0, 1)
        if args.weighting_scheme == "logit_normal":
            fractions = logit_normal(fractions, LOGIT_MEAN, LOGIT_STD)
        fractions = shifted(fractions, noise_scheduler.config.flow_shift)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).float().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            target = noise - clean_images
            if prediction_type == "sample":  # both become velocities; the clamp prevents division by almost zero
                levels = (timesteps / num_train_timesteps).clamp(min=0.05).view(-1, 1, 1, 1)
                model_output, target = ((noisy_images - images) / levels for images in (model_output, clean_images))
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
