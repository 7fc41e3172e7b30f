"""Terms beside blocks of a frozen net that take the guidance w as an input (AGD, Jensen & Sadat 2025, arXiv 2503.07274): the
net then needs one call where classifier-free guidance needs two.

A block's output becomes block(h) + term(h; w, t, prompt). The last layer of a term is 0 at the start, so the net begins as it
was.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.process.guidance_w import w_embedding

KINDS = ("embedding", "attention", "offset")
W_SCALE = 1000.0  # of w in offsets, as in the authors' code


@dataclass(frozen=True)
class GuidanceTerms:
    """The option `guidance` of adapters.

    Attributes:
        kind: "embedding" adds features of w, to the output of a time embedding; "attention" is the authors' cross-attention
            over [w, t, prompt]; "offset" their offset, the same at all positions.
        width: of the features of "embedding", and of the hidden layers of the others.
        blocks: names of the blocks, each whole or the end after a dot; None: those that the net names for the kind.
        context: width of prompts' states (`context` of `Cond`); 0: the terms do not read prompts.
        time_scale: the terms get `time_scale * t`.
    """

    kind: Literal["embedding", "attention", "offset"] = "embedding"
    width: int = 64
    blocks: list[str] | None = None
    context: int = 0
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 2:
            raise ValueError(f"width: found {self.width}, expected an even number of at least 4")
        if self.context < 0:
            raise ValueError(f"context: found {self.context}, expected at least 0")

    def term(self, dim: int) -> Term:
        """A term for a block whose output has `dim` features."""
        if self.kind == "embedding":
            return EmbeddingTerm(dim, self.width)
        made = AttentionTerm if self.kind == "attention" else OffsetTerm
        return made(dim, self.width, self.context, self.time_scale)


class Given:
    """What the terms of a net read: set by the net at each call, before its blocks run. It stays until the next call, since
    activation checkpointing runs blocks again in the backward pass."""

    w: Tensor | None = None
    t: Tensor
    context: Tensor | None = None
    mask: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Given:
        memo[id(self)] = made = Given()
        return made


class Term(nn.Module, ABC):
    """A term; `given` is shared by all of a net. It is called by `added`, which gathers its weights where they are sharded."""

    entries = ("added",)

    def __init__(self) -> None:
        super().__init__()
        self.given = Given()

    def after(self, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any], out: Any) -> Any:
        """A forward hook of a block: its output, of several the first one, plus the term."""
        hidden = args[0] if args else options["hidden_states"]
        made = out[0] if isinstance(out, tuple) else out
        if self.given.w is None:
            raise RuntimeError("guidance_w: a block with a guidance term ran outside of its net")
        made = made + self.added(hidden).to(made.dtype)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    @abstractmethod
    def added(self, hidden: Tensor) -> Tensor:
        """The term for the block's input."""


class EmbeddingTerm(Term):
    """out(features of w), [B, dim]; the features are those of latent consistency (`process.guidance_w.w_embedding`)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width, self.out = width, nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def added(self, hidden: Tensor) -> Tensor:
        """[B, dim]."""
        assert self.given.w is not None
        return self.out(w_embedding(self.given.w, self.width).to(self.out.weight.dtype))


class FourierEmbedding(nn.Module):
    """LayerNorm(MLP(cos(2 pi (f x + p)))) of numbers x [B], f ~ N(0, 1) and p ~ U(0, 1) fixed: [B, width]. `inner_norm`: also a
    LayerNorm between the two layers of the MLP."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, *, inner_norm: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(width))
        self.register_buffer("phases", torch.rand(width))
        self.mlp = _mlp(width, 4 * width, width, inner_norm=inner_norm)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * math.pi * (x.float()[:, None] * self.frequencies + self.phases)
        made: Tensor = self.norm(self.mlp(angles.cos().to(self.norm.weight.dtype)))
        return made


class AttentionTerm(Term):
    """out(softmax(q k^T / sqrt(d)) v) with q of the block's input and k, v of the tokens [w, t, prompt...], with sinusoidal
    positions; one head."""

    def __init__(self, dim: int, width: int, context: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.guidance, self.time = FourierEmbedding(width), FourierEmbedding(width)
        self.prompt = nn.Linear(context, width) if context else None
        self.q = nn.Linear(dim, width, bias=False)
        self.k, self.v = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def added(self, hidden: Tensor) -> Tensor:
        """As `hidden`: tokens [B,N,dim] or a map [B,dim,H,W]."""
        given, flat = self.given, hidden.dim() == 4
        assert given.w is not None
        h = hidden.flatten(2).transpose(1, 2) if flat else hidden
        tokens = [self.guidance(given.w)[:, None], self.time(self.time_scale * given.t)[:, None]]
        mask = None
        if self.prompt is not None:
            assert given.context is not None
            tokens.append(self.prompt(given.context.to(self.prompt.weight.dtype)))
            if given.mask is not None:
                always = given.mask.new_ones(len(h), 2)
                mask = torch.cat([always, given.mask], 1)[:, None]
        row = torch.cat(tokens, 1)
        row = row + positions(row.shape[1], row.shape[2], row)
        q = self.q(h.to(row.dtype))
        made: Tensor = self.out(F.scaled_dot_product_attention(q, self.k(row), self.v(row), attn_mask=mask))
        return made.transpose(1, 2).unflatten(2, hidden.shape[2:]) if flat else made


class OffsetTerm(Term):
    """MLP(embedding of 1000 w + embedding of t + projection of the mean prompt), the same at all positions."""

    def __init__(self, dim: int, width: int, context: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.guidance, self.time = (FourierEmbedding(width, inner_norm=True) for _ in range(2))
        self.prompt = nn.Linear(context, width) if context else None
        self.out = _mlp(width, width, dim, inner_norm=True)
        for parameter in self.out[-1].parameters():
            nn.init.zeros_(parameter)

    def added(self, hidden: Tensor) -> Tensor:
        """[B,1,dim] for tokens, [B,dim,1,1] for a map, [B,dim] for vectors."""
        given = self.given
        assert given.w is not None
        c = self.guidance(W_SCALE * given.w) + self.time(self.time_scale * given.t)
        if self.prompt is not None:
            assert given.context is not None
            c = c + self.prompt(_mean(given.context, given.mask).to(c.dtype))
        made: Tensor = self.out(c)
        if hidden.dim() == 4:
            return made[:, :, None, None]
        return made[:, None] if hidden.dim() == 3 else made


def positions(count: int, width: int, like: Tensor) -> Tensor:
    """[count, width] sines, then cosines, of position / 10000^(i / (width / 2))."""
    half = width // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=like.device) / half)
    angles = torch.arange(count, device=like.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).to(like.dtype)


def width_of(block: nn.Module) -> int | None:
    """Features of a block's output: those of its last linear layer or convolution; None without one."""
    last = None
    for module in block.modules():
        if isinstance(module, nn.Linear):
            last = module.out_features
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            last = module.out_channels
    return last


def _mean(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens [B,L,C] of a prompt, of those that a mask [B,L] names."""
    if mask is None:
        return context.mean(1)
    weights = mask.to(context.dtype)[..., None]
    return (context * weights).sum(1) / weights.sum(1).clamp(min=1)


def _mlp(start: int, hidden: int, end: int, *, inner_norm: bool) -> nn.Sequential:
    norm = [nn.LayerNorm(hidden)] if inner_norm else []
    return nn.Sequential(nn.Linear(start, hidden), nn.ReLU(), *norm, nn.Linear(hidden, end))
