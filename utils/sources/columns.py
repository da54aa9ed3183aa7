"""Selection of the columns of a data set that hold the images and the classes."""

import logging
import math
import os
from collections import Counter
from pathlib import Path

import datasets
import numpy as np

from .. import UserError, randomness
from ..data.own_images import MAX_CLASSES
from .folders import SPLITS, walk

logger = logging.getLogger(__name__)


class NoLabels(UserError):
    """The data set has no column of class labels."""


def select_columns(dataset, source):
    """Return the data set with only the columns that ``source`` names.

    They are ``image`` (not decoded), ``label`` and ``column:NAME``. Images may be of type Image, encoded bytes,
    {bytes, path}, paths, or arrays, see ``decoding.open_row``.

    Raises:
        UserError: no column matches, several match, or the values do not fit. The message lists the columns.
    """
    if dataset.features is None:  # a stream without a description of its columns
        dataset = dataset._resolve_features()
    columns = dict(dataset.features)
    listing = ", ".join(f"{key} ({getattr(kind, '_type', type(kind).__name__)})" for key, kind in columns.items())
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    images = images or [key for key, kind in columns.items() if isinstance(kind, dict) and "bytes" in kind]
    if source.image_column is None and len(images) != 1:
        problem = "no column of images" if not images else f"{len(images)} columns of images: {', '.join(images)}"
        raise UserError(
            f"{source.name} has {problem}. Name one with --image_column. The columns are {listing}"
            + ". To read a folder of image files, use --train_data_dir" * (source.flags["name"] == "--dataset_name")
        )
    image_column = source.image_column or images[0]
    if not _may_hold_images(columns.get(image_column)):
        raise UserError(
            f"--image_column {image_column}: not a column of images, bytes, paths or arrays. {source.name} has the "
            f"columns {listing}"
        )
    selected = {image_column: "image"}
    label_column = source.label_column
    if label_column is None and source.find_labels:
        found = [key for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
        if len(found) != 1:
            raise (UserError if found else NoLabels)(
                f"{source.name} has {len(found) or 'no'} columns of class labels. Name one with --label_column. It "
                f"must be of type ClassLabel, integers or strings. The columns are {listing}"
                + ("" if found else ". train_conditional.py --clusters needs no labels")
            )
        label_column = found[0]
    if label_column is not None:
        selected[label_column] = "label"
    if label_column is not None and label_column == image_column:
        raise UserError(f"--label_column {label_column}: this is the column of images. The columns are {listing}")
    for name, column in source.columns.items():
        key = f"column:{name}" if isinstance(column.source, Path) else column.source
        if key not in columns:
            folder = f". For the folder, use Column(Path({key!r}))" * Path(key).is_dir()
            raise UserError(f"columns: {source.name} has no {key!r} for {name}. Its columns are {listing}{folder}")
        if key in selected:
            raise UserError(f"columns: {key!r} of {source.name} is already {selected[key]}, so it cannot be {name}")
        selected[key] = f"column:{name}"
    classes = {key: kind for key, kind in columns.items() if isinstance(kind, datasets.ClassLabel)}
    dataset = dataset.select_columns([key for key in {**selected, **classes} if key in columns])
    for key in selected:
        if isinstance(columns.get(key), datasets.Image):
            dataset = dataset.cast_column(key, datasets.Image(decode=False))
    if source.max_samples is not None:
        dataset = _sample(dataset, source)
    if not source.streaming and ("[" in source.split or source.max_samples is not None):
        _warn_of_lacking_classes(classes, dataset, source)
    if label_column is not None and not isinstance(columns.get(label_column), datasets.ClassLabel):
        dataset = _encode_labels(dataset, columns.get(label_column), label_column, source, listing)
    if label_column is not None and not source.streaming:
        without = sum(label in (None, -1) for label in dataset[label_column])
        if without:
            logger.warning(f"{source.name}: {without} of {len(dataset)} images have no class in {label_column}")
    if label_column is not None and source.find_labels and not source.streaming:
        dataset = _drop_empty_classes(dataset, label_column, source)
    dataset = dataset.select_columns([*selected])
    return dataset.rename_columns({old: new for old, new in selected.items() if old != new})


def _sample(dataset, source):
    """Return ``max_samples`` random rows in order, or the first rows for a stream."""
    if source.streaming or source.max_samples >= len(dataset):
        return dataset.take(source.max_samples)
    chosen = randomness.shuffled_indices(source.seed, np.arange(source.max_samples), len(dataset))
    return dataset.select(np.sort(chosen))


def _warn_of_lacking_classes(classes: dict, dataset, source) -> None:
    """Warn of classes that have no image in a slice or a sample, as happens in slices of sorted data."""
    for key, kind in classes.items():
        present = {*dataset.with_format(None)[key]}
        lacking = [name for code, name in enumerate(kind.names) if code not in present]
        if lacking and len(lacking) < len(kind.names):
            logger.warning(
                f"{source.flag_label('split')}: no image for {len(lacking)} of the {len(kind.names)} classes in {key}: "
                f"{', '.join(lacking[:5])}. The data may be sorted. Choose parts that have all classes. "
                "In a folder, make the sub-folders train/CLASS and test/CLASS"
            )


def _drop_empty_classes(dataset, column: str, source):
    """Return the data set without the classes that have no image. Filtered data still list such classes."""
    names, values = dataset.features[column].names, dataset[column][:]
    present = sorted({value for value in values if value not in (None, -1)})
    if not present or len(present) == len(names):
        return dataset
    empty = [name for code, name in enumerate(names) if code not in present]
    logger.warning(
        f"{source.name}: left out {len(empty)} of the {len(names)} classes in {column}, because no image has them: "
        f"{', '.join(empty[:5])}"
    )
    codes = {code: new for new, code in enumerate(present)}
    feature = datasets.ClassLabel(names=[names[code] for code in present])
    return dataset.remove_columns(column).add_column(column, [codes.get(v, -1) for v in values], feature=feature)


def add_paired_files(dataset, source):
    """Add a column of paths for each folder in ``source.columns``: the partner of an image has the same name there.

    Raises:
        UserError: the images are not files, or some have no partner. The message names the first of these images.
    """
    for name, column in source.columns.items():
        if not isinstance(column.source, Path):
            continue
        label = "--condition_dir" if name == "condition" else f"columns: the folder of {name},"
        label = f"{label} {column.source}"
        if not column.source.is_dir():
            raise UserError(f"{label} is missing. Expected files with the names of the images")
        files = {}
        for path in walk(column.source)[0]:
            files.setdefault(Path(path).relative_to(column.source).with_suffix(""), []).append(path)
        key = source.image_column or "image"
        if source.streaming or key not in dataset.features:
            raise UserError(f"{label} needs images in a folder, not streamed. Name a column of the data set instead")
        if isinstance(dataset.features[key], datasets.Image):
            dataset = dataset.cast_column(key, datasets.Image(decode=False))
        records = [row if isinstance(row, str) else (row or {}).get("path") for row in dataset[key]]
        if not all(records):
            raise UserError(f"{label}: {source.name} has images that are not files. Name a column of the data instead")
        root = Path(source.name).expanduser()
        names = [Path(os.path.relpath(record, root)).with_suffix("") for record in records]
        if {*names} & {*files} == set():  # the folder may have no folders for the splits
            splits = {name.parts[0] for name in names if name.parts[0].lower() in SPLITS}
            names = [Path(*name.parts[1:]) if name.parts[0] in splits else name for name in names]
            for other in sorted(root.iterdir() if splits else ()):
                if other.name.lower() not in SPLITS or other.name in splits or not other.is_dir():
                    continue
                taken = {Path(os.path.relpath(path, other)).with_suffix("") for path in walk(other)[0]}
                if shared := [name for name in names if name in taken and name in files]:
                    raise UserError(
                        f"{label}: {shared[0]} is the partner of an image in {min(splits)} and of one in {other.name} "
                        f"({len(shared)} partners in all). Expected a folder for each split, such as "
                        f"{column.source / min(splits)} and {column.source / other.name}"
                    )
        if several := [name for name, count in Counter(names).items() if count > 1 or len(files.get(name, [])) > 1]:
            raise UserError(
                f"{label}: several files have the same name, such as {several[0]} ({len(several)} in all). Expected "
                "one image and one partner of each name, in folders of the same names"
            )
        partners = [files.get(name, [None])[0] for name in names]
        if missing := [record for record, partner in zip(records, partners, strict=True) if not partner]:
            raise UserError(
                f"{label} has no partner for {len(missing)} of {len(records)} images: {', '.join(missing[:3])}. "
                "Expected files of the same names, in folders of the same names"
            )
        dataset = dataset.add_column(f"column:{name}", [str(partner) for partner in partners])
    return dataset


def _encode_labels(dataset, kind, column: str, source, listing: str):
    """Turn a column of integers or strings into a ClassLabel column. A missing label is -1."""
    values = [] if source.streaming or kind is None else dataset[column][:]
    if isinstance(kind, datasets.Value) and kind.dtype == "bool":
        values, kind = [None if value is None else str(value) for value in values], datasets.Value("string")
    integers = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint"))
    if isinstance(kind, datasets.Value) and kind.dtype.startswith("float"):  # whole numbers with missing values
        values = [None if value is None or math.isnan(value) else value for value in values]
        integers = all(value is None or value.is_integer() for value in values)
        values = [None if value is None else int(value) for value in values] if integers else values
    if source.streaming or not (integers or (isinstance(kind, datasets.Value) and "string" in kind.dtype)):
        asked = "of type ClassLabel, as streams need" if source.streaming else "of class labels, integers or strings"
        raise UserError(f"--label_column {column}: not a column {asked}. {source.name} has the columns {listing}")
    names = sorted({value for value in values if value is not None and value != -1})
    if -1 in values and len(names) == 1:
        raise UserError(
            f"--label_column {column}: the values are -1 and {names[0]!r}, and -1 means that an image has no class. If "
            "both are classes, replace -1 by another value"
        )
    if len(names) > MAX_CLASSES:
        raise UserError(f"--label_column {column}: {len(names)} different values. Expected at most {MAX_CLASSES}")
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
