"""Train a denoising diffusion model that is told what to draw, and guided without a classifier (arXiv:2207.12598).

    accelerate launch --quiet --config_file accelerate_config.yaml train_conditional.py --dataset_name digits

draws the digits that it is asked for after a few minutes on 2 CPU cores. The output folder loads with diffusers alone:

    ConsistencyModelPipeline.from_pretrained("outputs/conditional")(batch_size=2, class_labels=[7, 3], num_inference_steps=25)

and, for guidance and classes by name, with the pipeline.py in it: see utils/diffusion/class_conditional.py.

train_ddpm.py with classes: the UNet is told each image's class and, now and then, nothing (--label_dropout). So it learns
what a seven looks like and what any digit does. Away from the latter sevens become surer: --model_guidance learns that.
"""

from utils.args import SAMPLERS, Parser, add_common_arguments, add_evaluation_arguments, check_common, integer, real

# fmt: off
UNETS = {  # --unet: keyword arguments of UNet2DModel
    "tiny": dict(  # 0.26 M parameters: for tests and first looks
        block_out_channels=(16, 32, 32), layers_per_block=1, add_attention=False, norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
    ),
    "small": dict(  # 1.2 M: 8 to 32 pixels, on a CPU: few channels where there are many pixels, and no attention
        block_out_channels=(16, 32, 96), layers_per_block=1, add_attention=False, norm_num_groups=8,
        down_block_types=["DownBlock2D"] * 3, up_block_types=["UpBlock2D"] * 3,
    ),
    "base": dict(  # 25.8 M: 32 to 64 pixels, on a GPU; attention at a quarter of the resolution
        block_out_channels=(128, 256, 256), layers_per_block=2, attention_head_dim=64,  # diffusers' 8 is slow
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ),
    "large": dict(  # 113.7 M, as google/ddpm-celebahq-256: 128 to 256 pixels, on several GPUs
        block_out_channels=(128, 128, 256, 256, 512, 512), layers_per_block=2, attention_head_dim=64,
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    ),
}
NOISE = dict(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    group = parser.add_argument_group("model")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--unet", choices=UNETS, help="architecture: tiny (for tests), small (8 to 32 pixels, the default), base (32 to 64), large (128 to 256); UNETS in this script")
    one.add_argument("--model_config_name_or_path", help="UNet2DModel config instead of --unet; random weights")
    one.add_argument("--pretrained_model_name_or_path", help="pipeline whose weights and noise schedule training starts from")
    group.add_argument("--dropout", type=real(0, 1), help="in the residual blocks of --unet (default: 0)")
    parser.switch(group, "--gradient_checkpointing", False, "recompute activations: less memory, slower")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first and for samples of another batch size, meant for GPUs")

    group = parser.add_argument_group("diffusion (defaults: NOISE in this script, or the pretrained pipeline's)")
    group.add_argument("--num_train_timesteps", type=integer(2, 10_000), help="T, number of noise levels")
    group.add_argument("--beta_schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), help="how noise grows with t")
    group.add_argument("--prediction_type", choices=("epsilon", "sample", "v_prediction"), help="predict the noise, the clean image, or v (arXiv:2202.00512)")
    parser.switch(group, "--rescale_betas_zero_snr", None, "make the last noise level pure noise (arXiv:2305.08891)")
    group.add_argument("--snr_gamma", type=real(1e-6), help="min-SNR loss weighting (arXiv:2303.09556); the paper uses 5")
    group.add_argument("--timestep_sampling", choices=("uniform", "stratified"), default="stratified", help="independent, or one from each equal part of [0, T)")
    group.add_argument("--time_density", choices=("uniform", "logit_normal"), default="logit_normal", help="where in [0, T) training looks: evenly, or more at the middle (arXiv:2403.03206)")
    group.add_argument("--logit_mean", type=real(-10, 10), default=0.4, help="of logit_normal: more noise if above 0")
    group.add_argument("--logit_std", type=real(0.01, 10), default=1.0, help="of logit_normal: less at the ends if smaller")
    group.add_argument("--sampler", choices=SAMPLERS, default="dpmsolver++", help="how samples are drawn")
    group.add_argument("--label_dropout", type=real(0, 1), default=0.1, help="share of samples whose class is not said")
    group.add_argument("--model_guidance", metavar="W", type=real(0, 0.9), default=0.35, help="guidance learnt by the weights (arXiv:2502.12154), about that of a scale of 1 / (1 - W); 0: none, a third quicker")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="further guidance of the samples that are drawn, at two calls a step: 1 is the model as it is, more is purer and less varied")

    add_evaluation_arguments(parser)
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/conditional", num_inference_steps=25, num_samples=80)
    args = parser.parse(argv)
    check_common(parser, args)
    if args.dropout is not None and (args.model_config_name_or_path or args.pretrained_model_name_or_path):
        parser.error("--dropout goes with --unet; a config or a pretrained model brings its own")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler

    from utils.data import load_train_data
    from utils.data.classes import check_classes
    from utils.diffusion import check_fit, load_pretrained, noise_flags, sample_images, unet_from_config, zero_init
    from utils.diffusion.class_conditional import ClassConditionalPipeline
    from utils.diffusion.classes import GuidedModel, give_classes, labels_in_turn, rows_by_class
    from utils.diffusion.schedulers import make_sampler, min_snr_weights, pipeline_scheduler
    from utils.evaluation import SampleQuality, Validation
    from utils.pictures import make_grid, save_samples
    from utils.publishing import Hub, write_card
    from utils.randomness import logit_normal, random_bits, sample_noise, uniform
    from utils.signals import StopSignal
    from utils.training import EMA, TrainingCurves, claim_output_dir, make_optimizer, resume, run, save

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args, "train_conditional")
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_pretrained(start, conditional=True) if start else None
    train_data = load_train_data(args, accelerator, pretrained and pretrained.unet.config, conditional=True)
    class_names = check_classes(train_data)
    nothing = len(class_names)  # the last class of the model: nothing said
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = run.total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        run.print_finished(accelerator, args, finished_at, train_data.settings)
        hub.push()
        return

    # Model
    shape = dict(sample_size=train_data.sample_size, in_channels=train_data.channels, out_channels=train_data.channels)
    shape |= dict(num_class_embeds=len(class_names) + 1)
    if pretrained:
        unet = give_classes(pretrained.unet, class_names)
        unet.register_to_config(sample_size=train_data.sample_size)
    elif args.model_config_name_or_path:
        unet = unet_from_config(args.model_config_name_or_path, **shape)
    else:
        unet = zero_init(UNet2DModel(**shape, dropout=args.dropout or 0.0, **UNETS[args.unet or "small"]))
    unet.register_to_config(_class_names=class_names)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = DDPMScheduler.from_config(
        pretrained.scheduler.config if pretrained else NOISE, **noise_flags(args)
    )
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    prediction_type = noise_scheduler.config.prediction_type
    check_fit(unet, noise_scheduler, train_data, args.num_inference_steps)
    sampler = make_sampler(args.sampler, noise_scheduler)
    validation = (
        Validation(args, accelerator, train_data, noise_scheduler, conditional=True) if args.validation_split else None
    )

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
        prediction_type=prediction_type, beta_schedule=noise_scheduler.config.beta_schedule, **train_data.settings,
        data_license=train_data.license, parameters=unet.num_parameters(), max_train_steps=max_train_steps,
    )  # fmt: skip
    run.start(accelerator, args, "train_conditional", global_step, **summary)
    curves = TrainingCurves(accelerator, args, train_data, num_train_timesteps, global_step, max_train_steps)
    quality = SampleQuality(args, accelerator, train_data, global_step) if args.evaluate_steps else None
    stop_signal = StopSignal(accelerator, hang_timeout=args.hang_timeout)

    guided = GuidedModel(unet, args.guidance_scale)
    all_classes = labels_in_turn(range(len(class_names)), accelerator.device)

    def draw(count, num_inference_steps=args.num_inference_steps):
        return sample_images(
            guided, sampler, accelerator, count, image_shape,
            num_inference_steps, args.sample_batch_size, args.seed, stop_signal.requested, model_inputs=all_classes,
        )  # fmt: skip

    def sample(path):
        with curves.pause(), ema_model.swapped_in(unet):
            images = draw(args.num_samples)
        if images is not None:  # not interrupted
            images, captions = rows_by_class(images, class_names)
            save_samples(make_grid(images, captions=captions), path, accelerator, args, global_step)

    def save_pipeline(folder):
        with ema_model.swapped_in(unet):
            ClassConditionalPipeline(unet, pipeline_scheduler(args.sampler, noise_scheduler)).save_pretrained(folder)
        write_card(folder, "Class-conditional DDPM", args, classes=class_names, **summary)

    draw(1, num_inference_steps=1)  # a model that cannot draw is found out now, not after hours

    # Train
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + place in it; all randomness follows
        torch.manual_seed(random_bits(args.seed, "dropout", sample_ids).item(0))  # differs between processes

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", sample_ids, image_shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", sample_ids)  # shares of T, in [0, 1)
        if args.timestep_sampling == "stratified":
            fractions = (sample_ids % global_batch_size + fractions) / global_batch_size
        if args.time_density == "logit_normal":
            fractions = logit_normal(fractions, args.logit_mean, args.logit_std)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).long().to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # Eq. 4 of the paper

        # the class that the model is told, or nothing
        said = torch.from_numpy(uniform(args.seed, "label dropout", sample_ids) >= args.label_dropout)
        labels = batch["labels"]  # (B,), -1 where it is not known
        class_labels = labels.where((labels >= 0) & said.to(labels.device), nothing)

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps, class_labels).sample.float()
            if prediction_type == "epsilon":
                target = noise
            elif prediction_type == "sample":
                target = clean_images
            else:
                target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
            if args.model_guidance:  # learn what guidance would draw: aim further away from what is said of nothing
                with torch.no_grad():
                    unsaid = model(noisy_images, timesteps, torch.full_like(class_labels, nothing)).sample.float()
                target = target + args.model_guidance * (model_output.detach() - unsaid)
            losses = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = losses.mean()
            if args.snr_gamma is not None:
                loss = (min_snr_weights(noise_scheduler, timesteps, args.snr_gamma) * losses).mean()
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
        if quality and (is_last or global_step % args.evaluate_steps == 0):
            with curves.pause(), ema_model.swapped_in(unet):
                quality.log(draw, global_step)
                quality.keep(save_pipeline)
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
