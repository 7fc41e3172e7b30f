"""Losses of tokens: look-ups of tokenizers (arXiv 1711.00937, eq. 3) and students of Distilled Decoding (arXiv 2412.17153)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from distill.process.base import at_least_float32


def look_up_losses(vectors: Tensor, codes: Tensor, beta: float = 0.25) -> tuple[Tensor, Tensor]:
    """(codebook loss |sg(z) - e|^2, commitment loss beta |z - sg(e)|^2), each [B] means over the rest, of vectors z [B,...] and
    their codes e (the last two terms of arXiv 1711.00937, eq. 3)."""
    book = (vectors.detach() - codes).square().flatten(1).mean(1)
    commit = (vectors - codes.detach()).square().flatten(1).mean(1)
    return book, beta * commit


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log softmax(logits)[token] of every position, [B,L,V] and [B,L] to [B,L] in float32 at least.

    Raises:
        ValueError: names `tokens`: another number of positions than the logits have.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"tokens: found shape {list(tokens.shape)}, expected {list(logits.shape[:-1])}")
    return F.cross_entropy(at_least_float32(logits).flatten(0, 1), tokens.flatten(), reduction="none").view(
        tokens.shape
    )


def code_error(vectors: Tensor, codes: Tensor) -> Tensor:
    """|vector - code|^2 / C of every position, [B,L,C] each to [B,L]; codes are constants."""
    return (at_least_float32(vectors) - at_least_float32(codes.detach())).square().mean(-1)


def mean_behind(values: Tensor, data: Tensor) -> Tensor:
    """Means of values [B,L] over the positions of a sample that are noise, where `data` [B,L] bool is false: [B]."""
    noise = (~data).to(values.dtype)
    return (values * noise).sum(1) / noise.sum(1)


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values under a mask, 0 where it is empty, without a gradient; no host sync."""
    return (values.detach() * mask).sum() / mask.sum().clamp(min=1)
