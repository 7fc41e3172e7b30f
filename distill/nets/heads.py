"""Heads that turn features of a denoiser into the logits of a discriminator."""

from __future__ import annotations

from torch import Tensor, nn

from distill.nets.layers import GroupNorm

# The last convolution covers this many pixels a side, so a feature map has that side times a power of two.
LAST = 4


class GanHead(nn.Module):
    """DMD2's head (arXiv 2405.14867): feature maps [B, channels, size, size] -> logits [B, 1], positive for real.

    [Conv 4x4 stride 2, GroupNorm, SiLU] halves the map until 4 x 4 is left; then Conv 4x4, GroupNorm, SiLU
    and Conv 1x1 to one number. The width stays ``channels``. DMD2 puts it on the bottleneck of the fake score:
    8 x 8 x 768 for ADM on ImageNet-64, 8 x 8 x 1280 for SD 1.5, 32 x 32 x 1280 for SDXL; there are 1, 1 and 3
    halvings. A map of 4 x 4, which none of them has, needs no halving.

    Args:
        channels: of the features; divisible by ``groups``.
        size: height and width of the features: 4 times a power of two.
        groups: of the normalisations.
    """

    def __init__(self, channels: int, size: int, *, groups: int = 32) -> None:
        super().__init__()
        if size < LAST:
            raise ValueError(
                f"size: found features of {size} x {size}, expected at least {LAST} x {LAST}: the head ends in a "
                f"{LAST} x {LAST} convolution"
            )
        halvings = (size // LAST).bit_length() - 1
        if LAST * 2**halvings != size:
            raise ValueError(f"size: found {size}, expected {LAST} times a power of two")
        if channels < 1 or groups < 1 or channels % groups:
            raise ValueError(
                f"groups: {channels} channels cannot be split into {groups} groups; expected a divisor"
            )
        self.shape = (channels, size, size)
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [
                nn.Conv2d(channels, channels, 4, stride=2, padding=1),
                GroupNorm(groups, channels),
                nn.SiLU(),
            ]
        layers += [nn.Conv2d(channels, channels, LAST, stride=LAST), GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels, size, size] -> [B, 1].

        Raises:
            ValueError: features of another shape than the head was made for.
        """
        if tuple(features.shape[1:]) != self.shape:
            raise ValueError(f"features: found shape {tuple(features.shape)}, expected [B, *{self.shape}]")
        return self.layers(features).flatten(1)


class VectorHead(nn.Module):
    """Features [B, channels] of a net without pixels (an MLP) -> logits [B, 1], positive for real: two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, channels] -> [B, 1]."""
        return self.layers(features)
