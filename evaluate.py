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
    from types import SimpleNamespace

    import numpy as np
    import torch

    from utils import UserError, optional, randomness
    from utils.args import size_of
    from utils.data.clusters import find_clusters, has_clusters, load_clusters
    from utils.data.own_images import translate_labels
    from utils.data.pixels import MODES
    from utils.diffusion.classes import GuidedModel, cycle_labels
    from utils.diffusion.conditions import PAIRED, Condition, GuidedByCondition
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.pipelines import choose_sampler, load_pipeline, saved_scheduler, training_scheduler
    from utils.diffusion.spaces import encode_in_batches
    from utils.diffusion.unets import weights_digest
    from utils.evaluation.class_statistics import asked_classes, check_classes, digit_probabilities, digit_statistics
    from utils.evaluation.comparison import compare
    from utils.evaluation.denoising_loss import DenoisingLoss
    from utils.evaluation.features import choose_features, load_extractor
    from utils.evaluation.image_folder import SampleFolder
    from utils.evaluation.reference import Reference
    from utils.evaluation.report import write_report
    from utils.evaluation.restoration import Restoration
    from utils.evaluation.sweep import best_setting, check_writable, write_scheduler
    from utils.hardware import peak_memory
    from utils.pictures import from_uint8
    from utils.privacy import public_data
    from utils.saved import net_folder
    from utils.training.checkpoints import file_hash
    from utils.training.output_dir import config_of, read_arguments
    from utils.training.process import start_process

    if args.write_best:
        for model in args.models:
            check_writable(model)
    accelerator = start_process(args.mixed_precision)
    reference = Reference(args, accelerator)
    rows, losses, grids, pairs, by_class = [], [], {}, {}, {}
    say = partial(print, flush=True) if accelerator.is_main_process else lambda text: None

    # All models and folders are opened once, so that a mistake is found before hours of sampling
    lasts = [Path(model).resolve().name for model in args.models]
    plans = []
    for model, last in zip(args.models, lasts, strict=True):
        plan = SimpleNamespace(model=model, name=model if lasts.count(last) > 1 else last, folder=None, settings=[])
        if is_folder_of_images(model):
            plan.folder = SampleFolder(model, accelerator, size_of(args.resolution), args.seed)
            plan.record, shape = plan.folder.record, plan.folder.shape
        else:
            unet, own, space = load_pipeline(model, args.trust_remote_code)
            plan.record, shape = read_arguments(model), space.image_shape
            if shape[0] not in MODES:
                raise UserError(f"{model} draws images of {shape[0]} channels. Expected 1 or 3")
            plan.settings = settings(args, model, own, say)
            for name, steps in plan.settings:
                choose_sampler(own, name, steps)
            plan.classes, plan.condition = check_classes(unet.config, reference), Condition.of_model(unet.config)
            for scale in args.guidance_scale if plan.classes else ():
                GuidedModel(unet, scale)
            if plan.condition and space.fingerprint:
                raise UserError(
                    f"{model} draws latents from a condition. Expected a model in pixels. Draw from this one with sample.py"
                )
            if plan.condition:
                plan.columns = partner_columns(args, plan)
                Restoration.check(reference, plan.condition, plan.columns)
        plan.how = reference.preparation(shape, plan.record)
        plans.append(plan)
    known = {plan.how.shape: plan.how for plan in reversed(plans) if plan.record}
    for plan in plans:  # without a known run, images are prepared as for the first known run of the same size
        plan.how = plan.how if plan.record else known.get(plan.how.shape, plan.how)
    hows = list(dict.fromkeys(plan.how for plan in plans))
    middle = replace(hows[0], center_crop=True, random_flip=False)
    looked_at, _, _ = next(reference.blocks(middle, 64))
    extract = load_extractor(choose_features(args.features, looked_at), accelerator.device)
    real_count = len(reference.images(args.reference_split))
    count = min(args.num_samples, real_count)
    if count < args.num_samples:
        say(f"N is {count} for all rows, because --reference_split has no more images")

    def measure(name, blocks, how, asked=None, labels=None, **facts):
        """Add a row for images that come in blocks, uint8 (B, C, H, W).

        Return it on the main process, and None on the others.

        Blocks of held-out images are pairs of images and indices. ``asked`` are the requested classes, if any. ``labels``
        are the digits that inputs were made from.
        """
        features, probabilities, copies, shown = (
            [],
            [],
            reference.copies(how) if accelerator.is_main_process else None,
            [],
        )
        for block in blocks:
            if not accelerator.is_main_process:
                continue
            images, indices = block if isinstance(block, tuple) else (block, None)
            features.append(extract(images))
            if extract.name == "digits":
                probabilities.append(digit_probabilities(images, accelerator.device))
            copies.add(images, indices)
            shown = images[:8].copy() if not len(shown) else shown
        if not accelerator.is_main_process:
            return None
        features = np.concatenate(features)
        row = dict(model=name, N=len(features), **facts)
        if len(features) < 2 * features.shape[1]:
            say(
                f"warning: {name}: {len(features)} images for {features.shape[1]} features. fd and kid are reliable only with at least twice as many images as features"
            )
        row |= compare(features, reference.features(extract, how, len(features)), extract.name, args.seed)
        probabilities = np.concatenate(probabilities) if probabilities else None
        if probabilities is not None:
            row |= digit_statistics(probabilities)
        if asked:
            by_class[name] = asked.by_class(features, probabilities)
            if "class_accuracy" in by_class[name]:
                row["class_accuracy"] = by_class[name]["class_accuracy"]
        if labels is not None and probabilities is not None:
            row["class_accuracy"] = float(np.mean(probabilities.argmax(1) == labels))
        rate, pairs[name] = copies.result()
        row |= {} if rate is None else {"copies": rate}
        rows.append(row)
        grids[name] = shown
        return row

    # Held-out real images are evaluated in place of samples, because no model can be expected to be better
    for how in hows if reference.held_out_split else ():
        size = "" if len(hows) == 1 else f" ({describe(how)})"
        found = reference.blocks(how, count, reference.held_out_split)
        row = measure(f"floor: held-out images{size}", (block[:2] for block in found), how)
        if row and row["N"] < 0.9 * count:
            say(
                f"warning: the floor has N={row['N']}, because there are no more held-out images. Its fd is higher than "
                f"with {count} images, as for every small set, but its kid is not"
            )

    # Samples
    for plan in plans:
        model = plan.model
        warn_of_differences(args, plan, reference, say)
        if plan.folder:
            number = min(count, len(plan.folder))
            measure(model, plan.folder.blocks(number, plan.how.image_range), plan.how)
            continue
        unet, own, space = load_pipeline(model, args.trust_remote_code)
        ema = plan.record.get("arguments", {}).get("use_ema")
        files = sorted(net_folder(Path(model)).glob("*.safetensors"))
        weights, kind = file_hash(*files)[:12] if files else None, config_of(unet)
        digest = weights or weights_digest(unet)
        unet = accelerator.prepare_model(unet, evaluation_mode=True)
        space.to(accelerator.device)
        clustered = has_clusters(plan.classes)
        clusters_file = find_clusters(model) if clustered else None
        if args.validation_loss and is_few_step(own):
            say(f"{model} has no denoising loss, because it is a few-step model")
        elif args.validation_loss and plan.condition and plan.condition.kind == PAIRED:
            say(
                f"{model} has no denoising loss here, because its inputs are second pictures. See --validation_split in training"
            )
        elif args.validation_loss and clustered and not clusters_file:
            say(f"{model} has no denoising loss here, because clusters.npz is missing. Give the folder of its training")
        elif args.validation_loss:
            clusters = load_clusters(clusters_file) if clustered else None
            splits = {"--reference_split": args.reference_split, "--held_out_split": reference.held_out_split}
            for flag, split in ((flag, split) for flag, split in splits.items() if split):
                found = [*reference.blocks(plan.how, args.num_validation_images, split)]
                images, numbers = (np.concatenate([block[k] for block in found]) for k in (0, 1))
                images, inputs = encode_in_batches(space, from_uint8(images), accelerator.device, args.seed), {}
                if clusters:
                    inputs["class_labels"] = clusters.assign(images)
                elif plan.classes:  # matched by name, because string labels are numbered separately in each split
                    labels, names = reference.labels(split, flag)
                    labels = torch.from_numpy(translate_labels(labels[numbers], names, plan.classes))
                    null_class = accelerator.unwrap_model(unet).config.num_class_embeds - 1
                    inputs["class_labels"] = labels.where(labels >= 0, null_class)
                if plan.condition:
                    batch = {"images": images, "sample_ids": numbers[: len(images)]}
                    inputs |= plan.condition.model_inputs(batch)
                loss = DenoisingLoss(images, training_scheduler(own), args.seed, inputs)
                losses.append(dict(model=plan.name, images=split, **loss.measure(unet, accelerator)))
        asked = asked_classes(plan.classes, reference, extract, plan.how, count)
        options = dict(model_inputs=cycle_labels(asked.labels, accelerator.device)) if asked else {}
        restoration, labels, total = None, None, count
        if plan.condition:
            restoration = Restoration(reference, plan.condition, plan.how, count, plan.columns)
            options, total, scores = dict(model_inputs=restoration.model_inputs), restoration.total, {}
            if extract.name == "digits":
                labels, names = reference.labels(reference.held_out_split, "--held_out_split")
                labels = labels[restoration.indices][np.arange(count) % len(restoration.true)]
                labels = labels if names == [str(k) for k in range(10)] else None
            guesses = restoration.guesses() if accelerator.is_main_process else ()
            guesses = restoration.measured(guesses, scores, means=False)
            row = measure(f"{plan.name}: input, without the model", guesses, plan.how, labels=labels)
            if row:
                row |= scores
        tried = []  # names of samplers, and their rows
        for name, steps in plan.settings:
            guided = asked or (restoration and plan.condition.may_be_left_out)
            for scale in args.guidance_scale if guided else [1.0 if restoration else None]:
                sampler = choose_sampler(own, name, steps)
                drawn_by = unet
                if asked:
                    drawn_by = GuidedModel(unet, scale)
                elif restoration:
                    drawn_by = GuidedByCondition(unet, plan.condition, scale)
                title = [plan.name, *([name, str(steps)] if name else []), *([f"guidance {scale:g}"] if guided else [])]
                facts = dict(sampler=type(sampler).__name__, steps=steps, ema=ema, weights=weights)
                if guided:
                    facts["guidance_scale"] = scale
                if "algorithm_type" in sampler.config:
                    facts["algorithm"] = sampler.config.algorithm_type
                depends_on = dict(
                    weights=digest, model=kind, sampler=config_of(sampler), steps=steps, guidance=scale,
                    labels=asked and asked.labels.tolist(), seed=args.seed, precision=accelerator.mixed_precision,
                    randomness=randomness.VERSION, **({"autoencoder": space.fingerprint} if space.fingerprint else {}),
                )  # fmt: skip
                if restoration:
                    depends_on["inputs"] = restoration.digest
                kept = drawing(
                    args, accelerator, drawn_by, sampler, space, steps, total, " ".join(title), depends_on, **options
                )
                scores = {}
                blocks = restoration.measured(kept.blocks(), scores) if restoration else kept.blocks()
                row = measure(" ".join(title), blocks, plan.how, asked, labels, **facts)
                if row:
                    row |= scores
                    row["images_per_second"] = kept.images_per_second
                    tried.append((name, [row]))
        if args.write_best and accelerator.is_main_process:
            name, steps = best_setting(tried)
            sampler = saved_scheduler(name, own, latent=not space.in_unit_range)
            write_scheduler(Path(model), sampler, steps)
            if publishing := optional.find("publishing"):
                publishing.update_card(Path(model))
            say(f"{model} now has the scheduler {type(sampler).__name__}, which was best with {steps} steps")
        accelerator.free_memory()

    # Noise is evaluated for comparison. Its numbers are neither a floor nor a limit
    for shape in dict.fromkeys(how.shape for how in hows):
        how = next(how for how in hows if how.shape == shape)
        size = "" if len({how.shape for how in hows}) == 1 else f" ({describe(how)})"
        measure(f"noise, for comparison{size}", reference.noise(shape, count), how)
    if accelerator.is_main_process:
        facts = dict(features=extract.name, features_hash=extract.hash, reference=args.reference)
        facts |= dict(public_reference=public_data(args.reference))  # a path is recognised only where it exists
        facts |= dict(reference_split=args.reference_split, held_out_split=reference.held_out_split, seed=args.seed)
        write_report(Path(args.output_dir), rows, losses, grids, pairs, by_class, bool(args.sweep), **facts)
        say(f"peak memory {peak_memory(accelerator.device) / 2**30:.2f} GiB")


