"""Where images come from: the Hub, a folder, a file, or one of the embedded sets, as one column of images.

Images are not decoded here, so that whoever decodes them can name the one that is bad.
"""

import errno
import glob
import hashlib
import logging
import math
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
from ..data.own_images import OwnImages, content_of, embedded_digits, embedded_faces
from .columns import add_paired_files, select_columns
from .folders import SPLITS, has_tables, load_folder

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "ylecun/mnist"
FILES = {  # builders of ``datasets``, by the extension of files
    ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json", ".tar": "webdataset",
}  # fmt: skip


ARRAYS = (datasets.Array2D, datasets.Array3D, datasets.Array4D, datasets.Array5D)
LARGE = 2**30  # bytes of images in tables, of which rows are not compared
LEAK = 0.5  # share of the held-out images that are training images from which a split is refused


class NoSuchSplit(UserError):
    """The data set has no split of this name."""


@dataclass(frozen=True)
class ImageSource:
    """Which images are meant, and how messages call the flags that said so.

    Attributes:
        name: Hub id, local path, or one of the embedded sets; None for MNIST, or the digits where it is not available.
        split: of the data set; slices such as train[:1%] work.
        is_folder: ``name`` is a folder of image files.
        config_name: configuration of the data set, where it has several.
        image_column: None for the only one of type Image.
        label_column: a column to keep as ``label``: of type ClassLabel, or of integers or strings, which become classes
            in their order.
        find_labels: take the only column of type ClassLabel where ``label_column`` is None; refuse none or several.
        max_samples: so many of the images, at random by ``seed``; the first ones with ``take_first``, or of a stream.
        streaming: read them as they are needed.
        columns: further tensors of each row, by name.
        flags: what the user knows ``name`` and ``split`` as.
    """

    name: str | None
    split: str = "train"
    is_folder: bool = False
    config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    max_samples: int | None = None
    seed: int = 0
    take_first: bool = False
    streaming: bool = False
    find_labels: bool = False
    columns: dict[str, Column] = field(default_factory=dict)
    flags: dict[str, str] = field(default_factory=lambda: {"name": "--dataset_name", "split": "--dataset_split"})

    @classmethod
    def from_args(cls, args) -> "ImageSource":
        """The training images that the flags of ``args.add_common_arguments`` name."""
        source = cls(
            args.train_data_dir or args.dataset_name, args.dataset_split, args.train_data_dir is not None,
            args.dataset_config_name, args.image_column, args.label_column, args.max_train_samples,
            seed=args.seed, streaming=args.streaming,
        )  # fmt: skip
        return replace(source, flags={**source.flags, "name": "--train_data_dir"}) if source.is_folder else source

    @property
    def split_names(self) -> set[str]:
        """The splits that ``split`` takes parts of: train and test of train[:80%]+test."""
        return {part.split("[")[0] for part in self.split.split("+")}

    def said(self, attribute: str) -> str:
        """The flag and its value, for messages: ``--dataset_split test``."""
        return f"{self.flags[attribute]} {getattr(self, attribute)}"


def load_source(source: ImageSource, accelerator) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """The data set that is meant, with the columns ``image`` (not decoded) and, if asked for, ``label``.

    Returns:
        The data set and its name, for messages and the model card.

    Raises:
        UserError: not found, no such split or column, no images, ambiguous columns.
    """
    if not source.name:  # one process decides, or the processes might train on different data
        choice = [_default_source(source) if accelerator.is_main_process else None]
        source = replace(source, name=broadcast_object_list(choice)[0])
    failure = None
    with accelerator.main_process_first():
        try:
            dataset = _open_source(source)
        except UserError as error:  # raised after the barrier in which the other processes wait
            failure = error
    said = [failure and f"on {platform.node()}: {failure}. All machines need the images, at the same place"]
    problems = filter(None, gather_object(said) if accelerator.num_processes > 1 else [])
    if failure:
        raise failure
    for problem in problems:  # of another process: this one's images are of no use without it
        raise UserError(problem)
    dataset = dataset.with_format(None)  # one that hides columns, or makes tensors of them, may have been saved with it
    return _arrays_as_numpy(select_columns(add_paired_files(dataset, source), source)), source.name


