"""A Space that draws with a model on the Hub: demo.py and the modules that it imports."""

import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, RepoCard, SpaceCardData

from .. import UserError
from .hub import Hub

ROOT = Path(__file__).parents[2]
CODE = ("demo.py", "utils/**/*.py")
NEEDED = ("demo.py", "utils/evaluation", "requirements.txt", "requirements-demo.txt")


class Space(Hub):
    """The repository of the demo on the Hub, private if the model is; see ``Hub``.

    Args:
        model: repository of the model, which must have been pushed.
        repo_id: USER/NAME or NAME of the Space; "" for the name of the model.

    Raises:
        UserError: the demo or a file that it needs is missing, or the model is on a branch.
    """

    kind, sent, flag, options = "space", "space", "--space", {"space_sdk": "gradio"}

    def __init__(self, model: Hub, repo_id: str):
        missing = [name for name in NEEDED if not (ROOT / name).exists()]
        if missing:
            raise UserError(f"--space: {', '.join(missing)} is missing. A Space consists of demo.py and all of utils/")
        if model.revision:
            raise UserError("--space: a Space loads the model from main, so leave --hub_revision out")
        self.model, self.given_id = model, repo_id
        super().__init__(model.folder, repo_id or model.repo_id, model.asked_for_private, timeout=model.timeout)

    def _create(self) -> None:
        self.private = HfApi().repo_info(self.model.repo_id).private
        super()._create()

    def _command(self) -> str:
        return self.model._command("--space", *([self.given_id] if self.given_id else []))

    def _fill(self, staging: Path) -> None:
        """Write README.md, app.py, requirements.txt and copies of the code."""
        for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
            place = staging / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        own_net = any((self.folder / self.model.sent).glob("unet/*.py"))
        arguments = [self.model.repo_id, *(["--trust_remote_code"] if own_net else [])]
        app = f"from demo import main, parse_args\n\nmain(parse_args({arguments!r}))\n"
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
            license=ModelCard.load(self.folder / self.model.sent / "README.md").data.license,
        )
        text = f"---\n{card.to_yaml()}\n---\n\n# {self.model.repo_id}\n\nThis Space draws images with the model.\n"
        RepoCard(text).save(staging / "README.md")
