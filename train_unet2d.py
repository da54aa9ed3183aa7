"""Train a UNet2DModel to find images in a mixture with uniform noise: what the architecture alone buys.

    accelerate launch --quiet --config_file accelerate_config.yaml train_unet2d.py --dataset_name digits

draws digits after minutes on 2 CPU cores. The output folder is a pipeline that brings its code along:

    DiffusionPipeline.from_pretrained("outputs/unet2d", trust_remote_code=True)

The noise, the target and the sampling are those of train_basic.py. The UNet is deeper, normalized, has attention, learns
its down- and up-sampling, and is told how much noise there is. train_ddpm.py changes the noise.
"""

from utils.args import Parser, add_common_arguments, check_common, real

# fmt: off
UNET = dict(  # 1.7 M parameters; every line but the first is something that train_basic.py's UNet has not
    block_out_channels=(32, 64, 64),
    layers_per_block=2,  # residual layers of two convolutions at each size, one more on the way up
    norm_num_groups=32,  # GroupNorm before each convolution
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),  # attention at the lower resolutions
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=64,  # one head; diffusers' default of 8 makes eight small ones, and a step nearly twice as long
    downsample_type="conv",  # learned, where train_basic.py takes a maximum
    upsample_type="conv",  # a convolution after the doubling
)


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])

    group = parser.add_argument_group("model")
    group.add_argument("--dropout", type=real(0, 1), default=0.0, help="in the residual layers")
    parser.switch(group, "--timestep_conditioning", True, "tell the UNet how much noise there is")
    parser.switch(group, "--gradient_checkpointing", False, "recompute activations: less memory, slower")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first and for samples of another batch size, meant for GPUs")

    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/unet2d", num_inference_steps=40)
    args = parser.parse(argv)
    check_common(parser, args)
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers import UNet2DModel
    from diffusers.optimization import get_scheduler

    from utils.data import load_train_data
    from utils.diffusion import check_fit, sample_images, zero_init
    from utils.diffusion.illustrations import show_denoising, show_walk
    from utils.diffusion.linear_mix import LinearMixPipeline, LinearMixScheduler
    from utils.evaluation import Validation
    from utils.pictures import make_grid, save_picture, save_samples
    from utils.publishing import Hub, write_card
    from utils.randomness import random_bits, sample_noise, uniform
    from utils.signals import StopSignal
    from utils.training import EMA, TrainingCurves, claim_output_dir, make_optimizer, resume, run, save

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args, "train_unet2d")
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    train_data = load_train_data(args, accelerator)  # or own_images=...
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = run.total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        run.print_finished(accelerator, args, finished_at, train_data.settings)
        hub.push()
        return

    # Model
    shape = dict(sample_size=train_data.sample_size, in_channels=train_data.channels, out_channels=train_data.channels)
    unet = zero_init(UNet2DModel(**shape, dropout=args.dropout, **UNET))
    if not args.timestep_conditioning:  # the embedding of the timestep is held at zero
        torch.nn.init.zeros_(unet.time_embedding.linear_2.weight)
        torch.nn.init.zeros_(unet.time_embedding.linear_2.bias)
        unet.time_embedding.requires_grad_(False)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = LinearMixScheduler()
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    check_fit(unet, noise_scheduler, train_data, args.num_inference_steps)
    validation = Validation(args, accelerator, train_data, noise_scheduler) if args.validation_split else None

    # Optimizer and learning rate; the schedule counts optimizer steps
    optimizer = make_optimizer(args, unet)  # or any of torch.optim
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    # Prepare
    if args.compile:
        unet.compile()
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema_model.to(accelerator.device)

    # Resume
    global_step = resume(accelerator, args, train_data.settings, ema_model)

    # Trackers
    summary = dict(
        **train_data.settings,
        data_license=train_data.license, parameters=unet.num_parameters(), max_train_steps=max_train_steps,
    )  # fmt: skip
    run.start(accelerator, args, "train_unet2d", global_step, **summary)
    curves = TrainingCurves(accelerator, args, train_data, num_train_timesteps, global_step, max_train_steps)
    stop_signal = StopSignal(accelerator, hang_timeout=args.hang_timeout)
    examples = train_data.examples(8).to(accelerator.device)

    def draw(count, num_inference_steps=args.num_inference_steps):
        return sample_images(
            unet, noise_scheduler, accelerator, count, image_shape,
            num_inference_steps, args.sample_batch_size, args.seed, stop_signal.requested,
        )  # fmt: skip

    def sample(path):
        with curves.pause(), ema_model.swapped_in(unet):
            images = draw(args.num_samples)
            denoising = show_denoising(unet, noise_scheduler, examples, args.seed)
            walk = show_walk(unet, noise_scheduler, 8, image_shape, 5, args.seed, accelerator.device)
        save_picture(denoising, output_dir / "denoising.png", accelerator, global_step, "denoising")
        save_picture(walk, output_dir / "walk.png", accelerator, global_step, "walk")
        if images is not None:  # not interrupted
            save_samples(make_grid(images), path, accelerator, args, global_step)

    def save_pipeline(folder):
        with ema_model.swapped_in(unet):
            LinearMixPipeline(unet, noise_scheduler).save_pretrained(folder)
        write_card(folder, "UNet2D denoiser", args, **summary)

    draw(1, num_inference_steps=1)  # a model that cannot draw is found out now, not after hours

    # Train
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + place in it; all randomness follows
        torch.manual_seed(random_bits(args.seed, "dropout", sample_ids).item(0))  # differs between processes

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", sample_ids, image_shape, accelerator.device, "uniform")  # in [-1, 1]
        fractions = uniform(args.seed, "timesteps", sample_ids)  # shares of noise, in [0, 1)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).float().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # x_a = (1 - a) x_0 + a u

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            target = clean_images
            losses = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = losses.mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        curves.add(losses, timesteps, batch.get("labels"))
        if not accelerator.sync_gradients:
            continue
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        ema_model.step(unet.parameters())
        global_step += 1

        # Once in N steps
        curves.step(global_step, grad_norm, learning_rate=learning_rate, ema_decay=ema_model.cur_decay_value or 0)
        stop, is_last = stop_signal.check(global_step), global_step == max_train_steps
        if stop or is_last or global_step % args.checkpointing_steps == 0:
            curves.check(global_step)  # no checkpoint holds a number that is not finite
            with curves.pause():
                save(accelerator, args, train_data.settings, ema_model, global_step, save_pipeline)
        if stop:
            run.stop(accelerator, args, global_step, max_train_steps, stop)
        if global_step % args.checkpointing_steps == 0 and not is_last:
            hub.push_checkpoint(global_step)
        if validation and (is_last or global_step % args.validation_steps == 0):
            with curves.pause(), ema_model.swapped_in(unet):
                validation.log(unet, global_step, stop_signal.requested)
        if global_step % args.sample_steps == 0 and not is_last:
            sample(output_dir / "samples" / f"step-{global_step:06}.png")

    # Save
    if accelerator.is_main_process:
        save_pipeline(output_dir)
    sample(output_dir / "samples.png")
    curves.close()
    run.finish(accelerator, args, global_step, max_train_steps, stop_signal)
    hub.push()


if __name__ == "__main__":
    arguments = parse_args()
    from utils.exits import run_script

    run_script(main, arguments)
