"""Draw images with any model of these scripts, or another pipeline of a UNet2DModel, with classes or without.

    python sample.py outputs/digits --num_samples 1000

Image k depends on the seed and k only: not on the batch size, nor on the number of processes of `accelerate launch`.
Interrupted, the same command goes on where it stopped. No code that comes with a model is run, unless it is asked for.
"""

from utils.args import ALL_SAMPLERS, Parser, integer, real
from utils.diffusion.guidance_args import add_guidance_arguments
from utils.exits import run_script


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a pipeline, or of a UNet2DModel")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs/samples", help="images/, grid.png and what else is asked for")
    parser.switch(parser, "--trust_remote_code", False, "run the code that a model brings whose net is its author's own; read it first")
    parser.add_argument("--num_samples", type=integer(1), default=64, help="images (default: 64; with --interpolate 8)")
    parser.add_argument("--sample_batch_size", type=integer(1), default=64, help="images at once, per process")
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of the noise that images start from")
    parser.add_argument("--format", choices=("png", "npz", "parquet"), default="png", help="also all images in one file: images.npz or images.parquet")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=ALL_SAMPLERS, help="instead of the scheduler that the pipeline carries")
    group.add_argument("--num_inference_steps", type=integer(1, 1000), help="UNet calls per image (default: 40; 2 of a model of distill_few_steps.py)")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the UNet's arithmetic (default: what the accelerate config says)")
    parser.switch(group, "--compile", False, "torch.compile the UNet: minutes at first")
    parser.switch(group, "--gif", False, "also walk.gif and walk.png: how the first images arise, noisy and predicted; with --interpolate a walk.gif from A to B and back")
    group.add_argument("--interpolate", nargs=2, type=integer(0), metavar=("A", "B"), help="numbers of two images: --num_samples images lead from the noise of one to that of the other (with dpmsolver++ where the pipeline's scheduler would add noise on the way) and, of a model with classes, through --class_labels")
    group.add_argument("--init_image", metavar="FILE", help="start from this picture with noise on it")
    group.add_argument("--strength", type=real(0.01, 1), default=0.5, help="how much noise is put on --init_image: 1 leaves nothing of it")

    group = parser.add_argument_group("steering")
    group.add_argument("--class_labels", metavar="LABELS", help="classes to draw, by name or number, such as 7,7,3, repeated in turn; or all (default: all, of a model with classes). --guidance_scale says how firmly")
    add_guidance_arguments(parser, group)
    args = parser.parse(argv)
    if args.interpolate:
        parser.set_defaults(num_samples=8)  # more are nearly equal
        args = parser.parse(argv)
    if args.strength != parser.get_default("strength") and not args.init_image:
        parser.error("--strength is of --init_image, which is not given")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import sys
    from functools import partial

    import numpy as np
    import torch
    from tqdm.auto import tqdm

    from utils import UserError
    from utils.diffusion.class_conditional import class_names
    from utils.diffusion.classes import GuidedModel, between_classes, choose_classes, cycle_labels, group_by_class
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.guidance import make_guidance
    from utils.diffusion.pipelines import (
        choose_sampler,
        default_steps,
        interpolate_noise,
        interpolation_sampler,
        load_pipeline,
    )
    from utils.diffusion.sampling import sample_batch, starting_noise
    from utils.evaluation.image_folder import ImageFolder, load_image, save_gif, save_trajectories
    from utils.pictures import make_grid, to_uint8
    from utils.signals import Interrupted, StopSignal
    from utils.training.process import start_process

    # Model
    accelerator = start_process(args.mixed_precision)
    unet, own, space = load_pipeline(args.model, args.trust_remote_code)
    space.to(accelerator.device)
    steered = args.guidance_color or args.guidance_prompt or args.init_image or (args.gif and not args.interpolate)
    calls = args.num_inference_steps or default_steps(own)
    name = args.sampler or (interpolation_sampler(own) if args.interpolate else None)
    sampler = choose_sampler(own, name, calls, bool(steered))
    if name != args.sampler:
        accelerator.print(f"--interpolate: with {name}, for the pipeline's own sampler adds noise at every step")
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # on a CPU it costs
    if args.compile:
        unet.compile()
    unet = plain = accelerator.prepare_model(unet, evaluation_mode=True)

    # What images start from, and what they are steered to
    def between(sample_ids):
        ends = [starting_noise(own, args.seed, np.array([k]), space.shape, "cpu") for k in args.interpolate]
        return interpolate_noise(own, *ends, torch.from_numpy(sample_ids / max(1, args.num_samples - 1)).float())

    guidance = make_guidance(args, accelerator.device, space=space)
    options = dict(guidance=guidance, strength=args.strength)
    classes = choose_classes(unet.config, args.class_labels)
    if classes is not None:  # the scale is that of the classes, unless samples are steered otherwise
        names = class_names(unet.config)
        if args.interpolate and not hasattr(unet, "class_embedding"):
            raise UserError("--interpolate: between classes only of a UNet2DModel; leave the flag out")
        if args.interpolate:
            options["model_inputs"] = between_classes(unet, classes, args.num_samples)
        else:
            options["model_inputs"] = cycle_labels(classes, accelerator.device)
        unet = GuidedModel(unet, 1.0 if guidance else args.guidance_scale)
    elif args.guidance_scale != 1 and not guidance:
        raise UserError(
            "--guidance_scale: this model knows no classes; give --guidance_color or --guidance_prompt, too"
        )
    if args.interpolate:
        options["noise"] = between
    if args.init_image and is_few_step(own):
        raise UserError(
            f"--init_image: {args.model} draws in a few calls, and knows too few noise levels; take its teacher"
        )
    if args.init_image:
        picture = load_image(args.init_image, space.image_shape, args.model)
        options["init_images"] = space.encode(picture.to(accelerator.device))
    draw = partial(
        sample_batch, unet, sampler, shape=space.shape, num_inference_steps=calls, seed=args.seed,
        device=accelerator.device, **options,
    )  # fmt: skip

    @torch.no_grad()
    def decoded(samples):
        return to_uint8(space.decode(samples))

    # Draw what is not there yet, every process its share
    images_folder = ImageFolder(accelerator, args, calls, plain, sampler, space)
    stop_signal = StopSignal(accelerator, "stopping; images that are complete stay")
    missing = images_folder.missing()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    progress = tqdm(
        total=args.num_samples,
        initial=args.num_samples - len(missing),
        unit="image",
        disable=not accelerator.is_main_process,
    )
    for start in range(0, len(mine), args.sample_batch_size):
        sample_ids = mine[start : start + args.sample_batch_size]
        try:
            images = draw(sample_ids=sample_ids, stop=stop_signal.requested)
        except Interrupted:
            break
        images_folder.save(sample_ids, decoded(images))
        progress.update(len(sample_ids) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    stop = stop_signal.check()
    stop_signal.restore()
    if stop:
        images_folder.print_stopped()
        sys.exit(128 + stop)

    # Pictures of them all
    if accelerator.is_main_process:
        images, captions = images_folder.load(64), ()
        if args.interpolate and len(images) <= 16:
            captions = [""]  # one row
        elif classes and not args.interpolate and len(classes) <= len(images):
            images, captions = group_by_class(images, [names[k] for k in classes])
        make_grid(images, captions=captions).save(images_folder.folder / "grid.png")
        if args.format != "png":
            images_folder.export(args.format)
        if args.gif and args.interpolate:
            ways = [[image[None]] for image in images_folder.load(args.num_samples)]
            save_gif(ways + ways[::-1], images_folder.folder / "walk.gif")
        elif args.gif:
            frames = []
            sample_ids = np.arange(min(16, args.num_samples))
            draw(sample_ids=sample_ids, watch=lambda *pair: frames.append([decoded(samples) for samples in pair]))
            save_gif(frames, images_folder.folder / "walk.gif")
            save_trajectories(frames, images_folder.folder / "walk.png")
    accelerator.wait_for_everyone()
    images_folder.print_finished()


if __name__ == "__main__":
    run_script(main, parse_args)
