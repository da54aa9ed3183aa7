"""Push the output folder of a training script to the Hub: the model, its card, pictures and settings.

    python push.py outputs/ddpm --hub_model_id me/digits --space

Run `hf auth login` before, or set HF_TOKEN. Run again, it sends what is missing or has changed.
"""

from utils.args import Parser, add_hub_arguments


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument("output_dir", metavar="folder", help="a run's folder, with model_index.json")
    parser.add_argument(
        "--evaluation", metavar="FILE", help="results.json of evaluate.py; its numbers go into the card"
    )
    parser.add_argument(
        "--space", metavar="ID", nargs="?", const="", help="also a Space with demo.py; its id (default: the model's)"
    )
    add_hub_arguments(parser.add_argument_group("Hub (defaults: what the run was started with)"))
    parser.set_defaults(hub_private_repo=None, hub_logs=None, hub_license=None)
    return parser.parse(argv)


def main(args):
    # Imports that take seconds come after parsing, so that --help answers at once
    import json
    from pathlib import Path
    from types import SimpleNamespace

    from utils import UserError
    from utils.publishing import Hub
    from utils.publishing.results import add_results, licensed
    from utils.publishing.space import Space
    from utils.training import run
    from utils.training.output_dir import read_arguments

    folder = Path(args.output_dir)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is not a folder with a pipeline; expected the output of a training script")
    if (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is a checkpoint; give the run's folder, {folder.parent}")
    settings = {**vars(args), "hub_private_repo": False, "hub_logs": False, "logging_dir": "logs"}
    recorded = read_arguments(folder).get("arguments", {})
    names = ("hub_model_id", "hub_private_repo", "hub_revision", "hub_logs", "logging_dir")
    settings |= {name: recorded[name] for name in names if name in recorded}
    settings |= {name: value for name, value in vars(args).items() if value is not None}
    settings |= dict(push_to_hub=True, hub_strategy="end", push_required=False)
    if args.evaluation:
        try:
            add_results(folder, json.loads(Path(args.evaluation).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"--evaluation {args.evaluation}: {error}; expected results.json of evaluate.py") from error
    accelerator = run.start_process(None)
    licensed(folder, args.hub_license)
    hub = Hub(accelerator, SimpleNamespace(**settings))
    hub.push()
    if args.space is not None:
        Space(accelerator, hub).push()


if __name__ == "__main__":
    arguments = parse_args()
    from utils.exits import run_script

    run_script(main, arguments)
