"""Redaction of a run's settings before publication: paths of this machine, names of own images, passwords."""

import os
import re
from pathlib import Path

# Flags that hold paths of this machine, or concern only this machine
PRIVATE = {"output_dir", "cache_images", "config", "resume_from_checkpoint", "report_to"}
DATA = {"dataset_name", "prior_dataset_name", "data"}  # flags and results that may name own images
OWN_IMAGES = "own images"
SECRET = re.compile(r"token|secret|passw|credential|api_?key|private_?key", re.IGNORECASE)  # in names of values
SECRET_VALUE = re.compile(r"hf_\w{10,}|sk-\w{10,}|gh[pousr]_\w{10,}|-----BEGIN")
HIDDEN = "hidden"


def basename_if_path(value):
    """Return a value with each path of this machine cut to its last part.

    Args:
        value: value of a flag, such as ``/home/me/model`` or ``dinov2=/home/me/model``, ``--flag=value``, or a list or
            dictionary with such values.
    """
    if isinstance(value, dict):
        entries = {key: HIDDEN if SECRET.search(str(key)) else entry for key, entry in value.items()}
        return {basename_if_path(key): basename_if_path(entry) for key, entry in entries.items()}
    if isinstance(value, list):
        return [basename_if_path(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if SECRET_VALUE.search(value):
        return HIDDEN
    names, text = re.fullmatch(r"((?:--)?(?:[\w-]+=)*)(.*)", value, re.DOTALL).groups()
    if not text or is_hub_id(text):
        return value
    is_path = text.startswith(("/", "./", "../", "~")) or (("/" in text or "\\" in text) and os.path.exists(text))
    return names + (Path(text).name if is_path else text)


def redact(values: dict) -> dict:
    """Return the flags, constants and results that may be published.

    Paths are cut to their last part, own images are not named, and what looks like a password is hidden.
    """
    shown = basename_if_path({name: value for name, value in values.items() if name not in PRIVATE})
    shown |= {name: public_data(values[name]) for name in DATA & {*shown}}
    return shown | {name: OWN_IMAGES for name in ("train_data_dir", "condition_dir") if shown.get(name)}


def public_data(name):
    """Return the name of the training images if they are on the Hub or embedded, and ``OWN_IMAGES`` otherwise.

    A path is recognised only where it exists, so this must be called where the images were loaded.
    """
    local = name and name not in ("digits", "faces", "mnist") and not is_hub_id(name)
    return OWN_IMAGES if local and (os.path.exists(name) or not re.fullmatch(r"[\w.-]+", name)) else name


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form user/name and is not an existing path."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", str(name))) and not os.path.exists(name)
