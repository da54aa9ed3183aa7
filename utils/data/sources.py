"""Where images come from: the Hub, a folder, a file, or one of the embedded sets, as one column of images.

Images are not decoded here, so that whoever decodes them can name the one that is bad.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import datasets.data_files
import numpy as np
from accelerate.utils import broadcast_object_list
from PIL import Image

from .. import UserError

logger = logging.getLogger(__name__)

DEFAULT_DATASET = "ylecun/mnist"


def load_source(args, accelerator) -> tuple[datasets.Dataset | datasets.IterableDataset, str]:
    """The data set that the flags name, with the columns ``image`` (not decoded) and, if asked for, ``label``.

    Returns:
        The data set and its name, for messages and the model card.

    Raises:
        UserError: not found, no such split or column, no images, ambiguous columns.
    """
    name = args.train_data_dir or args.dataset_name
    if not name:  # one process decides, or the processes might train on different data
        choice = [_default_source(args) if accelerator.is_main_process else None]
        name = broadcast_object_list(choice)[0]
    failure = None
    with accelerator.main_process_first():
        try:
            dataset = _open_source(name, args)
        except UserError as error:  # raised after the barrier in which the other processes wait
            failure = error
    if failure:
        raise failure
    return _select_columns(dataset, name, args), name


def data_license(dataset, name: str) -> str:
    """Under which licence the images are, as far as the data set says."""
    known = {"digits": "CC BY 4.0 (UCI Machine Learning Repository)", "faces": "not stated (photographs from the news)"}
    return known.get(name) or (dataset.info.license if dataset.info else None) or "not stated"


@contextmanager
def flags_called(names: dict[str, str]) -> Iterator[None]:
    """Inside, errors name the flags that the user gave: a key of ``names`` is replaced by its value."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for flag, given in names.items():
            message = message.replace(flag, given)
        raise UserError(message) from None


def check_disjoint(args, accelerator) -> None:
    """Refuse a ``--validation_split`` that shares images with ``--dataset_split``.

    Raises:
        UserError: says which.
    """
    specs = [args.dataset_split, args.validation_split]
    names = [{part.split("[")[0] for part in spec.split("+")} for spec in specs]
    shared = names[0] & names[1]
    if not shared:
        return
    ranges = []
    for spec, wholes in zip(specs, names, strict=True):
        lengths = {}
        for whole in wholes:
            values = {**vars(args), "dataset_split": whole, "label_column": None, "max_train_samples": None}
            lengths[whole] = 1 if args.streaming else len(load_source(SimpleNamespace(**values), accelerator)[0])
        parts = datasets.ReadInstruction.from_spec(spec).to_absolute(lengths)
        ranges.append([(part.splitname, part.from_, part.to) for part in parts])
    pairs = [(first, second) for first in ranges[0] for second in ranges[1] if first[0] == second[0]]
    if any(max(first[1], second[1]) < min(first[2], second[2]) for first, second in pairs):
        raise UserError(
            f"--validation_split {args.validation_split} shares images with --dataset_split {args.dataset_split}, so "
            "it would not be held out. Take parts that do not overlap, such as --dataset_split 'train[:90%]' and "
            "--validation_split 'train[90%:]'"
        )


def _default_source(args) -> str:
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.CRITICAL)  # its retries take twenty seconds and as many lines
    logger.info(f"No data set named: trying {DEFAULT_DATASET} from the Hub's cache and the Hub.")
    try:
        datasets.load_dataset(DEFAULT_DATASET, split=args.dataset_split)
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


