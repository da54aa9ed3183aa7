"""The model card of a run, and its upload to the Hub."""

from ..args import Parser


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags of a run that pushes its model; push.py has more of them."""
    group = parser.group("Hub")
    parser.switch(group, "--push_to_hub", False, "upload of the model at the end. Log in first, with `hf auth login` or HF_TOKEN")
    add_hub_arguments(parser, group)
    parser.checks.append(_check)


def add_hub_arguments(parser: Parser, group) -> None:
    """Add the flags for the repository of a model on the Hub."""
    group.add_argument("--hub_model_id", metavar="ID", help="repository on the Hub: USER/NAME, or NAME in the user's own account (default: the name of the output folder)")
    parser.switch(group, "--hub_private_repo", None, "a private repository. An existing public one is refused. --no-hub_private_repo: the account's visibility, mostly public (default: private unless the training images are public)")


def _check(parser: Parser, args) -> None:
    for flag in ("hub_model_id", "hub_private_repo"):
        if vars(args)[flag] is not None and not args.push_to_hub:
            parser.error(f"--{flag} needs --push_to_hub")
# fmt: on


def take_part(run):
    """Return the publication of a training run, see ``published_run.PublishedRun``."""
    from .published_run import PublishedRun

    return PublishedRun()


def update_card(folder) -> None:
    """Update the model card of a finished run after a change in its folder."""
    from .model_card import write_card

    write_card(folder, folder)
