"""Make a trained diffusion model draw in one to four calls instead of twenty-five: it learns where its teacher's way ends.

    accelerate launch --quiet --config_file accelerate_config.yaml distill_few_steps.py --pretrained_model_name_or_path outputs/digits --dataset_name digits --resolution 16

takes what train_ddpm.py or train_conditional.py made, or another DDPMPipeline with the noise of a DDPMScheduler, and
minutes on 2 CPU cores. The output loads as its teacher did:

    DDPMPipeline.from_pretrained("outputs/few-steps")(num_inference_steps=2)

A diffusion model goes from noise to an image by small steps. Without new noise on the way, the noise decides where the way
ends. Here the teacher walks, and the student learns to say at any point where the way ends: the consistency of Song et
al. 2023, arXiv:2303.01469, with ends that are walked to instead of the student's own guesses at the next point.
"""

from utils.args import Parser, add_common_arguments, add_evaluation_arguments, check_common, integer, real


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="teacher: DDPMPipeline, or what train_conditional.py made; a Hub id or a folder")
    parser.switch(group, "--gradient_checkpointing", False, "recompute activations: less memory, slower")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first and for samples of another batch size, meant for GPUs")

    group = parser.add_argument_group("distillation (noise schedule and target are the teacher's)")
    group.add_argument("--solver_steps", type=integer(2, 1000), default=8, help="UNet calls of the teacher on each way, by DPM-Solver++; a divisor of its noise levels")
    group.add_argument("--points_per_way", type=integer(1), default=4, help="images of a batch that are points of one way; fewer are less alike, and cost more calls of the teacher")
    group.add_argument("--noisy_points", type=real(0.1, 10), default=2.0, help="which points: place u of a way, from noise to image, is u to this power; 1 is even, more is nearer to noise")
    group.add_argument("--huber_c", type=real(0), default=0.03, help="pseudo-Huber loss sqrt(d^2 + c^2) - c: below about c errors count squared; d: rms over the pixels")
    group.add_argument("--teacher_guidance_scale", type=real(0), default=1.0, help="of a teacher with classes, learnt by the student: 1 is the teacher as it is, more is purer and less varied")
    group.add_argument("--label_dropout", type=real(0, 1), default=0.1, help="with classes: share of ways on which none is said, so that the student can be guided, too")
    group.add_argument("--teacher_steps", type=integer(1, 1000), default=25, help="UNet calls of the teacher's samples, to compare with")

    add_evaluation_arguments(parser)
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/few-steps", num_inference_steps=2, num_samples=16, optimizer="muon", learning_rate=5e-4)
    args = parser.parse(argv)
    check_common(parser, args)
    if args.validation_split:
        parser.error("--validation_split: the loss of single steps says nothing about a model that does without them; --evaluate_steps measures samples")
    if args.num_inference_steps > args.solver_steps:
        parser.error(f"--num_inference_steps {args.num_inference_steps} is more than --solver_steps {args.solver_steps}, the timesteps that the student knows")
    if args.train_batch_size % args.points_per_way:
        parser.error(f"--train_batch_size {args.train_batch_size} is not a multiple of --points_per_way {args.points_per_way}: each way has all its points in one batch")
    return args
# fmt: on


