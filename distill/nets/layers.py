"""Layers that the nets share. Each has a form of plain operations, since forward-mode derivatives
(`torch.func.jvp`, needed by continuous-time methods) pass neither fused attention nor the native group norm
on channels-last inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.arguments import check_range
from distill.data.cond import NULL_LABEL, Cond
from distill.process.guidance_w import w_embedding


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) of [B,C,*]. `plain=True` computes it with elementary operations and
    reductions."""

    def __init__(self, groups: int, channels: int, *, plain: bool = False, eps: float = 1e-5) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"groups: {channels} channels cannot be split into {groups} groups")
        self.groups, self.plain, self.eps = groups, plain, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.plain:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        grouped = x.reshape(x.shape[0], self.groups, -1)
        centred = grouped - grouped.mean(dim=2, keepdim=True)
        scale = (centred.square().mean(dim=2, keepdim=True) + self.eps).rsqrt()
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (centred * scale).reshape(x.shape) * self.weight.view(shape) + self.bias.view(shape)


class SelfAttention(nn.Module):
    """Residual multi-head self-attention over the positions of [B,C,H,W]. `math=True` writes the softmax
    out."""

    def __init__(
        self, channels: int, *, heads: int = 1, groups: int = 8, math: bool = False, plain_norm: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"heads: {channels} channels cannot be split over {heads} heads")
        self.heads, self.math = heads, math
        self.norm = GroupNorm(groups, channels, plain=plain_norm)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B,HW,C]
        q, k, v = self.qkv(tokens).view(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.math:
            weights = torch.softmax((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1]), dim=-1)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        mixed = self.out(mixed.transpose(1, 2).reshape(batch, height * width, channels))
        return x + mixed.transpose(1, 2).reshape(x.shape)


class TimeEmbedding(nn.Module):
    """[B] network times -> [B, dim] sines and cosines (Vaswani et al. 2017) of frequencies from 1 down to
    1/max_period."""

    frequencies: Tensor

    def __init__(self, dim: int, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(
                f"dim: a time embedding needs an even number of features, at least 2, found {dim}"
            )
        self.register_buffer(
            "frequencies",
            torch.exp(-math.log(max_period) * torch.arange(dim // 2) / (dim // 2)),
            persistent=False,
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(torch.float32)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def label_of(cond: Cond, num_classes: int) -> Tensor:
    """The class labels [B] of `cond`. Raises ValueError for conditions without labels."""
    if (label := cond.get("label")) is None:
        raise ValueError(
            f"cond: this net expects one of {num_classes} class labels a sample, found no labels"
        )
    return label


class ClassEmbedding(nn.Module):
    """[B] class labels -> [B, dim]; the label -1 (the null condition) has an embedding of its own, the last
    row."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        return class_rows(label, self.table, self.num_classes)


def class_rows(label: Tensor, table: nn.Embedding, num_classes: int) -> Tensor:
    """[B] class labels -> their rows [B, dim] of a table; -1, the null condition, is the row behind those of the classes.

    Raises ValueError for labels on the CPU that are no classes, and for -1 where the table has no row for it."""
    check_range("label", label, num_classes, null=table.num_embeddings > num_classes)
    # Labels are not checked on accelerators: an unknown class must not be read as the null condition.
    past = (label >= num_classes).to(label.dtype)
    rows: Tensor = table(torch.where(label == NULL_LABEL, num_classes, label + past))
    return rows


class GuidanceEmbedding(nn.Module):
    """The guidance w (`guidance_w` of `Cond`) as an input: [B] -> [B, width]; 0 at the start, so that a net that gets it
    begins as the net without it."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        if features < 4:
            raise ValueError(
                f"guidance_embedding: found {features}, expected 0 (none) or at least 4 features"
            )
        self.features = features
        self.out = nn.Linear(features, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, w: Tensor) -> Tensor:
        return self.out(w_embedding(w, self.features).to(self.out.weight.dtype))


def embeds_guidance(net: nn.Module) -> bool:
    """Whether a net takes the guidance w as an input."""
    return any(
        isinstance(module, GuidanceEmbedding) or getattr(module, "embeds_guidance", False) is True
        for module in net.modules()
    )


def add_guidance(embedding: Tensor, layer: GuidanceEmbedding | None, w: Tensor | None) -> Tensor:
    """`embedding` [B, width] plus that of the guidance w; a net and its conditions must agree on whether there is one."""
    if layer is None and w is None:
        return embedding
    if layer is None:
        raise ValueError("guidance_w: found a guidance embedding's input, but this net was built without one")
    if w is None:
        raise ValueError(
            "guidance_w: missing; this net was trained with the guidance w = guidance_scale - 1 as an input"
        )
    return embedding + layer(w)
