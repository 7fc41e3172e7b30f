"""VAR's transformer over scales (arXiv 2404.02905), and Distilled Decoding's student of it (arXiv 2412.17153). Parameters
have the names of the public files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.cond import Cond
from distill.nets.layers import class_rows, label_of
from distill.nets.scales import SCALES, Scales
from distill.nets.token_net import TokenNet
from distill.nets.token_transformer import TokenHead, student_output
from distill.process.prefix import data_groups


class VAR(TokenNet):
    """A group a scale, whose positions are drawn independently given the scales before.

    The input at a scale is the map of all codes before, resized; a scale sees all scales up to itself.

    Args:
        depth: blocks; the width is 64 depth and the heads are as many, unless given. scales: positions a side of each.
        vocabulary: V. size: C. num_classes: classes; the table has a null row more. shared: convolutions of the map.
        shared_adaln: one linear layer of the class for all blocks, each of which adds numbers of its own (d36, 512 pixels).
        student: see above. split: of a student, scales whose tokens come from the logits; null: all. logits: see `TokenNet`.

    With `student` it reads code vectors and noise as they are, behind a start of its own scale, with a flag of data and noise
    that is added in each block between attention and perceptron, and before both heads. A position sees itself and the scales
    before, not the others of its scale: so does the map of noise that it learns. See `nets.token_transformer.TokenTransformer`.

    The public files: `teacher=var` (`models.token_files`). There is no dropout, and no stochastic depth in training.
    """

    def __init__(
        self,
        *,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        scales: Sequence[int] = SCALES,
        vocabulary: int = 4096,
        size: int = 32,
        num_classes: int = 1000,
        shared: int = 4,
        shared_adaln: bool = False,
        student: bool = False,
        split: int | None = None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        width, heads = 64 * depth if width is None else width, depth if heads is None else heads
        if min(depth, width, heads, vocabulary, size, num_classes, *scales) < 1 or width % heads:
            raise ValueError(
                f"width, heads: found {width} and {heads}, expected a multiple, and sizes of at least 1"
            )
        if split is not None and (not student or not 0 <= split <= len(scales)):
            raise ValueError(
                f"split: found {split}, expected null, or of a student 0 .. {len(scales)} scales"
            )
        self.vocabulary, self.size, self.num_classes = vocabulary, size, num_classes
        self.groups = tuple(n**2 for n in scales)
        self.length, self.student, self.split = sum(self.groups), student, sum(self.groups[:split])
        levels = (1, *self.groups) if student else self.groups  # the start of a student is a scale of its own
        level = torch.tensor([number for number, count in enumerate(levels) for _ in range(count)])
        self.register_buffer("level", level, persistent=False)
        self.class_emb, self.word_embed = nn.Embedding(num_classes + 1, width), nn.Linear(size, width)
        std = math.sqrt(1 / width / 3)
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) * std)
        self.pos_1LC = nn.Parameter(torch.randn(1, len(level), width) * std)
        self.lvl_embed = nn.Embedding(len(levels), width)
        self.shared_adaln = shared_adaln
        if shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList([VARBlock(width, heads, shared_adaln) for _ in range(depth)])
        self.width = width
        self.head_nm, self.head = AdaLN(width), self.last_layer(logits)
        self.register_buffer("codebook", torch.zeros(vocabulary, size))
        if student:
            self.n_d_embed = nn.Embedding(2, width)
            nn.init.normal_(self.n_d_embed.weight, std=std)
            self.layerwise_n_d_embed = nn.ModuleList([nn.Linear(width, width) for _ in range(depth + 1)])
            self.final_layer_conti = TokenHead(width, size)
        else:
            self.quantize = Scales(scales, size, shared)
            self.quantize.requires_grad_(False)

    level: Tensor

    def forward(self, x: Tensor, t: Tensor, cond: Cond, heads: bool = False) -> Any:
        """As of `TokenTransformer`."""
        first = self._class(cond)
        if not self.student:
            return self.logits(self.quantize.inputs(x), first)
        known = data_groups(t, len(self.groups))[:, None]  # the start is level 0, and the scales follow
        flags = self.n_d_embed((self.level <= known).long())
        hidden = self._embedded(self.word_embed(x.to(first.dtype)), first) + flags
        visible = (self.level[:, None] > self.level) | torch.eye(
            len(self.level), dtype=torch.bool, device=x.device
        )
        *inside, last = self.layerwise_n_d_embed
        shared = self._of_blocks(first)
        for block, layer in zip(self.blocks, inside, strict=True):
            hidden, _ = block(hidden, shared, visible, None, layer(flags))
        hidden = hidden + last(flags)
        logits = self.head(self.head_nm(hidden, first))[:, 1:]
        made = self.final_layer_conti(hidden, first)[:, 1:]
        data = (self.level <= known)[:, 1:]
        return (logits, made) if heads else student_output(x, logits, made, self.codebook, data, self.split)

    def of_teacher(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Levels and positions of the teacher with new ones behind the start; no convolutions of the map."""
        kept = {name: value for name, value in state.items() if not name.startswith("quantize.")}
        for name, dim in (("lvl_embed.weight", 0), ("pos_1LC", 1)):
            own, given = self.get_parameter(name).detach(), kept[name]
            count = given.shape[dim]
            kept[name] = torch.cat(
                [given.narrow(dim, 0, 1), own.narrow(dim, 1, 1), given.narrow(dim, 1, count - 1)], dim
            )
        return kept

    def logits(self, inputs: Tensor, first: Tensor) -> Tensor:
        """Logits [B,L,V] of inputs [B,L - 1,C] of all scales but the first, with a mask over scales."""
        hidden = self._embedded(self.word_embed(inputs.to(first.dtype)), first)
        visible = self.level[:, None] >= self.level
        shared = self._of_blocks(first)
        for block in self.blocks:
            hidden, _ = block(hidden, shared, visible, None)
        out: Tensor = self.head(self.head_nm(hidden, first))
        return out

    def _class(self, cond: Cond) -> Tensor:
        return class_rows(label_of(cond, self.num_classes), self.class_emb, self.num_classes)

    def _of_blocks(self, first: Tensor) -> Tensor:
        """What the blocks are conditioned on: the class [B,width], or the numbers [B,1,6,width] that they share."""
        return self.shared_ada_lin(first).view(-1, 1, 6, self.width) if self.shared_adaln else first

    def _embedded(self, words: Tensor, first: Tensor) -> Tensor:
        start = first[:, None] + self.pos_start
        return torch.cat([start, words], 1) + self.lvl_embed(self.level) + self.pos_1LC

    def begin(self, cond: Cond) -> Any:
        """The class, an empty map and an empty cache of keys and values."""
        first = self._class(cond)
        f_hat = self.quantize.start(len(first), first)
        return VARState(first, self._of_blocks(first), f_hat, [None] * len(self.blocks))

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        """A scale sees all before it through the cache. Several known scales are added one after the other, so that no scale
        sees a later one."""
        if codes is None:
            return self._scale(state, state.first[:, None] + self.pos_start)
        sizes = list(self.groups[state.scale :]) if state.scale == 0 else [codes.shape[1]]
        if state.scale == 0:
            self._scale(state, state.first[:, None] + self.pos_start)
        logits, start = codes, 0
        while start < codes.shape[1]:
            size = sizes.pop(0)
            k = state.scale - 1
            part = codes[:, start : start + size].to(state.f_hat.dtype)
            state.f_hat = state.f_hat + self.quantize.part(part, k)
            logits = self._scale(state, self.word_embed(self.quantize.resized(state.f_hat, k + 1)))
            start += size
        return logits

    def _scale(self, state: Any, words: Tensor) -> Tensor:
        """Logits of the next scale, whose embedded input is `words`."""
        begin = sum(self.groups[: state.scale])
        place = slice(begin, begin + words.shape[1])
        hidden = words + self.lvl_embed(self.level[place]) + self.pos_1LC[:, place]
        for number, block in enumerate(self.blocks):
            hidden, state.cache[number] = block(hidden, state.cond, None, state.cache[number])
        state.scale += 1
        out: Tensor = self.head(self.head_nm(hidden, state.first))
        return out


