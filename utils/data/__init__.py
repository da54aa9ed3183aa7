"""Images to train on: where they come from, how they are decoded, and in what order they arrive.

``load_train_data`` makes a ``TrainData`` of the flags, or of ``OwnImages``; a script iterates over its ``batches``.
"""

from .datasets import TrainData, load_train_data
from .sources import OwnImages

__all__ = ["OwnImages", "TrainData", "load_train_data"]
