"""Train a class-conditional diffusion model with classifier-free guidance (arXiv:2207.12598).

    accelerate launch --quiet --config_file accelerate_config.yaml train_conditional.py --dataset_name digits

This command draws digits of every class after a few minutes on 2 CPU cores. The output folder loads with diffusers
alone:

    ConsistencyModelPipeline.from_pretrained("outputs/conditional")(batch_size=2, class_labels=[7, 3], num_inference_steps=25)

For guidance and class names, load the folder with its pipeline.py, see utils/diffusion/class_conditional.py.

This is train_ddpm.py with classes. The UNet is given each image's class or, with probability --class_dropout_prob, the
null class. It therefore learns a prediction for each class and an unconditional one. Guidance moves predictions away
from the unconditional one, which makes samples more recognisable. --model_guidance trains the model to predict guided
outputs in one function evaluation.

With --autoguidance, the target moves away from the output of an earlier version of the model (docs/autoguidance.md).

--clusters K makes classes for images without labels, see utils/data/clusters.py. With such classes, a model learns
faster than without classes.
"""

from utils.args import SAMPLERS, Parser, add_common_arguments, integer, real
from utils.diffusion.unets import add_unet_arguments
from utils.exits import run_script, training_script

NOISE = dict(
    num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
    rescale_betas_zero_snr=False,  # True makes the last noise level pure noise (arXiv:2305.08891)
)  # fmt: skip
DROPOUT = 0.0  # in the residual blocks of --unet
# --weighting_scheme logit_normal: a larger mean gives more noise, a smaller deviation fewer timesteps near 0 and T
LOGIT_MEAN, LOGIT_STD = 0.4, 1.0
SNR_GAMMA = None  # min-SNR loss weighting (arXiv:2303.09556); the paper uses 5
COPIED_AT = 0.3  # --autoguidance: share of all steps after which the earlier version is kept
GUIDES_FROM = 0.7  # share of all steps after which it guides


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_unet_arguments(parser)
    group = parser.group("diffusion (defaults: NOISE in this script, or the pretrained pipeline's)")
    group.add_argument("--beta_schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"), help="increase of the noise with t")
    group.add_argument("--prediction_type", choices=("epsilon", "sample", "v_prediction"), help="target: the noise, the clean image, or v (arXiv:2202.00512)")
    group.add_argument("--weighting_scheme", choices=("uniform", "logit_normal"), default="logit_normal", help="density of timesteps in training: uniform, or higher in the middle (arXiv:2403.03206)")
    group.add_argument("--autoguidance", metavar="W", type=real(0, 0.9), default=0.0, help="guidance by an earlier version of the model, learnt by the weights (arXiv:2406.02507). Its scale is 1 / (1 - W). 0: none")
    group.add_argument("--sampler", choices=SAMPLERS, default="dpmsolver++", help="scheduler that draws samples")
    group.add_argument("--clusters", metavar="K", type=integer(2, 1000), help="number of clusters of similar images, used as classes in place of labels. The defaults are then --sampler sde-dpmsolver++, --model_guidance 0 and --class_dropout_prob 1 / (K + 1)")
    group.add_argument("--class_dropout_prob", type=real(0, 1), default=0.1, help="share of training samples that get the null class")
    group.add_argument("--model_guidance", metavar="W", type=real(0, 0.9), default=0.35, help="guidance learnt by the weights (arXiv:2502.12154), similar to a guidance scale of 1 / (1 - W). 0: none. Training is then a third faster")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="guidance scale of sampling, in addition to --model_guidance. 1: no further guidance. Larger scales make samples more typical and less varied. Each sampling step then takes twice as long")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/conditional", num_inference_steps=25, num_samples=80)
    args = parser.parse(argv)
    if args.clusters:  # see docs/classes.md. diffusers' pipeline draws each class, and the null class, equally often
        parser.set_defaults(sampler="sde-dpmsolver++", class_dropout_prob=1 / (args.clusters + 1), model_guidance=0.0)
        args = parser.parse(argv)
    if args.clusters and vars(args).get("label_column"):
        parser.error(f"--clusters {args.clusters} takes the place of labels. Leave --label_column out, or --clusters")
    guided = args.model_guidance or args.guidance_scale != 1
    if guided and not args.class_dropout_prob and not args.pretrained_model_name_or_path:
        parser.error("--class_dropout_prob 0 trains no null class. Give --model_guidance 0 and --guidance_scale 1, or a larger probability")
    return args
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import copy

    import torch
    import torch.nn.functional as F
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.class_conditional import ClassConditionalPipeline
    from utils.diffusion.classes import GuidedModel, add_class_embedding, classes_to_show, cycle_labels, group_by_class
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.schedulers import make_noise_scheduler, make_sampler, min_snr_weights, pipeline_scheduler
    from utils.diffusion.unets import make_unet, prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import discretize, logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_conditional", title="Class-conditional DDPM", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_pretrained(start, conditional=True) if start else None
    config = pretrained and pretrained.unet.config
    train_data = load_train_data(args, accelerator, config, conditional=not args.clusters)
    if run.already_finished(train_data):
        return
    if args.clusters:
        train_data.cluster(args.clusters, run.output_dir, start)
    class_names = train_data.label_names
    null_class = len(class_names)  # the model's last class stands for no particular class

    # Model
    if pretrained:
        unet = add_class_embedding(pretrained.unet, class_names)
        unet.register_to_config(sample_size=train_data.sample_size)
    else:
        shape = dict(**train_data.model_shape, num_class_embeds=len(class_names) + 1)
        unet = make_unet(args.unet, args.model_config_name_or_path, shape, DROPOUT)
    unet.register_to_config(_class_names=class_names)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)
    guide = None  # an earlier version of the model
    if args.autoguidance:
        guide = prepare_unet(copy.deepcopy(unet), accelerator.device, False, args.compile).requires_grad_(False).eval()

    # Noise scheduler
    noise_scheduler = make_noise_scheduler(
        pretrained, NOISE, beta_schedule=args.beta_schedule, prediction_type=args.prediction_type
    )
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
    if guide is not None:
        guide = accelerator.prepare_model(guide, evaluation_mode=True)  # checkpoints hold it, too

    # Samples
    def model_inputs(batch):
        labels = batch["labels"]  # (B,), -1: unknown
        return {"class_labels": labels.where(labels >= 0, null_class)}

    guided = GuidedModel(unet, args.guidance_scale)
    typical = train_data.typical_labels()

    def draw(count, num_inference_steps=args.num_inference_steps, labels=typical):
        return run.sample_images(
            guided, sampler, count, train_data.image_shape, num_inference_steps,
            model_inputs=cycle_labels(labels, accelerator.device),
        )  # fmt: skip

    def sample():
        shown = classes_to_show(len(class_names), args.num_samples)
        images, captions = group_by_class(draw(args.num_samples, labels=shown), [class_names[k] for k in shown])
        return {"samples": make_grid(images, captions=captions)}

    def save_pipeline(folder):
        ClassConditionalPipeline(unet, pipeline_scheduler(args.sampler, noise_scheduler)).save_pretrained(folder)

    # Train
    copied_at, guides_from = (round(share * run.max_train_steps) for share in (COPIED_AT, GUIDES_FROM))
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{args.sampler}, {args.num_inference_steps} steps, seed {args.seed}, guidance {args.guidance_scale:g}",
        model_inputs=model_inputs,
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
        timesteps = torch.from_numpy(discretize(fractions, num_train_timesteps))
        timesteps = timesteps.to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # Eq. 4 of the paper

        # The model is given the class or, at random, the null class
        keep_label = torch.from_numpy(uniform(args.seed, "label dropout", sample_ids) >= args.class_dropout_prob)
        class_labels = model_inputs(batch)["class_labels"].where(
            keep_label.to(accelerator.device, non_blocking=True), null_class
        )

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps, class_labels).sample.float()
            if prediction_type == "epsilon":
                target = noise
            elif prediction_type == "sample":
                target = clean_images
            else:
                target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
            if args.model_guidance:  # the target moves away from the unconditional output, as guidance would move it
                with torch.no_grad():
                    unconditional = model(noisy_images, timesteps, torch.full_like(class_labels, null_class)).sample
                target = target + args.model_guidance * (model_output.detach() - unconditional.float())
            if guide is not None and run.global_step >= guides_from:  # the target moves away from the earlier output
                with torch.no_grad():
                    earlier_output = guide(noisy_images, timesteps, class_labels).sample.float()
                weight = args.autoguidance * (1 - args.model_guidance)  # a sum of 1 or more would diverge
                target = target + weight * (model_output.detach() - earlier_output)
            losses = F.mse_loss(model_output, target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
            loss = losses.mean()
            if SNR_GAMMA is not None:
                loss = (min_snr_weights(noise_scheduler, timesteps, SNR_GAMMA) * losses).mean()
            accelerator.backward(loss)
            grad_norm = None
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        if run.end_of_step(losses, timesteps, grad_norm, batch.get("labels")):  # once per optimizer step
            lr_scheduler.step()
            ema_model.step(unet.parameters())
            # Copied every 10 steps, because fp16 may skip a step, and --max_train_steps may become smaller
            if guide is not None and run.global_step in range(copied_at, 0, -10):
                with ema_model.averaged_weights(unet):
                    guide.load_state_dict(unet.state_dict())
    run.finish()


if __name__ == "__main__":
    run_script(main, parse_args)
