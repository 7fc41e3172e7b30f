"""Points: samples of a mixture of Gaussians with equal weights, the data of the toy recipes. The exact teacher is in
`models.analytic`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.arguments import finite, integer
from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.plain import plain_torch
from distill.data.rng import Draws


def ring_means(count: int = 8, radius: float = 1.5) -> list[list[float]]:
    """Return `count` points on a circle around 0; the first is at angle 0."""
    angles = [2 * math.pi * k / count for k in range(count)]
    return [[radius * math.cos(a), radius * math.sin(a)] for a in angles]


def mixture_means(
    ring: Mapping[str, Any] | None, means: Sequence[Sequence[float]] | None
) -> list[list[float]]:
    """Return the component means [K, D] given by either `ring`, {count, radius}, or `means`.

    Raises:
        ValueError: if both or neither are given, if `ring` has other keys, a count below 1 or a radius below 0, or if `means`
            is not a table of numbers.
    """
    if (ring is None) == (means is None):
        found = "neither" if ring is None else "both"
        raise ValueError(f"ring, means: found {found}, expected exactly one of them")
    if ring is not None:
        count: Any = ring.get("count")
        radius: Any = ring.get("radius")
        numbers = isinstance(count, int) and isinstance(radius, int | float)
        if set(ring) != {"count", "radius"} or not numbers or count < 1 or radius < 0:
            raise ValueError(
                f"ring: found {dict(ring)}, expected a count of at least 1 and a radius of at least 0"
            )
        return ring_means(count, radius)
    assert means is not None
    try:
        table = torch.tensor(means, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"means: expected [K, D] numbers: {error}") from None
    if table.ndim != 2 or table.numel() == 0:
        raise ValueError(f"means: expected [K, D] with K and D at least 1, found shape {list(table.shape)}")
    return table.tolist()


def mixture_sample(means: Tensor, std: float, component: Tensor, noise: Tensor) -> Tensor:
    """Return x0 = m_k + s n [B, D] in float64, from means [K, D], components [B] and standard normal noise [B, D]."""
    return means[component] + std * noise.double()


class Points:
    """Samples of the mixture. Point i is a function of (seed, stream, i).

    Args:
        ring, means: the component means, see `mixture_means`.
        std: standard deviation of each component.
        count: number of points.
        labelled: whether component k is class k; if not, there are no classes.
        seed, stream: keys of the random draws.

    Attributes:
        images: the points [count, D] float32, unbounded.
        labels: their components [count] int64.
    """

    value_range = None

    @plain_torch()
    def __init__(
        self,
        *,
        ring: Mapping[str, Any] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        std: float = 0.1,
        count: int = 4096,
        labelled: bool = False,
        seed: int = 0,
        stream: str = "points",
    ) -> None:
        count, seed, std = integer("count", count), integer("seed", seed), finite("std", std)
        if count < 1:
            raise ValueError(f"count: expected at least 1 point, found {count}")
        if std < 0:
            raise ValueError(f"std: expected at least 0, found {std}")
        self.means, self.std, self.labelled = mixture_means(ring, means), float(std), labelled
        table = torch.tensor(self.means, dtype=torch.float64)
        draws = Draws(seed, stream, 0, torch.arange(count))
        self.labels: Tensor = draws.integer("component", len(table))
        noise = draws.normal("noise", (table.shape[1],))
        self.images: Tensor = mixture_sample(table, self.std, self.labels, noise).float()
        self.sample_shape = (table.shape[1],)
        self.num_classes = len(table) if labelled else 0
        self.name = f"{len(table)} Gaussians of standard deviation {self.std:g}"

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return the points at `rows`, with labels if there are classes; the id of a point is its row."""
        cond = Cond.of_labels(self.labels[rows]) if self.labelled else Cond.nothing(len(rows))
        return Batch(ids=rows, index=index, cond=cond, x0=self.images[rows])

    def fingerprint(self) -> str:
        """Return the sha256 of points and components."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def fresh(self, seed: int, stream: str) -> Points:
        """Return the same number of points of the same mixture, drawn with (seed, stream)."""
        return Points(
            means=self.means,
            std=self.std,
            count=len(self),
            labelled=self.labelled,
            seed=seed,
            stream=stream,
        )
