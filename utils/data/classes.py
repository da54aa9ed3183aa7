"""The classes of labelled images."""

import numpy as np

from .. import UserError
from .columns import MAX_CLASSES
from .datasets import TrainData


def check_classes(train_data: TrainData) -> list[str]:
    """The names of the classes; refuses labels that no conditional model can learn from.

    Raises:
        UserError: no labels, too many classes, or some without an image.
    """
    dataset, name, names = train_data._images.dataset, train_data.name, train_data.label_names
    if not names:
        raise UserError(f"{name}: no class labels; give OwnImages labels=, one for each image")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{name} has {len(names)} classes; expected at most {MAX_CLASSES}")
    if train_data.length is not None:
        labels = np.array(dataset.labels if hasattr(dataset, "labels") else dataset["label"][:])
        empty = [label for code, label in enumerate(names) if not (labels == code).any()]
        if empty:
            raise UserError(
                f"{name} has no image of {len(empty)} of its {len(names)} classes: {', '.join(empty[:10])}. Take more "
                "images (--dataset_split, --max_train_samples), or another --label_column"
            )
    return names
