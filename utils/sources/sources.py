"""Sources of images: the Hub, a folder, a file, or one of the embedded sets, as one column of images.

Images are not decoded here, because the decoder names unreadable images later.
"""

import errno
import glob
import hashlib
import logging
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import datasets
import datasets.data_files
import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from .. import UserError
from ..data.columns import Column
from ..data.images import given_range
from ..data.own_images import content_of, embedded_digits, embedded_faces
from .columns import add_paired_files, select_columns
from .folders import SPLITS, has_tables, load_folder

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "ylecun/mnist"
EMBEDDED = {"digits": embedded_digits, "faces": embedded_faces}
FILES = {  # builders of ``datasets``, by file extension
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json", ".tar": "webdataset",
}  # fmt: skip


ARRAYS = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)
LARGE = 2**30  # bytes of images in tables above which rows are not compared
LEAK = 0.5  # share of training images among held-out images at which a split is refused


class NoSuchSplit(UserError):
    """The data set has no split of this name."""


@dataclass(frozen=True)
class ImageSource:
    """The description of the images to load, and the names of the flags for messages.

    Attributes:
        name: Hub id, local path, or one of the embedded sets; None for MNIST, or for the digits if MNIST is missing.
        split: split of the data set, or a slice such as train[:1%].
        is_folder: True if ``name`` is a folder of image files.
        config_name: configuration of the data set, if it has several.
        image_column: name of the column of images; None for the only one of type Image.
        label_column: name of a column to keep as ``label``, of type ClassLabel, or of integers or strings, which become
            classes in sorted order.
        max_samples: number of images: a random sample by ``seed``, or the first images with ``streaming``.
        streaming: True to read images only when they are needed.
        find_labels: True to use the only column of type ClassLabel if ``label_column`` is None. Data are refused unless
            they have exactly one such column.
        columns: additional tensors of each row, by name.
        value_range: values that become black and white in colour arrays; None chooses them by the images.
        flags: names of the flags for ``name`` and ``split``.
    """

    name: str | None
    split: str = "train"
    is_folder: bool = False
    config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_samples: int | None = None
    seed: int = 0
    streaming: bool = False
    find_labels: bool = False
    columns: dict[str, Column] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    flags: dict[str, str] = field(default_factory=lambda: {"name": "--dataset_name", "split": "--dataset_split"})

    @classmethod
    def from_args(cls, args) -> "ImageSource":
        """Return the description of the training images that the flags of ``args.add_common_arguments`` name."""
        source = cls(
            args.train_data_dir or args.dataset_name, args.dataset_split, args.train_data_dir is not None,
            args.dataset_config_name, args.image_column, args.label_column, args.max_train_samples,
            seed=args.seed, streaming=args.streaming, value_range=given_range(args.image_range),
        )  # fmt: skip
        return replace(source, flags={**source.flags, "name": "--train_data_dir"}) if source.is_folder else source

    @property
    def split_names(self) -> set[str]:
        """Names of the splits in ``split``, for example train and test for train[:80%]+test."""
        return {part.split("[")[0] for part in self.split.split("+")}

    def flag_label(self, attribute: str) -> str:
        """Return the flag and its value, for messages: ``--dataset_split test``."""
        return f"{self.flags[attribute]} {getattr(self, attribute)}"


def load_source(source: ImageSource, accelerator) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """Load a data set, with the columns ``image`` (not decoded) and, on request, ``label``.

    Returns:
        The data set and its name, for messages and the model card.

    Raises:
        UserError: the data set, split or column is not found, there are no images, or the columns are ambiguous.
    """
    if not source.name:  # one process decides, so that all processes train on the same data
        choice = [_default_source() if accelerator.is_main_process else None]
        source = replace(source, name=broadcast_object_list(choice)[0])
    failure = None
    with accelerator.main_process_first():
        try:
            dataset = _open_source(source)
        except UserError as error:  # it is raised after the barrier at which the other processes wait
            failure = error
    message = [failure and f"on {platform.node()}: {failure}. All machines need the images at the same path"]
    problems = filter(None, gather_object(message) if accelerator.num_processes > 1 else [])
    if failure:
        raise failure
    for problem in problems:  # a problem of one process stops all processes
        raise UserError(problem)
    dataset = dataset.with_format(None)  # a saved format might hide columns, or make tensors of them
    return _arrays_as_numpy(select_columns(add_paired_files(dataset, source), source)), source.name


def _arrays_as_numpy(dataset):
    """Return the data set with arrays in NumPy, because Python lists take 30 times the memory.

    The format has one type for all columns. Therefore nothing is changed if only some of the columns are float64.
    """
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    kinds = {key: kind.dtype for key, kind in dataset.features.items() if isinstance(kind, ARRAYS)}
    double = {dtype == "float64" for dtype in kinds.values()}
    if len(double) != 1:
        return dataset
    options = {"dtype": np.float64} if double.pop() else {}
    return dataset.with_format("numpy", columns=[*kinds], output_all_columns=True, **options)


