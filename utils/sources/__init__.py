"""Images that flags name: from the Hub, folders, tables, archives, metadata and streams.

Without this folder, a script can only train on images that its own Python code defines.
"""

import logging
import os

from ..args import Parser, integer

os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # or datasets asks a server for each table, even a local one


# fmt: off
def add_arguments(parser: Parser) -> None:
    """Add the flags that name the training images."""
    group = parser.group("data")
    group.add_argument("--dataset_name", help="Hub id, local folder or table (parquet, arrow, csv, json, tar), or one of mnist, digits (8x8, embedded) and faces (25x25, embedded). Default without --train_data_dir: MNIST, or the embedded digits if MNIST is not available")
    group.add_argument("--dataset_config_name", help="configuration of the data set, if it has several")
    group.add_argument("--dataset_split", default="train", help="split to train on, or a slice such as train[:1%%]")
    group.add_argument("--train_data_dir", metavar="DIR", help="folder of image files, instead of --dataset_name")
    group.add_argument("--image_column", help="column with the images (default: the only one of type Image)")
    group.add_argument("--label_column", help="column with class labels. Each of up to 50 classes has a loss curve")
    group.add_argument("--max_train_samples", metavar="N", type=integer(1), help="number of images to use: a random sample by --seed, or the first images of a stream")
    parser.switch(group, "--streaming", False, "reading of the data set during training, for sets that do not fit on the disk")
    parser.checks.append(_check)


def _check(parser: Parser, args) -> None:
    if args.dataset_name and args.train_data_dir:
        parser.error("--dataset_name and --train_data_dir are both given. Choose one source of images")
    if args.streaming and args.max_train_steps is None:
        parser.error("--streaming needs --max_train_steps, because the length of an epoch of a stream is unknown")
    if args.streaming and args.cache_images == "always":
        parser.error("--streaming and --cache_images=always exclude each other, because a stream is not cached. Give one")
    if args.streaming and not (args.dataset_name or args.train_data_dir):
        parser.error("--streaming needs --dataset_name or --train_data_dir")
# fmt: on


def load(args, accelerator, conditional: bool, columns: dict):
    """Load the training images that the flags name, see ``named_images.NamedImages``.

    Args:
        conditional: True if the images need class labels. Without ``--label_column``, the only column of class
            labels is used.
        columns: additional tensors of each row, see ``data.columns``.

    Raises:
        UserError: see ``sources.load_source``.
    """
    from dataclasses import replace

    from .named_images import NamedImages
    from .sources import ImageSource

    source = replace(ImageSource.from_args(args), find_labels=conditional, columns=columns)
    return NamedImages(source, accelerator, args.max_bad_images)


def refuse_for_own_images(args) -> None:
    """Refuse flags for named images, because the script defines its own images in Python.

    Raises:
        UserError: flags are given that own images do not support.
    """
    from .. import UserError

    named = args.dataset_name or args.train_data_dir
    if named:
        logging.getLogger(__name__).warning(f"The script trains on its own images, and ignores {named}")
    if args.streaming or args.label_column or args.max_train_samples:
        raise UserError(
            "own images do not support --streaming, --label_column or --max_train_samples. Leave these flags out. "
            "Select images and labels in the script instead"
        )
