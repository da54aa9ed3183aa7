"""Images to train on: where they come from, how they are decoded, and in what order they arrive.

``load_train_data`` goes from the flags to a ``TrainData``, whose ``batches`` a script iterates over.
"""

from .datasets import TrainData, load_train_data

__all__ = ["TrainData", "load_train_data"]
