"""A folder of image files as a data set: every file that Pillow reads, whatever its name.

The loader of ``datasets`` interprets names: a folder ``train`` hides the folders ``bus`` and ``car`` beside it, ``[1]``
is a pattern, and links are not followed. Therefore this module lists the files itself, and makes a data set of their
paths without decoding the images.
"""

import csv
import importlib.util
import json
import logging
import os
import re
from collections import Counter
from itertools import takewhile
from pathlib import Path, PurePath

import datasets
import pyarrow.parquet
from PIL import Image, ImageFile

from .. import UserError

logger = logging.getLogger(__name__)

SPLITS = {  # names of folders, and the names that datasets has for these splits
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
HEIC = {".heic", ".heif", ".hif"}
IGNORED_FOLDERS = ("__MACOSX", "__pycache__")


def image_extensions() -> set[str]:
    """Return the extensions, in lower case, of the files that the installed Pillow can open. HEIC needs pillow-heif."""
    if importlib.util.find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()
    extensions = set()
    for extension, name in Image.registered_extensions().items():
        opener = Image.OPEN.get(name, [None])[0]
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if name == "MPO" or (opener and not stub and name != "MPEG"):  # Pillow cannot decode the others
            extensions.add(extension.lower())
    return extensions


def walk(folder: Path) -> tuple[list[str], list[str], Counter]:
    """Return the sorted image files and metadata files below a folder, and the counts of other files by extension.

    Links are followed, and no folder is entered twice. Hidden files and folders (names that begin with a dot) and
    ``IGNORED_FOLDERS`` are skipped.
    """
    extensions, images, metadata, others = image_extensions(), [], [], Counter()
    special = []
    folders, links, entered = [os.fspath(folder)], [], set()
    while folders or links:  # links come last, so that a folder is listed under its own name
        place = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(place)) in entered:
            logger.warning(f"{place} is skipped, because it links to a folder that was already read: {real}")
            continue
        entered.add(real)
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            extension = os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # False for a link that leads to itself
                if entry.name not in IGNORED_FOLDERS:
                    (links if entry.is_symlink() else folders).append(entry.path)
            elif os.path.exists(entry.path) and not os.path.isfile(entry.path):  # reading a pipe would block
                special.append(entry.path)
            elif entry.name.lower() in METADATA:
                metadata.append(entry.path)
            elif extension in extensions:
                images.append(entry.path)
            else:
                others[extension or entry.name] += 1
    if special:
        logger.warning(f"{folder}: skipped pipes and other special files ({len(special)}): {', '.join(special[:3])}")
    return sorted(images), sorted(metadata), others


def load_folder(folder: Path, label_column: str | None = None) -> dict[str, datasets.Dataset]:
    """Load the images below a folder, by split.

    The splits are the folders that ``SPLITS`` names, if no other folders lie beside them. They may lie inside folders
    that contain all images. Images beside a folder for train are skipped. In all other cases, the only split is train.
    Within a split, the classes are the folders at the first level at which the names differ. They are the column
    ``label``.

    Args:
        label_column: column of metadata.csv, .jsonl or .parquet to keep, if one of them has it.

    Returns:
        Data sets by split, with ``image`` (not decoded) and perhaps labels; no data set if there are no images.

    Raises:
        UserError: the metadata with the labels cannot be used, or a file name is not UTF-8.
    """
    files, metadata, others = walk(folder)
    if not files:
        return {}
    if others:
        listing = ", ".join(f"{extension} ({count})" for extension, count in others.most_common(10))
        heic = ". For HEIC: pip install pillow-heif" if HEIC & {*others} else ""
        logger.warning(f"{folder}: skipped files that Pillow does not read ({others.total()}): {listing}{heic}")
    if bad := [file for file in files if not file.isprintable() and "\\udc" in ascii(file)]:
        raise UserError(f"{folder}: the file name {bad[0]!a} is not UTF-8. Rename the file")
    parts = [PurePath(os.path.relpath(file, folder)).parent.parts for file in files]
    files, parts, splits = _find_splits(folder, files, parts)
    classes = [None] * len(files)
    for split in {*splits}:
        rows = [row for row, other in enumerate(splits) if other == split]
        first, last = min(parts[row] for row in rows), max(parts[row] for row in rows)
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))])
        if shared and {*splits} != {"train"} and len({*parts}) > 1 and first == last:
            shared -= 1  # this split has one class, but another split has others
        for row in rows:  # a folder that holds all images is not a class
            classes[row] = parts[row][shared] if len(parts[row]) > shared else None
    columns, features = {"image": files}, {"image": datasets.Image(decode=False)}
    labels = _metadata_labels(files, metadata, label_column)
    if labels is not None:
        columns[label_column] = labels
        kind = "string" if any(isinstance(label, str) for label in labels) else "int64"
        features[label_column] = datasets.Value(kind)
    names = sorted({name for name in classes if name is not None})
    if names and "label" not in columns:
        codes = {name: code for code, name in enumerate(names)}
        columns["label"] = [codes.get(name) for name in classes]
        features["label"] = datasets.ClassLabel(names=names)
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    if set(splits) == {"train"}:
        return {"train": dataset}
    rows = {split: [row for row, other in enumerate(splits) if other == split] for split in dict.fromkeys(splits)}
    return {split: dataset.select(chosen) for split, chosen in rows.items()}


