"""Distil a diffusion model into a student that draws in one to four sampling steps instead of twenty-five.

    accelerate launch --quiet --config_file accelerate_config.yaml distill_few_steps.py --pretrained_model_name_or_path outputs/digits --dataset_name digits --resolution 16

This command takes minutes on 2 CPU cores. The teacher is an output of train_ddpm.py or train_conditional.py, or another
DDPMPipeline with the noise of a DDPMScheduler. The student loads like its teacher:

    DDPMPipeline.from_pretrained("outputs/few-steps")(num_inference_steps=2)

A diffusion model moves from noise to an image in small steps. If no noise is added along this trajectory, the starting
noise determines the image at the end. Here the teacher computes trajectories, and the student learns to predict their
ends from any point. Song et al. 2023, arXiv:2303.01469, call this a consistency model. Here the target is the end that
the teacher reaches, whereas the paper uses the student's own prediction at the next point.

Such predictions are blurred where the student cannot know the end. Therefore a second loss compares the distribution of
the student's images with that of the teacher (DMD, Yin et al. 2023, arXiv:2311.18828). For this, a copy of the teacher,
the fake model, is trained on the student's images. Where it differs from the teacher, the distributions differ.
"""

from utils.args import Parser, add_common_arguments, integer, real
from utils.diffusion.unets import add_speed_arguments
from utils.exits import run_script, training_script

MATCHING_WEIGHT = 2.0  # weight of the second loss, relative to that of the trajectories; 0: trajectories only
FAKE_LEARNING_RATE = 1e-3  # of the fake model, higher than the student's, because it must keep up with the student
POINTS_PER_TRAJECTORY = 4  # images per trajectory in a batch; fewer: more varied batches, but more teacher steps
# Exponent of a uniform position on the trajectory, from noise to image; larger: more points near noise
NOISY_POINTS = 2.0
LOGIT_MEAN, LOGIT_STD = 0.4, 1.0  # timesteps of the fake model, as in train_ddpm.py
MATCHING_TIMESTEPS = 0.02, 0.98  # range of timesteps at which teacher and fake model are compared, as fractions of T
HUBER_C = 0.03  # c of the pseudo-Huber loss sqrt(d^2 + c^2) - c, quadratic for d below about c; d: RMS error
TEACHER_STEPS = 25  # sampling steps of the teacher's samples, for comparison


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.group("model").add_argument("--pretrained_model_name_or_path", required=True, help="teacher: Hub id or folder of a DDPMPipeline, or of an output of train_conditional.py")
    add_speed_arguments(parser)
    group = parser.group("distillation (noise schedule and target are the teacher's)")
    group.add_argument("--solver_steps", type=integer(2, 1000), default=8, help="steps of DPM-Solver++ on each of the teacher's trajectories, a divisor of the teacher's number of noise levels")
    group.add_argument("--teacher_guidance_scale", type=real(0), default=1.0, help="guidance scale of a teacher with classes, learnt by the student. 1: no guidance. Larger scales make samples more typical and less varied")
    group.add_argument("--class_dropout_prob", type=real(0, 1), default=0.1, help="share of trajectories with the null class, for a teacher with classes. It allows guidance of the student, too")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/few-steps", num_inference_steps=2, num_samples=16, optimizer="muon", learning_rate=5e-4)
    args = parser.parse(argv)
    if vars(args).get("validation_split"):
        parser.error("--validation_split: the denoising loss does not measure a few-step model. Use --evaluate_steps, which compares samples")
    if args.num_inference_steps > args.solver_steps:
        parser.error(f"--num_inference_steps {args.num_inference_steps} is more than --solver_steps {args.solver_steps}, the number of timesteps that the student learns. Give at most that many")
    if args.train_batch_size % POINTS_PER_TRAJECTORY:
        parser.error(f"--train_batch_size {args.train_batch_size} is not a multiple of {POINTS_PER_TRAJECTORY}, the points of each trajectory in a batch. Give a multiple")
    return args
# fmt: on


