"""How good a model is: held-out loss and sample quality while it trains, metrics and reports after it.

Training scripts take ``Validation`` and ``SampleQuality``; ``sample.py`` and ``evaluate.py`` import the other modules.
Delete this folder, and the lines that name it, from a copy that does without.
"""

from .denoising_loss import Validation
from .sample_quality import SampleQuality

__all__ = ["SampleQuality", "Validation"]
