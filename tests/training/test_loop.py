"""utils/training/loop.py: the actions of a step are done however the run ends, and nothing is left behind."""

import ast
import json
import math
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import children
import filelock
import pytest
import torch
from conftest import equal_weights, exit_code, parse, reset_accelerate, scalars, slow, tiny, train
from PIL import Image
from safetensors.torch import load_file

import distill_few_steps
import finetune_faces
import train_autoencoder
import train_basic
import train_conditional
import train_ddpm
import train_flow
import train_latent
import train_paired
import train_unet2d
from utils import UserError, signals
from utils.evaluation import while_training
from utils.resilience.watchdog import Watchdog
from utils.saved import net_folder
from utils.signals import STOP_SIGNALS, StopSignal
from utils.training.loop import Run
from utils.training.losses import RecentLosses
from utils.training.output_dir import check_settings

ROOT = Path(train_ddpm.__file__).parent
FILE = "diffusion_pytorch_model.safetensors"
WEIGHTS = f"unet/{FILE}"
SCRIPTS = [
    train_basic, train_unet2d, train_ddpm, train_flow, train_paired, train_conditional, finetune_faces,
    distill_few_steps, train_autoencoder, train_latent,
]  # fmt: skip
EVERYTHING = [  # all repeated actions coincide with the checkpoints, as by default
    "--report_to=tensorboard", "--checkpointing_steps=2", "--sample_steps=2", "--evaluate_steps=2",
    "--num_evaluation_samples=10", "--features=pixels", "--dataset_split=train[:64]", "--checkpoints_total_limit=9",
    "--gradient_accumulation_steps=2", "--random_flip",
]  # fmt: skip
VALIDATION = ["--validation_split=train[64:96]", "--validation_steps=2"]
PLACES = {  # points at which a run is killed, in the order of the actions of a step
    "validation": (while_training.Validation, "measure"),
    "evaluation": (while_training.SampleQuality, "measure"),
    "samples": (Run, "_save_samples"),
}


class Killed(BaseException):
    """Exception that is not caught, like a kill."""


def flags_of(script, needs):
    size = 4 if script is distill_few_steps else 2  # whole trajectories
    return [
        *EVERYTHING,
        f"--train_batch_size={size}",
        *needs(script),
        *(VALIDATION if script is not distill_few_steps else []),
    ]


def curves(folder):
    """Return all curves except those of the machine."""
    names = ("loss/train", "loss/validation_held_out", "metrics/fd_pixels_N10", "loss_by_timestep/0-249")
    names += ("metrics/psnr_held_out",)
    found = {}
    for name in names:
        try:
            found[name] = scalars(folder, name)
        except KeyError:
            found[name] = None
    return found


@pytest.mark.parametrize(
    "script",
    [train_ddpm, distill_few_steps, *(slow(s) for s in SCRIPTS if s not in (train_ddpm, distill_few_steps))],
    ids=lambda script: script.__name__,
)
def test_what_is_due_at_a_step_is_done_although_the_run_is_killed_before(tmp_path, monkeypatch, needs, script):
    """Kill the run in validation at step 2, in sampling at step 4 and in the evaluation of step 6, the last one."""
    monkeypatch.setattr(while_training, "NUM_VALIDATION_IMAGES", 4)
    if hasattr(script, "DROPOUT"):
        monkeypatch.setattr(script, "DROPOUT", 0.3)
    monkeypatch.setitem(train_unet2d.UNET, "dropout", 0.3)
    flags = flags_of(script, needs)
    assert train(tmp_path / "straight", *flags, script=script) == 0
    kills = [("validation", 2), ("samples", 4), ("evaluation", 6)]
    for place, step in kills if script is not distill_few_steps else kills[1:]:
        owner, name = PLACES[place]
        original = getattr(owner, name)

        def dies(self, *arguments, original=original, step=step):
            if (getattr(self, "run", self)).global_step == step:
                raise Killed
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dies)
            with pytest.raises(Killed):
                train(tmp_path / "run", *flags, script=script)
        assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    assert train(tmp_path / "run", *flags, script=script) == 0
    assert curves(tmp_path / "run") == curves(tmp_path / "straight")
    for path in ("samples/step-000002.png", "samples/step-000004.png", "samples.png", "evaluation.json"):
        assert (tmp_path / "run" / path).read_bytes() == (tmp_path / "straight" / path).read_bytes(), path
    for path in (".", "best"):
        assert equal_weights(*(net_folder(tmp_path / name / path) / FILE for name in ("run", "straight")))
    state = "checkpoint-6/training_state"
    assert equal_weights(*(tmp_path / name / state / "model.safetensors" for name in ("run", "straight")))
    first, second = (
        torch.load(tmp_path / name / state / "optimizer.bin", weights_only=True) for name in ("run", "straight")
    )
    for key, values in first["state"].items():
        assert all(torch.equal(value, second["state"][key][part]) for part, value in values.items())
    assert json.loads((tmp_path / "run" / "done.json").read_text())["evaluation"] == 6


