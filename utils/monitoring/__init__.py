"""Curves of a run: in TensorBoard, W&B and other trackers, and as a picture."""

from ..args import Parser


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flag that names the trackers."""
    parser.group("run").add_argument("--report_to", metavar="TRACKER", default="tensorboard", help="names of trackers, separated by commas: tensorboard, wandb, trackio, or another that accelerate supports. Also all, or none")
# fmt: on


def take_part(run):
    """Return the logger of a training run's curves, see ``curves.MetricLogger``."""
    from .curves import MetricLogger

    return MetricLogger(run.args.report_to)
