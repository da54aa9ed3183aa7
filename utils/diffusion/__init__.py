"""Diffusion itself: noise schedules, samplers, sampling, and models that come from elsewhere.

What every script may need is re-exported here; ``schedulers``, ``basic_unet``, ``linear_mix``, ``adapters``,
``guidance`` and ``pipelines`` are imported by those that need them.
"""

from .pretrained import check_fit, load_pretrained, unet_from_config, zero_init
from .sampling import sample_images
from .schedulers import noise_flags

__all__ = ["check_fit", "load_pretrained", "noise_flags", "sample_images", "unet_from_config", "zero_init"]
