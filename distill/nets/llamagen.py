"""LlamaGen's class-conditional GPT (arXiv 2406.06525), and Distilled Decoding's student of it (arXiv 2412.17153). Parameters
have the names of the public files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.cond import Cond
from distill.nets.layers import class_rows, label_of
from distill.nets.token_net import TokenNet
from distill.nets.token_transformer import State, TokenHead, student_output
from distill.nets.tokenizer import nearest_codes
from distill.process.prefix import data_groups


class LlamaGen(TokenNet):
    """The sequence is [class, q_1 .. q_L] on a grid of L positions, a group each, row by row.

    As a teacher it reads tokens (the nearest codes of its input), and the output behind q_i holds the logits of token i + 1.
    With `student` it reads code vectors and noise through a linear layer with a flag of data and noise, its causal mask
    includes a position itself, and it has a second head: see `nets.token_transformer.TokenTransformer`.

    Args:
        width, depth, heads: of the transformer (B: 768, 12, 12; L: 1024, 24, 16). grid: positions a side, so L = grid^2.
        vocabulary: V. size: C. num_classes: of the table, which has a row more for the null class if `null_row` (a class
        dropout in training); without it there is no guidance. hidden: numbers inside the perceptrons; null: 8/3 of the
        width, up to the next multiple of 256. student, split, logits: as of
        `TokenTransformer`.

    The public files: `teacher=llamagen` (`models.token_files`). There is no dropout.
    """

    last = "output"
    rotation: Tensor

    def __init__(
        self,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        grid: int = 16,
        vocabulary: int = 16384,
        size: int = 8,
        num_classes: int = 1000,
        null_row: bool = True,
        hidden: int | None = None,
        student: bool = False,
        split: int | None = None,
        logits: bool = True,
    ) -> None:
        super().__init__()
        if min(width, depth, heads, grid, vocabulary, size, num_classes) < 1 or width % (4 * heads):
            raise ValueError(
                f"width, heads: found {width} and {heads}, expected a multiple of 4 heads, and sizes above 0"
            )
        length = grid**2
        if split is not None and (not student or not 0 <= split <= length):
            raise ValueError(f"split: found {split}, expected null, or of a student 0 .. {length} positions")
        self.vocabulary, self.length, self.groups, self.num_classes = (
            vocabulary,
            length,
            (1,) * length,
            num_classes,
        )
        self.student, self.split = student, length if split is None else split
        self.cls_embedding = ClassTable(num_classes + null_row, width)
        self.tok_embeddings: nn.Module = (
            nn.Linear(size, width) if student else nn.Embedding(vocabulary, width)
        )
        inside = -(-int(8 * width / 3) // 256) * 256 if hidden is None else hidden
        self.layers = nn.ModuleList([LlamaBlock(width, heads, inside) for _ in range(depth)])
        self.norm = RMSNorm(width)
        self.width = width
        self.output = self.last_layer(logits, bias=False)
        if student:
            self.n_d_embed = nn.Embedding(2, width)
            self.final_layer_conti = TokenHead(width, size)
        self.register_buffer("codebook", torch.zeros(vocabulary, size))
        self.register_buffer("rotation", rotation_2d(grid, width // heads), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if isinstance(self.output, nn.Linear):
            nn.init.zeros_(self.output.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Cond, heads: bool = False) -> Any:
        """As of `TokenTransformer`."""
        first = self._class(cond)
        if not self.student:
            tokens = self.tok_embeddings(nearest_codes(x[:, :-1], self.codebook))
            return self.output(self.norm(self._run(torch.cat([first[:, None], tokens], 1))))
        data = torch.arange(self.length, device=x.device) < data_groups(t, self.length)[:, None]
        flags = torch.cat([torch.ones_like(data[:, :1]), data], 1).long()
        given = self.tok_embeddings(x.to(first.dtype))
        hidden = self._run(torch.cat([first[:, None], given], 1) + self.n_d_embed(flags))[:, 1:]
        logits, made = self.output(self.norm(hidden)), self.final_layer_conti(hidden, first)
        return (logits, made) if heads else student_output(x, logits, made, self.codebook, data, self.split)

    def of_teacher(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All but the embedding of tokens: a student reads code vectors and noise."""
        return {name: value for name, value in state.items() if not name.startswith("tok_embeddings.")}

    def _class(self, cond: Cond) -> Tensor:
        table = self.cls_embedding.embedding_table
        return class_rows(label_of(cond, self.num_classes), table, self.num_classes)

    def _run(self, hidden: Tensor) -> Tensor:
        rotation = self.rotation[: hidden.shape[1]]
        for layer in self.layers:
            hidden, _ = layer(hidden, rotation, None)
        return hidden

    def begin(self, cond: Cond) -> Any:
        """The class, and an empty cache of keys and values."""
        return State(self._class(cond), [None] * len(self.layers))

    def advance(self, state: Any, codes: Tensor | None) -> Tensor:
        """Keys and values of the earlier positions are kept."""
        parts = [] if codes is None else [self.tok_embeddings(nearest_codes(codes, self.codebook))]
        hidden = torch.cat(parts if state.length else [state.first[:, None], *parts], 1)
        rotation = self.rotation[state.length : state.length + hidden.shape[1]]
        state.length += hidden.shape[1]
        for number, layer in enumerate(self.layers):
            hidden, state.cache[number] = layer(hidden, rotation, state.cache[number])
        out: Tensor = self.output(self.norm(hidden[:, -1:]))
        return out


class ClassTable(nn.Module):
    """The table of classes, under the name of the public files."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps), in float32."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class LlamaBlock(nn.Module):
    """Causal attention with rotated queries and keys, and a gated perceptron, each behind an RMS norm."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = LlamaAttention(width, heads), SwiGLU(width, hidden)
        self.attention_norm, self.ffn_norm = RMSNorm(width), RMSNorm(width)

    def forward(
        self, x: Tensor, rotation: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, cache = self.attention(self.attention_norm(x), rotation, cache)
        x = x + mixed
        return x + self.feed_forward(self.ffn_norm(x)), cache


class LlamaAttention(nn.Module):
    """Attention of the first positions [B,n,width], or of one position behind those of the cache."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wqkv, self.wo = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, rotation: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, length, _ = x.shape
        parts = self.wqkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotated(parts[0], rotation), rotated(parts[1], rotation), parts[2]
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=cache is None)
        return self.wo(mixed.transpose(1, 2).flatten(2)), (key, value)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


def rotation_2d(grid: int, size: int, base: float = 10_000.0) -> Tensor:
    """[1 + grid^2, size / 2, 2] cosines and sines: half of the pairs turn with the row, half with the column. The first
    position, that of the class, has zeros and not a turn by 0: its key is 0 (as in the public weights' training)."""
    half = size // 2
    speed = base ** -(torch.arange(0, half, 2)[: half // 2].float() / half)
    angle = torch.arange(grid).float()[:, None] * speed
    rows = angle[:, None].expand(-1, grid, -1)
    columns = angle[None].expand(grid, -1, -1)
    turns = torch.cat([rows, columns], -1).flatten(0, 1)
    table = torch.stack([turns.cos(), turns.sin()], -1)
    return torch.cat([torch.zeros(1, *table.shape[1:]), table])


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B,heads,n,size], of which neighbouring numbers are a pair, turned by rotation [n, size / 2, 2]."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)
