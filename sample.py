"""Draw images with a model of these scripts, or with another pipeline of a UNet2DModel.

    python sample.py outputs/digits --num_samples 1000

Image k depends only on the seed and k, not on the batch size or the number of processes of `accelerate launch`. After
an interruption, the same command resumes. Code that comes with a model runs only with --trust_remote_code.
"""

from utils.args import ALL_SAMPLERS, Parser, integer, real
from utils.diffusion.guidance_args import add_guidance_arguments
from utils.exits import run_script


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a pipeline, or of a UNet2DModel")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs/samples", help="folder for images/, grid.png and the other outputs")
    parser.switch(parser, "--trust_remote_code", False, "permission to run the model's network code. Read it first")
    parser.add_argument("--num_samples", type=integer(1), default=64, help="number of images (default: 64, or 8 with --interpolate)")
    parser.add_argument("--sample_batch_size", type=integer(1), default=64, help="images in a batch, per process")
    parser.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of all noise")
    parser.add_argument("--format", choices=("png", "npz", "parquet"), default="png", help="format of the output. npz and parquet also write all images to one file, images.npz or images.parquet")

    group = parser.add_argument_group("sampling")
    group.add_argument("--sampler", choices=ALL_SAMPLERS, help="scheduler to draw with, instead of the pipeline's")
    group.add_argument("--num_inference_steps", type=integer(1, 1000), help="sampling steps (default: 40, or 2 for a model of distill_few_steps.py)")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the UNet's arithmetic (default: that of the accelerate config)")
    parser.switch(group, "--compile", False, "compilation of the UNet with torch.compile, which takes minutes at first")
    parser.switch(group, "--gif", False, "additional files walk.gif and walk.png, with noisy and predicted images at each step, for the first images. With --interpolate, walk.gif alone, with the interpolation from A to B and back")
    group.add_argument("--interpolate", nargs=2, type=integer(0), metavar=("A", "B"), help="numbers of two images. --num_samples images are drawn from noise interpolated between the noise of A and of B. For a model with classes, they are also interpolated between --class_labels. If the pipeline's scheduler adds noise, dpmsolver++ is used instead")

    group = parser.add_argument_group("pictures")
    group.add_argument("--init_image", metavar="FILE", help="picture to start from, with noise added, or with a hole by --mask")
    group.add_argument("--strength", type=real(0.01, 1), default=0.5, help="amount of noise added to --init_image. 1: the noise replaces the picture")
    group.add_argument("--mask", metavar="FILE", help="picture that is white in the hole to fill, for --init_image with most models, or for --condition_image with a model trained with --condition inpaint")
    group.add_argument("--condition_image", metavar="FILE|DIR", help="inputs of a model of train_paired.py, of any size: small pictures, grey ones, outlines, or pictures with a transparent hole (default of --num_samples: 4 for each)")
    group.add_argument("--true_image", metavar="FILE|DIR", help="true images, to compare samples with. Without --condition_image, the inputs are made from them, as in training")

    group = parser.add_argument_group("steering")
    group.add_argument("--class_labels", metavar="LABELS", help="classes to draw in turn, by name or number, such as 7,7,3, or all (default: all, for a model with classes). --guidance_scale sets the strength of the classes")
    add_guidance_arguments(parser, group)
    args = parser.parse(argv)
    if given := args.condition_image or args.true_image:
        from utils.evaluation.given_images import given_files  # its imports take seconds

        parser.set_defaults(num_samples=4 * len(given_files(args)))
    if args.interpolate:
        parser.set_defaults(num_samples=8)  # with more images, neighbours look nearly equal
    args = parser.parse(argv)
    if given and args.init_image:
        parser.error("--init_image excludes --condition_image and --true_image, which are for other models. Leave one out")
    if args.mask and not (args.init_image or args.condition_image):
        parser.error("--mask needs --init_image or --condition_image. Give the picture with the hole")
    ignored = args.gif or args.interpolate or args.sampler or args.strength != parser.get_default("strength")
    if args.mask and args.init_image and ignored:
        parser.error("--mask with --init_image uses no --sampler, --strength, --gif or --interpolate. Leave them out")
    if args.strength != parser.get_default("strength") and not args.init_image:
        parser.error("--strength needs --init_image. Give a picture, or leave --strength out")
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
    from utils.diffusion.classes import (
        MOST_ROWS,
        GuidedModel,
        between_classes,
        choose_classes,
        cycle_labels,
        group_by_class,
    )
    from utils.diffusion.conditions import Condition, GuidedByCondition, arrange
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.guidance import make_guidance
    from utils.diffusion.inpainting import check_inpainting, inpaint_batch
    from utils.diffusion.pipelines import (
        choose_sampler,
        default_steps,
        interpolate_noise,
        interpolation_sampler,
        load_pipeline,
    )
    from utils.diffusion.sampling import sample_batch, starting_noise
    from utils.diffusion.spaces import Latents
    from utils.diffusion.windows import Windows
    from utils.evaluation.given_images import GivenImages
    from utils.evaluation.image_folder import ImageFolder, load_hole, load_image, save_gif, save_trajectories
    from utils.pictures import make_grid, to_uint8
    from utils.signals import Interrupted, StopSignal
    from utils.training.process import start_process

    # Model
    accelerator = start_process(args.mixed_precision)
    unet, own, space = load_pipeline(args.model, args.trust_remote_code)
    space.to(accelerator.device)
    steered = args.guidance_color or args.guidance_prompt or args.init_image or (args.gif and not args.interpolate)
    steps = args.num_inference_steps or default_steps(own)
    name = args.sampler or (interpolation_sampler(own) if args.interpolate else None)
    sampler = choose_sampler(own, name, steps, bool(steered))
    if name != args.sampler:
        accelerator.print(f"--interpolate: using {name}, because the pipeline's own sampler adds noise at every step")
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)  # this layout is slower on a CPU
    if args.compile:
        unet.compile()
    unet = plain = accelerator.prepare_model(unet, evaluation_mode=True)

    # Starting noise and guidance
    def between(sample_ids):
        ends = [starting_noise(own, args.seed, np.array([k]), shape, "cpu") for k in args.interpolate]
        return interpolate_noise(own, *ends, torch.from_numpy(sample_ids / max(1, args.num_samples - 1)).float())

    shape, given = space.shape, None
    guidance = make_guidance(args, accelerator.device, space=space)
    options = dict(guidance=guidance, strength=args.strength)
    classes = choose_classes(unet.config, args.class_labels)
    condition = Condition.of_model(unet.config)
    if condition:
        given = GivenImages(args, condition, shape[1:], space.image_shape[1] // shape[1])
        options["model_inputs"] = given.model_inputs
        windows = Windows(unet, shape[1:])
        unet = GuidedByCondition(windows, condition, 1.0 if guidance else args.guidance_scale)
        shape = (shape[0], *given.inputs.shape[2:])
        if (number := windows.count(shape[1:])) > 1:
            accelerator.print(f"An image of {shape[2]} x {shape[1]} pixels is drawn in {number} windows at each step")
        if args.num_samples < len(given.names):
            count, total = args.num_samples, len(given.names)
            accelerator.print(f"--num_samples {count}: only the first {count} of {total} inputs are used")
    elif args.condition_image or args.true_image:
        raise UserError(
            f"--condition_image, --true_image: {args.model} takes no condition. Expected a model of train_paired.py. "
            "--init_image starts from a picture with any model"
        )
    if classes is not None:  # --guidance_scale applies to the classes, unless a colour or a prompt guides samples
        names = class_names(unet.config)
        if args.interpolate and not hasattr(unet, "class_embedding"):
            raise UserError("--interpolate: only a UNet2DModel can interpolate between classes. Leave the flag out")
        if args.interpolate:
            options["model_inputs"] = between_classes(unet, classes, args.num_samples)
        else:
            options["model_inputs"] = cycle_labels(classes, accelerator.device)
        unet = GuidedModel(unet, 1.0 if guidance else args.guidance_scale)
    elif args.guidance_scale != 1 and not guidance and not condition:
        raise UserError("--guidance_scale: this model has no classes. Give --guidance_color or --guidance_prompt, too")
    if args.interpolate:
        options["noise"] = between
    if args.init_image and is_few_step(own):
        raise UserError(f"--init_image: {args.model} is a few-step model with too few noise levels. Use its teacher")
    if args.init_image:
        if condition:
            raise UserError(f"--init_image: {args.model} draws from --condition_image. Give that instead")
        picture = load_image(args.init_image, "--init_image", space.image_shape, args.model)
        options["init_images"] = space.encode(picture.to(accelerator.device))
    if args.init_image and args.mask:
        if isinstance(space, Latents) or guidance:
            raise UserError(
                "--mask with --init_image: expected a model in pixels, without --guidance_color and --guidance_prompt. "
                "Leave one of these flags out"
            )
        check_inpainting(own, args.model)
        hole = load_hole(args.mask, args.init_image, shape[1:], args.model)
        draw = partial(
            inpaint_batch, unet, own, known=picture, hole=hole, num_inference_steps=steps, seed=args.seed,
            device=accelerator.device, model_inputs=options.get("model_inputs"),
        )  # fmt: skip
    else:
        draw = partial(
            sample_batch, unet, sampler, shape=shape, num_inference_steps=steps, seed=args.seed,
            device=accelerator.device, **options,
        )  # fmt: skip

    @torch.no_grad()
    def finished(sample_ids, samples):
        images = to_uint8(space.decode(samples))
        return given.finish(sample_ids, images) if given else images

    # Each process draws its share of the missing images
    images_folder = ImageFolder(accelerator, args, steps, plain, sampler, space, given and given.digest)
    stop_signal = StopSignal(accelerator, "stopping. Complete images are kept")
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
        images_folder.save(sample_ids, finished(sample_ids, images))
        progress.update(len(sample_ids) * accelerator.num_processes)
    progress.close()
    accelerator.wait_for_everyone()
    stop = stop_signal.check()
    stop_signal.restore()
    if stop:
        images_folder.print_stopped()
        sys.exit(128 + stop)

    # Pictures of all images
    if accelerator.is_main_process:
        if given:
            count = min(16, len(given.names), args.num_samples)
            rows = range(min(4, max(1, args.num_samples // len(given.names))))
            images = images_folder.load(row * len(given.names) + k for row in rows for k in range(count))
            true = given.true if given.true is None else given.true[:count]
            images, captions = arrange(given.shown[:count], images, true)
        else:
            images, captions = images_folder.load(range(64)), ()
        if args.interpolate and not given and len(images) <= 16:
            captions = [""]  # one row
        elif classes and not args.interpolate and len(classes) <= min(len(images), MOST_ROWS):
            images, captions = group_by_class(images, [names[k] for k in classes])
        make_grid(images, captions=captions).save(images_folder.folder / "grid.png")
        if args.format != "png":
            images_folder.export(args.format)
        if args.gif and args.interpolate:
            frames = [[image[None]] for image in images_folder.load(range(args.num_samples))]
            save_gif(frames + frames[::-1], images_folder.folder / "walk.gif")
        elif args.gif:
            frames = []
            sample_ids = np.arange(min(16, args.num_samples))
            draw(
                sample_ids=sample_ids,
                watch=lambda *pair: frames.append([finished(sample_ids, samples) for samples in pair]),
            )
            save_gif(frames, images_folder.folder / "walk.gif")
            save_trajectories(frames, images_folder.folder / "walk.png")
    accelerator.wait_for_everyone()
    images_folder.print_finished()


if __name__ == "__main__":
    run_script(main, parse_args)
