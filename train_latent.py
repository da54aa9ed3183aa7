"""Train a flow-matching model on the latents of an autoencoder, with classes or without (arXiv:2112.10752).

    accelerate launch --quiet --config_file accelerate_config.yaml train_latent.py --dataset_name digits --resolution 32

This command trains in the latents of the autoencoder in outputs/autoencoder, which train_autoencoder.py writes. The
output folder loads with diffusers alone:

    LDMPipeline.from_pretrained("outputs/latent")
    DiTPipeline.from_pretrained("outputs/latent")([7, 3], guidance_scale=1)  # with --class_conditional

This is train_flow.py with latents in the place of images. They have fewer values, so that each step is faster. The
autoencoder stays as it is. Its digest is compared when the run resumes.
"""

from utils.args import SOLVERS, Parser, add_common_arguments, real
from utils.diffusion.unets import add_unet_arguments
from utils.exits import run_script, training_script

DROPOUT = 0.0  # in the residual blocks of --unet
# --weighting_scheme logit_normal: a larger mean gives more noise, a smaller deviation fewer timesteps near 0 and T
LOGIT_MEAN, LOGIT_STD = 0.4, 1.0
NULL_CLASS = 1000  # number of the null class, as in DiTPipeline


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_unet_arguments(parser)
    group = parser.group("latents")
    group.add_argument("--vae", metavar="FOLDER|ID", help="autoencoder: the output of train_autoencoder.py, or a folder or Hub id of an autoencoder or of a pipeline with one (default: outputs/autoencoder, or that of the pretrained pipeline)")
    group = parser.group("flow (defaults: those shown, or the pretrained pipeline's)")
    group.add_argument("--prediction_type", choices=("velocity", "sample"), help="target: the velocity (noise - latents), or the clean latents with a loss on the velocity that they imply (arXiv:2511.13720, default: velocity)")
    group.add_argument("--weighting_scheme", choices=("uniform", "logit_normal"), default="logit_normal", help="density of timesteps in training: uniform, or higher in the middle (arXiv:2403.03206)")
    group.add_argument("--flow_shift", type=real(0.01, 100), help="shift of the timesteps towards noise, for larger images, in training and sampling (arXiv:2403.03206, default: 1 up to 64 latents a side, then proportional to the side)")
    group.add_argument("--sampler", choices=SOLVERS, default="dpmsolver++", help="scheduler that draws samples")
    group = parser.group("classes")
    parser.switch(group, "--class_conditional", False, "a model with classes, which needs images with labels")
    group.add_argument("--class_dropout_prob", type=real(0, 1), default=0.1, help="share of training samples that get the null class")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="guidance scale of sampling. 1: no guidance. Larger scales make samples more typical and less varied. Each sampling step then takes twice as long")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/latent", num_inference_steps=25)
    args = parser.parse(argv)
    changed = [name for name in ("class_dropout_prob", "guidance_scale") if vars(args)[name] != parser.get_default(name)]
    if changed and not args.class_conditional:
        parser.error(f"--{changed[0]} needs --class_conditional. Without classes, leave it out")
    if args.guidance_scale != 1 and not args.class_dropout_prob and not args.pretrained_model_name_or_path:
        parser.error("--class_dropout_prob 0 trains no null class. Give --guidance_scale 1, or a larger probability")
    return args
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from diffusers import DiTPipeline, LDMPipeline
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.autoencoders import choose_autoencoder, image_config
    from utils.diffusion.classes import GuidedModel, add_class_embedding, classes_to_show, cycle_labels, group_by_class
    from utils.diffusion.flow import make_flow, make_sampler, shifted
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.spaces import Latents
    from utils.diffusion.unets import make_unet, prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_latent", title="Latent flow-matching model", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    conditional = args.class_conditional
    pretrained = load_pretrained(start, conditional=conditional, flow=True, latent=True) if start else None
    autoencoder = choose_autoencoder(args.vae, pretrained)
    # For images in memory, pass own_images=OwnImages(...)
    config = image_config(autoencoder, pretrained and pretrained.unet.config)
    train_data = load_train_data(args, accelerator, config, conditional=conditional)
    latents = Latents(autoencoder.to(accelerator.device), train_data.image_shape)
    train_data.encode_with(latents)
    if run.already_finished(train_data):
        return
    class_names = train_data.label_names if conditional else []

    # Model
    if pretrained:
        unet = add_class_embedding(pretrained.unet, class_names, NULL_CLASS) if conditional else pretrained.unet
        unet.register_to_config(sample_size=latents.model_shape["sample_size"])
    else:
        shape = latents.model_shape | (dict(num_class_embeds=NULL_CLASS + 1) if conditional else {})
        unet = make_unet(args.unet or "wide", args.model_config_name_or_path, shape, DROPOUT)
    if conditional:
        unet.register_to_config(_class_names=class_names)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = make_flow(args.prediction_type, args.flow_shift, latents.shape[1:], pretrained)
    num_train_timesteps, prediction_type = (
        noise_scheduler.config[k] for k in ("num_train_timesteps", "prediction_type")
    )
    check_fit(unet, noise_scheduler, latents.shape, args.num_inference_steps, downsampling=latents.downsampling)
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
    def model_inputs(batch):
        if not conditional:
            return {}
        labels = batch["labels"]  # (B,), -1: unknown
        return {"class_labels": labels.where(labels >= 0, NULL_CLASS)}

    drawn_by = GuidedModel(unet, args.guidance_scale) if conditional else unet
    typical = train_data.typical_labels()

    def draw(count, num_inference_steps=args.num_inference_steps, labels=typical):
        return run.sample_images(
            drawn_by, sampler, count, latents.shape, num_inference_steps, decode=latents.decode,
            model_inputs=cycle_labels(labels, accelerator.device) if conditional else None,
        )  # fmt: skip

    def sample():
        if not conditional:
            return {"samples": make_grid(draw(args.num_samples))}
        shown = classes_to_show(len(class_names), args.num_samples)
        images, captions = group_by_class(draw(args.num_samples, labels=shown), [class_names[k] for k in shown])
        return {"samples": make_grid(images, captions=captions)}

    def save_pipeline(folder):
        if not conditional:
            return LDMPipeline(autoencoder, unet, sampler).save_pretrained(folder)
        pipeline = DiTPipeline(unet, autoencoder, sampler)
        pipeline.register_to_config(id2label=dict(enumerate(class_names)))
        pipeline.save_pretrained(folder)

    # Train
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{args.sampler}, {args.num_inference_steps} steps, seed {args.seed}",
        model_inputs=model_inputs, space=latents,
    ):  # fmt: skip
        clean_latents = batch["latents"]  # (B, C, H, W), float32, normalised by the autoencoder's config
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness

        # Noise and timesteps are float32, whatever the precision of the UNet
        noise = sample_noise(args.seed, "noise", sample_ids, latents.shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", sample_ids)  # fractions of T, in [0, 1)
        positions = sample_ids % train_data.global_batch_size
        fractions = (positions + fractions) / train_data.global_batch_size  # one from each equal part of [0, 1)
        if args.weighting_scheme == "logit_normal":
            fractions = logit_normal(fractions, LOGIT_MEAN, LOGIT_STD)
        fractions = shifted(fractions, noise_scheduler.config.flow_shift)
        timesteps = torch.from_numpy(fractions * num_train_timesteps).float().to(accelerator.device, non_blocking=True)
        noisy_latents = noise_scheduler.add_noise(clean_latents, noise, timesteps)

        # A model with classes is given the class or, at random, the null class
        inputs = model_inputs(batch)
        if conditional:
            keep_label = torch.from_numpy(uniform(args.seed, "label dropout", sample_ids) >= args.class_dropout_prob)
            inputs["class_labels"] = inputs["class_labels"].where(
                keep_label.to(accelerator.device, non_blocking=True), NULL_CLASS
            )

        with accelerator.accumulate(model):
            model_output = model(noisy_latents, timesteps, **inputs).sample.float()
            target = noise - clean_latents
            if prediction_type == "sample":  # both become velocities; the clamp prevents division by almost zero
                levels = (timesteps / num_train_timesteps).clamp(min=0.05).view(-1, 1, 1, 1)
                model_output, target = ((noisy_latents - clean) / levels for clean in (model_output, clean_latents))
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
