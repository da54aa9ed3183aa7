"""Adapt a pretrained diffusion model of faces to a small set of images, sample fast, and steer the samples.

    accelerate launch --quiet --config_file accelerate_config.yaml finetune_faces.py --train_data_dir DIR

This command starts from google/ddpm-celebahq-256. --pretrained_model_name_or_path takes the Hub id or folder of another
DDPMPipeline, or of an LDMPipeline: the output of train_ddpm.py, train_flow.py or, without classes, train_latent.py.
`make faces` is an example that needs no network connection. The output folder is a pipeline of the same kind:

    DDPMPipeline.from_pretrained("outputs/faces")

Differences from train_ddpm.py: --method selects the weights to train, the model is compared with its base model, and
--guidance_color and --guidance_prompt steer samples towards a colour or a sentence.
"""

from utils.args import SAMPLERS, SOLVERS, Parser, add_common_arguments, integer
from utils.diffusion.guidance_args import add_guidance_arguments
from utils.diffusion.unets import add_speed_arguments
from utils.exits import run_script, training_script

LORA_TARGETS = "to_q,to_k,to_v,to_out.0,conv1,conv2"  # layers that get adapters, by the ends of their names


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    group = parser.group("model")
    group.add_argument("--pretrained_model_name_or_path", default="google/ddpm-celebahq-256", help="DDPMPipeline or LDMPipeline to adapt: a Hub id or a folder")
    group.add_argument("--method", choices=("full", "attention", "norm", "lora"), default="full", help="weights to train: all, attention layers, norms and biases, or low-rank adapters (arXiv:2106.09685), which are merged at the end")
    group.add_argument("--lora_rank", type=integer(1), default=8, help="rank of the adapters' matrices")
    add_speed_arguments(parser)
    group = parser.group("diffusion (noise schedule and target are the pretrained pipeline's)")
    group.add_argument("--sampler", choices=sorted({*SAMPLERS, *SOLVERS}), help="scheduler that draws samples (default: ddim, or dpmsolver++ for a model of straight paths)")
    add_guidance_arguments(parser, group)
    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/faces", num_inference_steps=40, lr_warmup_steps=100, train_batch_size=8, sample_steps=250, num_samples=16, sample_batch_size=8)
    args = parser.parse(argv)
    if {"train_data_dir", "dataset_name"} & {*vars(args)} and not (args.train_data_dir or args.dataset_name):
        parser.error("no images to adapt to were given. Give --train_data_dir DIR or --dataset_name")
    return args
# fmt: on


