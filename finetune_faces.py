"""Adapt a pretrained diffusion model of faces to a small set of images, sample fast, and steer the samples.

    accelerate launch --quiet --config_file accelerate_config.yaml finetune_faces.py --train_data_dir DIR

starts from google/ddpm-celebahq-256, or from any other DDPMPipeline: --pretrained_model_name_or_path takes a Hub id or
a folder, such as the output of train_ddpm.py. `make faces` does it all without a network. The output folder is again

    DDPMPipeline.from_pretrained("outputs/faces")

What is new against train_ddpm.py: only some weights may learn (--method), the model is compared with the one that it
comes from, and samples can be steered towards a colour or a sentence (--guidance_color, --guidance_prompt).
"""

from utils.args import SAMPLERS, Parser, add_common_arguments, check_common, integer
from utils.guidance_args import add_guidance_arguments, check_guidance


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])

    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", default="google/ddpm-celebahq-256", help="DDPMPipeline to adapt: a Hub id or a folder")
    group.add_argument("--method", choices=("full", "attention", "norm", "lora"), default="full", help="what learns: all weights; attention layers; norms and biases; low-rank adapters (arXiv:2106.09685), merged in the end")
    group.add_argument("--lora_rank", type=integer(1), default=8, help="rank of the adapters' matrices")
    group.add_argument("--lora_targets", default="to_q,to_k,to_v,to_out.0,conv1,conv2", help="layers that get adapters, by the end of their names")
    parser.switch(group, "--gradient_checkpointing", False, "recompute activations: less memory, slower")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first and for samples of another batch size, meant for GPUs")

    group = parser.add_argument_group("diffusion (noise schedule and target are the pretrained pipeline's)")
    group.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="how samples are drawn")
    add_guidance_arguments(group)

    group = parser.add_argument_group("forgetting")
    group.add_argument("--prior_dataset_name", help="images that the pretrained model was made for: a loss curve that shows forgetting")
    group.add_argument("--prior_dataset_split", default="train", help="split of --prior_dataset_name")

    add_common_arguments(parser)
    parser.set_defaults(output_dir="outputs/faces", num_inference_steps=40, learning_rate=1e-5, lr_warmup_steps=100, train_batch_size=8, sample_steps=250, validation_steps=250, num_samples=16, sample_batch_size=8)
    args = parser.parse(argv)
    check_common(parser, args)
    check_guidance(parser, args)
    if not (args.train_data_dir or args.dataset_name):
        parser.error("give the images to adapt to: --train_data_dir DIR, or --dataset_name")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import numpy as np
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers import DDPMPipeline, DDPMScheduler
    from diffusers.optimization import get_scheduler

    from utils.data import load_train_data
    from utils.diffusion import adapters, check_fit, load_pretrained, sample_images
    from utils.diffusion.guidance import make_guidance
    from utils.diffusion.schedulers import make_sampler, pipeline_scheduler
    from utils.evaluation import Validation
    from utils.evaluation.reference import show_nearest
    from utils.pictures import make_grid, save_picture, save_samples, to_uint8
    from utils.publishing import Hub, write_card
    from utils.randomness import random_bits, sample_noise, uniform
    from utils.signals import StopSignal
    from utils.training import EMA, TrainingCurves, claim_output_dir, make_optimizer, resume, run, save

    # Accelerator
    accelerator = run.make_accelerator(args)
    output_dir, finished_at = claim_output_dir(accelerator, args, "finetune_faces")
    hub = Hub(accelerator, args)
    set_seed(args.seed)

    # Data
    pretrained = load_pretrained(args.pretrained_model_name_or_path)
    train_data = load_train_data(args, accelerator, pretrained.unet.config)  # or own_images=...
    global_batch_size, image_shape = train_data.global_batch_size, train_data.image_shape  # all processes; (C, H, W)
    max_train_steps = run.total_train_steps(args, train_data.length, global_batch_size)
    if finished_at is not None and finished_at >= max_train_steps:
        run.print_finished(accelerator, args, finished_at, train_data.settings)
        hub.push()
        return

    # Model
    unet = pretrained.unet
    unet.register_to_config(sample_size=train_data.sample_size)
    adapters.log_trainable_counts(unet, args)
    parameters, base = unet.num_parameters(), adapters.base_weights(unet)
    adapters.choose_trainable(
        unet, args.method, args.lora_rank, args.lora_targets.replace(" ", "").split(","), args.seed
    )
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
    ema_model = EMA(unet, args.ema_max_decay, args.ema_inv_gamma, args.ema_power, enabled=args.use_ema)

    # Noise scheduler
    noise_scheduler = DDPMScheduler.from_config(pretrained.scheduler.config)
    num_train_timesteps = noise_scheduler.config.num_train_timesteps
    prediction_type = noise_scheduler.config.prediction_type
    check_fit(unet, noise_scheduler, train_data, args.num_inference_steps)
    sampler = make_sampler(args.sampler, noise_scheduler)
    validation = Validation(args, accelerator, train_data, noise_scheduler)
    guidance = make_guidance(args, accelerator.device)

    # Optimizer and learning rate; the schedule counts optimizer steps
    optimizer = make_optimizer(args, unet)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    # Prepare
    if args.compile:
        unet.compile()
    model, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    ema_model.to(accelerator.device)

    def draw(count, guidance=None, stop=lambda: False):
        return sample_images(
            unet, sampler, accelerator, count, image_shape,
            args.num_inference_steps, args.sample_batch_size, args.seed, stop, guidance=guidance,
        )  # fmt: skip

    # Resume
    base_samples = draw(min(8, args.num_samples))  # what the pretrained model draws, to compare with
    global_step = resume(accelerator, args, train_data.settings, ema_model)

    # Trackers
    summary = dict(
        prediction_type=prediction_type, method=args.method, base=args.pretrained_model_name_or_path,
        **train_data.settings,
        data_license=train_data.license, parameters=parameters, max_train_steps=max_train_steps,
    )  # fmt: skip
    run.start(accelerator, args, "finetune_faces", global_step, **summary)
    curves = TrainingCurves(accelerator, args, train_data, num_train_timesteps, global_step, max_train_steps)
    stop_signal = StopSignal(accelerator, hang_timeout=args.hang_timeout)
    training_images = to_uint8(train_data.examples(1000))

    def validate():
        with curves.pause(), ema_model.swapped_in(unet):
            distance = adapters.distance_to_base(unet, base)
            validation.log(unet, global_step, stop_signal.requested, distance_to_base=distance)

    def sample(path):
        with curves.pause(), ema_model.swapped_in(unet):
            images = draw(args.num_samples, stop=stop_signal.requested)
            guided = draw(len(base_samples), guidance, stop_signal.requested) if guidance else None
        if images is None or (guidance and guided is None):  # interrupted
            return
        first = images[: len(base_samples)]
        both = np.concatenate([base_samples, first])
        pictures = {"before_after": make_grid(both, captions=["base", "adapted"])}
        pictures["nearest"] = show_nearest(first, training_images)
        if guidance:
            pictures["guided"] = make_grid(np.concatenate([first, guided]), captions=["adapted", "guided"])
        for name, picture in pictures.items():
            save_picture(picture, output_dir / f"{name}.png", accelerator, global_step, name)
        save_samples(make_grid(images), path, accelerator, args, global_step)

    def save_pipeline(folder):
        with ema_model.swapped_in(unet):
            adapters.save_adapter(unet, folder / "adapter")
            plain = adapters.merged(unet)
            DDPMPipeline(plain, pipeline_scheduler(args.sampler, noise_scheduler)).save_pretrained(folder)
        write_card(folder, "Adapted DDPM", args, **summary)

    if global_step == 0:
        validate()

    # Train
    model.train()
    for batch in train_data.batches(global_step, max_train_steps):
        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32
        sample_ids = batch["sample_ids"]  # (B,) optimizer step x global batch + place in it; all randomness follows
        torch.manual_seed(random_bits(args.seed, "dropout", sample_ids).item(0))  # differs between processes

        # Noise and timesteps, in float32 whatever the UNet computes in
        noise = sample_noise(args.seed, "noise", sample_ids, image_shape, accelerator.device)
        fractions = uniform(args.seed, "timesteps", sample_ids)  # shares of T, in [0, 1)
        fractions = (sample_ids % global_batch_size + fractions) / global_batch_size  # one from each part of it
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
        if is_last or global_step % args.validation_steps == 0:
            validate()
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
