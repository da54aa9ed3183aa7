"""Play with a model in the browser: seeds, calls, samplers, classes, colours, and a walk between two seeds.

    pip install -r requirements-demo.txt
    python demo.py outputs/digits

prints the page's address, which only this machine can open. It takes what sample.py takes, and runs no code that comes
with a model. `push.py --space` makes a Space of it.
"""

from utils.args import SAMPLERS, SOLVERS, Parser, integer


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a pipeline, or of a UNet2DModel")
    parser.add_argument("--port", type=integer(1, 65535), help="of the page (default: the first free one from 7860)")
    parser.switch(parser, "--share", False, "also a public address, through Gradio's servers")
    return parser.parse(argv)


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import json
    import os
    import queue
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial
    from pathlib import Path
    from types import SimpleNamespace

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it works offline
    import gradio as gr
    import numpy as np
    import torch

    from utils import UserError
    from utils.data.images import PreparedImages
    from utils.data.sources import ImageSource, load_source
    from utils.diffusion.class_conditional import class_names
    from utils.diffusion.classes import GuidedModel, labels_in_turn
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.guidance import Guidance, color_loss
    from utils.diffusion.linear_mix import LinearMixScheduler
    from utils.diffusion.pipelines import choose_sampler, is_flow, load_pipeline, sampler_for_walks, slerp, usual_calls
    from utils.diffusion.pretrained import image_shape
    from utils.diffusion.sampling import sample_batch
    from utils.evaluation.image_folder import scaled_from
    from utils.evaluation.reference import show_nearest
    from utils.pictures import make_grid, to_uint8
    from utils.randomness import sample_noise
    from utils.training import run

    # Model
    accelerator = run.start_process(None)
    unet, own = load_pipeline(args.model)
    unet = accelerator.prepare_model(unet, evaluation_mode=True)
    shape, names = image_shape(unet.config), class_names(unet.config)
    samplers = [f"the model's own ({type(own).__name__})"]
    if not isinstance(own, LinearMixScheduler) and not is_few_step(own):
        samplers += [name for name in (SOLVERS if is_flow(own) else SAMPLERS) if name != "heun"]  # it shows nothing

    # Training images, where the run's folder says which they are
    training_images, record = None, Path(args.model) / "training_args.json"
    if record.is_file():
        flags = SimpleNamespace(**json.loads(record.read_text(encoding="utf-8"))["arguments"])
        try:
            dataset, name = load_source(ImageSource.from_args(flags), accelerator)
            scaled = scaled_from(args.model)[1]
            images = PreparedImages(dataset, name, {1: "L", 3: "RGB"}[shape[0]], shape[1:], image_range=scaled)
            training_images = images.examples(5000)
        except UserError as error:
            print(f"Without the nearest training images: {error}")

    # What the page does
    def draw(seed, count, calls, sampler, guidance_scale, classes=(), color=None, noise=None):
        """Yields what is predicted at each step, and the nearest training images at the end."""
        try:
            name = None if sampler == samplers[0] else sampler
            chosen, model = choose_sampler(own, name, int(calls), steered=True), unet
            options = {"noise": noise}
            if names:
                labels = [names.index(label) for label in classes] or list(range(len(names)))
                options["model_inputs"] = labels_in_turn(labels, accelerator.device)
                model = GuidedModel(unet, guidance_scale)
            elif color:
                options["guidance"] = Guidance(color_loss(color), guidance_scale)
            ids = np.zeros(int(count), int) if noise else np.arange(int(count))  # a walk's noise on the way is one
            steps = queue.Queue()
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(
                    sample_batch, model, chosen, ids, shape, int(calls), int(seed), accelerator.device,
                    watch=lambda _, predicted: steps.put(predicted), **options,
                )  # fmt: skip
                drawn.add_done_callback(lambda _: steps.put(None))
                while (predicted := steps.get()) is not None:
                    yield make_grid(to_uint8(predicted), 96), None
            images = to_uint8(drawn.result())
        except (UserError, ValueError) as error:
            raise gr.Error(str(error)) from error
        yield make_grid(images, 96), None if training_images is None else show_nearest(images[:8], training_images)

    def walk(other_seed, seed, count, calls, sampler, *rest):
        """Draws on the way from the noise of one seed to that of the other, with a sampler that adds none."""
        if sampler in (samplers[0], "ddpm", "sde-dpmsolver++"):
            sampler = sampler_for_walks(own) or samplers[0]
        ends = [sample_noise(int(end), "samples", np.zeros(1, int), shape) for end in (seed, other_seed)]
        fractions = torch.linspace(0, 1, int(count))
        between = slerp(*(end.expand(int(count), -1, -1, -1) for end in ends), fractions)
        yield from draw(seed, count, calls, sampler, *rest, noise=lambda ids: between)

    # The page
    with gr.Blocks(title=f"{Path(args.model).name}") as page:
        gr.Markdown(f"# {Path(args.model).name}\n{shape[1]} x {shape[2]} pixels; the same seed draws the same images.")
        with gr.Row():
            with gr.Column(scale=1):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, 64, 16, step=1, label="Images")
                calls = gr.Slider(1, 100, min(25, usual_calls(own)), step=1, label="Calls of the model an image")
                sampler = gr.Dropdown(samplers, value=samplers[0], label="Sampler")
                extra = gr.Dropdown(names, multiselect=True, label="Classes, in turn (all)", visible=bool(names))
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
        start.click(draw, inputs, [picture, nearest])
        between.click(walk, [other, *inputs], [picture, nearest])
        page.load(partial(draw, 0, 16, min(25, usual_calls(own)), samplers[0], 1), None, [picture, nearest])
    _, here, public = page.launch(server_port=args.port, share=args.share, quiet=True, prevent_thread_lock=True)
    print(f"Open {public or here}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    arguments = parse_args()
    from utils.exits import run_script

    run_script(main, arguments)
