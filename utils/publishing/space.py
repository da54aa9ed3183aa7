"""A Space that draws with a model on the Hub: demo.py, with what it imports."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import ModelCard, RepoCard, SpaceCardData

from .hub import Hub

ROOT = Path(__file__).parents[2]
CODE = ("demo.py", "utils/**/*.py")


class Space(Hub):
    """The demo's place on the Hub, private if the model is to be; see ``Hub``.

    Args:
        accelerator: says which process talks.
        args: as for ``Hub``, with ``space``, the Space's id or name; "" for that of the model.
        model_id: USER/NAME of the model, which is there.
    """

    kind, sent, options = "space", "space", {"space_sdk": "gradio"}

    def __init__(self, accelerator, args, model_id: str):
        self.model_id = model_id
        changed = dict(hub_model_id=args.space or model_id, hub_revision=None)  # a Space shows its main branch
        super().__init__(accelerator, SimpleNamespace(**{**vars(args), **changed}))

    def _command(self) -> str:
        return f"{super()._command()} --space {self.repo_id}"

    def _snapshot(self, source: Path) -> None:
        """Write README.md, app.py, requirements.txt and copies of the code to ``space/``."""
        target, staging = self.folder / self.sent, self.folder / "space-staging"
        shutil.rmtree(staging, ignore_errors=True)
        for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
            place = staging / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        app = f"from demo import main, parse_args\n\nmain(parse_args([{self.model_id!r}]))\n"
        (staging / "app.py").write_text(app, encoding="utf-8")
        files = [(ROOT / f"requirements{which}.txt").read_text(encoding="utf-8") for which in ("", "-demo")]
        lines = [line for line in "\n".join(files).splitlines() if re.match(r"[\w-]+==", line)]
        (staging / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        card = SpaceCardData(
            title=self.model_id.split("/")[1],
            sdk="gradio",
            sdk_version=re.search(r"^gradio==([\d.]+)", files[1], re.M)[1],
            python_version="3.11",
            app_file="app.py",
            models=[self.model_id],
            license=ModelCard.load(source / "README.md").data.license,
        )
        text = f"---\n{card.to_yaml()}\n---\n\n# {self.model_id}\n\nDraws with this model.\n"
        RepoCard(text).save(staging / "README.md")
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)

    def _finish_card(self) -> None:
        """It has no snippet."""