KILL = """
import os, signal
from utils.evaluation import while_training
from utils.training.loop import Run
owner, name = {place}
original = getattr(owner, name)
def dies(self, *arguments):
    if getattr(self, "run", self).global_step == {step}:
        os.kill(os.getpid(), signal.{number})
    return original(self, *arguments)
setattr(owner, name, dies)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM"])
@pytest.mark.parametrize("place, step", [("evaluation", 6), ("validation", 2), ("samples", 4)])
def test_a_real_kill_and_a_polite_one_lose_nothing_that_is_due(tmp_path, place, step, number):
    flags = tiny(*EVERYTHING, *VALIDATION, "--unet=tiny", "--train_batch_size=2")
    owner = {"validation": "while_training.Validation, 'measure'", "samples": "Run, '_save_samples'"}
    patch = KILL.format(place=owner.get(place, "while_training.SampleQuality, 'measure'"), step=step, number=number)
    code, said = children.run(children.patched(patch), *flags, f"--output_dir={tmp_path / 'run'}", folder=tmp_path)
    assert code == {"SIGKILL": -9, "SIGTERM": 143}[number], said
    assert f"Stopped by SIGTERM after {step} of 6" in said or number == "SIGKILL"
    for folder in ("run", "straight"):
        code, said = children.run(children.patched(""), *flags, f"--output_dir={tmp_path / folder}", folder=tmp_path)
        assert code == 0, said
    assert curves(tmp_path / "run") == curves(tmp_path / "straight")
    assert len([*(tmp_path / "run" / "samples").glob("*.png")]) == 2
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == (
        tmp_path / "straight" / "evaluation.json"
    ).read_bytes()


@pytest.mark.parametrize("flags", [[], slow(["--gradient_accumulation_steps=2", "--train_batch_size=4"])])
def test_the_point_after_a_stop_is_that_of_a_run_without_one(tmp_path, monkeypatch, flags):
    """A point of the curves is a mean over all steps since the last point, including those before the stop."""
    flags = [*flags, "--report_to=tensorboard", "--logging_steps=4", "--max_train_steps=8", "--label_column=label"]
    assert train(tmp_path / "straight", *flags) == 0
    original = StopSignal.check
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "check", lambda self, step=0: signal.SIGTERM if step == 6 else original(self, step))
        assert train(tmp_path / "run", *flags) == 143
    assert train(tmp_path / "run", *flags) == 0
    for name in ("loss/train", "optimizer/grad_norm", "loss_by_timestep/500-749", "loss_per_label/3"):
        points = scalars(tmp_path / "run", name)
        assert list(points) in ([4, 8], [8]) and points == scalars(tmp_path / "straight", name), name


def edited(*pairs):
    """Return a module like train_ddpm.py, with pieces of its text replaced."""
    text = (ROOT / "train_ddpm.py").read_text()
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    names = {"__name__": "edited", "__file__": str(ROOT / "train_ddpm.py")}
    exec(compile(ast.parse(text), "edited", "exec"), names)
    return names


def run_edited(names, folder, *flags):
    reset_accelerate()
    return names["main"](parse("--output_dir", folder, *flags))


@pytest.mark.parametrize(
    "images, epochs, steps, expected", [(1000, 3, None, 30), (1001, 3, None, 31), (None, 3, 7, 7), (1000, 3, 7, 7)]
)
def test_the_length_of_a_run(images, epochs, steps, expected):
    run = object.__new__(Run)
    run.args, run._finished_at = SimpleNamespace(num_train_epochs=epochs, max_train_steps=steps), None
    assert not run.already_finished(SimpleNamespace(length=images, global_batch_size=100))
    assert run.max_train_steps == expected


UPDATE = "            ema_model.step(unet.parameters())\n"
BATCH = '        clean_images = batch["images"]  # (B, C, H, W) in [-1, 1], float32\n'


def nothing_is_left(folder, handlers):
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers
    watching = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    for thread in watching:
        thread.join(5)
    assert not any(thread.is_alive() for thread in watching)
    with filelock.FileLock(folder / ".lock", timeout=0):
        pass


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        (
            "run.end_of_step(losses,",
            "run.end_of_step(loss,",
            ValueError,
            r"losses of shape \(\) for timesteps of shape",
        ),
        (
            "timesteps, grad_norm,",
            "timesteps, None,",
            ValueError,
            "grad_norm is missing. Expected the result of accelerator.clip_grad",
        ),
        (
            BATCH,
            BATCH + "        break\n",
            UserError,
            "ended the loop before the first optimizer step, so nothing is saved",
        ),
    ],
)
def test_a_loop_that_breaks_the_agreement_is_told_so(tmp_path, old, new, error, message):
    with pytest.raises(error, match=message):
        run_edited(edited((old, new)), tmp_path / "run")
    nothing_is_left(tmp_path / "run", {number: signal.getsignal(number) for number in STOP_SIGNALS})


def test_steps_of_ones_own_come_once_for_each_optimizer_step(tmp_path):
    call = "        if run.every(2):\n            seen.append(run.global_step)\n"
    names = edited((UPDATE, UPDATE + call))  # at the end of the loop, with or without an optimizer step
    names["seen"] = []
    run_edited(names, tmp_path / "run", "--gradient_accumulation_steps=2", "--max_train_steps=4")
    assert names["seen"] == [2, 4]


def test_a_pause_within_a_pause_counts_once():
    run = object.__new__(Run)
    run.tell, run._logged_at, run.args = lambda event: [], time.perf_counter(), SimpleNamespace()
    before = run._logged_at
    with run.untimed(), run.untimed():
        time.sleep(0.2)
    assert 0.2 <= run._logged_at - before <= time.perf_counter() - before


def test_a_break_ends_a_run_as_its_last_step_does(tmp_path, capsys):
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    names = edited((UPDATE, UPDATE + "            if run.global_step == 4:\n                break\n"))
    flags = ["--checkpointing_steps=3", "--evaluate_steps=3", "--num_evaluation_samples=10", "--features=pixels"]
    run_edited(names, tmp_path / "run", *flags)
    assert "ended the loop of 6 steps, after 4 optimizer steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint-4").is_dir() and (tmp_path / "run" / "samples.png").is_file()
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["step"] == 4
    nothing_is_left(tmp_path / "run", handlers)
    assert train(tmp_path / "four", *flags, "--max_train_steps=4", "--lr_scheduler=linear") == 0
    run_edited(names, tmp_path / "run", *flags)
    assert "This run is already finished, after 4 optimizer steps" in capsys.readouterr().out


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_and_an_interrupt_leave_nothing_behind(tmp_path, error):
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    names = edited((UPDATE, UPDATE + f"            if run.global_step == 4:\n                raise {error.__name__}\n"))
    with pytest.raises(error):
        run_edited(names, tmp_path / "run", "--hang_timeout=20")
    nothing_is_left(tmp_path / "run", handlers)
    assert train(tmp_path / "run") == 0


def test_what_fails_after_a_signal_is_a_stop(tmp_path, capsys):
    """A signal to a process group also ends a compiler's helpers, and code that waits for them fails first."""
    body = "if run.global_step == 4:\n                run.stop_signal.received = 15\n                raise RuntimeError"
    names = edited((UPDATE, UPDATE + f"            {body}\n"))
    assert exit_code(names["main"], names["parse_args"](tiny("--output_dir", tmp_path / "run"))) == 143
    assert "Stopped by SIGTERM after 4 optimizer steps, but a RuntimeError" in capsys.readouterr().err
    assert train(tmp_path / "run") == 0


