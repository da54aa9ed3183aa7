"""How good a model is: held-out loss and sample quality while it trains, metrics and reports after it."""

from .. import optional
from ..args import Parser, integer


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags of validation and evaluation while a model trains."""
    if optional.find("sources"):
        group = parser.group("validation")
        group.add_argument("--validation_split", help="split held out from training, for a loss curve; for example train[90%%:]")
        group.add_argument("--prior_dataset_name", metavar="NAME[:SPLIT]", help="images that the pretrained model was made for: a loss curve that shows forgetting")
        group.add_argument("--validation_steps", type=integer(1), help="optimizer steps between validations (default: --sample_steps)")

    group = parser.group("evaluation while training")
    group.add_argument("--evaluate_steps", type=integer(1), help="optimizer steps between evaluations: curves of fd and kid against training images; the pipeline with the lowest fd is kept in OUTPUT_DIR/best")
    group.add_argument("--num_evaluation_samples", type=integer(10), default=1000, help="samples, and as many training images; more make it surer and slower")
    add_features_arguments(group)


def add_features_arguments(group) -> None:
    """Add the flag that says what images are compared by."""
    group.add_argument("--features", metavar="NAME[=MODEL]", type=_features_type, help="what images are compared by: digits, efficientnet, pixels, dinov2, clip or inception; of dinov2 and clip also a model: dinov2=ID_OR_FOLDER (default: digits where the images are digits, else efficientnet)")
# fmt: on


def _features_type(text: str) -> str:
    """An argparse type: the name of features, with or without a model."""
    import argparse

    name, equals, _ = text.partition("=")
    known = ("digits", "efficientnet", "pixels", "dinov2", "clip", "inception")
    if name not in known or (equals and name not in ("dinov2", "clip")):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}, nor dinov2=MODEL, nor clip=MODEL")
    return text


def take_part(run):
    """Measure a model while it trains, see ``while_training.Evaluation``."""
    from .while_training import Evaluation

    return Evaluation()