@training_script
def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import numpy as np
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMPipeline, LDMPipeline
    from diffusers.optimization import get_scheduler

    from utils.data.nearest import show_nearest
    from utils.data.train_data import load_train_data
    from utils.diffusion import adapters
    from utils.diffusion.flow import shifted
    from utils.diffusion.guidance import make_guidance
    from utils.diffusion.pipelines import choose_sampler, is_flow, saved_scheduler, training_scheduler
    from utils.diffusion.pretrained import check_fit, load_pretrained
    from utils.diffusion.spaces import Latents, Pixels
    from utils.diffusion.unets import prepare_unet
    from utils.pictures import make_grid
    from utils.randomness import discretize, sample_noise, uniform
    from utils.training.ema import EMA
    from utils.training.loop import Run
    from utils.training.optimizer import choose_learning_rate, make_optimizer

    run = Run(args, "finetune_faces", title="Adapted DDPM", constants=globals())
    accelerator = run.accelerator

    # Data
    pretrained = load_pretrained(args.pretrained_model_name_or_path, flow=None, latent=True)
    # For images in memory, pass own_images=OwnImages(...)
    train_data = load_train_data(args, accelerator, pretrained.image_config)
    space, latent = Pixels(train_data.image_shape), pretrained.autoencoder is not None
    if latent:
        space = Latents(pretrained.autoencoder.to(accelerator.device), train_data.image_shape)
        train_data.encode_with(space)
    if run.already_finished(train_data):
        return

    # Model
    unet = pretrained.unet
    unet.register_to_config(sample_size=space.model_shape["sample_size"])
    parameters, base = unet.num_parameters(), adapters.base_weights(unet)
    adapters.choose_trainable(unet, args.method, args.lora_rank, LORA_TARGETS.split(","), args.seed)
    prepare_unet(unet, accelerator.device, args.gradient_checkpointing, args.compile)
    ema_model = EMA(unet, args.ema_max_decay, inv_gamma=1.0, power=0.75, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = training_scheduler(pretrained.scheduler, space)
    flow = is_flow(noise_scheduler)
    num_train_timesteps, prediction_type = (
        noise_scheduler.config[k] for k in ("num_train_timesteps", "prediction_type")
    )
    check_fit(unet, noise_scheduler, space.shape, args.num_inference_steps, downsampling=space.downsampling)
    sampler_name = args.sampler or ("dpmsolver++" if flow else "ddim")
    sampler = choose_sampler(noise_scheduler, sampler_name, args.num_inference_steps)
    saved = saved_scheduler(sampler_name, noise_scheduler, latent)
    guidance = make_guidance(args, accelerator.device, space=space)

    # Optimizer and learning rate; the schedule counts optimizer steps
    learning_rate = choose_learning_rate(args.learning_rate, unet, args.method)
    optimizer = make_optimizer(  # or any of torch.optim
        args.optimizer, unet, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-8
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)

    # Samples
    def draw(count, num_inference_steps=args.num_inference_steps, guidance=None):
        return run.sample_images(
            unet, sampler, count, space.shape, num_inference_steps, guidance=guidance, decode=space.decode
        )

    base_samples = draw(min(8, args.num_samples))  # samples of the pretrained model, for comparison
    training_parts = train_data.crops(1000)

    def sample():
        run.log({"optimizer/distance_to_base": adapters.distance_to_base(unet, base)})
        images = draw(args.num_samples)
        first = images[: len(base_samples)]
        pictures = {"samples": make_grid(images), "nearest": show_nearest(first, training_parts)}
        both = np.concatenate([base_samples, first])
        pictures["before_after"] = make_grid(both, captions=["base", "adapted"])
        if guidance:
            both = np.concatenate([first, draw(len(first), guidance=guidance)])
            pictures["guided"] = make_grid(both, captions=["adapted", "guided"])
        return pictures

    def save_pipeline(folder):
        adapters.save_adapter(unet, folder / "adapter")
        parts = adapters.merged(unet), saved
        pipeline = LDMPipeline(pretrained.autoencoder, *parts) if latent else DDPMPipeline(*parts)
        pipeline.save_pretrained(folder)

    # Train
    for batch in run.steps(
        model, ema_model, noise_scheduler, draw, sample, save_pipeline,
        caption=f"{sampler_name}, {args.num_inference_steps} steps, seed {args.seed}",
        method=args.method, base=args.pretrained_model_name_or_path, parameters=parameters,
        space=space if latent else None,
    ):  # fmt: skip
        clean_images = batch["latents" if latent else "images"]  # (B, C, H, W), float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + position in it; seeds all randomness

        # Noise and timesteps are float32, whatever the precision of the UNet
        noise = sample_noise(args.seed, "noise", sample_ids, space.shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", sample_ids)  # fractions of T, in [0, 1)
        positions = sample_ids % train_data.global_batch_size
        fractions = (positions + fractions) / train_data.global_batch_size  # one from each equal part of [0, 1)
        if flow:
            fractions = shifted(fractions, noise_scheduler.config.flow_shift)
            timesteps = torch.from_numpy(fractions * num_train_timesteps).float()
        else:
            timesteps = torch.from_numpy(discretize(fractions, num_train_timesteps))
        timesteps = timesteps.to(accelerator.device, non_blocking=True)
        noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)  # Eq. 4 of the paper

        with accelerator.accumulate(model):
            model_output = model(noisy_images, timesteps).sample.float()
            if flow:
                target = noise - clean_images
            elif prediction_type == "epsilon":
                target = noise
            elif prediction_type == "sample":
                target = clean_images
            else:
                target = noise_scheduler.get_velocity(clean_images, noise, timesteps)
            if flow and prediction_type == "sample":  # as in train_flow.py
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
