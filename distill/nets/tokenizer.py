"""Tokenizers: images as sequences of vectors of a codebook (VQ-VAE, arXiv 1711.00937)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.cond import Cond
from distill.nets.net import Net


@dataclass(frozen=True)
class LookUp:
    """Reconstructed images [B,*D]; the vectors [B,L,C] that were looked up; their codes [B,L,C], with the gradient of the
    codebook; indices [B,L] of the codes; `idle_distance` [B]."""

    images: Tensor
    vectors: Tensor
    codes: Tensor
    index: Tensor
    idle: Tensor


class TokenizerNet(Net, ABC):
    """Images [B,*D] <-> code vectors [B,L,C].

    Attributes:
        vocabulary: V. num_classes: 0, no conditions.
        l2_norm: whether codes, and vectors that are looked up, have length 1 (LlamaGen).
    """

    l2_norm: bool = False
    vocabulary: int
    num_classes = 0

    @abstractmethod
    def image_shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the image of [L,C] code vectors. Raises ValueError naming `sample_shape` for others."""

    @abstractmethod
    def codes(self) -> Tensor:
        """The codebook [V,C] as it is looked up."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Vectors [B,L,C] before they are looked up."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Code vectors [B,L,C] -> images, about in [-1, 1]."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond, parts: bool = False) -> Any:
        """Images -> reconstructed images, with gradients through the look-up (straight-through). With `parts`, a
        `LookUp`."""
        vectors = self.encode(x)
        vectors = F.normalize(vectors, dim=-1) if self.l2_norm else vectors
        book = self.codes()
        index = nearest_codes(vectors, book)
        codes = book[index]
        images = self.decode(vectors + (codes - vectors).detach())
        return LookUp(images, vectors, codes, index, idle_distance(vectors, index, book)) if parts else images


class ConvTokenizer(TokenizerNet):
    """A convolutional tokenizer for small images: patches of `patch` pixels become positions, where all convolutions act.

    Args:
        channels: of the images. patch: pixels a side; a multiple in each direction makes the image.
        grid: positions a side, so L = grid^2. vocabulary: V. size: C. width: channels inside.
        l2_norm: see `TokenizerNet`.
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        patch: int = 2,
        grid: int = 4,
        vocabulary: int = 32,
        size: int = 4,
        width: int = 64,
        l2_norm: bool = False,
    ) -> None:
        super().__init__()
        if min(channels, patch, grid, vocabulary, size, width) < 1:
            raise ValueError(
                f"channels, patch, grid, vocabulary, size, width: found {[channels, patch, grid, vocabulary, size, width]}, "
                "expected at least 1"
            )
        self.vocabulary = vocabulary
        self.channels, self.patch, self.grid, self.size, self.l2_norm = channels, patch, grid, size, l2_norm
        pixels = channels * patch**2
        self.book = nn.Parameter(torch.randn(vocabulary, size))
        self.encoder = _convolutions(pixels, width, size)
        self.decoder = _convolutions(size, width, pixels)

    def image_shape(self, sample_shape: Sequence[int]) -> tuple[int, ...]:
        if tuple(sample_shape) != (self.grid**2, self.size):
            raise ValueError(
                f"sample_shape: found {list(sample_shape)}, but the tokenizer has {[self.grid**2, self.size]}"
            )
        return (self.channels, self.grid * self.patch, self.grid * self.patch)

    def codes(self) -> Tensor:
        return F.normalize(self.book, dim=-1) if self.l2_norm else self.book

    def encode(self, images: Tensor) -> Tensor:
        wanted = self.image_shape((self.grid**2, self.size))
        if tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"images: found shape {list(images.shape)}, but the tokenizer takes {['B', *wanted]}"
            )
        found: Tensor = self.encoder(F.pixel_unshuffle(images, self.patch))
        return found.flatten(2).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        grid = codes.transpose(1, 2).reshape(len(codes), self.size, self.grid, self.grid)
        return F.pixel_shuffle(self.decoder(grid), self.patch)


def _convolutions(inputs: int, width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(width, outputs, 3, padding=1),
    )


def idle_distance(vectors: Tensor, index: Tensor, book: Tensor) -> Tensor:
    """[B] the mean over codes [V,C] of the squared distance of each that a sample does not use to the nearest of its vectors
    [B,L,C], which get no gradient."""
    distance = torch.cdist(book.expand(len(vectors), *book.shape), vectors.detach()).amin(2).square()
    return (distance * torch.ones_like(distance).scatter(1, index, 0.0)).mean(1)


def nearest_codes(vectors: Tensor, book: Tensor, chunk: int = 2**26) -> Tensor:
    """Indices [...] of the nearest codes [V,C] of vectors [...,C], by |e|^2 - 2 x.e; no tensor [N,V,C] exists."""
    rows = vectors.reshape(-1, vectors.shape[-1]).to(book.dtype)
    squares = book.square().sum(1)
    parts = rows.split(max(1, chunk // len(book)))
    return torch.cat([(squares - 2 * part @ book.T).argmin(1) for part in parts]).view(vectors.shape[:-1])
