"""The last lines of a run: its files, and commands to continue with."""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .. import counted, read_record
from ..data.clusters import has_clusters
from ..saved import index_file, net_config, net_folder
from .output_dir import read_arguments


@dataclass(frozen=True)
class Loading:
    """Code that loads a saved pipeline or model.

    Attributes:
        pipeline: class of diffusers.
        call: expression that returns the pipeline.
        own_pipeline: whether it uses the folder's ``pipeline.py``.
        runs_code: whether it runs code of the folder.
        clusters: whether its classes are clusters, which need not be chosen.
    """

    pipeline: str
    call: str
    own_pipeline: bool
    runs_code: bool
    clusters: bool = False

    @property
    def takes_condition(self) -> bool:
        """Return whether the pipeline draws from a picture, as those of train_paired.py do."""
        return self.pipeline == "LDMSuperResolutionPipeline"

    @property
    def guides_classes(self) -> bool:
        """Return whether the pipeline draws classes with guidance, as those of train_latent.py do."""
        return self.pipeline == "DiTPipeline"

    @property
    def is_autoencoder(self) -> bool:
        """Return whether it is an autoencoder, which draws nothing."""
        return self.pipeline.startswith(("Autoencoder", "VQModel"))

    def first_arguments(self, given: str | None) -> str:
        """Return the arguments that the pipeline needs to draw an image.

        Args:
            given: recorded names of the inputs that the script passes to the model.
        """
        if self.takes_condition:
            return "condition, "
        if self.own_pipeline or self.guides_classes:
            return "[0], " + "guidance_scale=1, " * self.guides_classes  # the default scale is 4
        return "class_labels=[0], " * (given == "class_labels" and not self.clusters)


def how_to_load(folder: Path, name: str | Path) -> Loading:
    """Return the code that loads the pipeline of ``folder`` by ``name``, a path or a Hub id."""
    kind, unet = read_record(index_file(folder))["_class_name"], net_config(folder)
    # ConsistencyModelPipeline draws squares only
    own_pipeline = (folder / "pipeline.py").is_file() and not isinstance(unet.get("sample_size"), int)
    kind = "DiffusionPipeline" if own_pipeline or isinstance(kind, list) else kind  # a list names a file of the folder
    runs_code = kind == "DiffusionPipeline" or any(net_folder(folder).glob("*.py"))
    options = f", custom_pipeline={str(name)!r}" * own_pipeline + ", trust_remote_code=True" * runs_code
    clusters = has_clusters(unet.get("_class_names") or [])
    return Loading(kind, f"{kind}.from_pretrained({str(name)!r}{options})", own_pipeline, runs_code, clusters)


def inputs_beside(folder: Path, given: str | None) -> str:
    """Return the names of inputs, besides noisy images and timesteps, that no pipeline passes to the model, or "".

    Args:
        folder: folder of the pipeline.
        given: recorded names of the inputs that the script passes to the model.
    """
    load, unet = how_to_load(folder, folder), net_config(folder)
    if load.takes_condition or load.guides_classes or load.is_autoencoder:
        return ""
    taken = unet.get("in_channels") or 0
    channels = taken - (unet.get("out_channels") or taken)
    if channels > 0:
        return f"a condition of {counted(channels, 'channel')}"
    return "" if given == "class_labels" and (folder / "pipeline.py").is_file() else given or ""


def last_lines(
    folder: Path, num_inference_steps: int | None, continued: str | None, given: str | None
) -> list[str]:  # fmt: skip
    """Return lines that describe the folder of a finished run.

    Args:
        num_inference_steps: sampling steps of its samples, None for an autoencoder.
        continued: flags with which the same script trains on the user's own images, or None to leave the line out.
        given: see ``inputs_beside``.
    """
    pictures = sorted(path.name for path in folder.glob("*.png") if path.name != "samples.png")
    lines = {"samples": ", ".join([str(folder / "samples.png"), *pictures])}
    load = how_to_load(folder, folder)
    if load.is_autoencoder:
        lines["autoencoder"] = load.call
    else:
        arguments = f"{load.first_arguments(given)}num_inference_steps={num_inference_steps}"
        lines["pipeline"] = f"{load.call}({arguments})"
    if beside := inputs_beside(folder, given):
        lines["pipeline"] = f"{load.call}.unet also needs {beside}. No pipeline of diffusers passes it to the model"
    script = os.path.join(os.path.dirname(os.path.relpath(sys.argv[0])), "sample.py")
    if load.takes_condition and os.path.isfile(script):  # a copied script may be alone
        python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
        lines["draw"] = (
            f"{_quote(python)} {_quote(script)} {_quote(folder)} --condition_image {_quote(folder / 'condition.png')}"
            f" --output_dir {_quote(f'{folder}-drawn')}"
        )
    if any(folder.glob("logs/**/events.out.*")):
        lines["curves"] = f"{_command('tensorboard')} --logdir {_quote(folder)}"
    lines["train longer"] = "the same command with a larger --max_train_steps"
    if "ipykernel" not in sys.modules:
        script = os.path.relpath(sys.argv[0])
        config = os.path.join(os.path.dirname(script), "accelerate_config.yaml")
        options = f" --quiet --config_file {_quote(config)}" if os.path.isfile(config) else ""
        launch = f"{_command('accelerate')} launch{options}"
        latent = os.path.join(os.path.dirname(script), "train_latent.py")
        if load.is_autoencoder and os.path.isfile(latent):
            resolution = min(read_arguments(folder)["image_shape"][1:])  # latent models draw squares
            given = read_arguments(folder)["arguments"]
            names = ("train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column")
            data = [f"--{name} {_quote(given[name])}" for name in names if given.get(name) is not None]
            lines["next"] = " ".join(
                [launch, _quote(latent), f"--vae {_quote(folder)}", *data, f"--resolution {resolution}"]
            )
        if continued:
            lines["your images"] = f"{launch} {_quote(script)} {continued}"
    return [f"  {name:12} {text}" for name, text in lines.items()]


def _command(name: str) -> str:
    """Return the command of a program: its name, or its path in an environment that is not activated."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else _quote(os.path.relpath(beside))


def _quote(path: str | Path) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))
