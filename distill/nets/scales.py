"""Tokens of several scales (VAR, arXiv 2404.02905): the map that the codes of all scales add up to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.nets.tokenizer import nearest_codes

SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Scales(nn.Module):
    """Codes of all scales <-> the map f_hat [B,C,h,h] that they add up to: f_hat = sum over scales of phi_k(up(codes_k)),
    phi_k(h) = (1 - r) h + r conv_k(h) with r = 1/2, and convolutions that neighbouring scales share.

    Args:
        scales: positions a side of each scale. size: C. shared: convolutions.
    """

    def __init__(self, scales: Sequence[int], size: int, shared: int = 4) -> None:
        super().__init__()
        self.scales, self.size, self.shared = list(scales), size, shared
        self.phis = nn.ModuleList([nn.Conv2d(size, size, 3, padding=1) for _ in range(shared)])

    @property
    def groups(self) -> list[int]:
        """Positions of each scale."""
        return [side**2 for side in self.scales]

    def phi(self, k: int) -> nn.Module:
        """The convolution of scale k: the one whose tick is nearest to k / (K - 1)."""
        low = (
            1 / 3 / self.shared if self.shared == 4 else 1 / 2 / self.shared
        )  # as the public weights were trained
        ticks = torch.linspace(low, 1 - low, self.shared, dtype=torch.float64, device="cpu")
        place = k / max(len(self.scales) - 1, 1)
        return self.phis[int((ticks - place).abs().argmin())]

    def part(self, codes: Tensor, k: int) -> Tensor:
        """What the codes [B,n^2,C] of scale k add to the map: [B,C,h,h]."""
        side = self.scales[k]
        grid = codes.transpose(1, 2).unflatten(-1, (side, side))
        if k < len(self.scales) - 1:
            grid = F.interpolate(grid, size=(self.scales[-1], self.scales[-1]), mode="bicubic")
        return 0.5 * grid + 0.5 * self.phi(k)(grid)

    def resized(self, f_hat: Tensor, k: int) -> Tensor:
        """A map [B,C,h,h] at the positions of scale k: [B,n^2,C]."""
        side = self.scales[k]
        return F.interpolate(f_hat, size=(side, side), mode="area").flatten(2).transpose(1, 2)

    def start(self, batch: int, like: Tensor) -> Tensor:
        """f_hat of no scale."""
        side = self.scales[-1]
        return like.new_zeros(batch, self.size, side, side)

    def total(self, codes: Tensor) -> Tensor:
        """f_hat [B,C,h,h] of the codes [B,L,C] of all scales."""
        f_hat = self.start(len(codes), codes)
        for k, part in enumerate(codes.split(self.groups, 1)):
            f_hat = f_hat + self.part(part, k)
        return f_hat

    def inputs(self, codes: Tensor) -> Tensor:
        """Inputs [B,L - 1,C] of all scales but the first, of the codes [B,L,C] of all scales."""
        f_hat, parts = self.start(len(codes), codes), []
        for k, part in enumerate(codes.split(self.groups, 1)[:-1]):
            f_hat = f_hat + self.part(part, k)
            parts.append(self.resized(f_hat, k + 1))
        return torch.cat(parts, 1)

    def vectors(self, features: Tensor, book: Tensor) -> Tensor:
        """Vectors [B,L,C] of all scales, whose nearest codes of the codebook [V,C] are the tokens of a map [B,C,h,h]: at each
        scale what the codes of the scales before leave of it, resized."""
        rest, parts = features, []
        for k in range(len(self.scales)):
            found = self.resized(rest, k)
            parts.append(found)
            rest = rest - self.part(book[nearest_codes(found, book)], k)
        return torch.cat(parts, 1)