def test_a_run_shorter_than_the_distance_of_points_has_one(tmp_path):
    assert train(tmp_path / "run", "--report_to=tensorboard", "--logging_steps=50") == 0
    assert list(scalars(tmp_path / "run", "loss/train")) == [6] and (tmp_path / "run" / "curves.png").is_file()


def test_a_refused_run_leaves_the_folder_to_others(tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(tmp_path / "run", "--seed=1")
    with filelock.FileLock(tmp_path / "run" / ".lock", timeout=0, is_singleton=False):
        pass


def test_a_run_without_a_checkpoint_starts_afresh_with_other_settings(tmp_path, capsys):
    with pytest.raises(UserError, match="start a new run with a lower --learning_rate"):
        train(tmp_path / "run", "--learning_rate=1e30", "--max_rollbacks=1", "--max_grad_norm=0")
    assert (tmp_path / "run" / "rollbacks.json").is_file()
    assert train(tmp_path / "run", "--learning_rate=1e-4") == 0
    assert "starts from scratch, because learning_rate was 1e+30, is 0.0001" in capsys.readouterr().err
    assert not (tmp_path / "run" / "rollbacks.json").exists()
    assert train(tmp_path / "straight", "--learning_rate=1e-4") == 0
    assert equal_weights(tmp_path / "run" / WEIGHTS, tmp_path / "straight" / WEIGHTS)
    with pytest.raises(UserError, match=r"learning_rate was 0\.0001, is 0\.1"):
        train(tmp_path / "run", "--learning_rate=0.1")


@pytest.mark.parametrize(
    "size, processes, advice",
    [
        (4, 2, "with 2 processes, --train_batch_size 2 --gradient_accumulation_steps 1 makes it 4"),
        (24, 2, "with 2 processes, --train_batch_size 4 --gradient_accumulation_steps 3 makes it 24"),
        (4, 3, "by 3 processes, which cannot share 4 evenly"),
    ],
)
def test_another_number_of_processes_is_told_the_flags_that_fit(size, processes, advice):
    new = {"train_batch_size": 4, "gradient_accumulation_steps": 1, "global_batch_size": 4 * processes}
    with pytest.raises(UserError, match=advice):
        check_settings("the folder", {"global_batch_size": size}, new, {})


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_that_fp16_skips_moves_neither_rate_nor_average(tmp_path, monkeypatch, optimizer):
    """With the scaler of a GPU, on a CPU: the gradient of one step and the loss of another overflow."""
    original = Run.__init__

    def init(run, *arguments, **options):
        original(run, *arguments, **options)
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")

    monkeypatch.setattr(Run, "__init__", init)
    backward, end = "            accelerator.backward(loss)\n", "    run.finish()\n"
    overflow = "            loss = loss * {2: math.inf, 4: math.nan}.get(run.global_step, 1)\n"
    seen = "    seen.update(rate=lr_scheduler.scheduler.last_epoch, average=ema_model.optimization_step)\n"
    names = edited((backward, overflow + backward), (end, seen + end))
    names.update(seen={}, math=math)
    run_edited(names, tmp_path / "run", "--max_train_steps=6", f"--optimizer={optimizer}")
    assert names["seen"] == {"rate": 4, "average": 4}
    assert all(torch.isfinite(weight).all() for weight in load_file(tmp_path / "run" / WEIGHTS).values())


def test_a_finished_model_without_checkpoints_is_not_trained_again(tmp_path):
    train(tmp_path / "run", "--max_train_steps=2")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for more in (["--max_train_steps=4"], ["--max_train_steps=2", "--num_samples=2"]):
        with pytest.raises(UserError, match=r"holds a finished model, but no checkpoint .* use sample\.py"):
            train(tmp_path / "run", *more)
    assert before == {path: path.read_bytes() for path in before}


def test_losses_that_overflow_again_and_again_end_a_run_of_fp16():
    fake = SimpleNamespace(mixed_precision="fp16", reduce=lambda values, how: values)
    recent = RecentLosses(fake)
    for _ in range(11):
        recent.add(torch.full((4,), math.inf))
        recent.step(torch.tensor(math.nan))
    assert [fine for *_, fine in recent.unseen(11)] == [True] * 9 + [False] * 2


def test_compiling_may_take_longer(monkeypatch):
    monkeypatch.setattr(signals, "compiling", 1)
    ended = []
    monkeypatch.setattr(Watchdog, "_abort", lambda self: (ended.append(time.monotonic()), self.end()))
    dog = Watchdog(SimpleNamespace(process_index=0, num_processes=1), 0.2)
    dog.heartbeat(1)
    time.sleep(0.6)
    assert not ended
    signals.compiling = 0
    time.sleep(0.5)
    dog.end()
    assert len(ended) == 1


def test_every_so_many_steps_of_ones_own_come_before_the_checkpoint(tmp_path):
    """Therefore a run that is killed in between repeats these actions."""
    line = "            if run.every(3):\n                made.append(sorted(run.output_dir.glob('checkpoint-*')))\n"
    names = edited((UPDATE, UPDATE + line))
    names["made"] = made = []
    run_edited(names, tmp_path / "run", "--checkpointing_steps=3")
    assert [[path.name for path in found] for found in made] == [[], ["checkpoint-3"]]


def test_a_second_interrupt_does_not_end_the_kernel_of_a_notebook(monkeypatch):
    """Protection: ``IPython`` in ``StopSignal._handle``; elsewhere the second signal ends the process at once."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: "a kernel"))
    stop = StopSignal(SimpleNamespace(is_main_process=True, num_processes=1))
    try:
        signal.raise_signal(signal.SIGINT)
        stop.at -= StopSignal.GRACE + 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()


def test_a_run_in_a_thread_goes_without_signals(tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(tmp_path / "run", "--max_train_steps=2")))
    thread.start()
    thread.join()
    assert codes == [0]


def test_pictures_of_other_images_do_not_stay_in_the_folder(tmp_path, capsys):
    """A run that had no checkpoint leaves pictures and curves, and the next run in its folder may be published."""
    for name, level in (("private", 20), ("public", 200)):
        (tmp_path / name).mkdir()
        for k in range(8):
            Image.new("L", (8, 8), level + k).save(tmp_path / name / f"{k}.png")
    flags = ["--sample_steps=1", "--report_to=tensorboard", "--max_train_steps=2"]
    train(tmp_path / "run", f"--train_data_dir={tmp_path / 'private'}", *flags)
    for name in ("checkpoint-2", "unet", "scheduler"):  # as if it was killed before
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "model_index.json").unlink()
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    del record["finished_at_step"]
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(record))
    curves = [*(tmp_path / "run").rglob("events.out.*")]
    shown = [tmp_path / "run" / "samples" / "step-000099.png", tmp_path / "run" / "nearest.png"]
    for path in shown:
        shutil.copyfile(tmp_path / "run" / "samples.png", path)
    train(tmp_path / "run", f"--train_data_dir={tmp_path / 'public'}", *flags)
    assert "of an earlier run with other images" in capsys.readouterr().err
    assert curves and not any(path.exists() for path in curves + shown)