def check_disjoint(trained_on, held_out) -> None:
    """Refuse a held-out split that shares images with the training split of the same data set.

    Slices are compared by row number. Rows are compared by file or content, whatever the splits are called. A few
    shared rows may be duplicates within the data, so they only cause a warning.

    Args:
        trained_on, held_out: ``NamedImages``.

    Raises:
        UserError: the splits share images.
    """
    _check_slices(trained_on.source, held_out.source, trained_on.accelerator)
    source, shared, count = held_out.source, shared_rows(trained_on.dataset, held_out.dataset), held_out.length
    if shared and shared >= LEAK * count:
        raise UserError(
            f"{source.flag_label('split')} shares images with {trained_on.source.flag_label('split')}: {shared} of "
            f"{count} held-out images are training images. Choose a split of other images"
        )
    if shared:
        logger.warning(f"{source.flag_label('split')}: {shared} of its {count} images are training images, too")


def _check_slices(trained_on: ImageSource, held_out: ImageSource, accelerator) -> None:
    pair = (trained_on, held_out)
    names = [source.split_names for source in pair]
    if not names[0] & names[1]:
        return
    ranges, sliced = [], any("[" in source.split for source in pair)  # only folders allow slices of streams
    for source, wholes in zip(pair, names, strict=True):
        lengths = {}
        for whole in wholes:
            entire = replace(source, split=whole, label_column=None, max_samples=None, streaming=False)
            lengths[whole] = 1 if source.streaming and not sliced else len(load_source(entire, accelerator)[0])
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
        ranges.append([(part.splitname, part.from_, part.to) for part in parts])
    pairs = [(first, second) for first in ranges[0] for second in ranges[1] if first[0] == second[0]]
    if any(max(first[1], second[1]) < min(first[2], second[2]) for first, second in pairs):
        raise UserError(
            f"{held_out.flag_label('split')} shares images with {trained_on.flag_label('split')}, so it would not be "
            f"held out. Choose parts that do not overlap, such as {trained_on.flags['split']} 'train[:90%]' and "
            f"{held_out.flags['split']} 'train[90%:]'"
        )


def shared_rows(trained_on, held_out) -> int | None:
    """Count the held-out images that are training images, by file or by content.

    Args:
        trained_on, held_out: data sets with the column ``image``, not decoded.

    Returns:
        The count, or None for streams and for more than a gigabyte of images that are not in files.
    """
    if not all(isinstance(dataset, datasets.Dataset) for dataset in (trained_on, held_out)):
        return None
    if any(dataset.data.nbytes > LARGE for dataset in (trained_on, held_out)):
        return None
    known = {row_key(record) for record in trained_on["image"]}
    return sum(row_key(record) in known for record in held_out["image"])


def row_key(record) -> str | bytes:
    """Return a key that identifies an image: its file, or a hash of its content."""
    if isinstance(record, dict):
        record = record.get("bytes") or record.get("path") or b""
    if isinstance(record, str):
        return os.path.realpath(record)
    content = record if isinstance(record, bytes) else content_of(record)
    return hashlib.sha256(content).digest()


def data_license(dataset, name: str) -> str:
    """Return the licence of the images, as far as the data set states it."""
    known = {"digits": "CC BY 4.0 (UCI Machine Learning Repository)", "faces": "not stated (photographs from the news)"}
    info = getattr(dataset, "info", None)
    return known.get(name) or (info.license if info else None) or "not stated"


def _default_source() -> str:
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.CRITICAL)  # its retries log twenty lines in twenty seconds
    logger.info(f"No data set is named. Trying {DEFAULT_DATASET} from the Hub's cache and the Hub.")
    try:
        datasets.load_dataset(DEFAULT_DATASET)  # its splits are checked later
        return DEFAULT_DATASET
    except Exception as error:  # there is no common class: httpx2, ConnectionError, OSError, ValueError ...
        reason = " ".join(str(error).split())
        logger.warning(
            f"{DEFAULT_DATASET} is not available ({type(error).__name__}: {reason}), so this run trains on the 1,797 "
            "embedded 8x8 digits. To choose, give --train_data_dir, or --dataset_name (digits, faces, Hub id or path)"
        )
        return "digits"
    finally:
        hub_logger.setLevel(level)


