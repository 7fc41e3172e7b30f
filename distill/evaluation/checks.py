"""Checks of the inputs of metrics; errors name the set."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(name: str, values: Tensor, at_least: int = 1) -> Tensor:
    """`values` [N, ...] flattened to float64 [N, D].

    Raises ValueError naming the set if it has no sample axis, fewer than `at_least` samples, or a
    non-finite entry.
    """
    if values.ndim < 2:
        raise ValueError(f"{name}: expected [N, D] or [N, C, H, W], got shape {list(values.shape)}")
    if len(values) < at_least:
        kind = "is empty" if len(values) == 0 else f"has {len(values)} samples"
        raise ValueError(f"{name} {kind}; this measure needs at least {at_least}")
    rows = values.detach().flatten(1).to(torch.float64)
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        bad = int((~finite).sum())
        first = int((~finite).nonzero()[0])
        raise ValueError(f"{name} has non-finite values in {bad} of {len(rows)} samples (first: {first})")
    return rows


def as_pair(names: tuple[str, str], x: Tensor, y: Tensor, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Two sets through `as_rows`; raises ValueError also if their dimensions D differ."""
    a, b = as_rows(names[0], x, at_least), as_rows(names[1], y, at_least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[0]} has {a.shape[1]} dimensions and {names[1]} has {b.shape[1]}")
    return a, b


def check_labels(name: str, labels: Tensor, count: int) -> None:
    """Raise ValueError unless `labels` is an integer tensor of shape [count]."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"{name}: expected a tensor of {count} integer labels, got {type(labels).__name__}")
    if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name}: expected {count} integer labels, got {list(labels.shape)} of {labels.dtype}"
        )
