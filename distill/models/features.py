"""Frozen feature extractors: losses compare images through them, evaluation measures with them.

Numbers of different feature spaces cannot be compared, so an extractor carries the name and the
sha256 that are printed beside every such number.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Protocol, cast, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.plain import plain_torch

FEATURE_NORM = 8.0


class AssetError(RuntimeError):
    """A shipped file is missing or is not the file that its card describes."""


class FeatureExtractor(Protocol):
    """The interface of a feature space for losses and evaluation; gradients flow to the images, never to weights.

    `name` goes into the name of every number measured with it, `dim` is D, `sha256` identifies the weights
    (None for an extractor that has no file, such as a test double).
    """

    name: str
    dim: int
    sha256: str | None
    full_count: int
    """Samples from which on a number may carry the plain name of its metric."""
    preprocessing: str
    """What happens to images before the network, in words; empty: nothing."""
    quantise: bool
    """Whether measures round images to the 8 bits of a file first (losses never do: rounding has no gradient)."""
    batch: int
    """Images a call when measuring."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to features [B, D]."""
        ...

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, D] and logits [B, classes] of the data's classes, or None where the network does not know
        them: logits of other classes must not be compared with the data's labels."""
        ...


@runtime_checkable
class PerceptualDistance(Protocol):
    """An extractor that compares two images itself, layer by layer: LPIPS, DISTS."""

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """[B] between images [B, C, H, W] in [-1, 1], 0 for equal ones."""
        ...


class Digits64(nn.Module):
    """Classifier of 8x8 grey digits whose 64-d penultimate layer is the feature space `digits64`.

    Features are L2-normalised times 8, so a coordinate is of order 1: unnormalised ones gave distances in
    the hundreds that depended mostly on the scale the training run happened to end with.
    """

    name = "digits64"
    dim = 64
    full_count = 2000
    preprocessing = ""
    classes = tuple(str(digit) for digit in range(10))  # the names of the logits
    quantise = False  # the data have 17 levels, which 8 bits do not hit
    batch = 256

    def __init__(self, sha256: str | None = None) -> None:
        super().__init__()
        self.sha256 = sha256
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 4 * 4, 64)
        self.head = nn.Linear(64, 10)

    def penultimate(self, images: Tensor) -> Tensor:
        """Non-negative activations [B, 64] of images [B, 1, 8, 8], before normalisation."""
        if images.shape[1:] != (1, 8, 8):
            raise ValueError(f"digits64 reads images [B, 1, 8, 8], got {list(images.shape)}")
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1, 8, 8] in [-1, 1] to features [B, 64] of norm 8."""
        return F.normalize(self.penultimate(images), dim=1) * FEATURE_NORM

    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8] in [-1, 1]."""
        return self.head(self.penultimate(images))

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` and `classify` for the cost of one pass."""
        x = self.penultimate(images)
        return F.normalize(x, dim=1) * FEATURE_NORM, self.head(x)


@plain_torch()
def load_digits64(device: torch.device | str = "cpu", folder: Traversable | None = None) -> Digits64:
    """The shipped classifier, frozen and in eval mode.

    `folder` holds `digits64.safetensors` and its card `digits64.json` (default: the package's assets).
    Raises AssetError if either is missing or the weights are not those of the card: a feature network that
    was retrained gives other distances (5.12 and 5.76 for the same noise in two runs).
    """
    folder = resources.files("distill.assets") if folder is None else folder
    weights, card = folder / "digits64.safetensors", folder / "digits64.json"
    for file in (weights, card):
        if not file.is_file():
            raise AssetError(f"{file} is missing; scripts/train_digits64.py writes it")
    data = weights.read_bytes()
    expected = cast(str, json.loads(card.read_text())["sha256"])
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise AssetError(f"{weights} has sha256 {found}, but {card} expects {expected}")
    net = Digits64(sha256=found)
    net.load_state_dict(safetensors.torch.load(data))
    return net.requires_grad_(False).eval().to(device)
