"""Command-line flags that every training script has, and checks of them.

Flags that change the mathematics are in the scripts. Flags of an optional folder are in that folder, see ``optional``.
Names follow diffusers' examples. This file imports only the standard library and PyYAML, so that ``--help``
answers at once.
"""

import argparse
import difflib
import math
import os
import re
import sys
from pathlib import Path

from . import optional

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc")
SOLVERS = ("dpmsolver++", "euler")  # for models of train_flow.py
ALL_SAMPLERS = (*SAMPLERS, "euler", "lcm")  # lcm is for models of distill_few_steps.py


def integer(low: int, high: float = math.inf):
    """Return an argparse type for an int in [low, high]."""
    return _number(int, low, high, "a whole number")


def real(low: float, high: float = math.inf):
    """Return an argparse type for a finite float in [low, high]."""
    return _number(float, low, high, "a number")


def size_of(resolution) -> tuple[int, int] | None:
    """Return (H, W) of ``--resolution`` or of a config's ``sample_size``: 32, "32x64" or a pair. None gives None."""
    if resolution is None:
        return None
    if isinstance(resolution, int):
        return resolution, resolution
    height, width = resolution.split("x") if isinstance(resolution, str) else resolution
    return int(height), int(width)


def nearest_resolution(size: tuple[int, int], factor: int) -> str:
    """Return the value of ``--resolution`` with multiples of ``factor`` that is nearest to (H, W)."""
    height, width = (max(factor, round(side / factor) * factor) for side in size)
    return str(height) if height == width else f"{height}x{width}"


def resolution(text: str) -> int | str:
    """Parse a side in pixels, or HEIGHTxWIDTH."""
    sides = text.lower().split("x")
    if not (len(sides) <= 2 and all(side.isdecimal() and int(side) >= 4 for side in sides)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a side in pixels, from 4 up, nor HEIGHTxWIDTH, such as 32x64"
        )
    return int(sides[0]) if len({*map(int, sides)}) == 1 else f"{int(sides[0])}x{int(sides[1])}"


def image_range(text: str) -> str:
    """Check that a text is ``auto``, ``full``, or two numbers LOW,HIGH, and return it."""
    low, _, high = text.partition(",")
    try:
        if text in ("auto", "full") or -math.inf < float(low) < float(high) < math.inf:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor full nor LOW,HIGH, such as 0,4095")


def condition_kind(text: str) -> str:
    """Check that a text is a kind of ``diffusion.conditions`` that is made from an image, and return it."""
    name, _, factor = text.partition(":")
    if text in ("gray", "inpaint", "outline") or (name == "lowres" and factor.isdecimal() and 2 <= int(factor) <= 64):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither lowres:FACTOR, such as lowres:4 (FACTOR from 2 to 64), nor gray, inpaint or outline. For "
        "pictures of your own use --condition_dir or --condition_column"
    )


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
    """Parsed flags as attributes that cannot be assigned. ``vars(args)`` is the dictionary of them."""

    __slots__ = ("__dict__", "_defaults")  # ``_defaults`` is not among ``vars(args)``

    def __init__(self, values: argparse.Namespace, defaults: dict | None = None):
        self.__dict__.update(vars(values))
        object.__setattr__(self, "_defaults", defaults or {})

    def __setattr__(self, name, value):
        raise AttributeError(f"--{name} is read-only after parsing")


def defaults_of(args) -> dict:
    """Return the default of each flag of parsed arguments, by name."""
    return getattr(args, "_defaults", {})


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that adds the default, unless there is none or the text names it already."""

    def _get_help_string(self, action):
        if action.default is None or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Switch(argparse.BooleanOptionalAction):
    """Flag that is given as --name, --name true, --name false or --no-name."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.nargs, self.metavar = "?", "BOOL"

    def __call__(self, parser, namespace, value, option_string=None):
        known = {None: True, "true": True, "false": False}
        if value is not None and option_string.startswith("--no-"):
            parser.error(f"argument {option_string}: got the value {value!r}. Expected no value. Leave it out")
        if value not in known:
            parser.error(f"argument {option_string}: {value!r} is not true or false")
        setattr(namespace, self.dest, known[value] != option_string.startswith("--no-"))


