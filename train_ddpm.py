"""Train a denoising diffusion model (DDPM, Ho et al. 2020, arXiv:2006.11239) on images.

    accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py --dataset_name digits

draws digits after a few minutes on 2 CPU cores. The output folder is a DDPMPipeline:

    DDPMPipeline.from_pretrained("outputs/ddpm")

An image is noised step by step, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise; a UNet that is told t learns
what undoes it; samples start from noise and follow its predictions back.
"""

from utils.args import SAMPLERS, Parser, add_common_arguments, add_features_arguments, check_common, integer, real

# fmt: off
UNETS = {  # --unet: keyword arguments of UNet2DModel
    "tiny": dict(  # 1.0 M parameters: for tests and first looks
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        add_attention=False,
    ),
    "small": dict(  # 2.5 M: 8 to 32 pixels, on a CPU; attention would cost more than it gives in minutes
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        add_attention=False,
    ),
    "base": dict(  # 25.8 M: 32 to 64 pixels, on a GPU; attention at a quarter of the resolution
        block_out_channels=(128, 256, 256),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=64,  # diffusers' default of 8 makes many small heads, which is slow
    ),
    "large": dict(  # 113.7 M, as google/ddpm-celebahq-256: 128 to 256 pixels, on several GPUs
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=64,
    ),
}
NOISE = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    group.add_argument("--unet", choices=UNETS, help="architecture, see UNETS in this script (default: small)")
    group.add_argument("--dropout", type=real(0, 1), help="in the residual blocks of --unet (default: 0)")
    group.add_argument("--model_config_name_or_path", help="UNet2DModel config instead of --unet; random weights")
    group.add_argument("--pretrained_model_name_or_path", help="pipeline whose weights and noise schedule training starts from")
    parser.switch(group, "--gradient_checkpointing", False, "recompute activations: less memory, slower")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first, meant for GPUs")

    group = parser.add_argument_group("diffusion (defaults: NOISE in this script, or the pretrained pipeline's)")
    group.add_argument("--num_train_timesteps", type=integer(2, 10_000), help="T, number of noise levels")
    group.add_argument("--beta_schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), help="how noise grows with t")
    group.add_argument("--prediction_type", choices=("epsilon", "sample", "v_prediction"), help="predict the noise, the clean image, or v (arXiv:2202.00512)")
    parser.switch(group, "--rescale_betas_zero_snr", None, "make the last noise level pure noise (arXiv:2305.08891)")
    group.add_argument("--snr_gamma", type=real(1e-6), help="min-SNR loss weighting (arXiv:2303.09556); the paper uses 5")
    group.add_argument("--timestep_sampling", choices=("uniform", "stratified"), default="stratified", help="independent, or one from each equal part of [0, T)")
    group.add_argument("--sampler", choices=SAMPLERS, default="dpmsolver++", help="how samples are drawn")

    group = parser.add_argument_group("evaluation while training")
    group.add_argument("--evaluate_steps", type=integer(1), help="optimizer steps between evaluations: curves of fd and kid against training images")
    group.add_argument("--num_evaluation_samples", type=integer(10), default=1000, help="N of each; more images make it surer and slower")
    add_features_arguments(group)
    parser.switch(group, "--keep_best", False, "keep the pipeline with the lowest fd so far in OUTPUT_DIR/best")

    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/ddpm", num_inference_steps=25)
    args = parser.parse(argv)
    check_common(parser, args)
    if sum(x is not None for x in (args.unet, args.model_config_name_or_path, args.pretrained_model_name_or_path)) > 1:
        parser.error("--unet, --model_config_name_or_path and --pretrained_model_name_or_path exclude each other; give one")
    if args.rescale_betas_zero_snr and args.prediction_type == "epsilon":
        parser.error("--rescale_betas_zero_snr with --prediction_type epsilon teaches nothing at the last timestep, where the input is the noise itself; take v_prediction or sample")
    if args.num_train_timesteps and args.num_inference_steps > args.num_train_timesteps:
        parser.error(f"--num_inference_steps {args.num_inference_steps} is more than --num_train_timesteps {args.num_train_timesteps}")
    if args.keep_best and not args.evaluate_steps:
        parser.error("--keep_best needs --evaluate_steps: what is best is found by evaluating")
    if args.dropout is not None and (args.model_config_name_or_path or args.pretrained_model_name_or_path):
        parser.error("--dropout goes with --unet; a config or a pretrained model brings its own")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler

    from utils import run
    from utils.cards import write_card
    from utils.curves import TrainingCurves
    from utils.datasets import load_train_data
    from utils.ema import EMA
    from utils.hub import Hub
    from utils.images import make_grid
    from utils.models import (
        check_fit,
        check_noise_scheduler,
        count_parameters,
        image_format,
        load_config,
        load_pretrained,
        make_unet,
    )
    from utils.output_dir import claim_output_dir, resume, save
    from utils.quality import Quality
    from utils.randomness import sample_noise, uniform
    from utils.sampling import estimate_seconds, sample_images, save_picture
    from utils.schedulers import compute_snr, make_sampler, min_snr_weights, pipeline_scheduler, total_train_steps
    from utils.signals import StopSignal
    from utils.validation import Validation

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args)
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    pretrained = None
    if args.pretrained_model_name_or_path:
        pretrained = load_pretrained(args.pretrained_model_name_or_path)
    train_data = load_train_data(args, accelerator, **(image_format(pretrained.unet) if pretrained else {}))
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        return run.finished_before(accelerator, args, finished_at, hub)

    # Model
    shape = dict(sample_size=train_data.resolution, in_channels=train_data.channels, out_channels=train_data.channels)
    if pretrained:
        unet = pretrained.unet
        unet.register_to_config(sample_size=train_data.resolution)
    elif args.model_config_name_or_path:
        unet = make_unet(load_config(args.model_config_name_or_path, **shape))
    else:
        unet = UNet2DModel(**shape, dropout=args.dropout or 0.0, **UNETS[args.unet or "small"])
    check_fit(unet, train_data.resolution, train_data.channels)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    given = {name: getattr(args, name) for name in (*NOISE, "rescale_betas_zero_snr")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.beta_schedule or args.num_train_timesteps:
        given["trained_betas"] = None  # a pretrained pipeline may bring explicit ones
    noise_scheduler = DDPMScheduler.from_config(pretrained.scheduler.config if pretrained else NOISE, **given)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    prediction_type = noise_scheduler.config.prediction_type
    check_noise_scheduler(noise_scheduler, args.num_inference_steps)
    sampler = make_sampler(args.sampler, noise_scheduler)
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
    if args.compile:
        unet.compile()
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema_model.to(accelerator.device)

    # Resume
    global_step = resume(accelerator, args, train_data.facts, ema_model)

    # Trackers
    facts = dict(prediction_type=prediction_type, beta_schedule=noise_scheduler.config.beta_schedule)
    facts |= dict(
        **train_data.facts,
        data_license=train_data.license,
        parameters=count_parameters(unet),
        max_train_steps=max_train_steps,
    )
    run.start(accelerator, args, "train_ddpm", global_step, **facts)
    curves = TrainingCurves(
        accelerator, train_data, args.logging_steps, num_train_timesteps, global_step, max_train_steps
    )
    stop_signal = StopSignal(accelerator)

    def draw(count, function=sample_images):
        return function(
            unet, sampler, accelerator, count, image_shape,
            args.num_inference_steps, args.sample_batch_size, args.seed, lambda: stop_signal.received,
        )  # fmt: skip

    def sample(path):
        with curves.pause(), ema_model.swapped_in(unet):
            images = draw(args.num_samples)
        if images is not None:  # not interrupted
            save_picture(make_grid(images), path, accelerator, global_step, "samples")

    def save_pipeline(folder):
        with ema_model.swapped_in(unet):
            DDPMPipeline(unet, pipeline_scheduler(args.sampler, noise_scheduler)).save_pretrained(folder)
        write_card(folder, "DDPM", args, **facts)

    if args.evaluate_steps:
        quality = Quality(args, accelerator, train_data, global_step)
        quality.announce(draw(quality.count, estimate_seconds))

    # Train
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        numbers = batch["sample_numbers"]  # (B,) optimizer step x global batch + place in it; all randomness follows
        torch.manual_seed(args.seed + int(numbers[0]))  # of dropout: another for each process and micro-step

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", numbers, image_shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", numbers)  # of T, in [0, 1)
        if args.timestep_sampling == "stratified":
            fractions = (numbers % global_batch_size + fractions) / global_batch_size
        timesteps = torch.from_numpy(fractions * num_train_timesteps).long().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # Eq. 4 of the paper

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            if prediction_type == "epsilon":
                target = noise
            elif prediction_type == "sample":
                target = clean_images
            else:
                target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
            losses = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = losses.mean()
            if args.snr_gamma is not None:
                snr = compute_snr(noise_scheduler, timesteps)
                loss = (min_snr_weights(snr, args.snr_gamma, prediction_type) * losses).mean()
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
        if args.evaluate_steps and (global_step % args.evaluate_steps == 0 or global_step == max_train_steps):
            with curves.pause():
                with ema_model.swapped_in(unet):
                    quality.log(draw(quality.count), global_step)
                quality.keep(save_pipeline)
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
