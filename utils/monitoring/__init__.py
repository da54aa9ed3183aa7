"""Curves of a run: in TensorBoard, W&B and other trackers, and as a picture."""

from ..args import Parser


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flag of the trackers."""
    parser.group("run").add_argument("--report_to", metavar="TRACKER", default="tensorboard", help="tracker: tensorboard, wandb, trackio, another of accelerate's, several with commas, all or none")
# fmt: on


def take_part(run):
    """Write the curves of a training run, see ``curves.MetricLogger``."""
    from .curves import MetricLogger

    return MetricLogger(run.args.report_to)