def _arrays_as_numpy(dataset):
    """The data set with columns of arrays in NumPy: as lists of Python they take 30 times the memory.

    NumPy's format has one type for all: a float64 column beside others stays as it is.
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

    Slices are compared by their numbers, and rows by file or content, whatever the splits are called. A few rows in
    both are duplicates within the data, and worth a warning.

    Args:
        trained_on, held_out: ``NamedImages``.

    Raises:
        UserError: says which.
    """
    _check_slices(trained_on.source, held_out.source, trained_on.accelerator)
    source, shared, count = held_out.source, shared_rows(trained_on.dataset, held_out.dataset), held_out.length
    if shared and shared >= LEAK * count:
        raise UserError(
            f"{source.said('split')} shares images with {trained_on.source.said('split')}: {shared} of its {count}, so "
            "it would not be held out. Take a split of other images"
        )
    if shared:
        logger.warning(f"{source.said('split')}: {shared} of its {count} images are training images, too")


def _check_slices(trained_on: ImageSource, held_out: ImageSource, accelerator) -> None:
    pair = (trained_on, held_out)
    names = [source.split_names for source in pair]
    if not names[0] & names[1]:
        return
    ranges = []
    for source, wholes in zip(pair, names, strict=True):
        lengths = {}
        for whole in wholes:
            entire = replace(source, split=whole, label_column=None, max_samples=None)
            lengths[whole] = 1 if source.streaming else len(load_source(entire, accelerator)[0])
        parts = datasets.ReadInstruction.from_spec(source.split).to_absolute(lengths)
        left = (source.take_first and source.max_samples) or math.inf  # a sample may be of any rows
        ranges.append([])
        for part in parts:
            ranges[-1].append((part.splitname, part.from_, min(part.to, part.from_ + left)))
            left -= part.to - part.from_
    pairs = [(first, second) for first in ranges[0] for second in ranges[1] if first[0] == second[0]]
    if any(max(first[1], second[1]) < min(first[2], second[2]) for first, second in pairs):
        raise UserError(
            f"{held_out.said('split')} shares images with {trained_on.said('split')}, so it would not be held out. "
            f"Take parts that do not overlap, such as {trained_on.flags['split']} 'train[:90%]' and "
            f"{held_out.flags['split']} 'train[90%:]'"
        )


def shared_rows(trained_on, held_out) -> int | None:
    """Count the held-out images that are training images, by file or by content.

    Args:
        trained_on, held_out: data sets with the column ``image``, not decoded.

    Returns:
        None where it cannot be told: for streams, and for more than a gigabyte of images that are in no files.
    """
    if not all(isinstance(dataset, datasets.Dataset) for dataset in (trained_on, held_out)):
        return None
    if any(dataset.data.nbytes > LARGE for dataset in (trained_on, held_out)):
        return None
    known = {_row_key(record) for record in trained_on["image"]}
    return sum(_row_key(record) in known for record in held_out["image"])


def _row_key(record) -> str | bytes:
    """What tells an image from others: its file, or a hash of its content."""
    if isinstance(record, dict):
        record = record.get("bytes") or record.get("path") or b""
    if isinstance(record, str):
        return os.path.realpath(record)
    content = record if isinstance(record, bytes) else content_of(record)
    return hashlib.sha256(content).digest()


def data_license(dataset, name: str) -> str:
    """Under which licence the images are, as far as the data set says."""
    known = {"digits": "CC BY 4.0 (UCI Machine Learning Repository)", "faces": "not stated (photographs from the news)"}
    info = getattr(dataset, "info", None)
    return known.get(name) or (info.license if info else None) or "not stated"


def _default_source(source: ImageSource) -> str:
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.CRITICAL)  # its retries take twenty seconds and as many lines
    logger.info(f"No data set named: trying {DEFAULT_DATASET} from the Hub's cache and the Hub.")
    try:
        datasets.load_dataset(DEFAULT_DATASET)  # its splits are looked up later, and said if they are wrong
        return DEFAULT_DATASET
    except Exception as error:  # no common class: httpx2, ConnectionError, OSError, ValueError ...
        reason = " ".join(str(error).split())
        logger.warning(
            f"{DEFAULT_DATASET} is not available ({type(error).__name__}: {reason}), so this run trains on the 1,797 "
            "embedded 8x8 digits. To choose: --dataset_name digits, faces, a Hub id or a path, or --train_data_dir DIR"
        )
        return "digits"
    finally:
        hub_logger.setLevel(level)


