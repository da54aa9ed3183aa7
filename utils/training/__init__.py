"""What every run needs, whatever it trains: set-up, the output folder, checkpoints, the averaged weights, curves, exit.

``run`` is used as a module: ``run.make_accelerator``, ``run.start``, ``run.finish``.
"""

from . import run
from .curves import TrainingCurves
from .ema import EMA
from .optimizer import make_optimizer
from .output_dir import claim_output_dir, resume, save

__all__ = ["EMA", "TrainingCurves", "claim_output_dir", "make_optimizer", "resume", "run", "save"]
