"""`random_conv`: features of a convolutional network with fixed random weights, which no training has seen.

It knows no classes and needs no file: a second space beside that of a loss or of a classifier. Distances in it follow the
local structure of images.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.arguments import integer
from distill.data.plain import plain_torch
from distill.data.rng import stream_key
from distill.models.extractors.images import check_images, to_rgb

NAME = "random_conv"
WIDTHS = (3, 32, 64, 128)


class RandomConv(nn.Module):
    """Three convolutions of 3x3 with ReLU, the last two with stride 2, then means over 2x2 areas: [B, 512], non-negative.

    Grey images are repeated to RGB. Weights are He-normal, a function of `seed`, so features of images in [-1, 1] have size
    of order 0.1 to 1. Gradients flow to the images.
    """

    name = NAME
    dim = 4 * WIDTHS[-1]
    full_count = 2000
    preprocessing = ""
    quantise = False
    batch = 128

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(stream_key(integer("seed", seed), NAME) % 2**63)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise(WIDTHS):
            weight = torch.randn(after, before, 3, 3, generator=generator, device="cpu")
            self.weights.append(weight * (2 / (9 * before)) ** 0.5)
            self.biases.append(0.1 * torch.randn(after, generator=generator, device="cpu"))
        parts = [p.detach().numpy().tobytes() for p in (*self.weights, *self.biases)]
        self.sha256 = hashlib.sha256(b"".join(parts)).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] to features [B, 512] in float32."""
        x = to_rgb(check_images(self.name, images)).float()
        with torch.autocast(images.device.type, enabled=False):
            for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                x = F.relu(F.conv2d(x, weight, bias, stride=1 if place == 0 else 2, padding=1))
            return F.adaptive_avg_pool2d(x, 2).flatten(1)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and no logits: the network knows no classes."""
        return self(images), None

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode; it has no layer that would differ."""
        return super().train(False)


@plain_torch()
def load_random_conv(device: torch.device | str = "cpu", seed: int = 0) -> RandomConv:
    """The network of a seed, frozen."""
    return RandomConv(seed).requires_grad_(False).eval().to(device)