def _open_source(source: ImageSource):
    embedded = {"digits": _embedded_digits, "faces": _embedded_faces}
    name = source.name
    if not source.is_folder and name in embedded:
        if source.streaming:
            raise UserError(f"--streaming: {name} is embedded and already in memory; drop the flag")
        return _choose({"train": embedded[name]()}, source)
    path = Path(name).expanduser()
    load = partial(datasets.load_dataset, split=source.split, streaming=source.streaming)
    try:
        if source.is_folder or (path.is_dir() and not has_tables(path)):
            if not path.is_dir():
                problem = "is a file" if path.exists() else "there is no such folder"
                raise UserError(f"{source.said('name')}: {problem}; expected a folder with image files")
            if parts := load_folder(path, source.label_column):
                if source.flags["name"] == "--dataset_name":
                    logger.info(f"{source.said('name')} is a folder of image files, read as by --train_data_dir.")
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
            raise UserError(f"{source.said('name')}: there is no such file or folder")
        return load(str(path) if path.exists() else name, name=source.config_name)
    except UserError:
        raise
    except Exception as error:  # as above, there is no common class
        reason = _innermost(error)
        if "Unknown split" in reason:
            raise NoSuchSplit(f"{source.said('split')}: {source.name}: {reason}") from error
        if "corresponds to no data" in reason or isinstance(error, datasets.data_files.EmptyDatasetError):
            reason = "it holds no image files"
        elif isinstance(error, ConnectionError):
            reason += ". Without a network there are digits and faces, which are embedded, and local paths"
        elif isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC):
            reason += f". datasets keeps a copy in {datasets.config.HF_DATASETS_CACHE}: set HF_HOME to another folder"
        raise UserError(f"{source.said('name')} cannot be loaded, {source.said('split')!r}: {reason}") from error


def _innermost(error: BaseException) -> str:
    """Name the error at the bottom: what datasets raises says that reading has failed, and that one says why."""
    told = error
    while isinstance(told, datasets.exceptions.DatasetGenerationError) and (told.__cause__ or told.__context__):
        told = told.__cause__ or told.__context__
    return f"{type(told).__name__}: {' '.join(str(told).split())}"


def _load_archives(path: Path, source: ImageSource, load):
    """Archives of images, all zip files or all tar files, below a folder."""
    files = [file for file in sorted(path.rglob("*")) if re.fullmatch(r".*\.(zip|tar|tar\.gz|tgz)", file.name.lower())]
    zips = [file for file in files if file.suffix.lower() == ".zip"]
    if zips and len(zips) < len(files):
        raise UserError(f"{source.said('name')} holds zip files and tar files; expected one kind, or image files")
    if not files:
        raise UserError(f"{source.said('name')}: it holds no image files")
    escaped = [glob.escape(str(file)) for file in files]
    return load("imagefolder" if zips else "webdataset", data_files=escaped)


def _load_files(files: list[str], source: ImageSource, load):
    """Tables, or archives in the form of WebDataset, all of one kind."""
    suffixes = {Path(file).suffix.lower() for file in files}
    kind = FILES.get(suffixes.pop()) if len(suffixes) == 1 else None
    if kind is None:
        raise UserError(f"{source.said('name')}: expected {', '.join(FILES)} files of one kind, a folder or a Hub id")
    escaped = [glob.escape(file) for file in files]  # a name is no pattern
    # "None", "NA" and "null" are words; an empty cell is what is missing
    options = dict(keep_default_na=False, na_values=[""]) if kind == "csv" else {}
    if source.streaming:
        return load(kind, data_files=escaped, **options)
    return _choose({"train": datasets.load_dataset(kind, data_files=escaped, split="train", **options)}, source)


def _choose(parts: Mapping[str, datasets.Dataset], source: ImageSource):
    """What ``source.split`` names, such as train[:80%] or train+test, of the splits that there are."""
    try:
        spec = re.sub(r"[a-z]+", lambda word: _split_called(word[0], parts), source.split)
        wanted = datasets.ReadInstruction.from_spec(spec)
        ranges = wanted.to_absolute({split: len(dataset) for split, dataset in parts.items()})
    except (ValueError, AssertionError) as error:
        raise NoSuchSplit(
            f"{source.said('split')}: {source.name} has the {'one split' if len(parts) == 1 else 'splits'} "
            f"{', '.join(parts)}; expected that, or a part such as {next(iter(parts))}[:80%]"
        ) from error
    chosen = [parts[part.splitname].select(range(part.from_, part.to)) for part in ranges]
    dataset = datasets.concatenate_datasets(chosen)
    return dataset.to_iterable_dataset() if source.streaming else dataset


def _split_called(name: str, parts: Mapping) -> str:
    """The split that is there under this name, or under the one that datasets has for it."""
    return SPLITS[name] if name not in parts and SPLITS.get(name) in parts else name


def _embedded_digits() -> datasets.Dataset:
    return _from_own(embedded_digits())


def _embedded_faces() -> datasets.Dataset:
    return _from_own(embedded_faces())


def _from_own(images: OwnImages) -> datasets.Dataset:
    columns = {"image": [images[k]["image"]()[0] for k in range(len(images))], "label": images.labels()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=images.label_names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
