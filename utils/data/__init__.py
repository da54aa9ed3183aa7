"""Images to train on: where they come from, how they are decoded, and in what order they arrive.

``load_train_data`` makes a ``TrainData`` of the flags, or of ``own_images.OwnImages``; a script iterates over its
``batches``.
"""

from .datasets import TrainData, load_train_data

__all__ = ["TrainData", "load_train_data"]