def trajectory_end(sampler, model_output, noisy_images, timesteps):
    """Return the images (B, C, H, W) at the ends of the trajectories through noisy images at timesteps (B,)."""
    from utils.diffusion.schedulers import predicted_images

    t = timesteps.view(-1, 1, 1, 1)
    c_skip, c_out = sampler.get_scalings_for_boundary_condition_discrete(t)  # as in sampling
    return c_skip * noisy_images + c_out * predicted_images(sampler, model_output, noisy_images, t)


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import copy

    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMPipeline
    from diffusers.optimization import get_scheduler

    from utils import UserError
    from utils.data.clusters import has_clusters
    from utils.data.train_data import load_train_data
    from utils.diffusion.class_conditional import ClassConditionalPipeline, class_names
    from utils.diffusion.classes import GuidedModel, add_class_embedding, cycle_labels
    from utils.diffusion.few_steps import make_few_step_sampler
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.schedulers import make_noise_scheduler, make_sampler, output_for, predicted_images
    from utils.diffusion.unets import prepare_unet, weights_digest
    from utils.pictures import make_grid
    from utils.randomness import discretize, logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import make_optimizer

    run = Run(args, "distill_few_steps", title="Few-step DDPM", constants=globals())
    accelerator = run.accelerator

    # Data
    pretrained = load_pretrained(args.pretrained_model_name_or_path, conditional=True)
    conditional = pretrained.unet.class_embedding is not None
    if args.teacher_guidance_scale != 1 and not conditional:
        raise UserError("--teacher_guidance_scale: the teacher has no classes. Leave the flag out")
    if accelerator.mixed_precision == "fp16" and args.gradient_accumulation_steps > 1:  # two optimizers share one scale
        raise UserError(
            "--mixed_precision fp16 and --gradient_accumulation_steps exclude each other here. Give --mixed_precision "
            "bf16 or no, or --gradient_accumulation_steps 1"
        )
    names = class_names(pretrained.unet.config)
    clusters = len(names) if has_clusters(names) else None
    train_data = load_train_data(args, accelerator, pretrained.unet.config, conditional=conditional and not clusters)
    if run.already_finished(train_data):
        return
    if clusters:
        train_data.cluster(clusters, run.output_dir, args.pretrained_model_name_or_path)
    classes = train_data.label_names if conditional else []

    # Model
    unet = pretrained.unet
    unet.register_to_config(sample_size=train_data.sample_size)
    if conditional:
        add_class_embedding(unet, classes)
    teacher = copy.deepcopy(unet).requires_grad_(False).eval().to(accelerator.device)  # not saved in checkpoints
    prepare_unet(teacher, accelerator.device, False, args.compile)
    fake_unet = copy.deepcopy(unet)  # a diffusion model of the student's images; only checkpoints hold it
    prepare_unet(fake_unet, accelerator.device, args.gradient_checkpointing, args.compile)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = make_noise_scheduler(pretrained, {})
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    check_fit(unet, noise_scheduler, train_data.image_shape, args.num_inference_steps)
    sampler = make_few_step_sampler(noise_scheduler, args.solver_steps)
    teacher_sampler = make_sampler("dpmsolver++", noise_scheduler)
    guided_teacher = GuidedModel(teacher, args.teacher_guidance_scale) if conditional else teacher

    # Optimizer and learning rate; the schedule counts optimizer steps
    # A beta1 of 0.5, not 0.9, because the fake model changes during training, and older gradients are outdated
    optimizer = make_optimizer(  # or any of torch.optim
        args.optimizer, unet, lr=args.learning_rate, betas=(0.5, 0.99), weight_decay=0.01, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    fake_optimizer = make_optimizer(
        args.optimizer, fake_unet, lr=FAKE_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8
    )
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    fake_model, fake_optimizer = accelerator.prepare(fake_unet, fake_optimizer)

    # Samples
    def model_inputs(batch):
        if not conditional:
            return {}
        labels = batch["labels"]  # (B,), -1: unknown
        return {"class_labels": labels.where(labels >= 0, len(classes))}

    def add_noise(images, sample_ids, purpose, fractions):
        noise = sample_noise(args.seed, purpose, sample_ids, train_data.image_shape, accelerator.device)
        timesteps = torch.from_numpy(discretize(fractions, num_train_timesteps)).to(accelerator.device)
        return noise_scheduler.add_noise(images, noise, timesteps), timesteps

    def denoise(net, noisy_images, timesteps, inputs):
        with torch.no_grad(), accelerator.autocast():
            output = net(noisy_images, timesteps, **inputs).sample.float()
        return predicted_images(noise_scheduler, output, noisy_images, timesteps.view(-1, 1, 1, 1)).clamp(-1, 1)

    all_classes, typical = range(len(classes)), train_data.typical_labels()

    def draw(
        count, num_inference_steps=args.num_inference_steps, drawn_by=unet, sampler=sampler, labels=typical
    ):  # fmt: skip
        return run.sample_images(
            drawn_by, sampler, count, train_data.image_shape, num_inference_steps,
            model_inputs=cycle_labels(labels, accelerator.device) if conditional else None,
        )  # fmt: skip

    teacher_steps = min(TEACHER_STEPS, num_train_timesteps)
    with accelerator.autocast():
        teacher_samples = draw(args.num_samples, teacher_steps, guided_teacher, teacher_sampler, all_classes)

    def sample():
        shown = sorted({1, 2, 4, args.num_inference_steps} - {*range(args.solver_steps + 1, 5)}, reverse=True)
        rows = {f"teacher, {teacher_steps} steps": teacher_samples}
        rows |= {
            f"{steps} step{'s' * (steps > 1)}": draw(args.num_samples, steps, labels=all_classes) for steps in shown
        }
        return {"samples": make_grid(np.concatenate(list(rows.values())), captions=list(rows))}

    def save_pipeline(folder):
        (ClassConditionalPipeline if conditional else DDPMPipeline)(unet, sampler).save_pretrained(folder)

    # Train
    first = slice(None, None, POINTS_PER_TRAJECTORY)  # in a batch, the first point of each trajectory
    last = torch.tensor(num_train_timesteps - 1, device=accelerator.device)
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"seed {args.seed}", compare=dict(teacher=weights_digest(teacher)[:16]),
        prediction_type=sampler.config.prediction_type, base=args.pretrained_model_name_or_path,
        model_inputs=model_inputs,
    ):  # fmt: skip
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness

        # Noise and timesteps are float32, whatever the precision of the UNet
        noise = sample_noise(args.seed, "noise", sample_ids[first], train_data.image_shape, accelerator.device)
        images = noise_scheduler.add_noise(clean_images[first], noise, last.expand(len(noise)))  # almost pure noise
        inputs, labels = model_inputs(batch), batch.pop("labels", None)
        if conditional:
            keep_label = torch.from_numpy(uniform(args.seed, "label dropout", sample_ids) >= args.class_dropout_prob)
            inputs["class_labels"] = inputs["class_labels"].where(keep_label.to(accelerator.device), len(classes))
        inputs = {name: value[first] for name, value in inputs.items()}  # one row per trajectory

        # The teacher computes its trajectories
        states = []
        teacher_sampler.set_timesteps(args.solver_steps, device=accelerator.device)
        teacher_sampler.set_begin_index(0)
        for timestep in teacher_sampler.timesteps:
            states.append(images)
            with torch.no_grad(), accelerator.autocast():
                teacher_output = guided_teacher(images, timestep.expand(len(images)), **inputs).sample.float()
            images = teacher_sampler.step(teacher_output, timestep, images).prev_sample

        # Each trajectory is split into parts with one point each. Parts near noise are shorter, so points are denser there
        fractions = uniform(args.seed, "timesteps", sample_ids)
        fractions = (sample_ids % POINTS_PER_TRAJECTORY + fractions) / POINTS_PER_TRAJECTORY
        step_index = torch.from_numpy(discretize(fractions**NOISY_POINTS, args.solver_steps)).to(accelerator.device)
        trajectories = torch.arange(len(sample_ids), device=accelerator.device) // POINTS_PER_TRAJECTORY
        noisy_images = torch.stack(states)[step_index, trajectories]  # (B, C, H, W)
        timesteps = teacher_sampler.timesteps[step_index]  # (B,)
        target = images.clamp(-1, 1)[trajectories]
        inputs = {name: value[trajectories] for name, value in inputs.items()}
        if conditional:
            batch["labels"] = labels[first][trajectories]

        with accelerator.accumulate(model, fake_model):
            model_output = model(noisy_images, timesteps, **inputs).sample.float()
            predicted = trajectory_end(sampler, model_output, noisy_images, timesteps)
            squares = (predicted - target).square().mean(dim=(1, 2, 3))  # (B,)
            losses = (squares + HUBER_C**2).sqrt() - HUBER_C  # pseudo-Huber, arXiv:2310.14189

            # The fake model learns to remove noise from the student's images, as the teacher does from real images
            samples = predicted.detach()
            clipped = samples.clamp(-1, 1)
            fractions = logit_normal(uniform(args.seed, "fake timesteps", sample_ids), LOGIT_MEAN, LOGIT_STD)
            noisy_samples, sample_timesteps = add_noise(clipped, sample_ids, "fake noise", fractions)
            fake_output = fake_model(noisy_samples, sample_timesteps, **inputs).sample.float()
            fake_target = output_for(noise_scheduler, clipped, noisy_samples, sample_timesteps.view(-1, 1, 1, 1))
            fake_loss = F.mse_loss(fake_output, fake_target)
            accelerator.backward(fake_loss)
            if accelerator.sync_gradients:  # clip_grad_norm_ of accelerate would unscale the student's gradients, too
                accelerator.unscale_gradients(fake_optimizer)
                torch.nn.utils.clip_grad_norm_(fake_model.parameters(), args.max_grad_norm or float("inf"))
            fake_optimizer.step()
            fake_optimizer.zero_grad()

            # Where both models disagree, the distributions differ. The loss moves samples by the difference
            low, high = MATCHING_TIMESTEPS
            fractions = low + (high - low) * uniform(args.seed, "matching timesteps", sample_ids)
            noisy_samples, sample_timesteps = add_noise(samples, sample_ids, "matching noise", fractions)
            by_teacher = denoise(guided_teacher, noisy_samples, sample_timesteps, inputs)
            by_fake = denoise(fake_unet, noisy_samples, sample_timesteps, inputs)
            scale = (samples - by_teacher).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=0.02)
            differences = (predicted - samples - (by_teacher - by_fake) / scale).square()
            # Images from points with little noise are sharp already, so they count less
            noise_power = 1 - noise_scheduler.alphas_cumprod.to(accelerator.device)[timesteps]
            matching_loss = (noise_power.view(-1, 1, 1, 1) * differences).mean()

            loss = losses.mean() + MATCHING_WEIGHT * matching_loss
            accelerator.backward(loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        if run.end_of_step(losses, timesteps, grad_norm, batch.get("labels")):  # once per optimizer step
            lr_scheduler.step()
            ema_model.step(unet.parameters())
        if run.every(args.logging_steps):
            both = accelerator.reduce(torch.stack([matching_loss.detach(), fake_loss.detach()]), "mean").tolist()
            run.log(dict(zip(("loss/matching", "loss/fake_model"), both, strict=True)))
    run.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