def _open_source(source: ImageSource):
    name = source.name
    if not source.is_folder and name in EMBEDDED:
        if source.streaming:
            raise UserError(f"--streaming: {name} is an embedded set, which is already in memory. Leave the flag out")
        return _choose({"train": _embedded(name)}, source)
    path = Path(name).expanduser()
    load = partial(datasets.load_dataset, split=source.split, streaming=source.streaming)
    try:
        if source.is_folder or (path.is_dir() and not has_tables(path)):
            if not path.is_dir():
                problem = "this is a file" if path.exists() else "there is no such folder"
                raise UserError(f"{source.flag_label('name')}: {problem}. Expected a folder with image files")
            if parts := load_folder(path, source.label_column):
                if source.flags["name"] == "--dataset_name":
                    logger.info(f"{source.flag_label('name')} is a folder of images, read as with --train_data_dir.")
                return _choose(parts, source)
            if source.is_folder:
                return _load_archives(path, source, load)
        if name == "mnist":
            name = DEFAULT_DATASET
        if path.is_file() or (glob.has_magic(name) and glob.glob(str(path))):
            return _load_files([str(path)] if path.is_file() else sorted(glob.glob(str(path))), source, load)
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return _choose(saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, source)
        if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise UserError(f"{source.flag_label('name')}: there is no such file or folder")
        return load(str(path) if path.exists() else name, name=source.config_name)
    except UserError:
        raise
    except Exception as error:  # as above, there is no common class
        reason = _innermost(error)
        if "Unknown split" in reason:
            raise NoSuchSplit(f"{source.flag_label('split')}: {source.name}: {reason}") from error
        if "corresponds to no data" in reason or isinstance(error, datasets.data_files.EmptyDatasetError):
            reason = "it holds no image files"
        elif isinstance(error, ConnectionError):
            reason += ". Without a network, use a local path, or digits or faces, which are embedded"
        elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            reason += f". datasets keeps a copy in {datasets.config.HF_DATASETS_CACHE}. Set HF_HOME to another folder"
        raise UserError(
            f"{source.flag_label('name')} cannot be loaded with {source.flag_label('split')!r}: {reason}"
        ) from error


def _innermost(error: BaseException) -> str:
    """Return the type and text of the first cause, because the error of datasets does not contain the reason."""
    cause = error
    while isinstance(cause, datasets.exceptions.DatasetGenerationError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"


def _load_archives(path: Path, source: ImageSource, load):
    """Load the archives of images below a folder, which must be all zip files or all tar files."""
    files = [file for file in sorted(path.rglob("*")) if re.fullmatch(r".*\.(zip|tar|tar\.gz|tgz)", file.name.lower())]
    zips = [file for file in files if file.suffix.lower() == ".zip"]
    if zips and len(zips) < len(files):
        raise UserError(f"{source.flag_label('name')} holds zip files and tar files. Expected one kind, or image files")
    if not files:
        raise UserError(f"{source.flag_label('name')}: it holds no image files")
    escaped = [glob.escape(str(file)) for file in files]
    return load("imagefolder" if zips else "webdataset", data_files=escaped)


def _load_files(files: list[str], source: ImageSource, load):
    """Load tables, or archives in the form of WebDataset, which must all be of one kind."""
    suffixes = {Path(file).suffix.lower() for file in files}
    kind = FILES.get(suffixes.pop()) if len(suffixes) == 1 else None
    if kind is None:
        raise UserError(
            f"{source.flag_label('name')}: expected {', '.join(FILES)} files of one kind, a folder or a Hub id"
        )
    escaped = [glob.escape(file) for file in files]  # names must not act as patterns
    # "None", "NA" and "null" are ordinary words. Only an empty cell is a missing value
    options = dict(keep_default_na=False, na_values=[""]) if kind == "csv" else {}
    if source.streaming:
        return load(kind, data_files=escaped, **options)
    return _choose({"train": datasets.load_dataset(kind, data_files=escaped, split="train", **options)}, source)


def _choose(parts: Mapping[str, datasets.Dataset], source: ImageSource):
    """Return the rows that ``source.split`` names, such as train[:80%] or train+test, from the splits ``parts``."""
    try:
        spec = re.sub(r"[a-z]+", lambda word: _split_called(word[0], parts), source.split)
        instruction = datasets.ReadInstruction.from_spec(spec)
        ranges = instruction.to_absolute({split: len(dataset) for split, dataset in parts.items()})
    except (ValueError, AssertionError) as error:
        raise NoSuchSplit(
            f"{source.flag_label('split')}: {source.name} has the {'one split' if len(parts) == 1 else 'splits'} "
            f"{', '.join(parts)}. Expected a split, or a part such as {next(iter(parts))}[:80%]"
        ) from error
    chosen = [parts[part.splitname].select(range(part.from_, part.to)) for part in ranges]
    dataset = datasets.concatenate_datasets(chosen)
    return dataset.to_iterable_dataset() if source.streaming else dataset


def _split_called(name: str, parts: Mapping) -> str:
    """Return this name, or the name that datasets has for such a split if only that one exists."""
    return SPLITS[name] if name not in parts and SPLITS.get(name) in parts else name


def _embedded(name: str) -> datasets.Dataset:
    images = EMBEDDED[name]()
    columns = {"image": [images[k]["image"]()[0] for k in range(len(images))], "label": images.labels()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=images.label_names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
