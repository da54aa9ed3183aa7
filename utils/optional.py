"""The optional folders of ``utils/``. Delete one, and nothing else: its flags are gone, and every run does without it.

A folder's ``__init__.py`` may have

* ``add_arguments(parser)``: add its flags. It is called while flags are parsed, so it imports nothing slow;
* ``take_part(run)``: return an object for a training run, see ``Parts``;
* ``explain(error, args)`` and ``ended(code, final)``: see ``exits``;
* ``load(args, ...)``, in ``sources`` alone: see ``data.train_data``.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

FOLDERS = ("sources", "resilience", "monitoring", "evaluation", "publishing")  # in this order they take part


@functools.cache
def find(name: str) -> ModuleType | None:
    """Import one of the folders; None where it has been deleted."""
    there = (Path(__file__).parent / name / "__init__.py").is_file()
    return importlib.import_module(f"{__package__}.{name}") if there else None


def collect(name: str) -> list:
    """Return what all folders that are there have of this name."""
    modules = [module for module in map(find, FOLDERS) if module]
    return [getattr(module, name) for module in modules if hasattr(module, name)]


class Parts:
    """The objects with which the optional folders take part in a run.

    Each has any of these methods. They are called on all processes; ``saved`` may be called on the main one alone:

    * ``claimed(run)``: the output folder is this run's;
    * ``load_state(run, state)``: here is what ``state`` has put into the checkpoint;
    * ``resumed(run)``: weights and global step are there; ``started(run)``: the first step follows;
    * ``global_batches(run)``: return the global batch of each optimizer step of the whole run;
    * ``measured(run, losses, timesteps, labels)``: a micro-step, see ``Run.end_of_step``;
    * ``stepped(run)``: an optimizer step;
    * ``checked(run, step, loss, norm)``: a finite loss, when it is looked at;
    * ``diverged(run, problem, entry)``: another one, see ``Run.diverged``;
    * ``logged(run, losses, norms)``: a point of the curves; ``pictured(run, name, picture, caption)``: a picture;
    * ``paused(run)``: something else than training has taken time;
    * ``state(run)``: return a dictionary for the checkpoint, ready for JSON;
    * ``saved(run, folder)``: a pipeline is saved in a folder;
    * ``finished(run)``: model and samples are saved; ``released(run)``: the last lines are printed;
    * ``closed(run)``: it has ended, in whatever way.
    """

    def __init__(self, run):
        self.run, self.all = run, [take_part(run) for take_part in collect("take_part")]

    def ask(self, event: str, *values) -> list:
        """Call this method of all that have it, and return what they return."""
        return [getattr(part, event)(self.run, *values) for part in self.all if hasattr(part, event)]
