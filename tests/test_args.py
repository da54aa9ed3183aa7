"""utils/args.py and train_ddpm.parse_args: wrong flags are refused in one line, before heavy imports."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

import demo
import distill_few_steps
import evaluate
import finetune_faces
import push
import sample
import train_autoencoder
import train_basic
import train_conditional
import train_ddpm
import train_flow
import train_latent
import train_paired
import train_unet2d
from utils import write_record
from utils.args import Parser

ROOT = Path(train_ddpm.__file__).parent


def refused(capsys, *flags, script=train_ddpm):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.parse_args(list(flags))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_batch_size=0"], "argument --train_batch_size: '0' is not a whole number from 1 up"),
        (["--train_batch_size=two"], "'two' is not a whole number from 1 up"),
        (["--learning_rate=nan"], "'nan' is not a number from 0 up"),
        (["--ema_max_decay=1.5"], "'1.5' is not a number from 0 to 1"),
        (["--prediction_type=noise"], "invalid choice: 'noise'"),
        (
            ["--learning_rat=1"],
            "unrecognized arguments: --learning_rat=1 (there is no flag --learning_rat. Did you mean --learning_rate?)",
        ),
        (["--dataset_name=digits", "--train_data_dir=x"], "Choose one source of images"),
        (["--streaming", "--dataset_name=x"], "--streaming needs --max_train_steps"),
        (["--streaming", "--max_train_steps=1"], "--streaming needs --dataset_name or --train_data_dir"),
        (["--streaming", "--max_train_steps=1", "--dataset_name=x", "--cache_images=always"], "exclude each other"),
        (["--model_config_name_or_path=a", "--pretrained_model_name_or_path=b"], "not allowed with argument"),
        (["--unet=tiny", "--pretrained_model_name_or_path=b"], "not allowed with argument"),
        (["--hub_model_id=me/x"], "--hub_model_id needs --push_to_hub"),
        (["--features=dinosaurs"], "unknown features 'dinosaurs'. Expected digits, efficientnet, pixels, dinov2"),
        (["--snr_gamma=5"], "there is no flag --snr_gamma"),
        (["--use_ema=perhaps"], "argument --use_ema: 'perhaps' is not true or false"),
        (["--no-use_ema", "false"], "argument --no-use_ema: got the value 'false'. Expected no value"),
        (["--config=missing.yaml"], "--config missing.yaml: cannot be read as YAML"),
    ],
)
def test_bad_flags_exit_with_one_line(capsys, flags, message):
    assert message in refused(capsys, *flags)


SCRIPTS = {  # with their required arguments
    train_basic: [],
    train_unet2d: [],
    train_ddpm: [],
    train_conditional: [],
    train_flow: [],
    train_paired: [],
    train_autoencoder: [],
    train_latent: [],
    finetune_faces: ["--dataset_name=digits"],
    distill_few_steps: ["--pretrained_model_name_or_path=outputs/digits"],
    sample: ["outputs/digits"],
    evaluate: ["outputs/digits", "--reference=digits"],
    demo: ["outputs/digits"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_refuses_what_it_cannot_be(capsys, script, monkeypatch):
    """A wrong type, a number out of range or an unknown choice gives one line that names the flag, and exit code 2.

    A valid value stays unchanged.
    """
    actions = []
    original = Parser.parse
    monkeypatch.setattr(
        Parser, "parse", lambda self, *rest, **more: actions.extend(self._actions) or original(self, *rest, **more)
    )
    script.parse_args(SCRIPTS[script])
    flags = {action.option_strings[0]: action for action in actions if action.option_strings}
    del flags["-h"], flags["--config"]
    typed = {flag for flag, action in flags.items() if action.type or action.choices or action.nargs == "?"}
    assert len(typed) >= (2 if script is demo else 10)
    assert len(flags) - len(typed) < 25  # the other flags take any text: names, paths, columns
    for flag in sorted(typed):
        action = flags[flag]
        wrong = ["certainly not", ""]
        if action.type:
            wrong += ["nan", "inf", "-inf", "-11", "1e400", "0x10", "--seed"]
        for value in wrong:
            assert refused(capsys, *SCRIPTS[script], f"{flag}={value}", script=script).count(flag) >= 1, (flag, value)
        if action.nargs not in ("?", 2) and action.type:
            assert f"argument {flag}: expected one argument" in refused(capsys, *SCRIPTS[script], flag, script=script)
        if action.choices:
            for value in action.choices:
                with contextlib.suppress(SystemExit):  # a combination with the defaults may be refused
                    assert getattr(script.parse_args([*SCRIPTS[script], f"{flag}={value}"]), action.dest) == value
    for flag in sorted(flags):  # a misspelt flag is never taken for another flag
        assert "unrecognized arguments" in refused(capsys, *SCRIPTS[script], f"{flag}x", script=script)


def flags_of(script):
    """Return the flags that a script defines."""
    found = []

    class Listed(Exception):
        pass

    def parse(parser, argv=None, **options):
        found.extend(option for action in parser._actions for option in action.option_strings)
        raise Listed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Listed):
        patch.setattr(Parser, "parse", parse)
        script.parse_args([])
    return {flag for flag in found if flag.startswith("--") and not flag.startswith("--no-") and flag != "--help"}


def test_a_new_flag_is_a_decision():
    """tests/frozen_flags.txt lists every flag and the scripts that have it. Adding or removing one changes the file."""
    table = {}
    for script in (*SCRIPTS, push):
        for flag in flags_of(script):
            table.setdefault(flag, []).append(script.__name__)
    lines = [f"{flag}: {', '.join(scripts)}" for flag, scripts in sorted(table.items())]
    assert lines == (ROOT / "tests" / "frozen_flags.txt").read_text().splitlines()


def test_config_file_sets_defaults_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "learning_rate: 2e-4\nrandom_flip: true\nuse_ema: false\nmax_train_steps: 7\nlabel_column:\n"
        "mixed_precision: no\n"
    )
    args = train_ddpm.parse_args(["--config", str(config), "--max_train_steps=9"])
    assert (args.learning_rate, args.random_flip, args.use_ema, args.max_train_steps) == (2e-4, True, False, 9)
    assert args.mixed_precision == "no" and args.label_column is None
    for content, message in [
        ("learning_rat: 1", "there is no flag --learning_rat"),
        ("train_batch_size: many", "'many' is not a whole number"),
        ("random_flip: 3", "Expected true or false"),
        ("[1, 2]", "expected lines of `flag: value`"),
        ("a: [", "cannot be read as YAML"),
        ("output_dir: #1", "output_dir has no value. Put quotes around a value that begins with #"),
    ]:
        config.write_text(content)
        assert message in refused(capsys, f"--config={config}")
    config.write_text("sweep: ['ddim:10,50', ddpm:10]\nreference: digits\n")
    assert evaluate.parse_args(["x", f"--config={config}"]).sweep == ["ddim:10,50", "ddpm:10"]
    config.write_text("reference: digits\nsweep: ['ddim:10,50', ddpm:10]\n")
    args = evaluate.parse_args([f"--config={config}", "x"])
    assert args.models == ["x"] and args.sweep == ["ddim:10,50", "ddpm:10"]
    config.write_text("gif: true\n")
    args = sample.parse_args(["outputs/x", "--config", str(config)])
    assert args.gif and args.model == "outputs/x" and args.config == str(config)
    args = sample.parse_args(["--gif", f"--config={config}", "outputs/x"])
    assert args.gif and args.model == "outputs/x" and args.config == str(config)
    config.write_text("models: [x]\nreference: digits\n")
    with pytest.raises(SystemExit):
        evaluate.parse_args(["x", f"--config={config}"])
    assert "there is no flag --models" in capsys.readouterr().err


def test_a_record_is_a_config_file_with_any_name(tmp_path):
    write_record(tmp_path / "run.json", {"script": "train_ddpm", "arguments": {"train_data_dir": "/data/\U0001f600 é"}})
    assert train_ddpm.parse_args([f"--config={tmp_path / 'run.json'}"]).train_data_dir == "/data/\U0001f600 é"


@pytest.mark.parametrize(
    "flags, expected",
    [("", True), ("--use_ema", True), ("--no-use_ema", False), ("--use_ema false", False), ("--use_ema=true", True)],
)
def test_switches(flags, expected):
    assert train_ddpm.parse_args(flags.split()).use_ema is expected


def test_a_home_folder_is_found_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_ddpm.parse_args(["--output_dir=~/run", "--train_data_dir=~/images"])
    assert (args.output_dir, args.train_data_dir) == (f"{tmp_path}/run", f"{tmp_path}/images")


def test_arguments_are_read_only():
    args = train_ddpm.parse_args([])
    with pytest.raises(AttributeError):
        args.seed = 3


def test_help_answers_at_once_and_groups_the_flags():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, ROOT / "train_ddpm.py", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 2
    assert result.returncode == 0
    for group in ("data:", "model:", "diffusion", "training:", "run:", "samples:"):
        assert f"\n{group}" in result.stdout
