"""Command-line flags that every training script has, and the checks that need no heavy import.

Flags that change the mathematics stand in the scripts; here are data, optimizer, run and checkpoint flags. Names are
those of diffusers' examples. The standard library, PyYAML and Pillow are enough here: ``--help`` answers at once.
"""

import argparse
import difflib
import math
import os
import re
import sys
from pathlib import Path

from .exits import not_again

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc")
SOLVERS = ("dpmsolver++", "euler", "heun")  # of train_flow.py's models
ALL_SAMPLERS = (*SAMPLERS, *SOLVERS[1:], "lcm")  # the last of distill_few_steps.py's


def integer(low: int, high: float = math.inf):
    """An argparse type: an int in [low, high]."""
    return _number(int, low, high, "a whole number")


def real(low: float, high: float = math.inf):
    """An argparse type: a finite float in [low, high]."""
    return _number(float, low, high, "a number")


def size_of(resolution) -> tuple[int, int] | None:
    """(H, W) of ``--resolution``, or of a config's ``sample_size``: 32, "32x64", a pair; None of None."""
    if resolution is None:
        return None
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution.split("x") if isinstance(resolution, str) else resolution
    return int(height), int(width)


def _resolution(text: str) -> int | str:
    sides = text.lower().split("x")
    if not (len(sides) <= 2 and all(side.isdecimal() and int(side) >= 4 for side in sides)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side in pixels, from 4 up, nor HEIGHTxWIDTH: 32x64")
    return int(sides[0]) if len({*map(int, sides)}) == 1 else f"{int(sides[0])}x{int(sides[1])}"


def image_range(text: str) -> str:
    """An argparse type: ``auto``, ``full``, or two numbers LOW,HIGH."""
    low, _, high = text.partition(",")
    try:
        if text in ("auto", "full") or -math.inf < float(low) < float(high) < math.inf:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor full nor LOW,HIGH, such as 0,4095")


def _number(kind, low, high, noun):
    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            limits = f"from {low} up" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {limits}")
        return value

    return convert


class Arguments:
    """Parsed flags: attributes to read, none to assign. ``vars(args)`` is the dictionary of them."""

    __slots__ = ("__dict__", "_defaults")  # ``_defaults`` is not among ``vars(args)``

    def __init__(self, values: argparse.Namespace, defaults: dict | None = None):
        self.__dict__.update(vars(values))
        object.__setattr__(self, "_defaults", defaults or {})

    def __setattr__(self, name, value):
        raise AttributeError(f"--{name} is read-only after parsing")


def defaults_of(args) -> dict:
    """The default of each flag of parsed arguments, by name."""
    return getattr(args, "_defaults", {})


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not name it already."""

    def _get_help_string(self, action):
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Switch(argparse.BooleanOptionalAction):
    """--name, --name true, --name false, --no-name."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.nargs, self.metavar = "?", "BOOL"

    def __call__(self, parser, namespace, value, option_string=None):
        known = {None: True, "true": True, "false": False}
        if value not in known or (value and option_string.startswith("--no-")):
            parser.error(f"argument {option_string}: {value!r} is not true or false")
        setattr(namespace, self.dest, known[value] != option_string.startswith("--no-"))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that shows defaults, takes ``--config file.yaml`` and returns read-only arguments."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.add_argument("--config", metavar="FILE", help="YAML file of flags and values; the command line wins")

    def error(self, message: str):
        """Exit with code 2 and one line: the mistake, and the flag that was probably meant."""
        hint = "--help lists the flags"
        if message.startswith("unrecognized arguments: --"):
            given = message.split(": ")[1].split()[0].split("=")[0]
            close = difflib.get_close_matches(given, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else hint
        self._print_message(f"error: {message} ({hint})\n", sys.stderr)
        not_again()
        self.exit(2)

    @staticmethod
    def switch(group, name: str, default: bool | None, help: str) -> None:
        """Add the flag ``--name``, which may be followed by true or false, and its opposite ``--no-name``."""
        group.add_argument(name, action=_Switch, default=default, help=help)

    def parse(self, argv: list[str] | None = None):
        """Parse ``argv`` into read-only arguments. Mistakes exit with code 2."""
        known, rest = argparse.ArgumentParser(add_help=False, allow_abbrev=False), None
        known.add_argument("--config")
        config, rest = known.parse_known_args(argv)
        values = self.parse_args(self._read_config(config.config) + rest)
        values.config = config.config
        if vars(values).get("optimizer", "") is None:  # what ran is recorded and compared, not "the default"
            values.optimizer = "adamw" if vars(values).get("pretrained_model_name_or_path") else "muon"
        for name, value in vars(values).items():  # no shell does it behind an =, nor in a file
            given = value if isinstance(value, list) else [value]
            given = [os.path.expanduser(part) if isinstance(part, str) else part for part in given]
            setattr(values, name, given if isinstance(value, list) else given[0])
        return Arguments(values, {action.dest: self.get_default(action.dest) for action in self._actions})

    def _read_config(self, path: str | None) -> list[str]:
        """The flags in a YAML file as a list of arguments, so that they are checked as typed ones are."""
        if path is None:
            return []
        import yaml

        try:
            entries = yaml.safe_load(text := Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}")
        if not isinstance(entries, dict):
            self.error(f"--config {path}: expected lines of `flag: value`, got {type(entries).__name__}")
        actions = {action.dest: action for action in self._actions}
        argv = []
        for name, value in entries.items():
            if name not in actions or name in ("help", "config") or not actions[name].option_strings:
                self.error(f"--config {path}: there is no flag --{name}; --help lists them")
            if value is None and re.search(rf"^{name}: *#\S", text, re.M):
                self.error(f"--config {path}: {name} has no value; put quotes around one that begins with #")
            if isinstance(actions[name], _Switch):
                if not isinstance(value, bool):
                    self.error(f"--config {path}: {name} is {value!r}; expected true or false")
                argv.append(f"--{name}" if value else f"--no-{name}")
            elif value is False and "no" in (actions[name].choices or ()):
                argv.append(f"--{name}=no")  # YAML reads a bare `no` as false
            elif isinstance(value, list):
                argv += [f"--{name}", *map(str, value)]
            elif value is not None:
                argv.append(f"--{name}={value}")
        return argv


# fmt: off
def add_common_arguments(parser: Parser) -> None:
    """Data, training, run, checkpoints and samples: what every training script has."""
    _add_data_arguments(parser)
    _add_training_arguments(parser)
    _add_run_arguments(parser)


def add_hub_arguments(group) -> None:
    """Where a model goes on the Hub."""
    group.add_argument("--hub_model_id", metavar="ID", help="USER/NAME, or NAME among your own (default: the name of the output folder)")
    Parser.switch(group, "--hub_private_repo", False, "make it a private repository; an existing public one is refused")
    group.add_argument("--hub_revision", metavar="BRANCH", help="branch to push to (default: main)")
    Parser.switch(group, "--hub_logs", False, "push TensorBoard's files, too: the Hub shows them; they may hold pictures of training images")
    group.add_argument("--hub_license", metavar="LICENSE", default="unknown", help="the model's licence, for its card: apache-2.0, cc-by-4.0, openrail, other ...")
    group.add_argument("--hub_timeout", type=real(4), default=1800.0, help="give up a push after this many seconds of failing")


def add_features_arguments(group) -> None:
    """What images are compared by."""
    group.add_argument("--features", choices=("digits", "pixels", "dinov2", "clip", "inception"), default="digits", help="what images are compared by; digits is for digits only")
    group.add_argument("--features_model_name_or_path", metavar="MODEL", help="weights for dinov2 and clip: a Hub id or a folder")


def add_evaluation_arguments(parser: Parser) -> None:
    """Whether, and how, samples are evaluated while a model trains."""
    group = parser.add_argument_group("evaluation while training")
    group.add_argument("--evaluate_steps", type=integer(1), help="optimizer steps between evaluations: curves of fd and kid against training images")
    group.add_argument("--num_evaluation_samples", type=integer(10), default=1000, help="N of each; more images make it surer and slower")
    add_features_arguments(group)
    parser.switch(group, "--keep_best", False, "keep the pipeline with the lowest fd so far in OUTPUT_DIR/best")


def _add_data_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset_name", help="Hub id, local folder or table (parquet, arrow, csv, json, tar), or: mnist, digits and faces (8x8 and 25x25, embedded). With neither this nor --train_data_dir: MNIST, or the embedded digits where it is not available")
    group.add_argument("--dataset_config_name", help="configuration of the data set, where it has several")
    group.add_argument("--dataset_split", default="train", help="split to train on; slices such as train[:1%%] work")
    group.add_argument("--train_data_dir", metavar="DIR", help="folder of image files, instead of --dataset_name")
    group.add_argument("--image_column", help="column with the images (default: the only one of type Image)")
    group.add_argument("--label_column", help="column with class labels; adds a loss curve for each class")
    group.add_argument("--max_train_samples", type=integer(1), help="use only the first N images")
    group.add_argument("--resolution", metavar="SIDE|HxW", type=_resolution, help="side of the training images, or height x width, pixels (default: the images' own size, with a shorter side of at most 64; where there is a pretrained model, its size)")
    group.add_argument("--image_mode", choices=("auto", "L", "RGB"), default="auto", help="grey (L), colour, or as the images are; where there is a pretrained model, as it wants")
    group.add_argument("--image_range", metavar="RANGE", type=image_range, default="auto", help="values that become black and white, of images with more than 8 bits: LOW,HIGH (--image_range=-1000,3000); full, that of the format; auto, that of the images looked at, unless they use half of the format's")
    parser.switch(group, "--center_crop", False, "crop the middle of images of another shape instead of a random part")
    parser.switch(group, "--random_flip", False, "mirror half of the images, left to right")
    group.add_argument("--interpolation", choices=("lanczos", "bicubic", "bilinear", "box", "nearest"), default="bicubic", help="filter that resizes the images")
    group.add_argument("--cache_images", choices=("auto", "always", "never"), default="auto", help="decode images once: into a file that all processes map where that takes seconds, otherwise into memory, and on the GPU up to a quarter of what is free; auto: up to 32 GiB in the file or half of the free disk, 4 GiB in memory")
    group.add_argument("--image_cache_dir", metavar="DIR", help="folder for that file, which the next run uses again (default: prepared-images in the cache of datasets)")
    group.add_argument("--dataloader_num_workers", type=integer(0), default=min(4, os.cpu_count() or 1), help="decoders, when not cached")
    parser.switch(group, "--streaming", False, "read the data set as it goes, for sets that fit on no disk")
    group.add_argument("--shuffle_buffer_size", type=integer(1), default=10_000, help="images, with --streaming")
    group.add_argument("--bad_images", choices=("error", "skip"), default="error", help="what to do about unreadable images")
    group.add_argument("--max_bad_images", type=integer(0), default=100, help="with --bad_images skip: stop above this")


def _add_training_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--train_batch_size", type=integer(1), default=64, help="images per process and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=integer(1), default=1, help="micro-steps per optimizer step")
    group.add_argument("--num_train_epochs", type=integer(1), default=40, help="passes over the data")
    group.add_argument("--max_train_steps", type=integer(1), help="optimizer steps; overrides --num_train_epochs")
    group.add_argument("--learning_rate", type=real(0), default=1e-3, help="peak rate")
    group.add_argument("--optimizer", choices=("adamw", "adamw8bit", "muon"), help="muon for matrices learns faster from random weights; adamw8bit keeps a quarter of the state, with bitsandbytes on a GPU or torchao (default: muon; adamw where pretrained weights are trained on, but not where they are distilled)")
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="linear", help="shape of the rate over the run; constant has no warm-up")
    group.add_argument("--lr_warmup_steps", type=integer(0), default=50, help="optimizer steps from 0 to the peak rate")
    group.add_argument("--adam_beta1", type=real(0, 0.999999), default=0.9, help="decay of the first moment")
    group.add_argument("--adam_beta2", type=real(0, 0.999999), default=0.99, help="decay of the second moment")
    group.add_argument("--adam_weight_decay", type=real(0), default=0.01, help="decoupled weight decay")
    group.add_argument("--adam_epsilon", type=real(1e-16), default=1e-8, help="added to the denominator")
    group.add_argument("--max_grad_norm", type=real(0), default=1.0, help="clip the gradient's norm; 0: do not clip")
    parser.switch(group, "--use_ema", True, "sample and save the exponential moving average of the weights")
    group.add_argument("--ema_max_decay", type=real(0, 1), default=0.999, help="upper limit of the average's decay")
    group.add_argument("--ema_inv_gamma", type=real(1e-9), default=1.0, help="warm-up: decay = 1-(1+step/inv_gamma)^-power")
    group.add_argument("--ema_power", type=real(0, 10), default=0.75, help="warm-up: larger averages over more steps sooner")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the UNet's arithmetic (default: what the accelerate config says)")
    parser.switch(group, "--allow_tf32", True, "TF32 matrix products on GPUs that have them")


