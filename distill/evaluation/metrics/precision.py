"""Precision, recall, density and coverage by balls of nearest neighbours.

The ball of a point reaches to its k-th nearest neighbour in its own set, the point itself not counted.
Precision and recall (Kynkaanniemi et al. 2019, 1904.06991, eq. 1-3) use closed balls; density and coverage
(Naeem et al. 2020, 2002.09797, eq. 3-4) open ones, as in the respective authors' code. The difference shows
only at ties: the density of a set of different points against itself is then 1, and that of one point many times is
0, with a recall of 1 (all radii are 0). Distances that agree to `TIE` (relative, of squares) are ties: the same pair
is computed in several products, whose rounding differs.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import FEATURES, Metric
from distill.evaluation.samples import Samples

CHUNK = 2048  # rows of a distance matrix held at once
TIE = 1e-9  # relative difference of squared distances up to which they are equal
CANCELLED = 1e-4  # below this share of |x|^2 + |y|^2 a product has lost too many digits
DIRECT = 2**22  # numbers held at once where differences are taken one by one


class Manifold(NamedTuple):
    """Precision, recall and coverage in [0, 1]; density >= 0, near 1 for equal laws, above 1 for collapse."""

    precision: float
    recall: float
    density: float
    coverage: float


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 as [N, M] of x [N, D] and y [M, D], both float64; 0 exactly where the rows are equal.

    By one matrix product, whose rounding is about 1e-15 (|x|^2 + |y|^2). Where that is no small part of the result
    (near copies, or sets far from the origin) the differences themselves are squared and summed.
    """
    x_sizes, y_sizes = x.square().sum(1, keepdim=True), y.square().sum(1)
    product = torch.addmm(y_sizes, x, y.T, alpha=-2).add_(x_sizes).clamp_min_(0)
    rows, columns = (product <= CANCELLED * (x_sizes + y_sizes.max())).nonzero(as_tuple=True)
    piece = max(1, DIRECT // x.shape[1])
    for i, j in zip(rows.split(piece), columns.split(piece), strict=True):
        product[i, j] = (x[i] - y[j]).square_().sum(1)
    return product


def squared_radii(features: Tensor, k: int, name: str = "features") -> Tensor:
    """Squared distance [N] of every row of [N, D] to its k-th nearest other row.

    Raises ValueError if k < 1 or the set holds fewer than k + 1 samples.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    x = as_rows(name, features, at_least=k + 1)
    radii = []
    for start in range(0, len(x), CHUNK):
        block = squared_distances(x[start : start + CHUNK], x)
        block.diagonal(offset=start).fill_(torch.inf)
        radii.append(block.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def manifold(generated: Tensor, real: Tensor, k: int = 5, real_radii: Tensor | None = None) -> Manifold:
    """The four measures of generated [N, D] against real [M, D] features.

    precision: share of generated samples inside some real ball. recall: share of real ones inside some
    generated ball. density: mean number of real balls around a generated sample, over k. coverage: share of
    real balls that hold a generated sample. `real_radii` is `squared_radii(real, k)` where already known.
    Raises ValueError for fewer than k + 1 samples, differing D or non-finite features.
    """
    names = ("generated features", "real features")
    x, y = as_pair(names, generated, real, at_least=k + 1)
    x_radii = squared_radii(x, k, names[0])
    y_radii = squared_radii(y, k, names[1]) if real_radii is None else real_radii
    recalled = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    nearest = torch.full((len(y),), torch.inf, dtype=y.dtype, device=y.device)
    precise, balls = 0.0, 0.0
    closed, opened = y_radii * (1 + TIE), y_radii * (1 - TIE)
    for rows, radii in zip(x.split(CHUNK), x_radii.split(CHUNK), strict=True):
        distance = squared_distances(rows, y)
        precise += float((distance <= closed).any(1).sum())
        balls += float((distance < opened).sum())
        recalled |= (distance <= radii[:, None] * (1 + TIE)).any(0)
        nearest = torch.minimum(nearest, distance.amin(0))
    return Manifold(
        precision=precise / len(x),
        recall=float(recalled.double().mean()),
        density=balls / (k * len(x)),
        coverage=float((nearest < opened).double().mean()),
    )


def _radii(x: Samples) -> Tensor:
    return squared_radii(x.features, x.options.k, f"{x.name} features")


def _manifold(x: Samples) -> Manifold:
    return manifold(x.features, x.real.features, x.options.k, x.real.once(_radii))


_of_balls = partial(Metric, of="images", reads=("features",))
PRECISION = _of_balls(
    "precision",
    order=90,
    measure=lambda x: x.once(_manifold).precision,
    meaning="share of samples among real ones; rises when samples collapse to class means",
    in_space=FEATURES,
)
RECALL = _of_balls(
    "recall",
    order=100,
    measure=lambda x: x.once(_manifold).recall,
    meaning="share of real images among samples; falls when samples collapse to class means",
    better="higher",
    in_space=FEATURES,
    of_count=True,
    monitored=True,
)
DENSITY = _of_balls(
    "density",
    order=110,
    measure=lambda x: x.once(_manifold).density,
    meaning="as precision, but counts the real neighbourhoods; above 1 for collapsed samples",
    in_space=FEATURES,
)
COVERAGE = _of_balls(
    "coverage",
    order=120,
    measure=lambda x: x.once(_manifold).coverage,
    meaning="share of real images with a sample in their neighbourhood; falls with variety",
    better="higher",
    in_space=FEATURES,
    of_count=True,
    monitored=True,
)
