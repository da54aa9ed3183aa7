"""What evaluate.py has found, in the metadata of a model card."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..training.checkpoints import file_hash
from ..training.output_dir import is_hub_id


def add_results(folder: Path, results: dict) -> None:
    """Put what evaluate.py has found into the card's metadata.

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
    reference = Path(results["reference"]).name if not is_hub_id(results["reference"]) else results["reference"]
    card.data.model_name = folder.resolve().name
    card.data.eval_results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=reference,
            dataset_name=reference,
            dataset_split=results["reference_split"],
            metric_type=metric,
            metric_name=f"{metric}, N={row['N']}, {row['sampler']}, {row['steps']} steps",
            metric_value=round(value, 4),
        )
        for row in rows
        for metric, value in row.items()
        if metric.startswith(("fd_", "fid_", "kid_", "precision", "recall", "coverage")) and "error" not in metric
    ]
    card.save(folder / "README.md")
