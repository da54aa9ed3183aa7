"""utils/publishing/hub.py and push.py: the real client, and a server with the Hub's protocol."""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import children
import numpy as np
import pytest
import yaml
from conftest import TINY, count_files, interrupt, parse, slow, train
from fake_hub import TOKEN, FakeHub
from PIL import Image
from safetensors.numpy import load

import distill_few_steps
import train_basic
import train_conditional
import train_ddpm
import train_paired
from utils.privacy import basename_if_path, redact
from utils.publishing import hub as publishing_hub
from utils.publishing.hub import PUSH_FAILED, Hub
from utils.publishing.model_card import write_card
from utils.training.checkpoints import file_hash, verify_checkpoint

ROOT = Path(__file__).parents[2]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
PIPELINE = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "training_args.json",
    "unet/config.json",
}
DRAW = """
import sys, numpy, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained(sys.argv[1], use_safetensors=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
numpy.save(sys.argv[2], pipeline(2, generator=generator, num_inference_steps=3, output_type="np").images)
"""


@pytest.fixture(scope="session")
def port_and_home(tmp_path_factory):
    """Return the server's port and the libraries' home, the same for all tests, so that one import is enough."""
    port, home = children.free_port(), tmp_path_factory.mktemp("home")
    children.keep_server(environment(SimpleNamespace(url=f"http://127.0.0.1:{port}", home=home)))
    return port, home


@pytest.fixture
def hub(port_and_home):
    port, home = port_and_home
    shutil.rmtree(home, ignore_errors=True)
    server = FakeHub(port)
    server.home = home
    yield server
    server.close()


def environment(hub):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    ours = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(hub.home)}
    return {**plain, **ours, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "1"}


def run(hub, folder, *flags, script="train_ddpm.py", processes=1, **changes):
    """Train in a child and push, and return exit code and output. A value None in ``changes`` removes a variable."""
    name = Path(script).name
    if name.startswith(("train", "finetune")):
        unet = ["--unet=tiny"] if name.startswith("train_ddpm") else []
        flags = [*TINY, *unet, f"--output_dir={folder}", "--push_to_hub", *flags]
    else:
        flags = [str(folder), *flags]
    values = {**environment(hub), **changes}
    values = {name: value for name, value in values.items() if value is not None}
    code, said = children.run(ROOT / script, *flags, processes=processes, folder=folder.parent, environment=values)
    assert TOKEN not in said
    return code, said


@pytest.fixture
def finished(finished_run, tmp_path):
    """Return a copy of a finished run, for push.py."""
    shutil.copytree(finished_run, tmp_path / "digits")
    return tmp_path / "digits"


