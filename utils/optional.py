"""The optional folders of ``utils/``. Delete one, and nothing else: its flags are gone, and every run does without it.

A folder's ``__init__.py`` may have

* ``add_arguments(parser)``: add its flags. It is called while flags are parsed, so it imports nothing slow;
* ``take_part(run)``: return an object for a training run, with any of the methods that ``training.loop.Run`` names;
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
