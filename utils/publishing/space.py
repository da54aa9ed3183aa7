"""A Space that draws with a model on the Hub: demo.py, with what it imports."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import HfApi, ModelCard, RepoCard, SpaceCardData

from .. import UserError
from .hub import Hub

ROOT = Path(__file__).parents[2]
CODE = ("demo.py", "utils/**/*.py")
NEEDED = ("demo.py", "utils/evaluation", "requirements.txt", "requirements-demo.txt")


class Space(Hub):
    """The demo's place on the Hub, private if the model is; see ``Hub``.

    Args:
        accelerator: says which process talks.
        model: of the model, which has been pushed; its ``args`` with ``space``, the Space's id or name, "" for the
            model's.

    Raises:
        UserError: the demo, or what it imports, is not there; the model is on a branch; as ``Hub``.
    """

    kind, sent, flag, options = "space", "space", "--space", {"space_sdk": "gradio"}

    def __init__(self, accelerator, model: Hub):
        missing = [name for name in NEEDED if not (ROOT / name).exists()]
        if missing:
            raise UserError(f"--space: {', '.join(missing)} is not here; a Space consists of demo.py and all of utils/")
        if model.args.hub_revision:
            raise UserError("--space: a Space draws with what is on main; leave --hub_revision out")
        self.model = model
        settings = {**vars(model.args), "hub_model_id": model.args.space or model.repo_id}
        super().__init__(accelerator, SimpleNamespace(**settings))

    def _create(self) -> None:
        self.args.hub_private_repo = self.args.hub_private_repo or HfApi().repo_info(self.model.repo_id).private
        super()._create()

    def _command(self) -> str:
        return self.model._command()

    def _fill(self, staging: Path, source: Path) -> None:
        """Write README.md, app.py, requirements.txt and copies of the code."""
        for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
            place = staging / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        app = f"from demo import main, parse_args\n\nmain(parse_args([{self.model.repo_id!r}]))\n"
        (staging / "app.py").write_text(app, encoding="utf-8")
        files = [(ROOT / f"requirements{which}.txt").read_text(encoding="utf-8") for which in ("", "-demo")]
        lines = [line for line in "\n".join(files).splitlines() if re.match(r"[\w-]+==", line)]
        (staging / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        card = SpaceCardData(
            title=self.model.repo_id.split("/")[1],
            sdk="gradio",
            sdk_version=re.search(r"^gradio==([\d.]+)", files[1], re.M)[1],
            python_version="3.11",
            app_file="app.py",
            models=[self.model.repo_id],
            license=ModelCard.load(source / "README.md").data.license,
        )
        text = f"---\n{card.to_yaml()}\n---\n\n# {self.model.repo_id}\n\nDraws with this model.\n"
        RepoCard(text).save(staging / "README.md")

    def _finish_card(self) -> None:
        """It has no snippet."""
