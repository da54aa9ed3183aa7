"""Explore a model in the browser: seeds, sampling steps, samplers, classes, colours, interpolation between seeds.

    pip install -r requirements-demo.txt
    python demo.py outputs/digits

This command prints the address of the page, which only users of this machine can open. It takes the same models as
sample.py. Code that comes with a model runs only with --trust_remote_code. `push.py --space` publishes the page as a
Space.
"""

from utils.args import SAMPLERS, SOLVERS, Parser, integer
from utils.exits import run_script

MAX_SIDE = 512  # pixels of an image that is drawn from a picture
INPUTS = {
    "gray": "a grey picture", "outline": "white lines on black", "paired": "a picture",
    "inpaint": "a picture, with a transparent hole or a hole painted white",
}  # fmt: skip


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a pipeline, or of a UNet2DModel")
    parser.switch(parser, "--trust_remote_code", False, "permission to run the model's network code. Read it first")
    parser.add_argument(
        "--port", type=integer(1, 65535), help="port of the page (default: the first free one from 7860)"
    )
    parser.switch(parser, "--share", False, "public address through Gradio's servers, without training images")
    return parser.parse(argv)


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import itertools
    import os
    import queue
    import signal
    import sys
    import tempfile
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial
    from pathlib import Path
    from types import SimpleNamespace

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page works offline
    # Pictures of the page are in a folder that other users cannot read, and that is removed at the end
    pictures = tempfile.TemporaryDirectory(prefix="demo-")
    os.environ.setdefault("GRADIO_TEMP_DIR", pictures.name)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    import numpy as np
    import torch
    from huggingface_hub import hf_hub_download
    from PIL import Image

    from utils import UserError, counted
    from utils.data.images import PreparedImages
    from utils.data.nearest import show_nearest
    from utils.data.pixels import MODES
    from utils.diffusion import pipelines
    from utils.diffusion.class_conditional import class_names
    from utils.diffusion.classes import GuidedModel, cycle_labels
    from utils.diffusion.conditions import Condition, GuidedByCondition
    from utils.diffusion.few_steps import is_few_step
    from utils.diffusion.guidance import Guidance, color_loss
    from utils.diffusion.linear_mix import LinearMixScheduler
    from utils.diffusion.sampling import cycle_rows, sample_batch, starting_noise
    from utils.diffusion.windows import Windows
    from utils.evaluation.given_images import enlarge, extend, scaled_from
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
    condition = Condition.of_model(unet.config)
    samplers = ["the model's own" + " (adds noise)" * pipelines.adds_noise(own)]
    most_steps = 100
    if is_few_step(own):
        most_steps = min(most_steps, own.config.original_inference_steps)
    elif not isinstance(own, LinearMixScheduler):
        samplers += SOLVERS if pipelines.is_flow(own) else SAMPLERS

    # Gradio reads the same variable; a Space sets it
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    is_public = args.share or host not in ("127.0.0.1", "localhost", "::1")

    # Training images are shown if the run's folder names them and they are available
    training_images, record = None, read_arguments(args.model)
    if record and is_public:
        print("Others can open this page, so it shows no training images")
    elif record:
        try:
            flags = SimpleNamespace(**record["arguments"])
            if not flags.train_data_dir and not flags.dataset_name:
                flags.dataset_name = record["data"]  # the default data set; images in Python have no name
            images = NamedImages(ImageSource.from_args(flags), accelerator)
            if images.length != record["images"]:
                raise UserError(
                    f"{images.name} does not have the {record['images']} images that this model was trained on"
                )
            prepared = PreparedImages(
                images, MODES[shape[0]], shape[1:], flags.center_crop, flags.random_flip, flags.seed,
                image_range=scaled_from(args.model)[1],
            )  # fmt: skip
            training_images = prepared.all_parts(1000)
        except UserError as error:
            print(f"The nearest training images are not shown: {error}")
        except (KeyError, AttributeError, TypeError):
            print(f"The nearest training images are not shown: {args.model} has no training_args.json of these scripts")

    numbers = itertools.count()

    @torch.no_grad()
    def decoded(samples):
        return to_uint8(space.decode(samples))

    def grid(images):
        picture = make_grid(images, 96)
        # Gradio names files by content, so an equal picture would overwrite a file that another visitor is loading
        picture.info["number"] = str(next(numbers))
        return picture

    def input_of(given):
        """Return the input that belongs to the given picture: float32 (1, K, H, W)."""
        layers = []
        if isinstance(given, dict):  # an editor, in which the user has painted the hole
            given, layers = given["background"], given["layers"]
        if given is None:
            raise UserError("there is no picture. Drop one into the field Input")
        if max(given.size) * condition.factor > MAX_SIDE:
            limit = MAX_SIDE // condition.factor
            raise UserError(f"{given.width} x {given.height} pixels are too many. Expected {limit} at most")
        if condition.kind == "inpaint":
            given = given.convert("RGBA")
            known = given.getchannel("A")
            for layer in layers:
                known.paste(0, mask=layer.getchannel("A").point(lambda value: 255 if value else 0))
            given.putalpha(known)
        given = enlarge(given, condition, space.shape[1:], shape[1] // space.shape[1])
        return condition.input_of(condition.picture_from(given))

    # Actions of the page
    def draw(
        seed,
        count,
        steps,
        sampler,
        guidance_scale,
        classes=(),
        steer=False,
        color=None,
        given=None,
        noise=None,
        text="",
    ):
        """Yield the prediction at each sampling step, then the samples, their description and the nearest images."""
        if steer and shape[0] == 1:
            color = "#" + 3 * f"{int(color):02x}"
        color = color if steer else None
        try:
            name = None if sampler == samplers[0] else sampler
            try:
                chosen, model, watched = pipelines.choose_sampler(own, name, int(steps), steered=True), unet, True
            except UserError:  # without the noise of a DDPMScheduler, samples are neither guided nor shown at each step
                chosen, model, watched = pipelines.choose_sampler(own, name, int(steps), bool(color)), unet, False
            options, drawn_shape, finish = {"noise": noise}, space.shape, decoded
            if condition:
                inputs = input_of(given)
                extended, scale = extend(inputs, space.shape[1:]), shape[1] // space.shape[1]
                options["model_inputs"] = cycle_rows({"condition": extended}, accelerator.device)
                model = GuidedByCondition(Windows(unet, space.shape[1:]), condition, guidance_scale)
                drawn_shape = (space.shape[0], *extended.shape[2:])
                height, width = (side * scale for side in inputs.shape[2:])

                def finish(samples):
                    return condition.keep_known(decoded(samples)[..., :height, :width], inputs)

            if names:
                labels = [names.index(label) for label in classes] or list(range(len(names)))
                options["model_inputs"] = cycle_labels(labels, accelerator.device)
                model = GuidedModel(unet, guidance_scale)
            elif color:
                options["guidance"] = Guidance(color_loss(color), guidance_scale, space=space)
            # In an interpolation, all other randomness is that of the first image
            ids = np.zeros(int(count), int) if noise else np.arange(int(count))
            predictions = queue.Queue()
            with ThreadPoolExecutor(1) as pool:
                drawn = pool.submit(
                    sample_batch, model, chosen, ids, drawn_shape, int(steps), int(seed or 0), accelerator.device,
                    watch=(lambda _, predicted: predictions.put(predicted)) if watched else None, **options,
                )  # fmt: skip
                drawn.add_done_callback(lambda _: predictions.put(None))
                while (predicted := predictions.get()) is not None:
                    yield grid(finish(predicted)), None, None
            images = finish(drawn.result())
        except (UserError, ValueError) as error:
            raise gr.Error(str(error)) from error
        steps_taken = counted(int(steps), "sampling step")
        text = text or f"Seed {int(seed or 0)}, {steps_taken}, {name or type(own).__name__}"
        comparable = training_images is not None and images.shape[1:] == shape
        yield grid(images), text, show_nearest(images[:8], training_images) if comparable else None

    def interpolate(other_seed, seed, count, steps, sampler, *rest):
        """Draw from noise interpolated between two seeds, with a sampler that adds none."""
        text = f"From seed {int(seed or 0)} to seed {int(other_seed or 0)}"
        if sampler in (samplers[0], "ddpm", "sde-dpmsolver++") and pipelines.interpolation_sampler(own):
            sampler = pipelines.interpolation_sampler(own)
            text += f", drawn by {sampler}, because the chosen sampler adds noise at each step. "
            text += "Its image of the same seed differs"
        ends = [starting_noise(own, int(end or 0), np.zeros(1, int), space.shape, "cpu") for end in (seed, other_seed)]
        between = pipelines.interpolate_noise(own, *ends, torch.linspace(0, 1, int(count)))
        yield from draw(seed, count, steps, sampler, *rest, noise=lambda ids: between, text=text)

    example = Path(args.model) / "condition.png"
    if condition and not Path(args.model).exists():
        try:
            example = Path(hf_hub_download(args.model, "condition.png"))
        except (OSError, ValueError) as error:  # a network error, or a repository without it
            print(f"There is no example of an input: {error}")
    # The example may be one of the user's own images, except on the Hub
    hidden = is_public and Path(args.model).exists()
    example = example if condition and example.is_file() and not hidden else None

    def input_field():
        """Return the field for the picture that the model draws from."""
        label = f"Input: {INPUTS.get(condition.kind, 'a small picture to enlarge')}"
        example_image = Image.open(example) if example else None
        if condition.kind != "inpaint":
            return gr.Image(example_image, type="pil", label=label, elem_id="given", height=240)
        white = gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=max(2, shape[1] // 6))
        # Its hole is transparent. The editor would drop a first layer as soon as the user paints
        value = example and dict(background=example_image.convert("RGBA"), layers=[], composite=None)
        return gr.ImageEditor(value, type="pil", label=label, brush=white, elem_id="given", height=320)

    # The page; on a phone the second column is below the first
    usual, title = min(25, pipelines.default_steps(own)), Path(args.model).name
    seed_input = partial(gr.Number, precision=0, minimum=0, maximum=2**53 - 1)  # browsers round larger numbers
    image = partial(gr.Image, type="pil", format="png", interactive=False, show_label=False)
    with gr.Blocks(title=title) as page:
        gr.Markdown(f"# {title}\n{shape[1]} x {shape[2]} pixels. The same seed draws the same images.")
        with gr.Row():
            with gr.Column(scale=2):
                given = input_field() if condition else gr.State(None)
                picture = image(label="Samples", elem_id="picture")
                how = gr.Markdown(elem_id="how")
            with gr.Column(scale=1):
                start = gr.Button("Draw", variant="primary")
                seed = seed_input(0, label="Seed")
                count = gr.Slider(1, 64, 16, step=1, label="Images")
                steps = gr.Slider(1, most_steps, usual, step=1, label="Sampling steps")
                sampler = gr.Dropdown(samplers, value=samplers[0], label="Sampler")
                classes = gr.Dropdown(names, multiselect=True, label="Classes (empty: all)", visible=bool(names))
                steer = gr.Checkbox(False, label="Guide towards a colour", visible=not (names or condition))
                if shape[0] == 1:
                    color = gr.Slider(0, 255, 128, step=1, label="Grey level", visible=False)
                else:
                    color = gr.ColorPicker("#ff8000", label="Colour", visible=False)
                guided = bool(names) or (condition and condition.may_be_left_out)
                scale = gr.Slider(0, 5, 1, step=0.1, label="Guidance strength", visible=bool(guided))
                other = seed_input(1, label="Second seed", visible=not condition)
                between = gr.Button("Interpolate from seed to seed", visible=not condition)
        known = training_images is not None
        gr.Markdown("The first samples, and the training images nearest to them", visible=known)
        nearest = image(label="Nearest training images", elem_id="nearest", visible=known)
        inputs = [seed, count, steps, sampler, scale, classes, steer, color, given]
        # One request at a time, because the scheduler has a state
        one = dict(outputs=[picture, how, nearest], concurrency_id="model")
        steer.change(lambda on: [gr.update(visible=on)] * 2, steer, [color, scale])
        start.click(draw, inputs, **one)
        between.click(interpolate, [other, *inputs], **one)
        if not condition or example:
            page.load(draw, inputs, **one)
    try:
        _, here, public = page.launch(
            server_name=host,
            server_port=args.port,
            share=args.share,
            quiet=True,
            prevent_thread_lock=True,
            run_history=False,
        )
    except OSError as error:
        raise UserError(f"--port {args.port}: {error}. Without the flag, a free port is found") from error
    if is_public and not args.share:
        print(f"GRADIO_SERVER_NAME={host}: other machines of the network can open this page, too")
    print(f"Open {public or here}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_script(main, parse_args)
