"""Compare adapting with training from scratch: by method, by learning rate, and by the number of pictures.

    python benchmarks/adapting.py faces --keep outputs/adapting
    python benchmarks/adapting.py PORTRAITS --resolution 64 --base_steps 4000 --keep outputs/adapting-portraits
    python benchmarks/adapting.py PORTRAITS --resolution 128 --vae AUTOENCODER --keep outputs/adapting-latents

train_ddpm.py trains a base model on the faces. With --vae, train_latent.py does. finetune_faces.py adapts it to pencil
drawings of 30 faces. The held-out images are drawings of other faces. The prior images are the training images of the
base. Training from scratch starts from random weights of the same net, with the optimizer and the learning rate of
train_ddpm.py.
--compare rates and --compare pictures make the tables by learning rate and by number of pictures.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
METHODS = ("scratch", "full", "attention", "norm", "lora")
RATES = {"full": (3e-4, 1e-3, 3e-3), "attention": (1e-3, 3e-3, 1e-2)}
RATES |= {"norm": (3e-3, 1e-2, 3e-2), "lora": (1e-3, 3e-3, 1e-2)}
PICTURES = (10, 30, 100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="faces (embedded), or a Parquet file with a column image")
    parser.add_argument("--compare", choices=("methods", "rates", "pictures"), default="methods")
    parser.add_argument("--resolution", type=int, default=24)
    parser.add_argument(
        "--base_images",
        type=int,
        default=100,
        help="number of images for the base model: the first ones of the data set",
    )
    parser.add_argument("--base_steps", type=int, default=800)
    parser.add_argument("--vae", help="autoencoder, for a base model of its latents")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--keep", type=Path, required=True, metavar="DIR", help="folder of the runs. Finished runs in it are used again"
    )
    options = parser.parse_args()
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    write_drawings(options)
    train_base(options)
    names = [f"{value:g}" for value in sorted({rate for rates in RATES.values() for rate in rates})]
    if options.compare == "rates":
        print(f"| {options.steps} steps, held-out loss | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for method, rates in RATES.items():
            found = {f"{rate:g}": adapt(options, method, 0, f"--learning_rate={rate}")["held_out"] for rate in rates}
            print(
                f"| {method} | {' | '.join(f'{found[name]:.4f}' if name in found else '' for name in names)} |",
                flush=True,
            )
        return
    print(f"| {options.steps} steps | pictures | held-out loss | prior loss | distance to base | nearest | s/step |")
    print("|---|---|---|---|---|---|---|")
    for method in METHODS if options.compare == "methods" else ("full",):
        for pictures in (30,) if options.compare == "methods" else PICTURES:
            rows = [adapt(options, method, seed, pictures=pictures) for seed in range(options.seeds)]
            shown = [spread([row[key] for row in rows]) for key in ("held_out", "prior", "distance", "nearest")]
            seconds = statistics.median(row["seconds"] for row in rows)
            print(f"| {method} | {pictures} | {' | '.join(shown)} | {seconds:.2f} |", flush=True)


def spread(values):
    """Return mean and range over the seeds."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def write_drawings(options):
    """Write drawings at twice the training size: of N faces in train-N/, and of other faces in test/."""
    from sketches import sketch

    from utils.data.own_images import embedded_faces

    if (options.keep / "test").is_dir():
        return
    if options.data == "faces":
        faces = [row["image"]()[0] for row in embedded_faces()]
        parts, others = {30: faces[:30]}, faces[30:]
    else:
        import datasets

        faces = [row["image"] for row in datasets.load_dataset("parquet", data_files=options.data, split="train")]
        rest = faces[options.base_images :]
        parts, others = {count: rest[:count] for count in PICTURES}, rest[max(PICTURES) :]
    side = 2 * options.resolution
    for name, images in {**{f"train-{count}": images for count, images in parts.items()}, "test": others}.items():
        (options.keep / name).mkdir(parents=True)
        for number, image in enumerate(images):
            drawing = sketch(image.convert("L").resize((side, side)))
            drawing.convert(image.mode).save(options.keep / name / f"{number:03}.png")


