"""One yardstick: compare samples of models, or folders of images, with real images.

    python evaluate.py outputs/basic outputs/ddpm --reference mnist

prints one table and writes it to --output_dir as JSON, Markdown and a picture. The first row, the floor, are real images
that are held out, in the place of samples; the last, the ceiling, is noise. Results are good for comparing rows of one
table. Metrics carry the name of the features: fd_digits is a Frechet distance in a digit classifier, and no FID.
"""

from pathlib import Path

from utils.args import ALL_SAMPLERS, Parser, image_range, integer, real
from utils.evaluation import add_features_arguments
from utils.exits import run_script


def scales(text):
    """An argparse type: numbers from 0 up, separated by commas."""
    return [real(0)(part) for part in text.split(",")]


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="pipelines (folders or Hub ids), or folders of images")
    parser.add_argument("--output_dir", metavar="DIR", default="outputs/evaluation", help="results.json, results.md, samples.png, nearest.png")
    parser.switch(parser, "--trust_remote_code", False, "run the code of models that bring a net of their author's own; read it first")

    group = parser.add_argument_group("real images")
    group.add_argument("--reference", required=True, help="what samples are compared with: Hub id, local path, mnist, digits or faces")
    group.add_argument("--reference_split", default="train", help="what the models were trained on")
    group.add_argument("--image_column", help="column with the images, as in training (default: the only one of type Image)")
    group.add_argument("--label_column", help="column with class labels, for a model with classes (default: the only one of type ClassLabel)")
    group.add_argument("--image_range", metavar="RANGE", type=image_range, default="auto", help="values that become black and white, of images with more than 8 bits, as in training: LOW,HIGH, full or auto")
    group.add_argument("--held_out_split", help="real images that they have not seen: the floor, and the measure of copying (default: test; where there is no such split, a tenth of --reference_split)")

    group = parser.add_argument_group("samples")
    group.add_argument("--num_samples", type=integer(10), default=2000, help="N: samples of each model, and real images of each split")
    group.add_argument("--sampler", choices=ALL_SAMPLERS, help="instead of the scheduler that a pipeline carries")
    group.add_argument("--num_inference_steps", type=integer(1, 1000), help="UNet calls per image (default: 40; 2 of a model of distill_few_steps.py)")
    group.add_argument("--sweep", metavar="SAMPLER:STEPS,STEPS", nargs="+", help="evaluate each model with all of these instead, for example ddim:10,50 dpmsolver++:10,20")
    parser.switch(group, "--write_best", False, "with --sweep: put the best sampler's scheduler into the pipeline, which must be a folder")
    group.add_argument("--guidance_scale", metavar="SCALE,SCALE", type=scales, default=[1.0], help="for models with classes: each is evaluated with all of these")
    group.add_argument("--sample_batch_size", type=integer(1), default=128, help="images at once, per process")
    group.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of samples, subsets and bootstrap")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the UNet's arithmetic (default: what the accelerate config says)")

    add_features_arguments(parser.add_argument_group("features"))

    group = parser.add_argument_group("denoising loss")
    parser.switch(group, "--validation_loss", False, "also the loss on frozen (image, timestep, noise) triples: trained on against held out, by noise level")
    group.add_argument("--num_validation_images", type=integer(1), default=256, help="images of each split")
    args = parser.parse(argv)
    if args.write_best and not args.sweep:
        parser.error("--write_best needs --sweep: the best of what?")
    if args.sweep and (args.sampler or args.num_inference_steps):
        parser.error("--sweep says which samplers and how many calls: leave out --sampler and --num_inference_steps")
    for entry in args.sweep or ():
        name, _, steps = entry.partition(":")
        if args.write_best and name == "unipc":
            parser.error(f"--write_best cannot write {name}: DDPMPipeline does not call it; leave it out of --sweep")
        if name not in ALL_SAMPLERS or not all(step.isdecimal() and 0 < int(step) <= 1000 for step in steps.split(",")):
            parser.error(f"--sweep {entry}: expected SAMPLER:STEPS,STEPS with one of {', '.join(ALL_SAMPLERS)} and steps from 1 to 1000")
    return args
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import itertools
    from functools import partial

    import torch

    from utils import optional, randomness
    from utils.data.own_images import translate_labels
    from utils.diffusion.classes import GuidedModel, labels_in_turn
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.pipelines import choose_sampler, load_pipeline, saved_scheduler, training_scheduler
    from utils.diffusion.spaces import encode_in_batches
    from utils.diffusion.unets import weights_digest
    from utils.evaluation.class_statistics import asked_classes, digit_statistics
    from utils.evaluation.comparison import compare
    from utils.evaluation.denoising_loss import DenoisingLoss
    from utils.evaluation.features import load_extractor
    from utils.evaluation.image_folder import load_folder, scaled_from
    from utils.evaluation.kept_samples import settings_of
    from utils.evaluation.reference import Reference
    from utils.evaluation.report import write_report
    from utils.evaluation.sweep import best_setting, check_writable, write_scheduler
    from utils.hardware import peak_memory
    from utils.pictures import from_uint8
    from utils.privacy import public_data
    from utils.training.checkpoints import file_hash
    from utils.training.output_dir import read_arguments
    from utils.training.process import start_process

    if args.write_best:
        for model in args.models:
            check_writable(model)
    accelerator = start_process(args.mixed_precision)
    extract = load_extractor(args.features, accelerator.device)
    real = Reference(args, accelerator)
    rows, losses, grids, pairs, by_class = [], [], {}, {}, {}
    say = partial(print, flush=True) if accelerator.is_main_process else lambda text: None

    def measure(name, images, asked=None, **facts):
        """Add a row for images, uint8 (N, C, H, W); ``asked`` are the classes that they should show, if any."""
        if not accelerator.is_main_process:
            return
        reference = real.resized(images.shape[1:])
        count = min(len(images), len(reference), args.num_samples)
        row = dict(model=name, N=count, **facts)
        features = extract(images[:count])
        if count < 2 * features.shape[1]:
            say(
                f"warning: {name}: {count} images for {features.shape[1]} features; fewer than twice as many make fd and kid unreliable"
            )
        row |= compare(features, extract(reference[:count]), extract.name, args.seed)
        if extract.name == "digits":
            row |= digit_statistics(images, accelerator.device)
        if asked:
            by_class[name] = asked.by_class(images, extract, extract.name, accelerator.device)
            if "class_accuracy" in by_class[name]:
                row["class_accuracy"] = by_class[name]["class_accuracy"]
        copies, pairs[name] = real.copies(images)
        row |= {} if copies is None else {"copies": copies}
        rows.append(row)
        grids[name] = images[:8]

    # Models are called by the last part of their names, where that tells them apart
    lasts = [Path(model).resolve().name for model in args.models]
    called = {model: model if lasts.count(last) > 1 else last for model, last in zip(args.models, lasts, strict=True)}

    # Real images that the models have not seen, in the place of samples: nothing can be expected to be better
    if real.held_out_split:
        measure("floor: held-out images", real.held_out[: args.num_samples])

    # Samples
    for model in args.models:
        if is_folder_of_images(model):
            measure(model, load_folder(model, accelerator, real.image_range))
            continue
        unet, own, space = load_pipeline(model, args.trust_remote_code)
        flags = read_arguments(model).get("arguments", {})
        trained_on, ema = flags.get("dataset_split"), flags.get("use_ema")
        if trained_on not in (None, args.reference_split):
            say(
                f"warning: {model} was trained on {trained_on}, not on --reference_split {args.reference_split}: copies and floor mislead"
            )
        known, trained_range = scaled_from(model)
        if known and trained_range != real.image_range:
            said = ",".join(f"{value:g}" for value in trained_range) if trained_range else "full"
            say(
                f"warning: {model} was trained with --image_range {said}, the reference is read otherwise; say the same"
            )
        files = sorted(Path(model).glob("unet/*.safetensors"))
        weights, kind = file_hash(*files)[:12] if files else None, settings_of(unet)
        digest = weights or weights_digest(unet)
        unet, shape = accelerator.prepare_model(unet, evaluation_mode=True), space.image_shape
        space.to(accelerator.device)
        asked, options = asked_classes(unet.config, real, shape, args.num_samples), {}
        if args.validation_loss and is_few_step(own):
            say(f"{model} has no denoising loss: it does without the small steps that it is of")
        elif args.validation_loss:
            splits = {"--reference_split": args.reference_split, "--held_out_split": real.held_out_split}
            for flag, split in ((flag, split) for flag, split in splits.items() if split):
                images = from_uint8(real.resized(shape, split)[: args.num_validation_images])
                images, inputs = encode_in_batches(space, images, accelerator.device), {}
                if asked:  # by name, for the classes of strings are those that occur in the split
                    _, found, names = real.labelled(shape, flag, split)
                    labels = torch.from_numpy(translate_labels(found, names, asked.names))
                    inputs["class_labels"] = labels.where(labels >= 0, len(asked.names))
                loss = DenoisingLoss(images, training_scheduler(own), args.seed, inputs)
                losses.append(dict(model=called[model], images=split, **loss.measure(unet, accelerator)))
        if asked:
            options["model_inputs"] = labels_in_turn(asked.labels, accelerator.device)
        tried = []  # samplers' names, and their rows
        for (name, steps), scale in itertools.product(
            settings(args, model, own, say), args.guidance_scale if asked else [None]
        ):
            sampler = choose_sampler(own, name, steps)
            drawn_by = unet if scale is None else GuidedModel(unet, scale)
            title = " ".join(
                [called[model], *([name, str(steps)] if name else []), *([f"guidance {scale:g}"] if asked else [])]
            )
            facts = dict(sampler=type(sampler).__name__, steps=steps, ema=ema, weights=weights)
            if asked:
                facts["guidance_scale"] = scale
            if "algorithm_type" in sampler.config:
                facts["algorithm"] = sampler.config.algorithm_type
            depends_on = dict(
                weights=digest, model=kind, sampler=settings_of(sampler), steps=steps, guidance=scale,
                labels=asked and asked.labels.tolist(), seed=args.seed, precision=accelerator.mixed_precision,
                randomness=randomness.VERSION, **({"autoencoder": space.fingerprint} if space.fingerprint else {}),
            )  # fmt: skip
            images, facts["images_per_second"] = draw(
                args, accelerator, drawn_by, sampler, space, steps, title, depends_on, **options
            )
            measure(title, images, asked, **facts)
            tried.append((name, rows[-1:]))
        if args.write_best and accelerator.is_main_process:
            name, steps = best_setting(tried)
            sampler = saved_scheduler(name, own)
            write_scheduler(Path(model), sampler, steps)
            if publishing := optional.find("publishing"):
                publishing.renew_card(Path(model))
            say(f"{model} carries {type(sampler).__name__} now, at its best with {steps} steps")
        accelerator.free_memory()

    # Noise: anything should be better
    measure("ceiling: noise", real.noise(args.num_samples))
    if accelerator.is_main_process:
        facts = dict(features=extract.name, features_hash=extract.hash, reference=args.reference)
        facts |= dict(public_reference=public_data(args.reference))  # while it can be seen whether it is a path
        facts |= dict(reference_split=args.reference_split, held_out_split=real.held_out_split, seed=args.seed)
        write_report(Path(args.output_dir), rows, losses, grids, pairs, by_class, bool(args.sweep), **facts)
        say(f"peak memory {peak_memory(accelerator.device) / 2**30:.2f} GiB")


