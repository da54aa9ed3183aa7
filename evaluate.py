"""Compare samples of models, or folders of images, with real images.

    python evaluate.py outputs/basic outputs/ddpm --reference mnist

This command prints one table, and writes it to --output_dir as JSON and Markdown, with pictures of samples. The first
row, called the floor, evaluates held-out real images in place of samples. The last row evaluates noise, for comparison.
Real images are prepared as in the model's training run. Only rows of the same table are comparable. A metric's name
contains its features: fd_digits is a Frechet distance with the features of a digit classifier, and not an FID.
"""

from pathlib import Path

from utils.args import ALL_SAMPLERS, Parser, image_range, integer, real, resolution
from utils.evaluation import add_features_arguments
from utils.exits import run_script


def scales(text):
    """Parse non-negative numbers separated by commas."""
    return [real(0)(part) for part in text.split(",")]


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="pipelines (folders or Hub ids), or folders of images")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs/evaluation", help="folder for results.json, results.md, samples.png and nearest.png")
    parser.switch(parser, "--trust_remote_code", False, "permission to run the network code of models. Read it first")

    group = parser.add_argument_group("real images")
    group.add_argument("--reference", required=True, help="real images to compare samples with: Hub id, local path, mnist, digits or faces")
    group.add_argument("--reference_split", default="train", help="split that the models were trained on")
    group.add_argument("--image_column", help="column with the images, as in training (default: the only one of type Image)")
    group.add_argument("--label_column", help="column with class labels, for models with classes (default: the only one of type ClassLabel)")
    group.add_argument("--image_range", metavar="RANGE", type=image_range, default="auto", help="values that become black and white, for images with more than 8 bits, as in training: LOW,HIGH, full or auto")
    parser.switch(group, "--center_crop", None, "centre crop of images of another aspect ratio, instead of a random crop (default: as in the training run, or a random crop if that run is unknown)")
    parser.switch(group, "--random_flip", None, "mirroring of half of the images (default: as in the training run, or none if that run is unknown). If it is unknown, copies are also searched for among mirrored images")
    group.add_argument("--held_out_split", help="split of real images that the models were not trained on, for the floor and the measure of copying (default: test or, if there is no such split, half of --reference_split, at most --num_samples images)")

    group = parser.add_argument_group("inputs of models of train_paired.py (made from held-out images)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--condition_dir", metavar="DIR", help="folder of second pictures with the names of the images, for models of pairs (default: that of the run)")
    one.add_argument("--condition_column", metavar="NAME", help="column with second pictures (default: that of the run)")

    group = parser.add_argument_group("samples")
    group.add_argument("--num_samples", type=integer(10), default=2000, help="N, the number of samples of each model and of real images of each split. A model with a condition draws seven more samples of each of the first 256 inputs")
    group.add_argument("--resolution", metavar="SIDE|HxW", type=resolution, help="size that folders of images are resized to (default: their own)")
    group.add_argument("--sampler", choices=ALL_SAMPLERS, help="scheduler to draw with, instead of the pipeline's")
    group.add_argument("--num_inference_steps", type=integer(1, 1000), help="sampling steps (default: 40, or 2 for a model of distill_few_steps.py)")
    group.add_argument("--sweep", metavar="SAMPLER:STEPS,STEPS", nargs="+", help="samplers with numbers of steps, such as ddim:10,50 dpmsolver++:10,20. Each model is evaluated with all of them")
    parser.switch(group, "--write_best", False, "saving of the best sampler's scheduler in the pipeline, which must be a local folder. Needs --sweep")
    group.add_argument("--guidance_scale", metavar="SCALE,SCALE", type=scales, default=[1.0], help="guidance scales. Each model with classes or a condition is evaluated with all of them")
    group.add_argument("--sample_batch_size", type=integer(1), default=128, help="images in a batch, per process")
    group.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of samples, subsets and bootstrap")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the UNet's arithmetic (default: that of the accelerate config)")

    add_features_arguments(parser.add_argument_group("features"))

    group = parser.add_argument_group("denoising loss")
    parser.switch(group, "--validation_loss", False, "measurement of the denoising loss on fixed triples (image, timestep, noise), by noise level, for training and held-out images")
    group.add_argument("--num_validation_images", type=integer(1), default=256, help="images of each split")
    args = parser.parse(argv)
    if args.write_best and not args.sweep:
        parser.error("--write_best needs --sweep")
    if args.sweep and (args.sampler or args.num_inference_steps):
        parser.error("--sweep sets samplers and steps. Leave out --sampler and --num_inference_steps")
    for entry in args.sweep or ():
        name, _, steps = entry.partition(":")
        if args.write_best and name == "unipc":
            parser.error(f"--write_best cannot write {name}, because DDPMPipeline cannot draw with it. Leave {name} out of --sweep")
        if name not in ALL_SAMPLERS or not all(step.isdecimal() and 0 < int(step) <= 1000 for step in steps.split(",")):
            parser.error(f"--sweep {entry}: expected SAMPLER:STEPS,STEPS with one of {', '.join(ALL_SAMPLERS)} and steps from 1 to 1000")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    from dataclasses import replace
    from functools import partial

    from utils.evaluation.features import choose_features, load_extractor
    from utils.evaluation.models import evaluate_model, make_plans, warn_of_differences
    from utils.evaluation.reference import Reference
    from utils.evaluation.report import Report
    from utils.evaluation.sweep import check_writable
    from utils.hardware import peak_memory
    from utils.privacy import public_data
    from utils.training.process import start_process

    if args.write_best:
        for model in args.models:
            check_writable(model)
    accelerator = start_process(args.mixed_precision)
    say = partial(print, flush=True) if accelerator.is_main_process else lambda text: None
    reference = Reference(args, accelerator)
    plans = make_plans(args, accelerator, reference, say)
    hows = list(dict.fromkeys(plan.how for plan in plans))
    middle = replace(hows[0], center_crop=True, random_flip=False)
    looked_at, _, _ = next(reference.blocks(middle, 64))
    extract = load_extractor(choose_features(args.features, looked_at), accelerator.device)
    report = Report(accelerator, reference, extract, args.seed)
    count = min(args.num_samples, len(reference.images(args.reference_split)))
    if count < args.num_samples:
        say(f"N is {count} for all rows, because --reference_split has no more images")

    # Held-out real images are evaluated in place of samples, because no model can be expected to be better
    for how in hows if reference.held_out_split else ():
        size = "" if len(hows) == 1 else f" ({how})"
        found = reference.blocks(how, count, reference.held_out_split)
        row = report.measure(f"floor: held-out images{size}", (block[:2] for block in found), how)
        if row and row["N"] < 0.9 * count:
            say(
                f"warning: the floor has N={row['N']}, because there are no more held-out images. Its fd is higher than "
                f"with {count} images, as for every small set, but its kid is not"
            )

    for plan in plans:
        warn_of_differences(args, plan, reference, say)
        if plan.folder:
            number = min(count, len(plan.folder))
            report.measure(plan.model, plan.folder.blocks(number, plan.how.image_range), plan.how)
        else:
            evaluate_model(args, accelerator, plan, reference, report, count, say)

    # Noise is evaluated for comparison. Its numbers are neither a floor nor a limit
    for shape in dict.fromkeys(how.shape for how in hows):
        how = next(how for how in hows if how.shape == shape)
        size = "" if len({how.shape for how in hows}) == 1 else f" ({how})"
        report.measure(f"noise, for comparison{size}", reference.noise(shape, count), how)
    if accelerator.is_main_process:
        facts = dict(features=extract.name, features_hash=extract.hash, reference=args.reference)
        facts |= dict(public_reference=public_data(args.reference))  # a path is recognised only where it exists
        facts |= dict(reference_split=args.reference_split, held_out_split=reference.held_out_split, seed=args.seed)
        report.write(Path(args.output_dir), bool(args.sweep), **facts)
        say(f"peak memory {peak_memory(accelerator.device) / 2**30:.2f} GiB")


if __name__ == "__main__":
    run_script(main, parse_args)
