"""The last lines of a run: its files, and commands to continue with."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from .. import counted


@dataclass(frozen=True)
class Loading:
    """Code that loads a saved pipeline.

    Attributes:
        pipeline: class of diffusers.
        call: expression that returns the pipeline.
        own_pipeline: whether it uses the folder's ``pipeline.py``.
        runs_code: whether it runs code of the folder.
    """

    pipeline: str
    call: str
    own_pipeline: bool
    runs_code: bool

    @property
    def takes_condition(self) -> bool:
        """Return whether the pipeline draws from a picture, as those of train_paired.py do."""
        return self.pipeline == "LDMSuperResolutionPipeline"


def how_to_load(folder: Path, name: str | Path) -> Loading:
    """Return the code that loads the pipeline of ``folder`` by ``name``, a path or a Hub id."""
    kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    # ConsistencyModelPipeline draws squares only
    own_pipeline = (folder / "pipeline.py").is_file() and not isinstance(unet.get("sample_size"), int)
    kind = "DiffusionPipeline" if own_pipeline or isinstance(kind, list) else kind  # a list names a file of the folder
    runs_code = kind == "DiffusionPipeline" or any((folder / "unet").glob("*.py"))
    options = f", custom_pipeline={str(name)!r}" * own_pipeline + ", trust_remote_code=True" * runs_code
    return Loading(kind, f"{kind}.from_pretrained({str(name)!r}{options})", own_pipeline, runs_code)


def inputs_beside(folder: Path, given: str | None) -> str:
    """Return the names of inputs, besides noisy images and timesteps, that no pipeline passes to the model, or "".

    Args:
        folder: folder of the pipeline.
        given: recorded names of the inputs that the script passes to the model.
    """
    if how_to_load(folder, folder).takes_condition:
        return ""
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    taken = unet.get("in_channels") or 0
    channels = taken - (unet.get("out_channels") or taken)
    if channels > 0:
        return f"a condition of {counted(channels, 'channel')}"
    return "" if given == "class_labels" and (folder / "pipeline.py").is_file() else given or ""


def last_lines(folder: Path, num_inference_steps: int, continued: str | None, given: str | None) -> list[str]:
    """Return lines that describe the folder of a finished run.

    Args:
        num_inference_steps: sampling steps of its samples.
        continued: flags with which the same script trains on the user's own images, or None to leave the line out.
        given: see ``inputs_beside``.
    """
    pictures = sorted(path.name for path in folder.glob("*.png") if path.name != "samples.png")
    lines = {"samples": ", ".join([str(folder / "samples.png"), *pictures])}
    load = how_to_load(folder, folder)
    labels = "[0], " * load.own_pipeline or "class_labels=[0], " * (given == "class_labels")
    labels = labels or "condition, " * load.takes_condition
    lines["pipeline"] = f"{load.call}({labels}num_inference_steps={num_inference_steps})"
    if beside := inputs_beside(folder, given):
        lines["pipeline"] = f"{load.call}.unet also needs {beside}. No pipeline of diffusers passes it to the model"
    script = os.path.join(os.path.dirname(os.path.relpath(sys.argv[0])), "sample.py")
    if load.takes_condition and os.path.isfile(script):  # a copied script may be alone
        python = "python" if shutil.which("python") == sys.executable else os.path.relpath(sys.executable)
        lines["draw"] = f"{python} {script} {folder} --condition_image {folder / 'condition.png'}"
    if any(folder.glob("logs/**/events.out.*")):
        lines["curves"] = f"{_command('tensorboard')} --logdir {folder}"
    lines["train longer"] = "the same command with a larger --max_train_steps"
    if continued and "ipykernel" not in sys.modules:
        script = os.path.relpath(sys.argv[0])
        config = os.path.join(os.path.dirname(script), "accelerate_config.yaml")
        options = f" --quiet --config_file {config}" if os.path.isfile(config) else ""
        lines["your images"] = f"{_command('accelerate')} launch{options} {script} {continued}"
    return [f"  {name:12} {text}" for name, text in lines.items()]


def _command(name: str) -> str:
    """Return the command of a program: its name, or its path in an environment that is not activated."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.exists() else os.path.relpath(beside)
