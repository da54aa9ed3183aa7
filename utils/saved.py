"""The layout and the name of a saved model: a pipeline of diffusers, or one of its models, such as an autoencoder."""

import json
from pathlib import Path

from . import UserError, read_record

INDEX, CONFIG = "model_index.json", "config.json"
NETS = ("unet", "transformer")  # folders of the denoiser in a pipeline
AUTOENCODERS = ("vqvae", "vae")  # folders of the autoencoder in a pipeline


def index_file(folder: Path) -> Path:
    """Return the file that names the class: that of the pipeline or, for a model alone, that of the model."""
    return folder / (INDEX if (folder / INDEX).is_file() or not (folder / CONFIG).is_file() else CONFIG)


def is_saved(folder: Path) -> bool:
    """Return whether a folder holds a pipeline or a model."""
    return index_file(folder).is_file()


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a model with its weights, and for a pipeline all parts that its index names."""
    if not is_saved(folder) or not any(net_folder(folder).glob("*.safetensors")):
        return False
    index = read_record(folder / INDEX) if (folder / INDEX).is_file() else {}
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] and name[0] != "_"]
    return all(any((folder / name).glob("*.json")) for name in parts)


def net_folder(folder: Path) -> Path:
    """Return the folder with the weights that were trained, ``folder`` itself for a model alone."""
    return next((folder / name for name in NETS if (folder / name).is_dir()), folder)


def net_config(folder: Path) -> dict:
    """Return the config of the model that was trained.

    Raises:
        OSError: there is none.
    """
    return json.loads((net_folder(folder) / CONFIG).read_text(encoding="utf-8"))


def refuse_missing(flag: str, name_or_path: str) -> None:
    """Refuse a local path that does not exist, because otherwise the Hub client would look for it for a minute.

    Raises:
        UserError: the name is empty, or looks like a path and does not exist.
    """
    if not name_or_path:
        raise UserError(f"{flag or 'the model'}: the name is empty. Expected a saved pipeline, or a Hub id")
    path = Path(name_or_path).expanduser()
    looks_local = name_or_path[0] in "./~" or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if looks_local and not path.exists():
        raise UserError(f"{flag or name_or_path}: there is no such folder. Expected a saved pipeline, or a Hub id")


def shorten(error: Exception) -> str:
    """Return the first 160 characters of a message, because libraries append advice about their own functions."""
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160].rsplit(" ", 1)[0] + " ..."


def variant_of(folder: Path) -> str | None:
    """Return ``fp16`` if a folder has weights of that variant only, or else None."""
    files = [path.name for path in folder.glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None
