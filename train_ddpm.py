"""Train a denoising diffusion model (DDPM, Ho et al. 2020, arXiv:2006.11239) on images.

    accelerate launch --quiet --config_file accelerate_config.yaml train_ddpm.py --dataset_name digits

This command draws digits after a few minutes on 2 CPU cores. The output folder is a DDPMPipeline:

    DDPMPipeline.from_pretrained("outputs/ddpm")

Noise is added to an image step by step, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise. A UNet that is
conditioned on t learns to remove the noise. Sampling starts from noise and follows the predictions back to an image.

With --autoguidance, the target moves away from the output of an earlier version of the model (docs/autoguidance.md).
"""

from utils.args import SAMPLERS, Parser, add_common_arguments, real
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
    group.add_argument("--sampler", choices=SAMPLERS, default="sde-dpmsolver++", help="scheduler that draws samples")
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/ddpm", num_inference_steps=25)
    return parser.parse(argv)
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import copy

    import torch
    import torch.nn.functional as F
    from diffusers import DDPMPipeline
    from diffusers.optimization import get_scheduler

    from utils.data.train_data import load_train_data
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.schedulers import make_noise_scheduler, make_sampler, min_snr_weights, pipeline_scheduler
    from utils.diffusion.unets import make_unet, prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import discretize, logit_normal, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "train_ddpm", title="DDPM", constants=globals())
    accelerator = run.accelerator

    # Data
    start = args.pretrained_model_name_or_path
    pretrained = load_pretrained(start) if start else None
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
    def draw(count, num_inference_steps=args.num_inference_steps):
        return run.sample_images(unet, sampler, count, train_data.image_shape, num_inference_steps)

    def sample():
        return {"samples": make_grid(draw(args.num_samples))}

    def save_pipeline(folder):
        DDPMPipeline(unet, pipeline_scheduler(args.sampler, noise_scheduler)).save_pretrained(folder)

    # Train
    copied_at, guides_from = (round(share * run.max_train_steps) for share in (COPIED_AT, GUIDES_FROM))
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
        timesteps = torch.from_numpy(discretize(fractions, num_train_timesteps))
        timesteps = timesteps.to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # Eq. 4 of the paper

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            if prediction_type == "epsilon":
                target = noise
            elif prediction_type == "sample":
                target = clean_images
            else:
                target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
            if guide is not None and run.global_step >= guides_from:  # the target moves away from the earlier output
                with torch.no_grad():
                    earlier_output = guide(noisy_images, timesteps).sample.float()
                target = target + args.autoguidance * (model_output.detach() - earlier_output)
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