def _find_splits(folder: Path, files: list[str], parts: list[tuple]) -> tuple[list[str], list[tuple], list[str]]:
    """Return the files that are used, and for each file its folders below the split, and its split."""
    wrappers = 0  # number of nested folders that hold all images, not counting images directly in ``folder``
    inside = [above for above in parts if above]
    while len({above[: wrappers + 1] for above in inside if len(above) > wrappers}) == 1 and all(
        len(above) > wrappers and above[wrappers].lower() not in SPLITS for above in inside
    ):
        wrappers += 1
    tops = [above[wrappers].lower() if len(above) > wrappers else None for above in parts]
    found = {top for top in tops if top in SPLITS}
    others = {above[wrappers] for above, top in zip(parts, tops, strict=True) if top and top not in SPLITS}
    loose = [file for file, top in zip(files, tops, strict=True) if top is None]
    if not found or others or (loose and "train" not in map(SPLITS.get, found)):
        if found:
            beside = ", ".join(sorted(others)[:5]) or f"{len(loose)} images"
            logger.warning(
                f"{folder}: folders with names of splits ({', '.join(sorted(found))}) are beside {beside}, so they are "
                "treated as classes and not as splits"
            )
        return files, parts, ["train"] * len(files)
    if loose:
        logger.warning(f"{folder}: skipped images beside the splits ({len(loose)}): {', '.join(loose[:3])}")
    kept = [k for k, top in enumerate(tops) if top is not None]
    return [files[k] for k in kept], [parts[k][wrappers + 1 :] for k in kept], [SPLITS[tops[k]] for k in kept]


def _metadata_labels(files: list[str], metadata: list[str], column: str | None) -> list | None:
    """Return the value of a metadata column for each file (None: missing), or None if no metadata file has it."""
    files = [os.path.abspath(file) for file in files]
    known, values, found = {*files}, {}, None
    for path in metadata:
        try:
            rows = _read_rows(path)
        except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:  # also UnicodeError, JSONDecodeError
            message = f"{path} cannot be read: {type(error).__name__}: {error}"
            if column is not None:
                raise UserError(f"{message}. Repair or remove the file") from error
            logger.warning(f"{message}. The images are used without this file")
            continue
        has_column = column is not None and any(column in row for row in rows)
        if not any("file_name" in row for row in rows):
            if has_column:
                raise UserError(f"{path} has {column}, but no column file_name with the names of the images")
            continue
        found = path if has_column else found
        missing = []
        for row in rows:
            name = str(row.get("file_name") or "").replace("\\", "/")
            file = os.path.abspath(os.path.join(os.path.dirname(path), name))
            if file not in known:
                missing.append(name)
            elif has_column:
                value = row.get(column)
                if values.setdefault(file, value) != value:
                    raise UserError(
                        f"{path}: {name} has two rows, with the {column} {values[file]!r} and {value!r}. Expected one "
                        "row for each image"
                    )
        if missing:
            logger.warning(
                f"{path}: no image exists for {len(missing)} of its {len(rows)} rows: {', '.join(missing[:5])}"
            )
    if not found:
        return None
    labels = [None if values.get(file) in (None, "") else values[file] for file in files]
    if not {*map(type, labels)} & {int, float, str, bool} or {*map(type, labels)} & {list, dict}:
        raise UserError(f"{found}: {column} has no integers or strings for these images. Expected one for each image")
    whole = all(label is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", str(label)) for label in labels)
    return [None if label is None else int(label) if whole else str(label) for label in labels]


def _read_rows(path: str) -> list[dict]:
    if path.lower().endswith(".parquet"):
        return pyarrow.parquet.read_table(path).to_pylist()
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.lower().endswith(".csv"):
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)
            return list(csv.DictReader(file, delimiter=delimiter))
        rows = [json.loads(line) for line in file if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def has_tables(folder: Path) -> bool:
    """Return whether a folder holds tables for ``datasets``, as a copy of a Hub repository does."""
    names = (name for _, _, names in os.walk(folder) for name in names if name.lower() not in METADATA)
    return any(name.lower().endswith((".parquet", ".arrow")) for name in names)
