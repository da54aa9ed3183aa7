"""The model card, and the path to the Hub."""

from ..args import Parser


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags that a run needs to push its model; push.py has all of them."""
    group = parser.group("Hub")
    parser.switch(group, "--push_to_hub", False, "push the model at the end; log in with `hf auth login` or HF_TOKEN")
    add_hub_arguments(parser, group)
    parser.checks.append(_check)


def add_hub_arguments(parser: Parser, group) -> None:
    """Add the flags that say where a model goes on the Hub."""
    group.add_argument("--hub_model_id", metavar="ID", help="USER/NAME, or NAME in the user's own account (default: the name of the output folder)")
    parser.switch(group, "--hub_private_repo", False, "a private repository; an existing public one is refused")


def _check(parser: Parser, args) -> None:
    for flag in ("hub_model_id", "hub_private_repo"):
        if vars(args)[flag] and not args.push_to_hub:
            parser.error(f"--{flag} needs --push_to_hub")
# fmt: on


def take_part(run):
    """Write the page of a run's model, and push it, see ``published_run.PublishedRun``."""
    from .published_run import PublishedRun

    return PublishedRun()


def update_card(folder) -> None:
    """Write a finished run's page again, where something in its folder has changed."""
    from .model_card import write_card

    write_card(folder, folder)
