"""A small convolutional U-Net (Ho et al. 2020, with the scale-shift conditioning of Nichol & Dhariwal 2021)
for pixel data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distill.data.cond import Cond
from distill.nets.layers import (
    ClassEmbedding,
    GroupNorm,
    GuidanceEmbedding,
    SelfAttention,
    TimeEmbedding,
    add_guidance,
    label_of,
)
from distill.nets.net import Net


class ResBlock(nn.Module):
    """Two 3x3 convolutions with a residual path; time and class scale and shift the second normalisation."""

    def __init__(
        self, channels_in: int, channels: int, embedding: int, groups: int, plain_norm: bool
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, plain=plain_norm)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        self.norm2 = GroupNorm(groups, channels, plain=plain_norm)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = torch.addcmul(shift, self.norm2(hidden), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(hidden))


def _check_sizes(sizes: Mapping[str, int], multipliers: Sequence[int], num_classes: int) -> None:
    """Refuse sizes that make no net."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: found {size}, expected at least 1")
    if not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers: found {list(multipliers)}, expected at least one, each at least 1")
    if num_classes < 0:
        raise ValueError(f"num_classes: found {num_classes}, expected at least 0")


class UNet(Net):
    """U-Net for [B,C,H,W] with H and W divisible by 2^(levels - 1).

    Args:
        channels: C of the data.
        width: channels of the first level; level i has width * multipliers[i].
        multipliers: one entry a level; between levels the resolution halves.
        blocks: residual blocks a level, in the encoder and in the decoder.
        num_classes: class labels it is conditioned on; 0 for none.
        time_scale: network time = time_scale * t. The embedding's fastest frequency is 1, so a flow's t in
            [0, 1] wants hundreds to a thousand (the 999 and 1000 of the rectified-flow code bases); a
            discrete VP index wants 1.
        embedding: width of the time and class embedding.
        attention: "sdpa" | "math" | "none" for the middle block; "math" allows forward-mode derivatives.
        plain_norm: group norms of elementary operations, needed by forward-mode derivatives on channels-last
            inputs.
        channels_last: memory format of the activations (1.3x faster on CPUs and tensor cores).
        guidance_embedding: features of the guidance w as an input (`guidance_w` of `Cond`); 0: no such input.
    """

    bottleneck = "middle_out"  # its output is the feature map of discriminators
    # kind of guidance terms (`models.guidance_adapters`) -> blocks
    guidance_blocks: ClassVar[dict[str, list[str]]] = {
        "embedding": ["embed"],
        "attention": ["attention"],
        "offset": ["middle_in", "middle_out"],
    }

    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 16,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        num_classes: int = 10,
        time_scale: float = 1000.0,
        embedding: int = 64,
        groups: int = 8,
        heads: int = 1,
        attention: str = "sdpa",
        plain_norm: bool = False,
        channels_last: bool = True,
        guidance_embedding: int = 0,
    ) -> None:
        super().__init__()
        if attention not in ("sdpa", "math", "none"):
            raise ValueError(f"attention: found {attention!r}, expected one of 'sdpa', 'math', 'none'")
        sizes = {"channels": channels, "width": width, "blocks": blocks, "embedding": embedding}
        _check_sizes(sizes | {"groups": groups, "heads": heads}, multipliers, num_classes)
        self.num_classes, self.time_scale = num_classes, time_scale
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.time = TimeEmbedding(embedding)
        self.embed = nn.Sequential(
            nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.label = ClassEmbedding(num_classes, embedding) if num_classes else None
        self.guidance = GuidanceEmbedding(guidance_embedding, embedding) if guidance_embedding else None

        widths = [width * m for m in multipliers]
        block = partial(ResBlock, embedding=embedding, groups=groups, plain_norm=plain_norm)
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        skips = self._build_down(widths, blocks, block)
        current = widths[-1]
        self.middle_in = block(current, current)
        self.attention = (
            nn.Identity()
            if attention == "none"
            else SelfAttention(
                current, heads=heads, groups=groups, math=attention == "math", plain_norm=plain_norm
            )
        )
        self.middle_out = block(current, current)
        self._build_up(widths, blocks, block, skips)
        self.out_norm = GroupNorm(groups, widths[0], plain=plain_norm)
        self.out = nn.Conv2d(widths[0], channels, 3, padding=1)
        self.recomputes = False
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.to(memory_format=self.memory_format)

    def _build_down(
        self, widths: Sequence[int], blocks: int, block: Callable[[int, int], ResBlock]
    ) -> list[int]:
        """The encoder; returns the channels of every activation that the decoder concatenates."""
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        current = self.stem.out_channels
        skips = [current]
        for level, level_width in enumerate(widths):
            if level:
                self.shrink.append(nn.Conv2d(current, current, 3, stride=2, padding=1))
                skips.append(current)
            stack = nn.ModuleList()
            for _ in range(blocks):
                stack.append(block(current, level_width))
                current = level_width
                skips.append(current)
            self.down.append(stack)
        return skips

    def _build_up(
        self, widths: Sequence[int], blocks: int, block: Callable[[int, int], ResBlock], skips: list[int]
    ) -> None:
        """The decoder: every kept activation is concatenated once."""
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        current = widths[-1]
        for level in reversed(range(len(widths))):
            stack = nn.ModuleList()
            for _ in range(blocks + 1):
                stack.append(block(current + skips.pop(), widths[level]))
                current = widths[level]
            self.up.append(stack)
            if level:
                self.grow.append(nn.Conv2d(current, current, 3, padding=1))

    def enable_gradient_checkpointing(self) -> None:
        """Compute the activations of blocks again in the backward pass, instead of keeping them."""
        self.recomputes = True

    def _run(self, block: nn.Module, hidden: Tensor, embedding: Tensor) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(block, hidden, embedding, use_reentrant=False)
        return block(hidden, embedding)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B,C,H,W] at process times t [B] under `cond` -> [B,C,H,W]."""
        embedding = self.embed(self.time(t * self.time_scale))
        if self.label is not None:
            embedding = embedding + self.label(label_of(cond, self.num_classes))
        embedding = F.silu(add_guidance(embedding, self.guidance, cond.get("guidance_w")))
        hidden = self.stem(x.contiguous(memory_format=self.memory_format))
        skips = [hidden]
        for level, stack in enumerate(self.down):
            if level:
                hidden = self.shrink[level - 1](hidden)
                skips.append(hidden)
            for block in stack:
                hidden = self._run(block, hidden, embedding)
                skips.append(hidden)
        hidden = self.attention(self._run(self.middle_in, hidden, embedding))
        hidden = self._run(self.middle_out, hidden, embedding)
        for level, stack in enumerate(self.up):
            for block in stack:
                hidden = self._run(block, torch.cat([hidden, skips.pop()], dim=1), embedding)
            if level < len(self.grow):
                hidden = self.grow[level](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return self.out(F.silu(self.out_norm(hidden))).contiguous()
