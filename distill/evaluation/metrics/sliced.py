"""Sliced Wasserstein distance in pixels: needs no network (Bonneel et al. 2015; Rabin et al. 2011).

    SW_2(x, y)^2 = mean over directions u of  int_0^1 (F_x^-1(q) - F_y^-1(q))^2 dq

with F^-1 the quantile functions of <x, u> and <y, u>, |u| = 1. The root is taken after the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import Metric
from distill.evaluation.samples import Samples


def directions(dim: int, projections: int, seed: int) -> Tensor:
    """Unit directions [dim, projections] in float64: a function of the arguments and the torch version."""
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randn(projections, dim, generator=generator, dtype=torch.float64, device="cpu")
    return (draws / draws.norm(dim=1, keepdim=True)).T


def sorted_projections(images: Tensor, projections: int = 256, seed: int = 0, name: str = "images") -> Tensor:
    """Ascending projections [projections, N] of images [N, ...], one row a direction."""
    rows = as_rows(name, images)
    along = directions(rows.shape[1], projections, seed).to(rows.device)
    return (rows @ along).T.contiguous().sort(dim=1).values


def quantile_distance(x: Tensor, y: Tensor) -> float:
    """SW_2 of sorted projections [P, N] and [P, M], exact also for N != M.

    Both quantile functions are steps; between two neighbours of the merged grid {i/N} u {j/M} both are
    constant, so the integral is a sum over its at most N + M - 1 pieces. The grid is kept in integers of
    1/(N M), where equal knots are equal.
    """
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return float((x - y).square().mean().sqrt())
    knots = torch.cat([torch.arange(n, device=x.device) * m, torch.arange(m, device=x.device) * n])
    knots = torch.cat([knots.unique(), knots.new_tensor([n * m])])
    left, width = knots[:-1], knots.diff().to(x.dtype) / (n * m)
    gaps = x.index_select(1, left // m).sub_(y.index_select(1, left // n))
    return float((gaps.square_() @ width).mean().sqrt())


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, seed: int = 0) -> float:
    """SW_2 of images x [N, C, H, W] and y [M, C, H, W] in [-1, 1], flattened; in units of a pixel value.

    Raises ValueError for an empty set, differing sizes or non-finite pixels.
    """
    x, y = as_pair(("generated images", "reference images"), x, y)
    return quantile_distance(
        sorted_projections(x, projections, seed), sorted_projections(y, projections, seed)
    )


def _sorted(x: Samples) -> Tensor:
    return sorted_projections(x.values, x.options.projections, x.options.seed, f"{x.name} images")


SLICED_WASSERSTEIN = Metric(
    "sliced_wasserstein",
    order=80,
    measure=lambda x: quantile_distance(x.once(_sorted), x.real.once(_sorted)),
    meaning="sliced Wasserstein distance of pixels, or of points",
    title="sliced W",
    better="lower",
    of_count=True,
    floor=True,
    monitored=True,
)