class Parser(argparse.ArgumentParser):
    """ArgumentParser that shows defaults, reads ``--config file.yaml`` and returns read-only arguments."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_Formatter, allow_abbrev=False)
        self.checks = []  # functions that take parser and arguments, and refuse flags that cannot work
        self.add_argument(
            "--config", metavar="FILE", help="YAML file of flags and values, which the command line overrides"
        )

    def error(self, message: str):
        """Print one line with the mistake and the flag that was probably meant, and exit with code 2."""
        hint = "--help lists the flags"
        if message.startswith("unrecognized arguments: --"):
            given = message.split(": ")[1].split()[0].split("=")[0]
            close = difflib.get_close_matches(given, self._option_string_actions, n=1, cutoff=0.8)
            hint = f"there is no flag {given}. {f'Did you mean {close[0]}?' if close else hint}"
        self._print_message(f"error: {message} ({hint})\n", sys.stderr)
        self.exit(2)

    def group(self, title: str):
        """Return the group of flags with this title, which is created if it is missing."""
        return next((group for group in self._action_groups if group.title == title), None) or self.add_argument_group(
            title
        )

    @staticmethod
    def switch(group, name: str, default: bool | None, help: str) -> None:
        """Add the flag ``--name``, optionally followed by true or false, and its opposite ``--no-name``."""
        group.add_argument(name, action=_Switch, default=default, help=help)

    def parse(self, argv: list[str] | None = None, learning_rate: float = 1e-3):
        """Parse ``argv`` into read-only arguments. Mistakes exit with code 2.

        Args:
            learning_rate: default of ``--learning_rate`` from random weights.
        """
        known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        known.add_argument("--config")
        argv = sys.argv[1:] if argv is None else argv
        config = known.parse_known_args(argv)[0].config
        if config is not None:
            # With --config in between, a list at the end of the file does not take the next argument
            argv = [*self._read_config(config), f"--config={config}", *argv]
        values = self.parse_args(argv)
        if vars(values).get("optimizer", "") is None:  # resolved, so that the run's record holds a value
            values.optimizer = "adamw" if vars(values).get("pretrained_model_name_or_path") else "muon"
        if vars(values).get("learning_rate", "") is None and not vars(values).get("pretrained_model_name_or_path"):
            values.learning_rate = learning_rate
        for name, value in vars(values).items():  # shells do not expand ~ after an = or in a file
            given = value if isinstance(value, list) else [value]
            given = [os.path.expanduser(part) if isinstance(part, str) else part for part in given]
            setattr(values, name, given if isinstance(value, list) else given[0])
        arguments = Arguments(values, {action.dest: self.get_default(action.dest) for action in self._actions})
        for check in self.checks:
            check(self, arguments)
        return arguments

    def _read_config(self, path: str | None) -> list[str]:
        """Return the flags in a YAML file as a list of arguments, so that they are checked as typed ones are.

        Values stay text, so that ``1.10``, ``007`` and ``on`` are parsed by the type of the flag instead of YAML. The
        file may also be the record of a run, ``training_args.json``. Then the flags in this record are used.
        """
        if path is None:
            return []
        import yaml

        try:
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}")
        entries = self._entries(path, root)
        if {"script", "arguments"} <= {*entries}:
            entries = self._entries(path, entries["arguments"])
            entries.pop("config", None)
        actions = {action.dest: action for action in self._actions}
        argv = []
        for name, node in entries.items():
            if name not in actions or name in ("help", "config") or not actions[name].option_strings:
                close = difflib.get_close_matches(name, actions, n=1, cutoff=0.8)
                hint = f". Did you mean {close[0]}?" if close else ""
                self.error(f"--config {path}: there is no flag --{name}{hint}")
            argv += self._typed(path, name, node, actions[name])
        return argv

    def _entries(self, path: str, node) -> dict:
        """Return the entries of a YAML mapping, by name."""
        import yaml

        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "text"
            self.error(f"--config {path}: expected lines of `flag: value`, got {kind}")
        entries = {}
        for key, value in node.value:
            if key.value in entries:
                self.error(
                    f"--config {path}: {key.value} is given twice, the second time in line {key.start_mark.line + 1}"
                )
            entries[key.value] = value
        return entries

    def _typed(self, path: str, name: str, node, action) -> list[str]:
        """Return the command-line arguments for an entry."""
        import yaml

        values = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(value, yaml.ScalarNode) for value in values):
            self.error(f"--config {path}: {name} is nested. Expected a value or a list of values")
        if isinstance(node, yaml.SequenceNode):
            if action.nargs not in ("+", "*") and not isinstance(action.nargs, int):
                self.error(f"--config {path}: {name} is a list. Expected one value")
            return [f"--{name}", *(value.value for value in values)]
        if node.tag.endswith(":null"):
            line = node.start_mark.buffer and Path(path).read_text(encoding="utf-8").splitlines()[node.start_mark.line]
            if line and re.search(rf"^\s*{name}: *#\S", line):
                self.error(f"--config {path}: {name} has no value. Put quotes around a value that begins with #")
            return []
        if isinstance(action, _Switch):
            if node.value.lower() not in ("true", "false"):
                self.error(f"--config {path}: {name} is {node.value!r}. Expected true or false")
            return [f"--{name}" if node.value.lower() == "true" else f"--no-{name}"]
        if node.value.lower() == "false" and "no" in (action.choices or ()):
            return [f"--{name}=no"]
        return [f"--{name}={node.value}"]


# fmt: off
def add_common_arguments(parser: Parser, draws: bool = True) -> None:
    """Add the flags of data, training, run and samples, and those of the optional folders, with their checks.

    Args:
        draws: whether the model draws images in sampling steps. An autoencoder does not.
    """
    group = parser.group("data")
    group.add_argument("--resolution", metavar="SIDE|HxW", type=resolution, help="side of the training images, or height x width, in pixels (default: the size of the pretrained model, or the images' own size with a shorter side of at most 64)")
    group.add_argument("--image_mode", choices=("auto", "L", "RGB"), default="auto", help="grey (L) or colour (RGB). auto: as the pretrained model expects, or as the images are")
    group.add_argument("--image_range", metavar="RANGE", type=image_range, default="auto", help="values that become black and white, for images with more than 8 bits: LOW,HIGH, as in --image_range=-1000,3000. full: range of the format. auto: range of some inspected images, or of the format if they use at least half of it")
    parser.switch(group, "--center_crop", False, "centre crop of images of another aspect ratio, instead of a random crop")
    parser.switch(group, "--random_flip", False, "mirroring of half of the images, left to right")
    group.add_argument("--cache_images", metavar="auto|always|never|DIR", default="auto", help="cache of decoded images, or of latents: a file that all processes map if decoding takes seconds, otherwise memory. Small caches are copied to the GPU. auto: a file of up to 32 GiB or half of the free disk, or up to 4 GiB of memory. DIR: folder for the file, which later runs reuse (default: prepared-images in the cache folder of datasets)")
    group.add_argument("--dataloader_num_workers", type=integer(0), default=min(4, os.cpu_count() or 1), help="processes that decode images that are not cached")
    group.add_argument("--max_bad_images", metavar="N", type=integer(0), default=0, help="number of unreadable images to skip. One more stops the run")

    group = parser.group("training")
    group.add_argument("--train_batch_size", type=integer(1), default=64, help="images per process and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=integer(1), default=1, help="micro-steps per optimizer step")
    group.add_argument("--num_train_epochs", type=integer(1), default=40, help="passes over the data")
    group.add_argument("--max_train_steps", type=integer(1), help="number of optimizer steps, which overrides --num_train_epochs")
    group.add_argument("--learning_rate", type=real(0), help="peak learning rate (default: 1e-3 from random weights, 3e-3 in train_autoencoder.py, 5e-4 in distill_few_steps.py. With other pretrained weights, it decreases with their number, see utils/training/optimizer.py)")
    group.add_argument("--optimizer", choices=("adamw", "adamw8bit", "muon"), help="optimizer. muon learns faster from random weights. adamw8bit keeps a quarter of adamw's state, and requires bitsandbytes (on a GPU) or torchao (default: muon, or adamw for pretrained weights that are not distilled)")
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="linear", help="schedule of the learning rate. constant ignores --lr_warmup_steps")
    group.add_argument("--lr_warmup_steps", type=integer(0), default=50, help="optimizer steps from 0 to the peak learning rate")
    group.add_argument("--max_grad_norm", type=real(0), default=1.0, help="limit of the gradient's norm. 0: no clipping")
    parser.switch(group, "--use_ema", True, "use of the exponential moving average of the weights (EMA) for samples and saved models")
    group.add_argument("--ema_max_decay", type=real(0, 1), default=0.999, help="upper limit of the average's decay")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="precision of the model's arithmetic (default: that of the accelerate config)")

    group = parser.group("run")
    group.add_argument("--output_dir", metavar="DIR", help="folder for all output of the run")
    group.add_argument("--seed", type=integer(0, 2**31), default=0, help="seed of weights, order, crops, noise and samples")
    group.add_argument("--logging_steps", type=integer(1), default=10, help="optimizer steps between logged losses")
    group.add_argument("--checkpointing_steps", type=integer(1), default=500, help="optimizer steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=integer(1), default=2, help="checkpoints to keep, newest first")
    group.add_argument("--resume_from_checkpoint", metavar="latest|DIR", help="checkpoint to resume from (default: latest, the newest in --output_dir, or a new run if there is none)")

    group = parser.group("samples")
    group.add_argument("--sample_steps", type=integer(1), default=500, help="optimizer steps between sample grids")
    group.add_argument("--num_samples", type=integer(1), default=64, help="images in a grid")
    group.add_argument("--sample_batch_size", type=integer(1), default=64, help="images sampled at once, per process")
    if draws:
        group.add_argument("--num_inference_steps", type=integer(1, 1000), help="sampling steps of each image")
    for add_arguments in optional.collect("add_arguments"):
        add_arguments(parser)
# fmt: on