def partner_columns(args, plan):
    """Return the column of second pictures that the flags name, or else that of the model's run."""
    from dataclasses import replace
    from types import SimpleNamespace

    from utils.data.columns import condition_columns

    given = {name: vars(args)[name] for name in ("condition_dir", "condition_column")}
    if not any(given.values()):
        given = {name: plan.record.get("arguments", {}).get(name) for name in given}
    columns = condition_columns(SimpleNamespace(**given))
    known = dict(value_range=plan.condition.value_range, channels=plan.condition.picture_channels)
    return {name: replace(column, **known) for name, column in columns.items()}


def describe(how):
    """Return the shape, crop and mirroring of real images as text."""
    channels, height, width = how.shape
    return f"{height}x{width}{' grey' * (channels == 1)}{', centre' * how.center_crop}{', mirrored' * bool(how.random_flip)}"


def warn_of_differences(args, plan, reference, say):
    """Warn if a model was trained on images that differ from those it is compared with."""
    flags, model = plan.record.get("arguments", {}), plan.model
    if flags.get("dataset_split") not in (None, args.reference_split):
        say(
            f"warning: {model} was trained on {flags['dataset_split']}, not on --reference_split {args.reference_split}. Copies and floor are misleading. Give the split that it was trained on"
        )
    trained_range = plan.record.get("scaled_from")
    if "scaled_from" in plan.record and tuple(trained_range or ()) != tuple(plan.how.image_range or ()):
        given = ",".join(f"{value:g}" for value in trained_range) if trained_range else "full"
        say(f"warning: {model} was trained with --image_range {given}, unlike the reference. Give the same range")
    _, *size = plan.how.shape
    shape = reference.size or (1, 1)
    if not plan.record and reference.size and shape[0] * size[1] != shape[1] * size[0] and args.center_crop is None:
        say(
            f"{model}: it is unknown how its images were cropped. It is compared with random crops of the reference. Give --center_crop to compare it with centre crops"
        )


