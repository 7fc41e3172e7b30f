"""A small transformer over sequences of code vectors: the autoregressive teacher of the embedded digits, and with `student` the
student of Distilled Decoding (arXiv 2412.17153), which starts from its weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.cond import Cond
from distill.nets.layers import ClassEmbedding, label_of
from distill.nets.token_net import TokenNet
from distill.process.prefix import data_groups


class TokenTransformer(TokenNet):
    """Causal, pre-norm. The sequence is [class, x_1 .. x_L], each group one position.

    As a teacher it reads code vectors (so it takes any vector as a prefix), and the output behind x_i holds the logits of token
    i + 1. With `student`, the output at x_i is about token i itself: the mask includes it, and x_i is a code vector (data) or
    noise, which a flag says. Then there are two heads: logits, and a code vector directly (a layer norm with a shift and a
    scale of a table plus the class, and a linear layer). New weights of a student: the flags and the second head.

    Args:
        vocabulary: V. size: C, numbers of a code. length: L. num_classes: 0 for none.
        width, depth, heads: of the transformer. dropout: of embeddings and branches, not of attention.
        student, split, logits: see `TokenNet`; split null: all tokens come from the logits.
    """

    def __init__(
        self,
        *,
        vocabulary: int = 32,
        size: int = 4,
        length: int = 16,
        num_classes: int = 10,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        student: bool = False,
        split: int | None = None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        if min(vocabulary, size, length, width, depth, heads) < 1 or width % heads or num_classes < 0:
            raise ValueError(
                f"vocabulary, size, length, width, depth, heads: found {[vocabulary, size, length, width, depth, heads]}, "
                "expected at least 1, and a width that is a multiple of heads"
            )
        if split is not None and (not student or not 0 <= split <= length):
            raise ValueError(f"split: found {split}, expected null, or of a student 0 .. {length} positions")
        self.vocabulary, self.size, self.length, self.num_classes = vocabulary, size, length, num_classes
        self.groups: Sequence[int] = (1,) * length
        self.student, self.split, self.width = student, length if split is None else split, width
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        self.embed = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))
        self.position = nn.Parameter(torch.randn(length + 1, width) * 0.02)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = self.last_layer(logits)
        if student:
            self.flag = nn.Embedding(2, width)
            nn.init.normal_(self.flag.weight, std=0.02)
            self.token_head = TokenHead(width, size)
            self.register_buffer("codebook", torch.zeros(vocabulary, size))

    def forward(self, x: Tensor, t: Tensor, cond: Cond, heads: bool = False) -> Any:
        """[B,L,C] -> logits [B,L,V] of a teacher. Of a student, whose first k = (1 - t) L positions of x are data: the tokens
        [B,L,C] with the data as they are, or with `heads` (logits [B,L,V], code vectors [B,L,C]) as they are predicted."""
        first = self._class(cond)
        given = self.embed(x.to(self.position.dtype))
        if not self.student:
            out: Tensor = self.head(self.norm(self._run(torch.cat([first[:, None], given[:, :-1]], 1))))
            return out
        data = torch.arange(self.length, device=x.device) < data_groups(t, self.length)[:, None]
        flags = self.flag(torch.cat([torch.ones_like(data[:, :1]), data], 1).long())
        hidden = self._run(torch.cat([first[:, None], given], 1) + flags)[:, 1:]
        logits, tokens = self.head(self.norm(hidden)), self.token_head(hidden, first)
        if heads:
            return logits, tokens
        return student_output(x, logits, tokens, self.codebook, data, self.split)

    def _class(self, cond: Cond) -> Tensor:
        if self.label is None:
            return self.position.new_zeros(len(cond), self.width)
        rows: Tensor = self.label(label_of(cond, self.num_classes))
        return rows

    def _run(self, sequence: Tensor) -> Tensor:
        hidden = self.dropout(sequence + self.position[: sequence.shape[1]])
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def begin(self, cond: Cond) -> Any:
        """The class, and an empty cache of keys and values."""
        first = self._class(cond)
        return State(first, [None] * len(self.blocks))

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        """Keys and values of the earlier positions are kept."""
        parts = [] if codes is None else [self.embed(codes.to(self.position.dtype))]
        new = torch.cat(parts if state.length else [state.first[:, None], *parts], 1)
        hidden = self.dropout(new + self.position[state.length : state.length + new.shape[1]])
        blocks: Iterable[Any] = self.blocks
        for number, block in enumerate(blocks):
            hidden, state.cache[number] = block.cached(hidden, state.cache[number])
        state.length += new.shape[1]
        out: Tensor = self.head(self.norm(hidden[:, -1:]))
        return out


@dataclass
class State:
    """Generation so far: the embedding of the class [B, width], keys and values of each block, positions in them."""

    first: Tensor
    cache: list[tuple[Tensor, Tensor] | None] = field(default_factory=list)
    length: int = 0


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a layer norm and added to the stream [B,n,width]."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._heads(x)
        return self._add(x, F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def cached(self, x: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The first positions x [B,n,width], or one position behind those of the cache; and the new cache."""
        query, key, value = self._heads(x)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self._add(x, mixed), (key, value)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        return query, key, value

    def _add(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        added: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return added


class TokenHead(nn.Module):
    """[B,L,width] and a condition [B,width] -> code vectors [B,L,C]: shift and scale are a table plus the condition. Parameters
    have the names of the public files."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, size)

    def forward(self, hidden: Tensor, cond: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table[None] + cond[:, None])[:, :, None].unbind(1)
        out: Tensor = self.linear(self.norm(hidden) * (1 + scale) + shift)
        return out


def student_output(
    x: Tensor, logits: Tensor, tokens: Tensor, codebook: Tensor, data: Tensor, split: int
) -> Tensor:
    """A student's samples [B,L,C]: x where `data` [B,L] is true; elsewhere the codes of the logits' argmax before position
    `split` and the predicted vectors behind it."""
    codes = codebook[logits.argmax(-1)].to(tokens.dtype)
    by_logits = torch.arange(x.shape[1], device=x.device) < split
    made = torch.where(by_logits[None, :, None], codes, tokens)
    return torch.where(data[..., None], x.to(made.dtype), made)
