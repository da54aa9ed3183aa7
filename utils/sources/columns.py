"""Which column of a data set holds the images, and which one the classes."""

import math

import datasets

from .. import UserError
from ..data.own_images import MAX_CLASSES


def select_columns(dataset, source):
    """The columns of images and labels that ``source`` means, as ``image``, not decoded, and ``label``.

    Images may be of type Image, encoded bytes, {bytes, path}, paths, or arrays: ``images.locate`` knows them.

    Raises:
        UserError: none or several columns might be meant, or they hold something else; lists the columns.
    """
    if dataset.features is None:  # a stream that does not say what it holds
        dataset = dataset._resolve_features()
    columns = dict(dataset.features)
    listing = ", ".join(f"{key} ({getattr(kind, '_type', type(kind).__name__)})" for key, kind in columns.items())
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    images = images or [key for key, kind in columns.items() if isinstance(kind, dict) and "bytes" in kind]
    if source.image_column is None and len(images) != 1:
        problem = "no column of images" if not images else f"{len(images)} columns of images: {', '.join(images)}"
        raise UserError(
            f"{source.name} has {problem}. Name one with --image_column; the columns are {listing}"
            + ". A folder of image files is read by --train_data_dir" * (source.flags["name"] == "--dataset_name")
        )
    image_column = source.image_column or images[0]
    if not _may_hold_images(columns.get(image_column)):
        raise UserError(
            f"--image_column {image_column}: not a column of images, bytes, paths or arrays. {source.name} has "
            f"{listing}"
        )
    wanted = {image_column: "image"}
    label_column = source.label_column
    if label_column is None and source.find_labels:
        found = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        if len(found) != 1:
            raise UserError(
                f"{source.name} has {len(found) or 'no'} columns of class labels. Name one with --label_column, of "
                f"type ClassLabel, integers or strings; the columns are {listing}"
            )
        label_column = found[0]
    if label_column is not None:
        wanted[label_column] = "label"
    dataset = dataset.select_columns([key for key in wanted if key in columns])
    if isinstance(columns[image_column], datasets.Image):
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    dataset = dataset if source.max_samples is None else dataset.take(source.max_samples)
    if label_column is not None and not isinstance(columns.get(label_column), datasets.ClassLabel):
        dataset = _encode_labels(dataset, columns.get(label_column), label_column, source, listing)
    return dataset.rename_columns({old: new for old, new in wanted.items() if old != new})


def _encode_labels(dataset, kind, column: str, source, listing: str):
    """A column of integers or strings as a ClassLabel column; a missing one is -1."""
    values = [] if source.streaming or kind is None else dataset[column][:]
    integers = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint"))
    if isinstance(kind, datasets.Value) and kind.dtype.startswith("float"):  # whole numbers, beside missing ones
        values = [None if value is None or math.isnan(value) else value for value in values]
        integers = all(value is None or value.is_integer() for value in values)
        values = [None if value is None else int(value) for value in values] if integers else values
    if source.streaming or not (integers or (isinstance(kind, datasets.Value) and "string" in kind.dtype)):
        asked = "of type ClassLabel, for a stream" if source.streaming else "of class labels, integers or strings"
        raise UserError(f"--label_column {column}: not a column {asked}. {source.name} has {listing}")
    names = sorted({value for value in values if value is not None and value != -1})
    if len(names) > MAX_CLASSES:
        raise UserError(f"--label_column {column}: {len(names)} different values; expected at most {MAX_CLASSES}")
    codes = {value: code for code, value in enumerate(names)}
    feature = datasets.ClassLabel(names=[str(name) for name in names])
    dataset = dataset.remove_columns(column)
    return dataset.add_column(column, [codes.get(value, -1) for value in values], feature=feature)


def _may_hold_images(kind) -> bool:
    if isinstance(kind, datasets.Value):
        return kind.dtype.removeprefix("large_") in ("binary", "string")
    lists = (list, datasets.List, datasets.LargeList)
    return (isinstance(kind, dict) and "bytes" in kind) or isinstance(
        kind, (datasets.Image, datasets.Array2D, datasets.Array3D, *lists)
    )
