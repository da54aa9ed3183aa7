"""What is known of a model only after its card was written: what evaluate.py has found, the licence."""

import logging
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..training.checkpoints import file_hash
from ..training.output_dir import OWN_IMAGES
from .model_card import UNLICENSED

logger = logging.getLogger(__name__)

MEASURED = ("fd_", "fid_", "kid_", "precision", "recall", "coverage", "class_accuracy")  # columns of evaluate.py


def add_results(folder: Path, results: dict) -> None:
    """Put what evaluate.py has found into the card, and into its metadata.

    Args:
        folder: a saved pipeline with a README.md.
        results: of a ``results.json``; rows of these weights count.

    Raises:
        ValueError: none of them does.
    """
    weights = file_hash(*(folder / "unet").glob("*.safetensors"))[:12]
    rows = [row for row in results["results"] if row.get("weights") == weights]
    if not rows:
        names = ", ".join(f"{row['model']} ({row.get('weights', 'no weights')})" for row in results["results"])
        raise ValueError(f"none of its rows is of the weights in {folder} ({weights}): {names}. Run evaluate.py again")
    card = ModelCard.load(folder / "README.md")
    reference = results.get("public_reference", OWN_IMAGES)  # as evaluate.py saw it
    card.data.model_name = folder.resolve().name
    names = [name for name in rows[0] if name.startswith(MEASURED) and "error" not in name]
    settings = [name for name in ("sampler", "algorithm", "steps", "guidance_scale", "N") if name in rows[0]]
    head = [*settings, *names]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(row.get, head)] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))
    text = f"## Evaluation\n\n`evaluate.py` against {reference}, {results['reference_split']}:\n\n{table}\n\n"
    before, title, after = re.sub(r"## Evaluation\n.*?(?=## )", "", card.text, flags=re.S).partition("## Training\n")
    card.text = before + text + title + after
    card.data.eval_results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=reference,
            dataset_name=reference,
            dataset_split=results["reference_split"],
            metric_type=metric,
            metric_name=", ".join([metric, *(f"{name} {row[name]}" for name in settings)]),
            metric_value=round(value, 4),
        )
        for row in rows
        for metric, value in row.items()
        if metric in names
    ]
    card.save(folder / "README.md")


def licensed(folder: Path, license: str | None) -> None:
    """Put the licence into the card's metadata; None leaves what is there, and says so if that is `unknown`.

    Args:
        folder: a saved pipeline; without a README.md nothing happens.
    """
    if not (folder / "README.md").is_file():
        return
    card = ModelCard.load(folder / "README.md")
    if license:
        card.data.license = license
        card.save(folder / "README.md")
    elif card.data.license == "unknown":
        logger.warning(UNLICENSED)
