"""The models and folders of images that evaluate.py compares with real images."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from .. import UserError, optional, randomness
from ..args import size_of
from ..data.clusters import find_clusters, has_clusters, load_clusters
from ..data.columns import Column, condition_columns
from ..data.own_images import translate_labels
from ..data.pixels import MODES
from ..diffusion.classes import GuidedModel, cycle_labels
from ..diffusion.conditions import PAIRED, Condition, GuidedByCondition
from ..diffusion.few_steps import is_compatible, is_few_step
from ..diffusion.pipelines import (
    choose_sampler,
    default_steps,
    estimate_seconds,
    load_pipeline,
    saved_scheduler,
    training_scheduler,
)
from ..diffusion.sampling import sample_images
from ..diffusion.spaces import encode_in_batches
from ..diffusion.unets import weights_digest
from ..pictures import from_uint8
from ..saved import is_saved, net_folder
from ..training.checkpoints import file_hash
from ..training.output_dir import config_of, read_arguments
from .class_statistics import asked_classes, check_classes
from .denoising_loss import DenoisingLoss
from .image_folder import SampleFolder
from .kept_samples import KeptSamples
from .reference import Preparation, Reference
from .report import Report
from .restoration import Restoration
from .sweep import best_setting, write_scheduler


@dataclass
class Plan:
    """One model, or one folder of images, and the way in which it is evaluated.

    Attributes:
        model: folder or Hub id.
        name: name in the tables. A folder of images has that of ``model``.
        record: record of its run, {} if it has none.
        how: preparation of the real images that its samples are compared with.
        folder: its images, if it is a folder of images.
        settings: sampler (None: the pipeline's own) and number of steps of each evaluation.
        classes: names of its classes.
        condition: its condition, or None.
        columns: column of the second pictures of a model of pairs.
    """

    model: str
    name: str
    record: dict
    how: Preparation
    folder: SampleFolder | None = None
    settings: list[tuple[str | None, int]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    condition: Condition | None = None
    columns: dict[str, Column] = field(default_factory=dict)


def make_plans(args, accelerator, reference: Reference, say: Callable[[str], None]) -> list[Plan]:
    """Open all models and folders once, so that a mistake is found before hours of sampling.

    Args:
        args: flags of evaluate.py.
        say: function that prints a line on the main process.

    Raises:
        UserError: a model cannot be loaded, or does not fit a flag or the reference.
    """
    lasts = [Path(model).resolve().name for model in args.models]
    plans = []
    for model, last in zip(args.models, lasts, strict=True):
        name = model if lasts.count(last) > 1 else last
        if Path(model).is_dir() and not is_saved(Path(model)):
            folder = SampleFolder(model, accelerator, size_of(args.resolution), args.seed)
            how = reference.preparation(folder.shape, folder.record)
            plans.append(Plan(model, name, folder.record, how, folder))
            continue
        unet, own, space = load_pipeline(model, args.trust_remote_code)
        record, shape = read_arguments(model), space.image_shape
        if shape[0] not in MODES:
            raise UserError(f"{model} draws images of {shape[0]} channels. Expected 1 or 3")
        plan = Plan(model, name, record, reference.preparation(shape, record))
        plan.settings = _settings(args, model, own, say)
        for sampler, steps in plan.settings:
            choose_sampler(own, sampler, steps)
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
        plans.append(plan)
    known = {plan.how.shape: plan.how for plan in reversed(plans) if plan.record}
    for plan in plans:  # without a known run, images are prepared as for the first known run of the same size
        plan.how = plan.how if plan.record else known.get(plan.how.shape, plan.how)
    return plans


def _settings(args, model: str, own, say) -> list[tuple[str | None, int]]:
    """Return the sampler (None: the pipeline's own) and the steps of each evaluation of a model with ``own``."""
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


def partner_columns(args, plan: Plan) -> dict[str, Column]:
    """Return the column of second pictures that the flags name, or else that of the model's run."""
    given = {name: vars(args)[name] for name in ("condition_dir", "condition_column")}
    if not any(given.values()):
        given = {name: plan.record.get("arguments", {}).get(name) for name in given}
    columns = condition_columns(SimpleNamespace(**given))
    known = dict(value_range=plan.condition.value_range, channels=plan.condition.picture_channels)
    return {name: replace(column, **known) for name, column in columns.items()}


def warn_of_differences(args, plan: Plan, reference: Reference, say) -> None:
    """Warn if a model was trained on images that differ from those it is compared with."""
    flags, model = plan.record.get("arguments", {}), plan.model
    if flags.get("dataset_split") not in (None, args.reference_split):
        say(
            f"warning: {model} was trained on {flags['dataset_split']}, not on --reference_split "
            f"{args.reference_split}. Copies and floor are misleading. Give the split that it was trained on"
        )
    trained_range = plan.record.get("scaled_from")
    if "scaled_from" in plan.record and tuple(trained_range or ()) != tuple(plan.how.image_range or ()):
        given = ",".join(f"{value:g}" for value in trained_range) if trained_range else "full"
        say(f"warning: {model} was trained with --image_range {given}, unlike the reference. Give the same range")
    _, *size = plan.how.shape
    shape = reference.size or (1, 1)
    if not plan.record and reference.size and shape[0] * size[1] != shape[1] * size[0] and args.center_crop is None:
        say(
            f"{model}: it is unknown how its images were cropped. It is compared with random crops of the reference. "
            "Give --center_crop to compare it with centre crops"
        )


def evaluate_model(args, accelerator, plan: Plan, reference: Reference, report: Report, count: int, say) -> None:
    """Measure a model's denoising loss, draw samples with each of its settings, and add their rows to the report.

    Args:
        args: flags of evaluate.py.
        count: number of samples of each setting.
        say: function that prints a line on the main process.
    """
    model = plan.model
    unet, own, space = load_pipeline(model, args.trust_remote_code)
    ema = plan.record.get("arguments", {}).get("use_ema")
    files = sorted(net_folder(Path(model)).glob("*.safetensors"))
    weights, kind = file_hash(*files)[:12] if files else None, config_of(unet)
    digest = weights or weights_digest(unet)
    unet = accelerator.prepare_model(unet, evaluation_mode=True)
    space.to(accelerator.device)
    if args.validation_loss:
        _measure_losses(args, accelerator, plan, reference, report, unet, own, space, say)
    asked = asked_classes(plan.classes, reference, report.extract, plan.how, count)
    options = dict(model_inputs=cycle_labels(asked.labels, accelerator.device)) if asked else {}
    restoration, labels, total = None, None, count
    if plan.condition:
        restoration = Restoration(reference, plan.condition, plan.how, count, plan.columns)
        options, total = dict(model_inputs=restoration.model_inputs), restoration.total
        if report.extract.name == "digits":
            labels, names = reference.labels(reference.held_out_split, "--held_out_split")
            labels = labels[restoration.indices][np.arange(count) % len(restoration.true)]
            labels = labels if names == [str(k) for k in range(10)] else None
        scores = {}
        guesses = restoration.guesses() if accelerator.is_main_process else ()
        guesses = restoration.measured(guesses, scores, means=False)
        report.measure(f"{plan.name}: input, without the model", guesses, plan.how, scores, labels=labels)
    tried = []  # names of samplers, and their rows
    guided = asked or (restoration and plan.condition.may_be_left_out)
    runs = [(*setting, scale) for setting in plan.settings for scale in (args.guidance_scale if guided else [None])]
    for name, steps, scale in runs:
        sampler = choose_sampler(own, name, steps)
        drawn_by = unet
        if asked:
            drawn_by = GuidedModel(unet, scale)
        elif restoration:
            drawn_by = GuidedByCondition(unet, plan.condition, 1.0 if scale is None else scale)
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
        kept = _draw(args, accelerator, drawn_by, sampler, space, steps, total, " ".join(title), depends_on, **options)
        scores = {}
        blocks = restoration.measured(kept.blocks(), scores) if restoration else kept.blocks()
        row = report.measure(" ".join(title), blocks, plan.how, scores, asked, labels, **facts)
        if row:
            row["images_per_second"] = kept.images_per_second
            tried.append((name, row))
    if args.write_best and accelerator.is_main_process:
        name, steps = best_setting(tried)
        sampler = saved_scheduler(name, own)
        write_scheduler(Path(model), sampler, steps)
        if publishing := optional.find("publishing"):
            publishing.update_card(Path(model))
        say(f"{model} now has the scheduler {type(sampler).__name__}, which was best with {steps} steps")
    accelerator.free_memory()


def _measure_losses(args, accelerator, plan, reference, report, unet, own, space, say) -> None:
    """Add a model's denoising losses on the reference and the held-out images to the report."""
    clustered = has_clusters(plan.classes)
    clusters_file = find_clusters(plan.model) if clustered else None
    reason = None
    if is_few_step(own):
        reason = "has no denoising loss, because it is a few-step model"
    elif plan.condition and plan.condition.kind == PAIRED:
        reason = (
            "has no denoising loss here, because its inputs are second pictures. See --validation_split in training"
        )
    elif clustered and not clusters_file:
        reason = "has no denoising loss here, because clusters.npz is missing. Give the folder of its training"
    if reason:
        say(f"{plan.model} {reason}")
        return
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
        report.losses.append(dict(model=plan.name, images=split, **loss.measure(unet, accelerator)))


def _draw(args, accelerator, model, sampler, space, steps, count, title, depends_on, **options) -> KeptSamples:
    """Return the samples of one setting, which are kept in OUTPUT_DIR/drawn, see ``KeptSamples``."""

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
