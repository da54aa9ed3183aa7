"""Push the output folder of a training script to the Hub: the model, its card, pictures and settings.

    python push.py outputs/ddpm --hub_model_id me/digits --space

Run `hf auth login` first, or set HF_TOKEN. If you repeat the command, it sends only what is missing or has changed.
"""

from utils.args import Parser, real
from utils.exits import run_script
from utils.publishing import add_hub_arguments


# fmt: off
def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("output_dir", metavar="folder", help="output folder of a run")
    parser.add_argument("--evaluation", metavar="FILE", help="results.json of evaluate.py, for the numbers on the card")
    parser.add_argument("--space", metavar="ID", nargs="?", const="", help="push of a Space that runs demo.py, too, by its id (without ID: the model's id)")
    group = parser.add_argument_group("Hub (defaults of --hub_model_id and --hub_private_repo: those of the run)")
    add_hub_arguments(parser, group)
    group.add_argument("--hub_revision", metavar="BRANCH", help="branch to push to (default: main)")
    parser.switch(group, "--hub_logs", False, "upload of TensorBoard's files, too, which the Hub shows. They may hold pictures of training images")
    group.add_argument("--hub_license", metavar="LICENSE", help="the model's licence, for its card: apache-2.0, cc-by-4.0, openrail, other ... (default: unknown)")
    group.add_argument("--hub_dataset_name", metavar="NAME", help="name of the training images on the model's page (default: their name on the Hub, or none for own images)")
    group.add_argument("--hub_timeout", type=real(4), default=1800.0, help="seconds of failed attempts before a push is given up")
    return parser.parse(argv)
# fmt: on


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    from pathlib import Path

    from utils import UserError, read_record
    from utils.publishing.hub import Hub
    from utils.publishing.model_card import write_card
    from utils.publishing.space import Space
    from utils.saved import INDEX, is_saved
    from utils.training.output_dir import read_arguments
    from utils.training.process import start_process

    folder = Path(args.output_dir)
    if not is_saved(folder):
        raise UserError(f"{folder} is not a folder with a model. Expected the output of a training script")
    if (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is a checkpoint. Give the run's folder, {folder.parent}")
    if args.space is not None and not (folder / INDEX).is_file():
        raise UserError(f"--space: {folder} is an autoencoder, which draws nothing. Leave the flag out")
    recorded = read_arguments(folder).get("arguments", {})
    private = args.hub_private_repo if args.hub_private_repo is not None else recorded.get("hub_private_repo")
    card = dict(license=args.hub_license, dataset_name=args.hub_dataset_name)
    if args.evaluation:
        try:
            card["evaluation"] = read_record(Path(args.evaluation))
            write_card(folder, folder, **card)
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--evaluation {args.evaluation}: {error}. Expected results.json of evaluate.py") from error
    start_process(None)
    hub = Hub(
        folder, args.hub_model_id or recorded.get("hub_model_id"), private, args.hub_revision, args.hub_logs,
        args.hub_timeout, **card,
    )  # fmt: skip
    hub.check()
    hub.push()
    if args.space is not None:
        space = Space(hub, args.space)
        space.check()
        space.push()


if __name__ == "__main__":
    run_script(main, parse_args)
