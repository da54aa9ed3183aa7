"""demo.py in a browser. The picture in the README:

DEMO_MODEL=outputs/digits .venv/bin/python -m pytest -m slow tests/scripts/test_demo.py -k browser
"""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from children import ROOT, free_port
from conftest import train
from diffusers import DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler
from fake_hub import FakeHub
from PIL import Image

import demo
import train_conditional
import train_paired
from utils import UserError
from utils.diffusion.few_steps import make_few_step_sampler
from utils.evaluation.sweep import write_scheduler
from utils.publishing.space import Space

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.slow


@pytest.fixture
def serve():
    """Return a function that starts demo.py, or a script of another folder, and returns the address of its page."""
    servers = []

    def start(*command, folder=ROOT, **environment):
        values = {**os.environ, "GRADIO_SERVER_PORT": str(free_port()), **environment}
        command = [sys.executable, *map(str, command)]
        server = subprocess.Popen(command, cwd=folder, env=values, stdout=subprocess.PIPE, text=True)
        servers.append(server)
        for line in server.stdout:
            if line.startswith("Open "):
                return line.split()[1]
        raise AssertionError(f"it ended with {server.wait()}")

    yield start
    for server in servers:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1300, "height": 860})
    page.set_default_timeout(60_000)
    yield page
    page.close()


def drawn(page, before=None):
    """Return the picture, after it has changed from ``before`` and drawing has ended."""
    page.wait_for_function(
        """before => {
            const shown = document.querySelector("#picture img");
            return shown && shown.src !== before && !document.querySelector("#picture .generating");
        }""",
        arg=before,
    )
    page.wait_for_timeout(1500)
    return page.locator("#picture img").get_attribute("src")


def test_a_browser_draws_and_the_picture_changes_with_the_seed(finished_run, serve, page):
    model = os.environ.get("DEMO_MODEL")
    page.goto(serve("demo.py", model or finished_run))
    first = drawn(page)
    page.locator("#nearest img").wait_for()  # the run's folder names its training images
    assert not page.get_by_label("Classes", exact=False).is_visible()
    assert "Seed 0, 25 sampling steps, DPMSolverMultistepScheduler" in page.locator("#how").inner_text()
    if model:
        page.screenshot(path=ROOT / "assets" / "demo.png", full_page=True)
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Draw").click()
    second = drawn(page, first)
    page.get_by_role("button", name="Interpolate").click()
    third = drawn(page, second)
    assert "From seed 7 to seed 1, drawn by dpmsolver++" in page.locator("#how").inner_text()
    page.get_by_label("Guide towards a colour").check()
    page.get_by_label("Seed", exact=True).fill("")  # counts as 0
    page.get_by_role("button", name="Draw").click()
    assert len({first, second, third, drawn(page, third)}) == 4
    page.get_by_label("Seed", exact=True).fill("9223372036854775808")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("is greater than maximum value 9007199254740991").wait_for()


def test_on_a_phone_the_picture_is_above_the_buttons(finished_run, serve, browser):
    page = browser.new_page(viewport={"width": 390, "height": 844}, is_mobile=True)
    page.goto(serve("demo.py", finished_run, GRADIO_SERVER_NAME="0.0.0.0"))
    drawn(page)
    picture, button = (page.locator(name).bounding_box() for name in ("#picture", "button:has-text('Draw')"))
    assert picture["y"] + picture["height"] <= button["y"] < 844
    assert not page.locator("#nearest img").is_visible()  # others can open this page
    page.close()


@pytest.mark.parametrize("kind", ["few steps", "other noise", "of another program"])
def test_models_of_other_kinds_are_drawn(tmp_path, finished_run, serve, page, kind):
    shutil.copytree(finished_run, tmp_path / "run")
    config = DDPMPipeline.from_pretrained(finished_run).scheduler.config
    (tmp_path / "run" / "training_args.json").write_text(
        '{"learning_rate": 1}' if kind == "of another program" else "{}"
    )
    if kind == "few steps":
        sampler = make_few_step_sampler(DDPMScheduler(prediction_type="v_prediction"), 4)
        write_scheduler(tmp_path / "run", sampler, 2)
    elif kind == "other noise":
        write_scheduler(tmp_path / "run", EulerDiscreteScheduler(prediction_type=config.prediction_type), 4)
    page.goto(serve("demo.py", tmp_path / "run"))
    first = drawn(page)
    if kind == "few steps":
        assert page.get_by_label("number input for Sampling steps").get_attribute("max") == "4"
    page.get_by_label("Seed", exact=True).fill("3")
    page.get_by_role("button", name="Draw").click()
    assert drawn(page, first) != first


def test_a_model_with_classes_is_asked_for_them(tmp_path, serve, page):
    # A new UNet predicts zero, so after one step its classes would differ by less than a grey level
    flags = ("--max_train_steps=10", "--learning_rate=1e-2", "--unet=tiny")
    assert train(tmp_path / "run", *flags, script=train_conditional) == 0
    page.goto(serve("demo.py", tmp_path / "run"))
    first = drawn(page)
    page.get_by_label("Classes", exact=False).click()
    page.get_by_role("option", name="7").click()
    page.get_by_role("button", name="Draw").click()
    assert drawn(page, first) != first and not page.get_by_label("Guide towards a colour").is_visible()


@pytest.mark.parametrize("kind", ["lowres:2", "inpaint"])
def test_a_model_with_a_condition_draws_from_a_picture(tmp_path, serve, page, kind):
    flags = ("--max_train_steps=10", "--learning_rate=1e-2", "--unet=tiny", f"--condition={kind}")
    assert train(tmp_path / "run", *flags, script=train_paired) == 0
    page.goto(serve("demo.py", tmp_path / "run"))
    first = drawn(page)  # from the example in the folder
    assert not page.get_by_label("Guide towards a colour").is_visible()
    assert not page.get_by_role("button", name="Interpolate").is_visible()
    if kind == "lowres:2":
        Image.new("L", (6, 4), 200).save(tmp_path / "picture.png")
        page.locator("#given button[aria-label='Clear'], #given button[aria-label='Remove Image']").first.click()
        page.locator("#given input[type=file]").set_input_files(tmp_path / "picture.png")
        page.locator("#given img").wait_for()
        page.wait_for_timeout(1000)
    else:
        page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Draw").click()
    assert drawn(page, first) != first


def test_the_space_draws_with_its_own_files_and_the_model_of_the_hub(tmp_path, finished_run, serve, page):
    space = Space.__new__(Space)  # without the network
    space.folder, space.model = tmp_path, SimpleNamespace(repo_id="me/digits", sent="pushed")
    (tmp_path / "pushed").mkdir()
    shutil.copy(finished_run / "README.md", tmp_path / "pushed")
    space._snapshot()
    hub = FakeHub()
    hub.create("me/digits")
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS):
        hub.files("me/digits")[name] = (finished_run / name).read_bytes()
    network = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")
    page.goto(serve("app.py", folder=tmp_path / "space", **network))
    assert drawn(page) and page.get_by_role("heading", name="digits").is_visible()
    hub.close()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        demo.main(demo.parse_args([str(tmp_path / "nothing")]))
