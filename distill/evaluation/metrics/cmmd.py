"""CMMD: biased MMD^2 of CLIP image embeddings under a Gaussian kernel (Jayasumana et al. 2024,
2401.09603), the estimator of its authors' code.

    CMMD = 1000 (mean_{i,j} k(x_i, x_j) + mean_{i,j} k(y_i, y_j) - 2 mean_{i,j} k(x_i, y_j)),
    k(a, b) = exp(-|a - b|^2 / (2 * 10^2)),    |a| = |b| = 1

The diagonals count (biased: a set against itself has exactly 0, two samples of one law a small positive value), and
neither the bandwidth nor the scale follows the data: values of different runs stand beside each other.
The published numbers are of CLIP ViT-L/14 at 336 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import Metric
from distill.evaluation.metrics.precision import squared_distances
from distill.evaluation.samples import Samples

BANDWIDTH = 10.0
SCALE = 1000.0
CHUNK = 2048  # rows of a kernel matrix held at once


def unit_rows(embeddings: Tensor, name: str = "embeddings") -> Tensor:
    """Float64 rows [N, D] of norm 1. Raises ValueError for a non-finite row or a row of zeros."""
    rows = as_rows(name, embeddings)
    if not (rows.square().sum(1) > 0).all():
        raise ValueError(f"{name} has rows of zeros, which have no direction; expected embeddings of images")
    return F.normalize(rows, dim=1)


def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean of k(x_i, y_j) - 1 over all i, j (0-d, float64) of x [N, D] and y [M, D]; both float64.

    k of unit rows lies in [0.98, 1], and MMD^2 is a small difference of such means: leaving out the common 1 keeps two
    more digits.
    """
    sums = [(squared_distances(rows, y) / (-2 * BANDWIDTH**2)).expm1_().sum() for rows in x.split(CHUNK)]
    return torch.stack(sums).sum() / (len(x) * len(y))


def cmmd(x: Tensor, y: Tensor, y_kernel: Tensor | None = None) -> float:
    """CMMD of generated [N, D] and reference [M, D] embeddings, taken as they are: `unit_rows` normalises.

    `y_kernel` is `mean_kernel(y, y)` in float64 where it is already known. Raises ValueError for an empty set,
    differing D or non-finite embeddings.
    """
    x, y = as_pair(("generated embeddings", "reference embeddings"), x, y)
    own = mean_kernel(y, y) if y_kernel is None else y_kernel
    return SCALE * float(mean_kernel(x, x) + own - 2 * mean_kernel(x, y))


def _name(features: str) -> str | None:
    """The name in a feature space; None for features of no CLIP image tower, for which CMMD is undefined."""
    if features == "clip":
        return "cmmd"
    return f"cmmd_{features}" if features.startswith("clip_") else None


def _embeddings(x: Samples) -> Tensor:
    return unit_rows(x.features, f"{x.name} embeddings")


def _kernel(x: Samples) -> Tensor:
    embeddings = x.once(_embeddings)
    return mean_kernel(embeddings, embeddings)


def _cmmd(x: Samples) -> float | None:
    if _name(x.options.space) is None:
        return None
    return cmmd(x.once(_embeddings), x.real.once(_embeddings), x.real.once(_kernel))


CMMD = Metric(
    "cmmd",
    order=60,
    measure=_cmmd,
    meaning="Gaussian kernel distance of CLIP embeddings, times 1000, biased upward",
    of="images",
    better="lower",
    in_space=_name,
    of_count=True,
    floor=True,
    reads=("features",),
)
