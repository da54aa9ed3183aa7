"""Train the smallest honest denoiser: a hand-written UNet that finds images in a mixture with uniform noise.

    accelerate launch --quiet --config_file accelerate_config.yaml train_basic.py --dataset_name digits

draws digits after a minute on 2 CPU cores. The output folder is a pipeline that brings its code along:

    DiffusionPipeline.from_pretrained("outputs/basic", trust_remote_code=True)

An image is mixed with noise by a random amount, x_a = (1 - a) x_0 + a u; a UNet of six convolutions that is not told a
learns to predict x_0; samples start from noise and move towards the predictions in small steps. Nothing more: this is
how far one gets. train_unet2d.py puts a better UNet in its place, train_ddpm.py another noise.
"""

from utils.args import Parser, add_common_arguments, check_common


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/basic", num_inference_steps=40)
    args = parser.parse(argv)
    check_common(parser, args)
    return args


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler

    from utils import run
    from utils.basic_unet import BasicUNet
    from utils.cards import write_card
    from utils.curves import TrainingCurves
    from utils.datasets import load_train_data
    from utils.ema import EMA
    from utils.hub import Hub
    from utils.images import make_grid
    from utils.models import check_fit, count_parameters
    from utils.output_dir import claim_output_dir, resume, save
    from utils.pipeline import LinearMixPipeline
    from utils.randomness import sample_noise, uniform
    from utils.sampling import sample_images, save_picture, show_denoising, show_walk
    from utils.schedulers import LinearMixScheduler, total_train_steps
    from utils.signals import StopSignal
    from utils.validation import Validation

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args)
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    train_data = load_train_data(args, accelerator)
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        return run.finished_before(accelerator, args, finished_at, hub)

    # Model
    shape = dict(sample_size=train_data.resolution, in_channels=train_data.channels, out_channels=train_data.channels)
    unet = BasicUNet(**shape)
    check_fit(unet, train_data.resolution, train_data.channels)
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = LinearMixScheduler()
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    validation = Validation(args, accelerator, train_data, noise_scheduler) if args.validation_split else None

    # Optimizer and learning rate; the schedule counts optimizer steps
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay, eps=args.adam_epsilon, fused=True,
    )  # fmt: skip
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    # Prepare
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema_model.to(accelerator.device)

    # Resume
    global_step = resume(accelerator, args, train_data.facts, ema_model)

    # Trackers
    facts = dict(
        **train_data.facts,
        data_license=train_data.license,
        parameters=count_parameters(unet),
        max_train_steps=max_train_steps,
    )
    run.start(accelerator, args, "train_basic", global_step, **facts)
    curves = TrainingCurves(
        accelerator, train_data, args.logging_steps, num_train_timesteps, global_step, max_train_steps
    )
    stop_signal = StopSignal(accelerator)
    examples = train_data.examples(8).to(accelerator.device)

    def sample(path):
        with curves.pause(), ema_model.swapped_in(unet):
            images = sample_images(
                unet, noise_scheduler, accelerator, args.num_samples, image_shape,
                args.num_inference_steps, args.sample_batch_size, args.seed, lambda: stop_signal.received,
            )  # fmt: skip
            denoising = show_denoising(unet, noise_scheduler, examples, args.seed)
            walk = show_walk(unet, noise_scheduler, 8, image_shape, 5, args.seed, accelerator.device)
        save_picture(denoising, output_dir / "denoising.png", accelerator, global_step, "denoising")
        save_picture(walk, output_dir / "walk.png", accelerator, global_step, "walk")
        if images is not None:  # not interrupted
            save_picture(make_grid(images), path, accelerator, global_step, "samples")

    def save_pipeline(folder):
        with ema_model.swapped_in(unet):
            LinearMixPipeline(unet, noise_scheduler).save_pretrained(folder)
        write_card(folder, "Basic denoiser", args, **facts)

    # Train
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        numbers = batch["sample_numbers"]  # (B,) optimizer step x global batch + place in it; all randomness follows

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", numbers, image_shape, accelerator.device, "uniform")  # in [-1, 1]
        fractions = uniform(args.seed, "timesteps", numbers)  # of noise, in [0, 1)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).float().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # x_a = (1 - a) x_0 + a u

        with accelerator.accumulate(model):
            model_output = model(noisy_images).sample.float()
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
        stop = stop_signal.check(global_step)
        if stop or global_step % args.checkpointing_steps == 0 or global_step == max_train_steps:
            curves.check(global_step)  # no checkpoint holds a number that is not finite
            with curves.pause():
                save(accelerator, args, train_data.facts, ema_model, global_step, save_pipeline)
        if stop:
            return run.say_stopped(accelerator, args, global_step, max_train_steps, stop)
        if global_step % args.checkpointing_steps == 0 and global_step < max_train_steps:
            hub.push_checkpoint(global_step)
        if validation and (global_step % args.validation_steps == 0 or global_step == max_train_steps):
            with curves.pause(), ema_model.swapped_in(unet):
                validation.log(unet, global_step, lambda: stop_signal.received)
        if global_step % args.sample_steps == 0 and global_step < max_train_steps:
            sample(output_dir / "samples" / f"step-{global_step:06}.png")

    # Save
    if accelerator.is_main_process:
        save_pipeline(output_dir)
    sample(output_dir / "samples.png")
    curves.close()
    return run.finish(accelerator, args, global_step, stop_signal, hub, **facts)


if __name__ == "__main__":
    arguments = parse_args()
    from utils.run import run_script

    run_script(main, arguments)
