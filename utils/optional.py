"""The optional folders of ``utils/``. When one is deleted, its flags are gone, and every script runs without it.

A folder's ``__init__.py`` may have

* ``add_arguments(parser)``: add its flags. It imports nothing slow, because it is called while flags are parsed;
* ``take_part(run)``: return an object for a training run, see ``Parts``;
* ``explain(error, args)`` and ``ended(code, final)``: see ``exits``;
* ``load(args, ...)``, in ``sources`` only: see ``data.train_data``.
"""

import functools
import importlib
from pathlib import Path
from types import ModuleType

FOLDERS = ("sources", "resilience", "monitoring", "evaluation", "publishing")  # in the order in which they are called


@functools.cache
def find(name: str) -> ModuleType | None:
    """Import and return one of the folders, or return None if it was deleted."""
    there = (Path(__file__).parent / name / "__init__.py").is_file()
    return importlib.import_module(f"{__package__}.{name}") if there else None


def collect(name: str) -> list:
    """Return the attribute of this name from each folder that has one."""
    modules = [module for module in map(find, FOLDERS) if module]
    return [getattr(module, name) for module in modules if hasattr(module, name)]


class Parts:
    """The objects with which the optional folders take part in a run.

    Each may have any of these methods. They are called on all processes; ``saved`` may be called on the main one alone:

    * ``claimed(run)``: the output folder is reserved for this run;
    * ``load_state(run, state)``: a checkpoint is loaded, with the dictionary that ``state`` returned;
    * ``resumed(run)``: weights and global step are loaded; ``started(run)``: the first step follows;
    * ``global_batches(run)``: return the number of the global batch of each optimizer step of the whole run;
    * ``measured(run, losses, timesteps, labels)``: a micro-step has ended, see ``Run.end_of_step``;
    * ``stepped(run)``: an optimizer step has ended;
    * ``diverged(run, problem, entry)``: a step diverged, see ``Run.diverged``;
    * ``logged(run, losses, norms)``: there is a new point of the curves;
    * ``pictured(run, name, picture, caption)``: there is a new picture;
    * ``paused(run)``: time was spent on something other than training;
    * ``state(run)``: return a dictionary for the checkpoint, ready for JSON;
    * ``saved(run, folder)``: a pipeline is saved in a folder;
    * ``finished(run)``: model and samples are saved; ``released(run)``: the last lines are printed;
    * ``closed(run)``: the run has ended, in any way.
    """

    def __init__(self, run):
        self.run, self.all = run, [take_part(run) for take_part in collect("take_part")]

    def ask(self, event: str, *values) -> list:
        """Call the method ``event`` of all objects that have it, and return their results."""
        return [getattr(part, event)(self.run, *values) for part in self.all if hasattr(part, event)]