def train_base(options):
    """Train the base, and write a copy with random weights. Its net has attention, so that each method has weights."""
    from diffusers import DiffusionPipeline, UNet2DModel

    import train_ddpm
    import train_latent
    from utils.diffusion.unets import UNETS

    blocks = dict(down_block_types=["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"], attention_head_dim=32)
    config = {**UNETS["small"], **blocks, "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}
    (options.keep / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}), encoding="utf-8")
    small, vae = options.resolution <= 32 or options.vae, [f"--vae={options.vae}"] if options.vae else []
    run(
        train_latent if vae else train_ddpm, options.keep / "base", *vae,
        f"--model_config_name_or_path={options.keep / 'config.json'}",
        f"--dataset_split=train[:{options.base_images}]", f"--max_train_steps={options.base_steps}",
        f"--dataset_name={options.data}", f"--resolution={options.resolution}", "--random_flip",
        f"--train_batch_size={64 if small else 16}",
    )  # fmt: skip
    pipeline = DiffusionPipeline.from_pretrained(options.keep / "base")
    pipeline.unet = UNet2DModel.from_config(pipeline.unet.config)
    pipeline.save_pretrained(options.keep / "random")


def adapt(options, method, seed, *flags, pictures=30):
    """Adapt the base, and return the last losses and distances of the run, and its time per step."""
    import finetune_faces

    folder = options.keep / "-".join([method, str(pictures), str(options.steps), str(seed), *(f[17:] for f in flags)])
    scratch = method == "scratch"
    flags = [*flags, *(["--learning_rate=1e-3", "--optimizer=muon"] if scratch else [f"--method={method}"])]
    run(
        finetune_faces, folder, f"--pretrained_model_name_or_path={options.keep / ('random' if scratch else 'base')}",
        f"--train_data_dir={data_folder(options, pictures)}", "--validation_split=test", f"--seed={seed}",
        f"--prior_dataset_name={options.data}:train[:{options.base_images}]", f"--max_train_steps={options.steps}",
        "--random_flip", "--lr_warmup_steps=20", *flags,
    )  # fmt: skip
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((folder / "logs").glob("*/events*")).parent)).Reload()

    def last(tag):
        return events.Scalars(tag)[-1].value

    speeds = [event.value for event in events.Scalars("system/images_per_second")]
    return dict(
        held_out=last("loss/validation_held_out"), prior=last("loss/validation_prior"),
        distance=last("optimizer/distance_to_base"), nearest=nearest(options, folder, pictures, seed),
        seconds=8 / statistics.median(speeds),
    )  # fmt: skip


def data_folder(options, pictures):
    """Return a folder with these drawings as its splits train and test."""
    folder = options.keep / f"data-{pictures}"
    for split, name in (("train", f"train-{pictures}"), ("test", "test")):
        folder.mkdir(exist_ok=True)
        if not (folder / split).exists():
            (folder / split).symlink_to((options.keep / name).resolve())
    return folder


def nearest(options, folder, pictures, seed):
    """Return the median distance of samples to training images, divided by that of held-out images."""
    from PIL import Image

    from utils.data.nearest import nearest_distances
    from utils.diffusion.pipelines import load_pipeline
    from utils.diffusion.sampling import sample_images
    from utils.evaluation.features import load_extractor
    from utils.training.process import start_process

    accelerator, extract = start_process("bf16"), load_extractor("pixels")
    unet, sampler, space = load_pipeline(str(folder))
    unet, space = accelerator.prepare_model(unet, evaluation_mode=True), space.to(accelerator.device)
    samples = sample_images(unet, sampler, accelerator, 32, space.shape, 20, 32, seed, decode=space.decode)

    def vectors(part):
        mode = "L" if space.image_shape[0] == 1 else "RGB"
        images = [
            Image.open(file).convert(mode).resize(space.image_shape[:0:-1])
            for file in sorted((options.keep / part).iterdir())
        ]
        both = [np.array(image)[:, step] for image in images for step in (slice(None), slice(None, None, -1))]
        return extract(np.stack([np.atleast_3d(image).transpose(2, 0, 1) for image in both]))

    trained = vectors(f"train-{pictures}")
    distances = [np.median(nearest_distances(found, trained)[0]) for found in (extract(samples), vectors("test"))]
    return float(distances[0] / distances[1])


def run(script, folder, *flags):
    common = ["--mixed_precision=bf16", "--checkpointing_steps=100000", "--sample_steps=100000", "--num_samples=16"]
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        script.main(script.parse_args([f"--output_dir={folder}", *common, *flags]))


if __name__ == "__main__":
    main()
