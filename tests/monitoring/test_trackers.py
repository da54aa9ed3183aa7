"""Trackers of a run: TensorBoard in a browser, Weights & Biases and trackio offline."""

import os
import sqlite3
import subprocess
import sys
import time

import pytest
from children import ROOT, free_port
from conftest import events, interrupt, train

from utils.monitoring.trackers import _options


def test_tensorboard_has_one_run_over_resumes_and_the_flags_that_differ(tmp_path):
    from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

    flags = ["--report_to=tensorboard", "--label_column=label", "--max_train_steps=6"]
    train(tmp_path / "run", *flags)
    interrupt(tmp_path / "run", keep="checkpoint-3")
    train(tmp_path / "run", *flags)
    assert {path.parent for path in (tmp_path / "run").rglob("events.*")} == {tmp_path / "run" / "logs" / "run"}
    data = events(tmp_path / "run")
    content = data.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    given = dict(parse_session_start_info_plugin_data(content).hparams)
    assert given["label_column"].string_value == "label" and given["parameters"].number_value > 1e5
    assert not {"lr_scheduler", "max_grad_norm", "output_dir"} & set(given)  # defaults and private flags are left out
    assert "custom_scalars" in str(data.summary_metadata.values())


def test_trackers_show_a_resumed_run_as_one(tmp_path):
    places = tmp_path / "run", tmp_path / "run" / "logs"
    new, other = (_options(*places, ["wandb"], 0)["wandb"] for _ in range(2))
    resumed = _options(*places, ["wandb"], 3)["wandb"]
    assert resumed["id"] == other["id"] != new["id"] and resumed["resume"] == "allow"
    assert resumed["dir"] == str(tmp_path / "run") and resumed["name"] == "run"


@pytest.mark.slow
def test_tensorboard_in_a_browser(tmp_path, finished_run, browser):
    """The loss is shown first. The pictures, the overlaid curves and the table of metrics are there."""
    port = free_port()
    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={finished_run}", "--host=127.0.0.1"]
    with subprocess.Popen([*command, f"--port={port}"], stderr=subprocess.DEVNULL) as server:
        try:
            page = browser.new_page(viewport={"width": 1600, "height": 1200})
            open_when_there(page, address)
            first = page.locator(".group-title").nth(1)  # after "Pinned"
            assert first.inner_text(timeout=60_000).split()[0] == "loss"
            page.get_by_text("loss/train", exact=True).first.wait_for()
            assert page.get_by_text(f"logs/{finished_run.name}", exact=True).first.is_visible()
            page.screenshot(path=tmp_path / "time_series.png")
            shown = {"images": "step 6", "custom_scalars": "training, by noise level", "hparams": "loss/train"}
            for tab, wanted in shown.items():
                page.goto(f"{address}#{tab}")
                page.reload()
                page.get_by_text(wanted).first.wait_for(timeout=60_000)
            page.goto(f"{address}#images")
            page.reload()
            page.locator("tf-image-loader img").first.wait_for(timeout=60_000)
        finally:
            server.terminate()


def open_when_there(page, address, seconds=60):
    for attempt in range(seconds):
        try:
            return page.goto(address)
        except Exception:  # the server has not started yet
            if attempt == seconds - 1:
                raise
            time.sleep(1)


@pytest.mark.slow
def test_trackio_has_curves_and_pictures_of_one_run_over_resumes(tmp_path):
    pytest.importorskip("trackio")
    command = [sys.executable, "train_ddpm.py", "--dataset_name=digits", "--unet=tiny", "--report_to=trackio"]
    command += ["--max_train_steps=4", "--logging_steps=2", "--checkpointing_steps=2", "--num_samples=4"]
    command += ["--num_inference_steps=1", f"--output_dir={tmp_path / 'run'}"]
    for resumed in (False, True):
        if resumed:
            interrupt(tmp_path / "run", keep="checkpoint-2")
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")})
    with sqlite3.connect(tmp_path / "trackio" / "train_ddpm.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
        configs = database.execute("select * from configs").fetchall()
    (title,) = {name for name, *_ in rows}
    assert title.startswith("run ") and {step for _, step, _ in rows} == {2, 4}
    logged = str([values for *_, values in rows])
    assert "loss/train" in logged and "samples" in logged
    assert len(configs) == 1 and "263025" in str(configs) and str(tmp_path) not in str(configs)
    assert [*(tmp_path / "trackio" / "media").rglob("*.png")]


@pytest.mark.slow
def test_wandb_keeps_all_in_the_output_folder_and_one_run_over_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    flags = ["--report_to=wandb", "--num_samples=4"]
    assert train(tmp_path / "run", *flags) == 0
    interrupt(tmp_path / "run", keep="checkpoint-3")
    assert train(tmp_path / "run", *flags) == 0
    runs = [*(tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({run.name.rpartition("-")[2] for run in runs}) == 1  # two parts with one id
    assert all([*run.rglob("samples_*.png")] for run in runs) and not (tmp_path / "wandb").exists()
