"""Evaluation: held-out loss and sample quality during training, metrics and reports afterwards."""

from .. import optional
from ..args import Parser, integer


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags of validation and evaluation during training."""
    if optional.find("sources"):
        group = parser.group("validation")
        group.add_argument("--validation_split", help="held-out split for a loss curve, for example train[90%%:]")
        group.add_argument("--prior_dataset_name", metavar="NAME[:SPLIT]", help="data set like that of the pretrained model. Its loss curve shows how much the model forgets")
        group.add_argument("--validation_steps", type=integer(1), help="optimizer steps between validations (default: --sample_steps)")

    group = parser.group("evaluation while training")
    group.add_argument("--evaluate_steps", type=integer(1), help="optimizer steps between evaluations. Each evaluation adds a point to two curves: fd and kid against training images. The pipeline with the lowest fd is kept in OUTPUT_DIR/best")
    group.add_argument("--num_evaluation_samples", type=integer(10), default=1000, help="number of samples, which are compared with as many training images. More samples take longer, and the result is more precise")
    add_features_arguments(group)


def add_features_arguments(group) -> None:
    """Add the flag for the features that images are compared by."""
    group.add_argument("--features", metavar="NAME[=MODEL]", type=_features_type, help="features that images are compared by: digits, efficientnet, pixels, dinov2, clip or inception. dinov2 and clip accept a model: dinov2=ID_OR_FOLDER (default: digits for images of digits, otherwise efficientnet)")
# fmt: on


def _features_type(text: str) -> str:
    """Return the value of ``--features`` if it is valid: a name, with or without a model."""
    import argparse

    name, equals, _ = text.partition("=")
    known = ("digits", "efficientnet", "pixels", "dinov2", "clip", "inception")
    if name not in known or (equals and name not in ("dinov2", "clip")):
        raise argparse.ArgumentTypeError(
            f"unknown features {text!r}. Expected {', '.join(known)}, dinov2=MODEL or clip=MODEL"
        )
    return text


def take_part(run):
    """Return the evaluation of a training run, see ``while_training.Evaluation``."""
    from .while_training import Evaluation

    return Evaluation()