def draw(args, accelerator, model, sampler, space, steps, title, depends_on, **options):
    """Samples of one setting, kept in OUTPUT_DIR/drawn, and images per second; see ``draw_kept``."""
    from utils.diffusion.pipelines import estimate_seconds
    from utils.diffusion.sampling import sample_images
    from utils.evaluation.kept_samples import draw_kept

    def setting(count):
        return model, sampler, accelerator, count, space.shape, steps, args.sample_batch_size, args.seed

    def announce(missing):
        text = f"{title}: {type(sampler).__name__}, {steps} steps: "
        if missing:
            minutes = estimate_seconds(*setting(missing), **options) / 60
            kept = f" for {missing} of {args.num_samples} images, the others are kept" * (missing < args.num_samples)
            text += f"about {minutes:.1f} minutes{kept}"
        else:
            text += f"kept in {folder}"
        accelerator.print(text, flush=True)

    folder = Path(args.output_dir) / "drawn"
    options["decode"] = space.decode
    return draw_kept(
        folder, accelerator, args.num_samples, space.image_shape, args.sample_batch_size, depends_on,
        lambda first, count: sample_images(*setting(count), first=first, **options), announce,
    )  # fmt: skip


def is_folder_of_images(name):
    folder = Path(name)
    return folder.is_dir() and not any((folder / file).is_file() for file in ("model_index.json", "config.json"))


def settings(args, model, own, say):
    """Sampler (None for the pipeline's own) and number of steps of each evaluation of a model that carries ``own``."""
    from utils import UserError
    from utils.diffusion.few_steps import suits
    from utils.diffusion.pipelines import usual_calls

    if not args.sweep:
        return [(args.sampler, args.num_inference_steps or usual_calls(own))]
    entries = [entry.partition(":") for entry in args.sweep]
    suited = [entry for entry in entries if suits(entry[0], own)]
    others = sorted({name for name, *_ in entries} - {name for name, *_ in suited})
    if not suited:
        raise UserError(f"--sweep: {', '.join(others)} cannot draw with {model}, which carries {type(own).__name__}")
    if others:
        say(f"{model} is not drawn with {', '.join(others)}: for models of another kind")
    return [(name, int(n)) for name, _, steps in suited for n in steps.split(",")]


if __name__ == "__main__":
    run_script(main, parse_args)
