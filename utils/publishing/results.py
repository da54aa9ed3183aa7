"""The results of evaluate.py, for a model card."""

from pathlib import Path

from huggingface_hub import EvalResult

from ..privacy import OWN_IMAGES
from ..saved import net_folder
from ..training.checkpoints import file_hash

MEASURED = (
    "psnr",
    "ssim",
    "detail",
    "spread",
    "fd_",
    "fid_",
    "kid_",
    "precision",
    "recall",
    "coverage",
    "class_accuracy",
    "copies",
)  # columns of evaluate.py


def describe_results(folder: Path, results: dict) -> tuple[str, list[EvalResult]]:
    """Return the section of a model card, and the entries of its metadata.

    Args:
        folder: folder of a saved pipeline.
        results: content of a ``results.json``. Only rows about the weights in ``folder`` are used.

    Raises:
        ValueError: there are no such rows.
    """
    weights = file_hash(*net_folder(folder).glob("*.safetensors"))[:12]
    rows = [row for row in results["results"] if row.get("weights") == weights]
    if not rows:
        names = ", ".join(f"{row['model']} ({row.get('weights', 'no weights')})" for row in results["results"])
        raise ValueError(
            f"none of its rows is about the weights in {folder} ({weights}): {names}. Run evaluate.py again"
        )
    reference = results.get("public_reference", OWN_IMAGES)  # a name that may be published
    names = [name for name in rows[0] if name.startswith(MEASURED) and "error" not in name]
    settings = [name for name in ("sampler", "algorithm", "steps", "guidance_scale", "N") if name in rows[0]]
    head = [*settings, *names]
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(row.get, head)] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))
    entries = [
        EvalResult(
            task_type="image-to-image" if "psnr" in row else "unconditional-image-generation",
            dataset_type=reference,
            dataset_name=reference,
            dataset_split=results["reference_split"],
            metric_type=metric,
            metric_name=", ".join([metric, *(f"{name} {row[name]}" for name in settings)]),
            metric_value=float(f"{value:.4g}"),
        )
        for row in rows
        for metric, value in row.items()
        if metric in names
    ]
    return f"Measured by `evaluate.py` against {reference}, {results['reference_split']}:\n\n{table}", entries
