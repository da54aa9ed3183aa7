"""Play with a model in the browser: seeds, calls, samplers, classes, colours, and a walk between two seeds.

    pip install -r requirements-demo.txt
    python demo.py outputs/digits

prints the page's address, which only this machine can open. It takes what sample.py takes, and runs no code that comes
with a model unless it is asked for. `push.py --space` makes a Space of it.
"""

from utils.args import SAMPLERS, SOLVERS, Parser, integer
from utils.exits import run_script


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a pipeline, or of a UNet2DModel")
    parser.switch(
        parser,
        "--trust_remote_code",
        False,
        "run the code that a model brings whose net is its author's own; read it first",
    )
    parser.add_argument("--port", type=integer(1, 65535), help="of the page (default: the first free one from 7860)")
    parser.switch(parser, "--share", False, "also a public address, through Gradio's servers")
    return parser.parse(argv)


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import os
    import queue
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial
    from pathlib import Path
    from types import SimpleNamespace

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it works offline
    import numpy as np
    import torch

    from utils import UserError
    from utils.data.images import PreparedImages
    from utils.data.nearest import show_nearest
    from utils.data.pixels import MODES
    from utils.diffusion import pipelines
    from utils.diffusion.class_conditional import class_names
    from utils.diffusion.classes import GuidedModel, labels_in_turn
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.guidance import Guidance, color_loss
    from utils.diffusion.linear_mix import LinearMixScheduler
    from utils.diffusion.sampling import sample_batch, starting_noise
    from utils.evaluation.image_folder import scaled_from
    from utils.pictures import make_grid, to_uint8
    from utils.sources.named_images import NamedImages
    from utils.sources.sources import ImageSource
    from utils.training.output_dir import read_arguments
    from utils.training.process import start_process

    try:
        import gradio as gr
    except ImportError as error:
        raise UserError("demo.py needs Gradio: pip install -r requirements-demo.txt") from error

    # Model
    accelerator = start_process(None)
    unet, own, space = pipelines.load_pipeline(args.model, args.trust_remote_code)
    space.to(accelerator.device)
    unet = accelerator.prepare_model(unet, evaluation_mode=True)
    shape, names = space.image_shape, class_names(unet.config)
    samplers = [f"the model's own ({type(own).__name__})"]
    if not isinstance(own, LinearMixScheduler) and not is_few_step(own):
        suited = SOLVERS if pipelines.is_flow(own) else SAMPLERS
        samplers += suited

    # Training images, where the run's folder says which they are, and they are there
    training_images, record = None, read_arguments(args.model)
    if record:
        flags = SimpleNamespace(**record["arguments"])
        if not flags.train_data_dir and not flags.dataset_name:
            flags.dataset_name = record["data"]  # what was found where none was named; images of a program have no name
        try:
            images = NamedImages(ImageSource.from_args(flags), accelerator)
            if images.length != record["images"]:
                raise UserError(f"{images.name} has not the {record['images']} images that this was trained on")
            prepared = PreparedImages(
                images, MODES[shape[0]], shape[1:], flags.center_crop, flags.random_flip, flags.seed,
                image_range=scaled_from(args.model)[1],
            )  # fmt: skip
            training_images = prepared.all_parts(1000)
        except (UserError, KeyError, AttributeError) as error:  # or the record is of a run that did not say
            print(f"Without the nearest training images: {error}")

    @torch.no_grad()
    def decoded(samples):
        return to_uint8(space.decode(samples))

    # What the page does
    def draw(seed, count, calls, sampler, guidance_scale, classes=(), color=None, noise=None):
        """Yields what is predicted at each step, and the nearest training images at the end."""
        try:
            name = None if sampler == samplers[0] else sampler
            try:
                chosen, model, watched = pipelines.choose_sampler(own, name, int(calls), steered=True), unet, True
            except UserError:  # noise of another kind: drawn, but neither steered nor shown as it arises
                chosen, model, watched = pipelines.choose_sampler(own, name, int(calls), bool(color)), unet, False
            options = {"noise": noise}
            if names:
                labels = [names.index(label) for label in classes] or list(range(len(names)))
                options["model_inputs"] = labels_in_turn(labels, accelerator.device)
                model = GuidedModel(unet, guidance_scale)
            elif color:
                options["guidance"] = Guidance(color_loss(color), guidance_scale, space=space)
            ids = np.zeros(int(count), int) if noise else np.arange(int(count))  # on a walk all else is the first's
            steps = queue.Queue()
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(
                    sample_batch, model, chosen, ids, space.shape, int(calls), int(seed or 0), accelerator.device,
                    watch=(lambda _, predicted: steps.put(predicted)) if watched else None, **options,
                )  # fmt: skip
                drawn.add_done_callback(lambda _: steps.put(None))
                while (predicted := steps.get()) is not None:
                    yield make_grid(decoded(predicted), 96), None
            images = decoded(drawn.result())
        except (UserError, ValueError) as error:
            raise gr.Error(str(error)) from error
        yield make_grid(images, 96), None if training_images is None else show_nearest(images[:8], training_images)

    def walk(other_seed, seed, count, calls, sampler, *rest):
        """Draws on the way from the noise of one seed to that of the other, with a sampler that adds none."""
        if sampler in (samplers[0], "ddpm", "sde-dpmsolver++"):
            sampler = pipelines.sampler_for_walks(own) or samplers[0]
        ends = [starting_noise(own, int(end or 0), np.zeros(1, int), space.shape, "cpu") for end in (seed, other_seed)]
        way = pipelines.noise_between(own, *ends, torch.linspace(0, 1, int(count)))
        yield from draw(seed, count, calls, sampler, *rest, noise=lambda ids: way)

    # The page
    usual, title = min(25, pipelines.usual_calls(own)), Path(args.model).name
    with gr.Blocks(title=title) as page:
        gr.Markdown(f"# {title}\n{shape[1]} x {shape[2]} pixels; the same seed draws the same images.")
        with gr.Row():
            with gr.Column(scale=1):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, 64, 16, step=1, label="Images")
                calls = gr.Slider(1, 100, usual, step=1, label="Calls of the model an image")
                sampler = gr.Dropdown(samplers, value=samplers[0], label="Sampler")
                label = "Classes, in turn (a walk: the first)"
                extra = gr.Dropdown(names, multiselect=True, label=label, visible=bool(names))
                color = gr.ColorPicker(None, label="Steer towards a colour", visible=not names)
                scale = gr.Slider(0, 5, 1, step=0.1, label="Guidance towards it: how firmly")
                start = gr.Button("Draw", variant="primary")
                other = gr.Number(1, label="Another seed", precision=0, minimum=0)
                between = gr.Button("Walk from seed to seed")
            with gr.Column(scale=2):
                image = partial(gr.Image, type="pil", format="png", interactive=False, show_label=False)
                picture = image(label="Samples", elem_id="picture")
                known = training_images is not None
                gr.Markdown("The first ones, and the training images nearest to them", visible=known)
                nearest = image(label="Nearest training images", elem_id="nearest", visible=known)
        inputs = [seed, count, calls, sampler, scale, extra, color]
        one = dict(outputs=[picture, nearest], concurrency_id="model")  # one at a time, for the scheduler has a state
        start.click(draw, inputs, **one)
        between.click(walk, [other, *inputs], **one)
        page.load(partial(draw, 0, 16, usual, samplers[0], 1), None, **one)
    try:
        _, here, public = page.launch(server_port=args.port, share=args.share, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {args.port}: {error}. Leave the flag out, and a free one is found") from error
    print(f"Open {public or here}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, parse_args)