def drawing(args, accelerator, model, sampler, space, steps, count, title, depends_on, **options):
    """Return the samples of one setting, which are kept in OUTPUT_DIR/drawn, see ``KeptSamples``."""
    from utils.diffusion.pipelines import estimate_seconds
    from utils.diffusion.sampling import sample_images
    from utils.evaluation.kept_samples import KeptSamples

    def setting(number):
        return model, sampler, accelerator, number, space.shape, steps, args.sample_batch_size, args.seed

    def announce(missing):
        text = f"{title}: {type(sampler).__name__}, {steps} steps: "
        if missing:
            minutes = estimate_seconds(*setting(missing), **options) / 60
            kept = f" for {missing} of {count} images. The others are kept" * (missing < count)
            text += f"about {minutes:.1f} minutes{kept}"
        else:
            text += f"kept in {folder}"
        accelerator.print(text, flush=True)

    folder = Path(args.output_dir) / "drawn"
    options["decode"] = space.decode
    return KeptSamples(
        folder, accelerator, count, args.sample_batch_size, depends_on,
        lambda first, number: sample_images(*setting(number), first=first, **options), announce,
    )  # fmt: skip


def is_folder_of_images(name):
    """Return whether the name is that of a folder without a model."""
    from utils.saved import is_saved

    folder = Path(name)
    return folder.is_dir() and not is_saved(folder)


def settings(args, model, own, say):
    """Return the sampler (None: the pipeline's own) and the steps of each evaluation of a model with ``own``."""
    from utils import UserError
    from utils.diffusion.few_steps import is_compatible
    from utils.diffusion.pipelines import default_steps

    if not args.sweep:
        return [(args.sampler, args.num_inference_steps or default_steps(own))]
    entries = [entry.partition(":") for entry in args.sweep]
    suited = [entry for entry in entries if is_compatible(entry[0], own)]
    others = sorted({name for name, *_ in entries} - {name for name, *_ in suited})
    if not suited:
        raise UserError(
            f"--sweep: {', '.join(others)} cannot draw with {model}, which has the scheduler {type(own).__name__}"
        )
    if others:
        say(f"{model} is not evaluated with {', '.join(others)}, because its scheduler is a {type(own).__name__}")
    return [(name, int(n)) for name, _, steps in suited for n in steps.split(",")]


if __name__ == "__main__":
    run_script(main, parse_args)
