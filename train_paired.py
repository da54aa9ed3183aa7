"""Train a model that draws images from other images: enlarges, colours, fills holes, or follows outlines.

    accelerate launch --quiet --config_file accelerate_config.yaml train_paired.py --dataset_name digits

This command trains a model that enlarges digits by a factor of four, in a few minutes on 2 CPU cores. The output folder
loads with diffusers alone:

    LDMSuperResolutionPipeline.from_pretrained("outputs/paired")(condition, num_inference_steps=25)

This is train_flow.py with a condition: an image that is concatenated to the channels of the noisy image (SR3,
arXiv:2104.07636, and Palette, arXiv:2111.05826). The condition is made from each image (--condition), or it is a second
picture of each image (--condition_dir, --condition_column). Each sample is one of the images that fit the condition.
"""

from utils.args import SOLVERS, Parser, add_common_arguments, condition_kind, real
from utils.diffusion.unets import add_unet_arguments
from utils.exits import run_script, training_script

DROPOUT = 0.0  # in the residual blocks of --unet
# --weighting_scheme logit_normal: a larger mean gives more noise, a smaller deviation fewer timesteps near 0 and T
LOGIT_MEAN, LOGIT_STD = 0.4, 1.0
SAMPLES_PER_INPUT = 4  # in the picture of samples, which shows --num_samples / 4 inputs


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add_unet_arguments(parser)
    group = parser.group("flow (defaults: those shown, or the pretrained pipeline's)")
    group.add_argument("--prediction_type", choices=("velocity", "sample"), help="target: the velocity (noise - image), or the clean image with a loss on the velocity that it implies (arXiv:2511.13720, default: velocity)")
    group.add_argument("--weighting_scheme", choices=("uniform", "logit_normal"), default="logit_normal", help="density of timesteps in training: uniform, or higher in the middle (arXiv:2403.03206)")
    group.add_argument("--flow_shift", type=real(0.01, 100), help="shift of the timesteps towards noise, for larger images, in training and sampling (arXiv:2403.03206, default: 1 up to 64 pixels, then proportional to the side)")
    group.add_argument("--sampler", choices=SOLVERS, default="dpmsolver++", help="scheduler that draws samples")
    group = parser.group("condition")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--condition", metavar="KIND", type=condition_kind, help="condition made from each image: lowres:FACTOR (smaller), gray, inpaint (with a hole) or outline (default: lowres:4)")
    one.add_argument("--condition_dir", metavar="DIR", help="folder of second pictures with the names of the images of --train_data_dir")
    one.add_argument("--condition_column", metavar="NAME", help="column with second pictures")
    group.add_argument("--condition_dropout_prob", type=real(0, 1), default=0.0, help="share of training samples that get the null condition, for --guidance_scale")
    group.add_argument("--guidance_scale", type=real(0), default=1.0, help="guidance strength when samples are drawn. 1: none. Other values need --condition_dropout_prob in training, and take twice as long")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/paired", num_inference_steps=25)
    return parser.parse(argv)
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import torch
    import torch.nn.functional as F
    from diffusers import LDMSuperResolutionPipeline
    from diffusers.optimization import get_scheduler

    from utils.data.columns import condition_columns
    from utils.data.train_data import load_train_data
    from utils.diffusion.conditions import Condition, GuidedByCondition, arrange
    from utils.diffusion.flow import make_flow, make_sampler, shifted
    from utils.diffusion.identity import identity_autoencoder
    from utils.diffusion.pretrained import add_input_channels, check_fit, load_pretrained
    from utils.diffusion.sampling import cycle_rows
    from utils.diffusion.unets import concatenate_condition, make_unet, prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_paired", title="Image-to-image model", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_pretrained(start, flow=True, condition=True) if start else None
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(
        args, accelerator, pretrained and pretrained.unet.config, columns=condition_columns(args)
    )
    condition = Condition.from_args(args, train_data)
    if run.already_finished(train_data):
        return
    in_channels = train_data.channels + condition.channels

    # Model
    if pretrained:
        unet = add_input_channels(pretrained.unet, in_channels)
        unet.register_to_config(sample_size=train_data.sample_size)
    else:
        shape = train_data.model_shape | dict(in_channels=in_channels)
        unet = make_unet(args.unet, args.model_config_name_or_path, shape, DROPOUT)
    unet.register_to_config(_condition=condition.config)
    concatenate_condition(unet)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = make_flow(args.prediction_type, args.flow_shift, train_data.size, pretrained)
    num_train_timesteps, prediction_type = (
        noise_scheduler.config[k] for k in ("num_train_timesteps", "prediction_type")
    )
    check_fit(unet, noise_scheduler, train_data.image_shape, args.num_inference_steps, in_channels)
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
    guided = GuidedByCondition(unet, condition, args.guidance_scale)
    shown = train_data.examples_to_show(max(1, args.num_samples // SAMPLES_PER_INPUT))
    pictures = condition.pictures(shown)

    def draw(count, num_inference_steps=args.num_inference_steps, examples=None):
        inputs = condition.model_inputs(examples or train_data.examples_to_show(count))
        samples = run.sample_images(
            guided, sampler, count, train_data.image_shape, num_inference_steps,
            model_inputs=cycle_rows(inputs, accelerator.device),
        )  # fmt: skip
        return condition.keep_known(samples, inputs["condition"])

    def sample():
        images, captions = arrange(condition.show(pictures), draw(args.num_samples, examples=shown), shown["images"])
        return {"samples": make_grid(images, captions=captions)}

    def save_pipeline(folder):
        LDMSuperResolutionPipeline(identity_autoencoder(train_data.channels), unet, sampler).save_pretrained(folder)
        condition.save_picture(pictures[0], folder / "condition.png")

    # Train
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{args.sampler}, {args.num_inference_steps} steps, seed {args.seed}",
        model_inputs=condition.model_inputs, condition=condition.kind,
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

        # The model is given the condition or, at random, the null condition
        keep = torch.from_numpy(uniform(args.seed, "condition dropout", sample_ids) >= args.condition_dropout_prob)
        given = condition.model_inputs(batch)["condition"]
        given = given.where(keep.view(-1, 1, 1, 1).to(accelerator.device, non_blocking=True), condition.null(given))

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps, condition=given).sample.float()
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