def _add_run_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", metavar="DIR", help="everything that the run makes")
    group.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of weights, order, crops, noise and samples")
    group.add_argument("--report_to", default="tensorboard", help="tracker: tensorboard, wandb, trackio, another of accelerate's, all or none")
    group.add_argument("--tracker_project_name", metavar="NAME", help="project in W&B and trackio (default: the script's name)")
    group.add_argument("--logging_dir", default="logs", help="TensorBoard folder, inside --output_dir")
    group.add_argument("--logging_steps", type=integer(1), default=10, help="optimizer steps between points of a curve")
    group.add_argument("--checkpointing_steps", type=integer(1), default=500, help="optimizer steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=integer(1), default=2, help="checkpoints to keep, newest first")
    group.add_argument("--max_rollbacks", metavar="N", type=integer(0), default=0, help="where loss or gradient are not finite, go back to the newest checkpoint and leave out the images of that step, at most N times in a run; then stop")
    group.add_argument("--grad_norm_deviations", metavar="K", type=real(1), help="also where a gradient's norm is more than K standard deviations above the mean of the last 100 steps")
    group.add_argument("--hang_timeout", metavar="SECONDS", type=real(0), default=300.0, help="end a run of which nothing has moved for so long since its first step, with the stacks of its threads; 0: never")
    group.add_argument("--resume_from_checkpoint", metavar="latest|DIR", help="the checkpoint to go on from (default: latest, the newest in --output_dir, or a new run where there is none)")

    group = parser.add_argument_group("samples")
    group.add_argument("--sample_steps", type=integer(1), default=500, help="optimizer steps between sample grids")
    group.add_argument("--num_samples", type=integer(1), default=64, help="images in a grid")
    group.add_argument("--sample_batch_size", type=integer(1), default=64, help="images sampled at once, per process")
    group.add_argument("--num_inference_steps", type=integer(1, 1000), help="UNet calls per sample")

    group = parser.add_argument_group("Hub")
    parser.switch(group, "--push_to_hub", False, "push the model at the end; log in with `hf auth login` or HF_TOKEN")
    add_hub_arguments(group)
    group.add_argument("--hub_strategy", choices=("end", "every_checkpoint"), default="end", help="when to push; checkpoints go beside training")
    parser.switch(group, "--push_required", False, "do not train if the Hub cannot be reached at the start")
    group.add_argument("--hub_dataset_name", metavar="NAME", help="what the model's page calls the training images (default: their name on the Hub; images of your own are not named)")

    group = parser.add_argument_group("validation")
    group.add_argument("--validation_split", help="split held out from training, for a loss curve; for example train[90%%:]")
    group.add_argument("--validation_steps", type=integer(1), default=500, help="optimizer steps between validations")
    group.add_argument("--num_validation_images", type=integer(1), default=64, help="images of each set")


def check_common(parser: Parser, args) -> None:
    """Refuse combinations that cannot work, before anything is imported or written."""
    if args.dataset_name and args.train_data_dir:
        parser.error("--dataset_name and --train_data_dir are both given; choose one source of images")
    if args.streaming and args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps: a stream has no known length to count epochs in")
    if args.streaming and args.cache_images == "always":
        parser.error("--streaming and --cache_images always exclude each other: a stream is not kept")
    for flag in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_logs", "push_required"):
        if vars(args)[flag] and not args.push_to_hub:
            parser.error(f"--{flag} needs --push_to_hub")
    if vars(args).get("rescale_betas_zero_snr") and args.prediction_type == "epsilon":
        parser.error("--rescale_betas_zero_snr with --prediction_type epsilon teaches nothing at the last timestep, where the input is the noise itself; take v_prediction or sample")
    levels = vars(args).get("num_train_timesteps")
    if levels and args.num_inference_steps > levels:
        parser.error(f"--num_inference_steps {args.num_inference_steps} is more than --num_train_timesteps {levels}")
    if vars(args).get("keep_best") and not args.evaluate_steps:
        parser.error("--keep_best needs --evaluate_steps: what is best is found by evaluating")
    if args.hub_strategy == "every_checkpoint" and not args.push_to_hub:
        parser.error("--hub_strategy every_checkpoint needs --push_to_hub")
    if args.grad_norm_deviations and not args.max_rollbacks:
        parser.error("--grad_norm_deviations needs --max_rollbacks: how often the run may go back")
    if args.streaming and not (args.dataset_name or args.train_data_dir):
        parser.error("--streaming needs --dataset_name or --train_data_dir")
# fmt: on