def _open_source(name: str, args):
    embedded = {"digits": _embedded_digits, "faces": _embedded_faces}
    if args.train_data_dir is None and name in embedded:
        if args.streaming:
            raise UserError(f"--streaming: {name} is embedded and already in memory; drop the flag")
        return _slice(embedded[name](), name, args)
    path = Path(name).expanduser()
    load = partial(datasets.load_dataset, split=args.dataset_split, streaming=args.streaming)
    try:
        if args.train_data_dir is not None:
            if not path.is_dir():
                problem = "is a file" if path.exists() else "there is no such folder"
                raise UserError(f"--train_data_dir {name}: {problem}; expected a folder with image files")
            return load("imagefolder", data_dir=str(path))
        if name == "mnist":
            name = DEFAULT_DATASET
        if path.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix)
            if kind is None:
                raise UserError(f"--dataset_name {name}: expected a .parquet or .arrow file, a folder or a Hub id")
            return load(kind, data_files=str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _from_disk(path, args)
        if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
            raise UserError(f"--dataset_name {name}: there is no such file or folder")
        return load(str(path) if path.exists() else name, name=args.dataset_config_name)
    except UserError:
        raise
    except Exception as error:  # as above, there is no common class
        flag = "--train_data_dir" if args.train_data_dir else "--dataset_name"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if "corresponds to no data" in reason or isinstance(error, datasets.data_files.EmptyDatasetError):
            reason = "it holds no image files"
        elif isinstance(error, ConnectionError):
            reason += ". Without a network there are digits and faces, which are embedded, and local paths"
        raise UserError(f"{flag} {name} cannot be loaded, split {args.dataset_split!r}: {reason}") from error


def _from_disk(path: Path, args):
    """What ``Dataset.save_to_disk`` wrote."""
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, datasets.DatasetDict):
        if args.dataset_split not in dataset:
            raise UserError(f"--dataset_split {args.dataset_split}: {path} has the splits {', '.join(dataset)}")
        dataset = dataset[args.dataset_split]
    else:
        dataset = _slice(dataset, str(path), args)
    return dataset.to_iterable_dataset() if args.streaming else dataset


def _slice(dataset, name: str, args):
    """The part that ``--dataset_split`` names, such as train[:80%], of a set that has the one split train."""
    try:
        parts = datasets.ReadInstruction.from_spec(args.dataset_split).to_absolute({"train": len(dataset)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"--dataset_split {args.dataset_split}: {name} has the one split train; expected that, or a part of it "
            "such as train[:80%]"
        ) from error
    return datasets.concatenate_datasets([dataset.select(range(part.from_, part.to)) for part in parts])


def _embedded_digits() -> datasets.Dataset:
    """1,797 handwritten digits, 8x8, 17 levels of grey (Alpaydin & Kaynak 1998), from scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _from_arrays(np.rint(digits.images * (255 / 16)), digits.target, [str(k) for k in range(10)])


def _embedded_faces() -> datasets.Dataset:
    """100 grey faces, 25x25, cut from Labeled Faces in the Wild, from scikit-image."""
    from skimage.data import lfw_subset

    return _from_arrays(np.rint(lfw_subset()[:100] * 255), np.zeros(100, int), ["face"])


def _from_arrays(images: np.ndarray, labels: np.ndarray, names: list[str]) -> datasets.Dataset:
    columns = {"image": [Image.fromarray(image.astype(np.uint8)) for image in images], "label": labels.tolist()}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _select_columns(dataset, name: str, args):
    if dataset.features is None:  # a stream that does not say what it holds
        dataset = dataset._resolve_features()
    columns = dict(dataset.features)
    listing = ", ".join(f"{key} ({getattr(kind, '_type', type(kind).__name__)})" for key, kind in columns.items())
    images = [key for key, kind in columns.items() if isinstance(kind, datasets.Image)]
    if args.image_column is None and len(images) != 1:
        problem = "no column of images" if not images else f"{len(images)} columns of images: {', '.join(images)}"
        raise UserError(f"{name} has {problem}. Name one with --image_column; the columns are {listing}")
    image_column = args.image_column or images[0]
    if image_column not in images:
        raise UserError(f"--image_column {image_column}: not a column of type Image. {name} has {listing}")
    wanted = {image_column: "image"}
    if args.label_column is not None:
        if not isinstance(columns.get(args.label_column), datasets.ClassLabel):
            raise UserError(
                f"--label_column {args.label_column}: not a column of type ClassLabel. {name} has {listing}"
            )
        wanted[args.label_column] = "label"
    dataset = dataset.select_columns(list(wanted)).cast_column(image_column, datasets.Image(decode=False))
    dataset = dataset.rename_columns({old: new for old, new in wanted.items() if old != new})
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    return dataset
