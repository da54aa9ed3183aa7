"""utils/args.py and train_ddpm.parse_args: what cannot work is refused in one line, before anything heavy."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_ddpm

ROOT = Path(train_ddpm.__file__).parent


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        train_ddpm.parse_args(list(flags))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--train_batch_size=0"], "argument --train_batch_size: '0' is not a whole number from 1 up"),
        (["--train_batch_size=two"], "'two' is not a whole number from 1 up"),
        (["--learning_rate=nan"], "'nan' is not a number from 0 up"),
        (["--adam_beta2=1"], "'1' is not a number from 0 to 0.999999"),
        (["--prediction_type=noise"], "invalid choice: 'noise'"),
        (["--learning_rat=1"], "unrecognized arguments: --learning_rat=1 (did you mean --learning_rate?)"),
        (["--dataset_name=digits", "--train_data_dir=x"], "choose one source of images"),
        (["--streaming", "--dataset_name=x"], "--streaming needs --max_train_steps"),
        (["--streaming", "--max_train_steps=1"], "--streaming needs --dataset_name or --train_data_dir"),
        (["--streaming", "--max_train_steps=1", "--dataset_name=x", "--cache_images=always"], "exclude each other"),
        (["--model_config_name_or_path=a", "--pretrained_model_name_or_path=b"], "give one"),
        (["--unet=tiny", "--pretrained_model_name_or_path=b"], "give one"),
        (["--dropout=0.1", "--model_config_name_or_path=a"], "brings its own"),
        (["--use_ema=perhaps"], "argument --use_ema: 'perhaps' is not true or false"),
        (["--no-use_ema", "false"], "argument --no-use_ema: 'false' is not true or false"),
        (["--config=missing.yaml"], "--config missing.yaml: cannot be read as YAML"),
    ],
)
def test_bad_flags_exit_with_one_line(capsys, flags, message):
    assert message in refused(capsys, *flags)


def test_every_number_refuses_text_and_every_choice_refuses_others(capsys):
    import re

    with pytest.raises(SystemExit):
        train_ddpm.parse_args(["--help"])
    text = capsys.readouterr().out
    numbers = set()
    for flag in sorted(set(re.findall(r"--[a-z_0-9]+", text.split("options:")[0])) - {"--help"}):
        if flag.startswith("--no-"):
            continue
        try:
            train_ddpm.parse_args([f"{flag}=certainly not"])
        except SystemExit as stop:
            assert stop.code == 2
            numbers.add(flag)
            assert flag in capsys.readouterr().err
    assert len(numbers) > 40  # what is left takes any text: names, paths, columns


def test_config_file_sets_defaults_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "learning_rate: 2e-4\nrandom_flip: true\nuse_ema: false\nmax_train_steps: 7\nsnr_gamma:\nmixed_precision: no\n"
    )
    args = train_ddpm.parse_args(["--config", str(config), "--max_train_steps=9"])
    assert (args.learning_rate, args.random_flip, args.use_ema, args.max_train_steps) == (2e-4, True, False, 9)
    assert args.mixed_precision == "no" and args.snr_gamma is None
    for content, message in [
        ("learning_rat: 1", "there is no flag --learning_rat"),
        ("train_batch_size: many", "'many' is not a whole number"),
        ("random_flip: 3", "expected true or false"),
        ("[1, 2]", "expected lines of `flag: value`"),
        ("a: [", "cannot be read as YAML"),
    ]:
        config.write_text(content)
        assert message in refused(capsys, f"--config={config}")


@pytest.mark.parametrize(
    "flags, expected",
    [("", True), ("--use_ema", True), ("--no-use_ema", False), ("--use_ema false", False), ("--use_ema=true", True)],
)
def test_switches(flags, expected):
    assert train_ddpm.parse_args(flags.split()).use_ema is expected


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