def way_ends_at(sampler, model_output, noisy_images, timesteps):
    """The images (B, C, H, W) that the way through noisy ones leads to: themselves, where there is no noise (B,)."""
    from utils.diffusion.schedulers import predicted_images

    t = timesteps.view(-1, 1, 1, 1)
    c_skip, c_out = sampler.get_scalings_for_boundary_condition_discrete(t)  # the same that draws samples
    return c_skip * noisy_images + c_out * predicted_images(sampler, model_output, noisy_images, t)


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import copy

    import numpy as np
    import torch
    from accelerate.utils import set_seed
    from diffusers import DDPMPipeline, DDPMScheduler
    from diffusers.optimization import get_scheduler

    from utils import UserError
    from utils.data import load_train_data
    from utils.data.classes import check_classes
    from utils.diffusion import check_fit, load_pretrained, sample_images
    from utils.diffusion.class_conditional import ClassConditionalPipeline
    from utils.diffusion.classes import GuidedModel, give_classes, labels_in_turn
    from utils.diffusion.few_steps import make_few_step_sampler, weights_digest
    from utils.diffusion.schedulers import make_sampler
    from utils.evaluation import SampleQuality
    from utils.pictures import make_grid, save_picture
    from utils.publishing import Hub, write_card
    from utils.randomness import random_bits, sample_noise, uniform
    from utils.signals import StopSignal
    from utils.training import EMA, TrainingCurves, claim_output_dir, make_optimizer, resume, run, save

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args, "distill_few_steps")
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    pretrained = load_pretrained(args.pretrained_model_name_or_path, conditional=True)
    conditional = pretrained.unet.class_embedding is not None
    if args.teacher_guidance_scale != 1 and not conditional:
        raise UserError("--teacher_guidance_scale: the teacher knows no classes; leave the flag out")
    config = pretrained.unet.config
    train_data = load_train_data(args, accelerator, config, conditional=conditional)  # or own_images=...
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = run.total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        run.print_finished(accelerator, args, finished_at, train_data.settings)
        hub.push()
        return

    # Model
    unet = pretrained.unet
    unet.register_to_config(sample_size=train_data.sample_size)
    classes = check_classes(train_data) if conditional else None
    if conditional:
        give_classes(unet, classes)
    teacher = copy.deepcopy(unet).requires_grad_(False).eval()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
        teacher.to(memory_format=torch.channels_last)
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = DDPMScheduler.from_config(pretrained.scheduler.config)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    check_fit(unet, noise_scheduler, train_data, args.num_inference_steps)
    if args.teacher_steps > num_train_timesteps:
        raise UserError(
            f"--teacher_steps {args.teacher_steps}: the teacher has only {num_train_timesteps} noise levels"
        )
    sampler = make_few_step_sampler(noise_scheduler, args.solver_steps)
    teacher_sampler = make_sampler("dpmsolver++", noise_scheduler)

    # Optimizer and learning rate; the schedule counts optimizer steps
    optimizer = make_optimizer(args, unet)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    # Prepare
    if args.compile:
        unet.compile()
        teacher.compile()
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    teacher.to(accelerator.device)  # not prepared: it is in no checkpoint
    guided_teacher = GuidedModel(teacher, args.teacher_guidance_scale) if conditional else teacher
    ema_model.to(accelerator.device)

    # Resume
    settings = {**train_data.settings, "teacher": weights_digest(teacher)[:16]}
    global_step = resume(accelerator, args, settings, ema_model)

    # Trackers
    summary = dict(
        prediction_type=sampler.config.prediction_type, base=args.pretrained_model_name_or_path, **train_data.settings,
        data_license=train_data.license, parameters=unet.num_parameters(), max_train_steps=max_train_steps,
    )  # fmt: skip
    run.start(accelerator, args, "distill_few_steps", global_step, **summary)
    curves = TrainingCurves(accelerator, args, train_data, num_train_timesteps, global_step, max_train_steps)
    quality = SampleQuality(args, accelerator, train_data, global_step) if args.evaluate_steps else None
    stop_signal = StopSignal(accelerator, hang_timeout=args.hang_timeout)
    options = dict(model_inputs=labels_in_turn(range(len(classes)), accelerator.device)) if conditional else {}

    def draw(count, num_inference_steps=args.num_inference_steps, drawn_by=unet, sampler=sampler):
        return sample_images(
            drawn_by, sampler, accelerator, count, image_shape,
            num_inference_steps, args.sample_batch_size, args.seed, stop_signal.requested, **options,
        )  # fmt: skip

    with curves.pause(), accelerator.autocast():
        teacher_samples = draw(args.num_samples, args.teacher_steps, guided_teacher, teacher_sampler)

    def sample(path):
        rows = {f"teacher, {args.teacher_steps} calls": teacher_samples}
        shown = sorted({1, 2, 4, args.num_inference_steps} - {*range(args.solver_steps + 1, 5)}, reverse=True)
        with curves.pause(), ema_model.swapped_in(unet):
            rows |= {f"{calls} call{'s' * (calls > 1)}": draw(args.num_samples, calls) for calls in shown}
        if not any(images is None for images in rows.values()):  # not interrupted
            picture = make_grid(np.concatenate(list(rows.values())), captions=list(rows))
            save_picture(picture, path, accelerator, global_step, "samples", f"step {global_step}, seed {args.seed}")

    def save_pipeline(folder):
        pipeline_class = ClassConditionalPipeline if conditional else DDPMPipeline
        with ema_model.swapped_in(unet):
            pipeline_class(unet, sampler).save_pretrained(folder)
        write_card(folder, "Few-step DDPM", args, classes=classes, **summary)

    # Train
    first = slice(None, None, args.points_per_way)  # in a batch, the first point of each way
    last = torch.tensor(num_train_timesteps - 1, device=accelerator.device)
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + place in it; all randomness follows
        torch.manual_seed(random_bits(args.seed, "dropout", sample_ids).item(0))  # differs between processes

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", sample_ids[first], image_shape, accelerator.device)
        way = noise_scheduler.add_noise(clean_images[first], noise, last.expand(len(noise)))  # next to pure noise
        labels, class_labels = batch.pop("labels", None), None
        if conditional:  # (W,), -1 where it is not known
            labels = labels[first]
            said = torch.from_numpy(uniform(args.seed, "label dropout", sample_ids[first]) >= args.label_dropout)
            class_labels = labels.where((labels >= 0) & said.to(labels.device), len(classes))

        # the teacher walks
        passed = []
        teacher_sampler.set_timesteps(args.solver_steps, device=accelerator.device)
        teacher_sampler.set_begin_index(0)
        for timestep in teacher_sampler.timesteps:
            passed.append(way)
            with torch.no_grad(), accelerator.autocast():
                teacher_output = guided_teacher(way, timestep.expand(len(way)), class_labels).sample.float()
            way = teacher_sampler.step(teacher_output, timestep, way).prev_sample

        # points of the ways, one from each part, parts shorter near noise
        fractions = uniform(args.seed, "timesteps", sample_ids)
        fractions = (sample_ids % args.points_per_way + fractions) / args.points_per_way
        places = torch.from_numpy(fractions**args.noisy_points * args.solver_steps).long().to(accelerator.device)
        ways = torch.arange(len(sample_ids), device=accelerator.device) // args.points_per_way
        noisy_images = torch.stack(passed)[places, ways]  # (B, C, H, W)
        timesteps = teacher_sampler.timesteps[places]  # (B,)
        target = way.clamp(-1, 1)[ways]
        if conditional:
            batch["labels"], class_labels = labels[ways], class_labels[ways]  # those of the ways

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps, class_labels).sample.float()
            predicted = way_ends_at(sampler, model_output, noisy_images, timesteps)
            squares = (predicted - target).square().mean(dim=(1, 2, 3))  # (B,)
            losses = (squares + args.huber_c**2).sqrt() - args.huber_c  # pseudo-Huber, arXiv:2310.14189
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
                save(accelerator, args, settings, ema_model, global_step, save_pipeline)
        if stop:
            run.stop(accelerator, args, global_step, max_train_steps, stop)
        if global_step % args.checkpointing_steps == 0 and not is_last:
            hub.push_checkpoint(global_step)
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
