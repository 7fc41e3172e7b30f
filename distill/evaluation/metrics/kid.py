"""Kernel distance: unbiased MMD^2, kernel k(a, b) = (<a,b>/D + 1)^3 (Binkowski et al. 2018, 1801.01401).

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Unbiased at every sample size, hence often negative near equality: never clamped, never rooted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import FEATURES, Metric
from distill.evaluation.samples import Samples
from distill.models.kernels import CHUNK, Kernel

KERNEL = Kernel("polynomial", degree=3)


def _gram_blocks(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    for rows in x.split(CHUNK):
        yield KERNEL(rows, y)


def self_similarity(features: Tensor, name: str = "features") -> float:
    """Mean of k(x_i, x_j) over i != j of features [N, D]; N >= 2."""
    x = as_rows(name, features, at_least=2)
    total = torch.stack([block.sum() for block in _gram_blocks(x, x)]).sum()
    diagonal = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return float((total - diagonal) / (len(x) * (len(x) - 1)))


def kid(x: Tensor, y: Tensor, y_similarity: float | None = None) -> float:
    """Unbiased MMD^2 of generated [N, D] and reference [M, D] features, all rows at once, N and M free.

    Without subsets there is no sampling of the estimator itself; published KIDs average subsets of 1000 and
    are usually printed times 1000. `y_similarity` is `self_similarity(y)` where it is already known.
    Raises ValueError for fewer than two samples, differing D or non-finite features.
    """
    x, y = as_pair(("generated features", "reference features"), x, y, at_least=2)
    own = self_similarity(y) if y_similarity is None else y_similarity
    cross = torch.stack([block.sum() for block in _gram_blocks(x, y)]).sum() / (len(x) * len(y))
    return self_similarity(x) + own - 2 * float(cross)


def _similarity(x: Samples) -> float:
    return self_similarity(x.features, f"{x.name} features")


KID = Metric(
    "kid",
    order=50,
    measure=lambda x: kid(x.features, x.real.features, x.real.once(_similarity)),
    meaning="kernel distance of features, unbiased, may be negative",
    of="images",
    form=".1f",
    scale=1000.0,
    unit="·10³",
    better="lower",
    in_space=FEATURES,
    of_count=True,  # unbiased, but its spread grows as 1 / N, and what is published is of one count
    floor=True,
    monitored=True,
    reads=("features",),
)