@dataclass
class VARState:
    """Generation so far: class [B,width], what the blocks are conditioned on, map [B,C,h,h], keys and values of each block,
    scales in them."""

    first: Tensor
    cond: Tensor
    f_hat: Tensor
    cache: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    scale: int = 0


class Conditioned(nn.Module):
    """Scales, shifts and gates, `parts` in all: a linear layer of the condition [B,width] makes them, or, with `shared`, they
    are the condition [B,1,parts,width] plus learned numbers."""

    def __init__(self, width: int, parts: int, shared: bool = False) -> None:
        super().__init__()
        self.parts, self.width, self.shared = parts, width, shared
        if shared:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, parts, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))

    def split(self, cond: Tensor) -> tuple[Tensor, ...]:
        """`parts` tensors [B,1,width]."""
        if self.shared:
            return (self.ada_gss + cond).unbind(2)
        return self.ada_lin(cond).view(-1, 1, self.parts, self.width).unbind(2)


class AdaLN(Conditioned):
    """A layer norm without weights, scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.split(cond)
        return normed(x) * (1 + scale) + shift


def normed(x: Tensor) -> Tensor:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class VARBlock(Conditioned):
    """Attention of unit queries and keys, and a two-layer perceptron; scale, shift and gate of both come from the condition."""

    def __init__(self, width: int, heads: int, shared: bool = False) -> None:
        super().__init__(width, 6, shared)
        self.attn, self.ffn = VARAttention(width, heads), FeedForward(width)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        visible: Tensor | None,
        cache: tuple[Tensor, Tensor] | None,
        between: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`between` [B,n,width] is added behind the attention."""
        gate1, gate2, scale1, scale2, shift1, shift2 = self.split(cond)
        mixed, cache = self.attn(normed(x) * (1 + scale1) + shift1, visible, cache)
        x = x + mixed * gate1
        x = x if between is None else x + between
        return x + self.ffn(normed(x) * (1 + scale2) + shift2) * gate2, cache


class FeedForward(nn.Module):
    """Two linear layers with GELU (tanh form)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VARAttention(nn.Module):
    """softmax(s q.k) with q and k of length 1 and a learned factor s <= 100 a head; keys have no bias."""

    zero_k_bias: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mat_qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), 4.0).log())

    def forward(
        self, x: Tensor, visible: Tensor | None, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        batch, length, _ = x.shape
        parts = (
            F.linear(x, self.mat_qkv.weight, bias)
            .view(batch, length, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        query, key, value = parts.unbind(0)
        query = F.normalize(query, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
        key = F.normalize(key, dim=-1)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)
        return self.proj(mixed.transpose(1, 2).flatten(2)), (key, value)