def tokens_in(folder):
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_run_is_pushed_and_a_stranger_draws_the_same_pixels(hub, tmp_path):
    folder = tmp_path / "digits"
    flags = ["--report_to=tensorboard", "--sample_steps=3", "--hub_private_repo", "--logging_steps=2"]
    code, said = run(hub, folder, *flags)
    assert code == 0 and said.rstrip().endswith(f"Pushed to {hub.url}/me/digits"), said
    assert hub.repos["me/digits"]["private"] is True
    files = hub.files("me/digits")
    pictures = {"samples.png", "curves.png", "samples/step-000003.png"}
    assert set(files) == PIPELINE | pictures | {WEIGHTS}
    assert files[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert files["samples.png"] == (folder / "samples.png").read_bytes()
    assert (
        "The Hub" not in said
        and "with `push.py --hub_license`" in said
        and "HF_ENDPOINT is set, so the model and your token are sent to" in said
    )
    # No token, and no path of this machine
    assert not tokens_in(tmp_path)
    assert not [path for path, content in files.items() if str(tmp_path).encode() in content]
    assert "output_dir" not in json.loads(files["training_args.json"])["arguments"]
    # Draw with nothing but the id
    results = []
    for name in ("me/digits", str(folder)):
        target = tmp_path / f"{len(results)}.npy"
        shutil.rmtree(hub.home, ignore_errors=True)
        code, said = children.run(DRAW, name, target, folder=tmp_path, environment=environment(hub))
        assert code == 0, said
        results.append(np.load(target))
    assert np.array_equal(*results) and results[0].std() > 0
    # A second push sends nothing
    commits = hub.repos["me/digits"]["commits"]
    hub.requests.clear()
    code, said = run(hub, folder, *flags)
    assert code == 0 and "This run is already finished" in said and "Pushed to" in said, said
    assert hub.repos["me/digits"]["commits"] == commits
    assert not [request for request in hub.requests if request.startswith("PUT") or "/commit/" in request]
    # With facts that only push.py has
    code, said = run(hub, folder, "--hub_license=apache-2.0", "--hub_logs", "--hub_dataset_name=Cats", script="push.py")
    assert code == 0 and "--hub_license" not in said, said
    files = hub.files("me/digits")
    logs = {path for path in files if path.startswith("logs/")}
    assert logs and not any(os.uname().nodename in path for path in logs)
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0" and "# DDPM trained on Cats" in card


def test_the_card(hub, finished, tmp_path):
    weights = hashlib.sha256((finished / WEIGHTS).read_bytes()).hexdigest()[:12]
    row = dict(model="a name", N=300, fd_digits=7.5, fd_digits_error=0.1, recall=0.9, sampler="DDIM", steps=20)
    rows = [{"model": "floor", "N": 300, "fd_digits": 0.5}, {**row, "weights": weights}]
    results = {"reference": "digits", "reference_split": "train", "results": rows}
    (tmp_path / "results.json").write_text(json.dumps(results))
    code, said = run(hub, finished, f"--evaluation={tmp_path}/results.json", script="push.py")
    assert code == 0, said
    card = hub.files("me/digits")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "diffusers" and metadata["license"] == "unknown"
    assert "with `push.py --hub_license`" in said
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    metrics = metadata["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"fd_digits": 7.5, "recall": 0.9}
    assert metrics[0]["name"] == "fd_digits, sampler DDIM, steps 20, N 300"
    for part in (
        "from_pretrained('me/digits')",
        "## Intended use and limits",
        "data\\_license | CC BY 4.0",
        "torch 2.13",
        "# DDPM trained on scikit-learn's digits",
        "| DDIM | 20 | 300 | 7.5 | 0.9 |",
        "](https://arxiv.org/abs/2006.11239)",
    ):
        assert part in card, card
    assert "![samples](samples.png)" in card and "![curves](curves.png)" in card
    assert "## People" not in card  # digits
    code, said = run(hub, finished, f"--evaluation={tmp_path}/results.json", "--hub_license=mit", script="push.py")
    assert code == 0 and "with `push.py --hub_license`" not in said, said
    again = hub.files("me/digits")["README.md"].decode()
    assert yaml.safe_load(again.split("---")[1])["license"] == "mit" and again.count("## Evaluation") == 1
    snippet = card.split("```python\n")[1].split("```")[0]
    place = tmp_path / "stranger"
    place.mkdir()
    code, said = children.run(snippet, folder=place, environment=environment(hub))
    assert code == 0, said
    assert Image.open(place / "sample.png").size == (8, 8)


@pytest.mark.parametrize("name", ['it\'s "custom_pipeline"', "DiffusionPipeline.from_pretrained, trust_remote_code"])
def test_the_snippet_runs_whatever_the_folder_is_called(finished, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "outputs" / name)
    write_card(tmp_path / "outputs" / name, tmp_path / "outputs" / name)
    code = (tmp_path / "outputs" / name / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert f"{'outputs/' + name!r}" in code
    exec(code, {})
    assert (tmp_path / "sample.png").is_file()


def test_the_first_stages_push_their_code(hub, tmp_path):
    code, said = run(hub, tmp_path / "basic", "--hub_model_id=me/first", script="train_basic.py")
    assert code == 0, said
    code_files = {"linear_mix.py", "unet/basic_unet.py", "scheduler/linear_mix.py", "walk.png", "samples.png"}
    assert set(hub.files("me/first")) == PIPELINE | code_files | {WEIGHTS}  # denoising.png shows training images


@pytest.mark.slow
def test_a_conditional_model_pushes_its_file_and_the_card_loads_both_ways(hub, tmp_path):
    flags = ["--hub_model_id=me/classes", "--max_train_steps=1", "--unet=tiny"]
    code, said = run(hub, tmp_path / "classes", *flags, script="train_conditional.py")
    assert code == 0, said
    files = hub.files("me/classes")
    assert set(files) == PIPELINE | {"pipeline.py", "samples.png", WEIGHTS}
    card = files["README.md"].decode()
    assert "ConsistencyModelPipeline.from_pretrained('me/classes')" in card
    assert "DiffusionPipeline.from_pretrained('me/classes', custom_pipeline='me/classes', trust" in card


def test_two_processes_push_once(hub, tmp_path):
    code, said = run(hub, tmp_path / "two", "--max_train_steps=2", processes=2)
    assert code == 0 and said.count("Pushed to http") == 1, said
    assert hub.requests.count("POST /api/repos/create") == 2  # the check, and the push


def test_a_space_is_pushed_with_the_code_that_it_runs(hub, finished):
    code, said = run(hub, finished, "--space", "--hub_private_repo", "--hub_license=mit", script="push.py")
    assert code == 0 and f"Pushed to {hub.url}/spaces/me/digits" in said, said
    assert hub.repos["space.me/digits"]["private"] is True
    files = hub.files("space.me/digits")
    code_files = {str(path.relative_to(ROOT)) for path in [ROOT / "demo.py", *ROOT.glob("utils/**/*.py")]}
    assert set(files) == code_files | {"README.md", "app.py", "requirements.txt"}
    metadata = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert metadata["sdk"] == "gradio" and metadata["app_file"] == "app.py" and metadata["models"] == ["me/digits"]
    assert metadata["license"] == "mit" and f"gradio=={metadata['sdk_version']}" in files["requirements.txt"].decode()
    assert "main(parse_args(['me/digits']))" in files["app.py"].decode()
    # The Space has another name, and is private because the model is. The command that sends it again has both names
    hub.fail("models/space.me/demo/commit", 500)
    again = ["--hub_model_id=me/digits", "--space=me/demo", "--hub_timeout=4"]
    code, said = run(hub, finished, *again, script="push.py")
    assert code == PUSH_FAILED and "--hub_model_id me/digits --space me/demo" in said, said
    assert hub.repos["space.me/demo"]["private"] is True and "me/demo" not in hub.repos
    code, said = run(hub, finished, *again, "--hub_revision=draft", script="push.py")
    assert code == 1 and "leave --hub_revision out" in said, said


@pytest.mark.slow
def test_a_branch(hub, finished):
    code, said = run(hub, finished, "--hub_model_id=me/x", "--hub_revision=draft", script="push.py")
    assert code == 0, said
    assert hub.files("me/x") == {} and WEIGHTS in hub.files("me/x", "draft")


def test_only_what_is_allowed_is_pushed(hub, finished, tmp_path):
    """Protection: ``ALLOWED`` and ``is_symlink`` in ``utils/publishing/hub.py``."""
    (tmp_path / "secret").write_text("my diary")
    (finished / "samples" / "linked.png").symlink_to(tmp_path / "secret")
    (finished / "scheduler" / "old").mkdir()
    for name in (".env", "notes.txt", "nearest.png", "denoising.png", "unet/optimizer.bin", "scheduler/old/x.py"):
        (finished / name).write_text("private")
    (finished / "best").mkdir()
    code, said = run(hub, finished, script="push.py")
    assert code == 0 and "linked.png is not pushed, because it is a link" in said, said
    assert not {b"my diary", b"private"} & set(hub.files("me/digits").values())
    assert not [path for path in hub.files("me/digits") if path.startswith(("checkpoint", "logs", "best", "hub", "."))]
    (finished / "unet").rename(tmp_path / "unet")
    (finished / "unet").symlink_to(tmp_path / "unet")
    code, said = run(hub, finished, "--hub_model_id=me/second", script="push.py")
    assert code == PUSH_FAILED and "in a linked folder. Only files are pushed" in said, said
    assert hub.files("me/second") == {}


# ------------------------------------------------------------------------------------------------------------ faults

REFUSED = [
    ("auth-check", 403, "The token may not write to me/digits"),
    slow("whoami", 401, "Run `hf auth login`, or set HF_TOKEN"),
    slow("create", 403, "The token may not write to me/digits"),
    slow("auth-check", 404, "me/digits does not exist, or this token may not read it"),
]


@pytest.mark.parametrize("where, status, message", REFUSED)
def test_what_cannot_work_is_reported_before_training(hub, tmp_path, where, status, message):
    """Protection: ``Hub.check``."""
    hub.fail(where, status)
    began = time.monotonic()
    code, said = run(hub, tmp_path / "digits", "--max_train_steps=100000")
    assert code == 1 and message in said, said
    assert time.monotonic() - began < 30 and not list((tmp_path / "digits").glob("checkpoint-*"))


@pytest.mark.slow
def test_no_login_is_reported_before_training(hub, tmp_path):
    code, said = run(hub, tmp_path / "digits", HF_TOKEN=None)
    assert code == 1 and "you are not logged in" in said, said


def test_a_public_repository_is_not_taken_for_a_private_one(hub, tmp_path):
    hub.create("me/digits", private=False)
    code, said = run(hub, tmp_path / "digits", "--hub_private_repo")
    assert code == 1 and "me/digits exists and is public" in said, said


def test_a_model_of_own_images_is_private_unless_the_user_asks(hub, tmp_path):
    images = tmp_path / "patients"
    for name in ("anna", "bernd"):
        (images / name).mkdir(parents=True)
        for k in range(8):
            Image.new("L", (8, 8), 30 * k).save(images / name / f"{k}.png")
    code, said = run(hub, tmp_path / "own", f"--dataset_name={images}")
    assert code == 0 and hub.repos["me/own"]["private"], said
    assert "fingerprint" not in json.loads(hub.files("me/own")["training_args.json"])
    hub.create("me/there", private=False)
    code, said = run(hub, tmp_path / "own", "--hub_model_id=there", script="push.py")
    assert code == 1 and "the training images (own images) are not public" in said, said
    assert "give --no-hub_private_repo" in said
    code, said = run(hub, tmp_path / "own", "--hub_model_id=there", "--no-hub_private_repo", script="push.py")
    assert code == 0 and "model_index.json" in hub.files("me/there"), said


def test_pushing_runs_no_code_of_the_folder(hub, tmp_path):
    """Someone else may have written the folder."""
    assert train(tmp_path / "basic", script=train_basic) == 0
    with open(tmp_path / "basic" / "pipeline.py", "a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    code, said = run(hub, tmp_path / "basic", script="push.py")
    assert code == 0 and not (tmp_path / "ran").exists(), said
    assert "trust_remote_code=True" in hub.files("me/basic")["README.md"].decode()
    path = tmp_path / "basic" / "training_args.json"
    record = json.loads(path.read_text())
    record["image_shape"] = ["1", "8", f"8) + print(open({str(tmp_path / 'ran')!r}, 'w'))"]
    path.write_text(json.dumps(record))
    code, said = run(hub, tmp_path / "basic", script="push.py")
    assert code == PUSH_FAILED and "invalid literal for int()" in said and not (tmp_path / "ran").exists(), said


def test_faces_are_named_but_their_pictures_are_not_public():
    assert publishing_hub._is_public("digits") and not publishing_hub._is_public("faces")
    assert publishing_hub._is_public("faces", gated=True)


def test_what_looks_like_a_password_is_hidden():
    given = {"HF_TOKEN": "x", "SMTP": {"password": "y", "port": 25}, "NOTE": "hf_" + "a" * 20, "TOKENS": [7]}
    assert redact(given) == {
        "HF_TOKEN": "hidden",
        "SMTP": {"password": "hidden", "port": 25},
        "NOTE": "hidden",
        "TOKENS": "hidden",
    }
    assert redact({"MONKEY": 1, "KEYS": [2], "lr_scheduler": "linear"}) == {
        "MONKEY": 1,
        "KEYS": [2],
        "lr_scheduler": "linear",
    }


FAULTS = [  # where, what, how often; whether the push succeeds
    slow("/commit/", 503, 1, True),
    ("/commit/", (429, {"Retry-After": "2"}), 1, True),
    slow("/commit/", 409, 1, True),
    slow("/commit/", 412, 1, True),
    slow("/commit/", "drop", 1, True),
    slow("repos/create", (503, {}), 3, True),
    slow("repos/create", "drop", 2, True),
    slow("PUT /lfs", 500, 2, True),
    ("/commit/", 500, 10**6, False),
    slow("/commit/", 413, 10**6, False),
    slow("/commit/", 403, 10**6, False),
    slow("preupload", 403, 10**6, False),
    slow("PUT /lfs", 403, 10**6, False),
    slow("/commit/", "hang", 10**6, False),
    slow(".", 503, 10**6, False),
    slow(".", "drop", 10**6, False),
]


@pytest.mark.parametrize("where, action, times, succeeds", FAULTS)
def test_a_fault_never_costs_the_model(hub, finished, where, action, times, succeeds):
    """Protection: ``_retry``, ``_with_timeout`` and the thread in ``Hub.push``."""
    before = count_files(finished / "checkpoint-6")
    hub.fail(where, action, times)
    began = time.monotonic()
    patience = 8 if succeeds else 4
    code, said = run(hub, finished, f"--hub_timeout={patience}", "--hub_model_id=me/digits", script="push.py")
    assert time.monotonic() - began < 100
    assert count_files(finished / "checkpoint-6") == before
    if succeeds:
        assert code == 0 and "Pushed to" in said, said
    else:
        assert code == PUSH_FAILED and "Not pushed: " in said and "Traceback" not in said, said
        command = said.rstrip().splitlines()[-1].strip()
        assert (
            command
            == f"python {os.path.relpath(ROOT / 'push.py', finished.parent)} {finished} --hub_model_id me/digits"
        )
        hub.faults.clear()
        sent = [request for request in hub.requests if request.startswith("PUT /lfs")]
        code, said = run(hub, finished, *command.split()[3:], script="push.py")
        assert code == 0, said
        if where == "/commit/" and action != "hang":  # the weights had arrived, so they are not sent again
            assert len([request for request in hub.requests if request.startswith("PUT /lfs")]) == len(sent)
    assert load(hub.files("me/digits")[WEIGHTS]).keys()
    assert hub.files("me/digits")[WEIGHTS] == (finished / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_without_a_network_training_continues(hub, tmp_path):
    code, said = run(hub, tmp_path / "run", HF_HUB_OFFLINE="1")
    assert code == PUSH_FAILED and "The Hub cannot be reached now" in said and "HF_HUB_OFFLINE is set" in said, said
    assert "Finished, after 6 optimizer steps" in said and "Not pushed" in said
    verify_checkpoint(tmp_path / "run" / "checkpoint-6")
    code, said = run(hub, tmp_path / "run", script="push.py")
    assert code == 0 and WEIGHTS in hub.files("me/run"), said


def test_what_cannot_be_copied_is_reported(hub, tmp_path):
    """Protection: ``except Exception`` in ``Hub._send``."""
    driver = tmp_path / "train_ddpm_driver.py"
    driver.write_text(
        f"import sys, pathlib; sys.path.insert(0, {str(ROOT)!r})\nimport train_ddpm, utils.publishing.hub\n"
        "from utils.exits import run_script\n"
        "def copyfile(*paths):\n    raise OSError(28, 'No space left on device')\n"
        "utils.publishing.hub.shutil.copyfile = copyfile\nrun_script(train_ddpm.main, train_ddpm.parse_args)\n"
    )
    code, said = run(hub, tmp_path / "run", script=str(driver))
    assert code == PUSH_FAILED and "Not pushed: OSError: [Errno 28]" in said and "Finished, after 6" in said, said
    verify_checkpoint(tmp_path / "run" / "checkpoint-6")


def test_ctrl_c_while_pushing(hub, finished, tmp_path):
    hub.fail("preupload", "hang")
    options = dict(log=tmp_path / "log", environment=environment(hub))
    process = children.start(ROOT / "push.py", finished, "--hub_timeout=100", **options)
    deadline = time.monotonic() + 60
    while not any("preupload" in request for request in hub.requests):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    code, said = children.finish(process, 30)
    assert code == PUSH_FAILED and "stopped by a signal" in said and "python push.py" in said


# --------------------------------------------------------------------------------------------------- without a server


@pytest.mark.parametrize("script", [train_basic, train_ddpm, train_conditional, train_paired, distill_few_steps])
def test_flags_of_the_hub_need_a_push(capsys, script):
    start = ["--pretrained_model_name_or_path=x"] * (script is distill_few_steps)
    for flag in ("--hub_model_id=x", "--hub_private_repo"):
        with pytest.raises(SystemExit):
            parse(flag, *start, script=script)
        assert "needs --push_to_hub" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--hub_token=x", *start, script=script)  # such a flag would show the token in logs


def test_paths_are_cut_down_to_their_names(tmp_path):
    assert basename_if_path(f"--train_data_dir={tmp_path}/faces") == "--train_data_dir=faces"
    assert basename_if_path(str(tmp_path)) == tmp_path.name and basename_if_path("~/x/y") == "y"
    for kept in ("google/ddpm-celebahq-256", "train[:90%]", "--learning_rate=1e-3", 0.5, None, ["a"], "--use_ema"):
        assert basename_if_path(kept) == kept
    assert basename_if_path(f"dinov2={tmp_path}") == f"dinov2={tmp_path.name}"
    assert basename_if_path(f"--features=dinov2={tmp_path}") == f"--features=dinov2={tmp_path.name}"
    nested = {"MASKS": [str(tmp_path), {f"{tmp_path}/b": f"data-dir={tmp_path}/a"}, 3], "LONG": "a/" + 300 * "b"}
    assert redact(nested) == {"MASKS": [tmp_path.name, {"b": "data-dir=a"}, 3], "LONG": "a/" + 300 * "b"}
    for flag in ("train_data_dir", "condition_dir"):
        assert redact({flag: "/data/patients_smith"}) == {flag: "own images"}


@pytest.mark.parametrize("public", [True, False])
def test_the_name_of_a_data_set_that_is_not_public_stays_here(finished, tmp_path, monkeypatch, caplog, public):
    record = json.loads((finished / "training_args.json").read_text())
    record["arguments"]["dataset_name"] = record["public_arguments"]["dataset_name"] = "me/patients"
    record |= {"public_data": "me/patients", "data": "me/patients"}
    record["card"]["reproduce"] += " --dataset_name me/patients --x me/patients-net"
    (finished / "training_args.json").write_text(json.dumps(record))
    monkeypatch.setattr(publishing_hub, "_is_public", lambda name, gated: public)
    (tmp_path / "sent").mkdir()
    row = {"model": "run", "weights": file_hash(finished / WEIGHTS)[:12], "N": 10, "fd_digits": 1.0}
    evaluation = {"public_reference": "me/more-patients", "reference_split": "train", "results": [row]}
    Hub(finished, "me/model", logs=True, evaluation=evaluation)._fill(tmp_path / "sent")
    for name in ("README.md", "training_args.json"):
        text = (tmp_path / "sent" / name).read_text()
        assert "me/patients-net" in text
        assert bool(re.search(r"me/(more-)?patients\b(?!-)", text)) is public, name
    assert ("me/patients is not public on the Hub" in caplog.text) is not public


@pytest.mark.parametrize("kind", ["nowhere", "a checkpoint", "a wrong evaluation"])
def test_push_refuses_what_it_cannot_push(hub, finished, tmp_path, kind):
    flags, folder = [], finished
    if kind == "nowhere":
        folder, expected = tmp_path / "nowhere", "is not a folder with a model"
    elif kind == "a checkpoint":
        folder, expected = finished / "checkpoint-6", "is a checkpoint. Give the run's folder"
    else:
        (tmp_path / "results.json").write_text('{"results": [{"model": "digits", "weights": "other"}]}')
        flags, expected = [f"--evaluation={tmp_path}/results.json"], "none of its rows is about the weights in"
    code, said = run(hub, folder, *flags, script="push.py")
    assert code == 1 and expected in said and not hub.repos, said


@pytest.mark.slow
def test_a_resumed_run_pushes_its_new_weights(hub, tmp_path):
    code, said = run(hub, tmp_path / "run", "--lr_scheduler=constant")
    assert code == 0, said
    before = hub.files("me/run")[WEIGHTS]
    interrupt(tmp_path / "run", "checkpoint-3")
    code, said = run(hub, tmp_path / "run", "--lr_scheduler=constant", "--max_train_steps=9")
    assert code == 0 and "3 optimizer steps done" in said and "Pushed to" in said, said
    assert hub.files("me/run")[WEIGHTS] == (tmp_path / "run" / WEIGHTS).read_bytes() != before


def test_a_push_later_goes_where_the_run_was_to_go(hub, tmp_path):
    """Protection: ``recorded`` in push.py. A private model must not be published by a shorter command."""
    hub.fail("/commit/", 413, 1)
    code, said = run(hub, tmp_path / "run", "--hub_model_id=me/faces", "--hub_private_repo")
    assert code == PUSH_FAILED, said
    hub.repos.clear()
    code, said = run(hub, tmp_path / "run", script="push.py")
    assert code == 0 and list(hub.repos) == ["me/faces"] and hub.repos["me/faces"]["private"], said
