"""Frechet distance between two feature sets (Heusel et al. 2017, 1706.08500, eq. 6).

Called `fd` everywhere: it is an FID only with the Inception weights and the image protocol of that paper.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from distill.evaluation.checks import as_pair, as_rows
from distill.evaluation.metric import Metric
from distill.evaluation.samples import Samples


def moments(features: Tensor, name: str = "features") -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] (divisor N - 1) in float64 of features [N, D].

    Raises ValueError for fewer than two samples or non-finite features; warns when N < D + 1, where the
    covariance is singular and the distance is dominated by the sample size.
    """
    rows = as_rows(name, features, at_least=2)
    count, dim = rows.shape
    if count < dim + 1:
        warnings.warn(f"{name}: {count} samples in {dim} dimensions, covariance is singular", stacklevel=2)
    mean = rows.mean(0)
    centred = rows - mean
    return mean, centred.T @ centred / (count - 1)


def frechet_distance(mean_x: Tensor, cov_x: Tensor, mean_y: Tensor, cov_y: Tensor) -> float:
    """|m_x - m_y|^2 + Tr(S_x + S_y - 2 (S_x S_y)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    S_x S_y is similar to the symmetric S_x^(1/2) S_y S_x^(1/2), so the trace of its root is the sum of the
    roots of that matrix' eigenvalues: real, no iterative matrix root, and well defined for singular S.
    Rounding may leave a value near -1e-14 for equal arguments. Raises ValueError if the shapes differ.
    """
    if mean_x.shape != mean_y.shape or cov_x.shape != cov_y.shape:
        raise ValueError(f"moments of {mean_x.numel()} and {mean_y.numel()} dimensions cannot be compared")
    values, vectors = torch.linalg.eigh(cov_x.to(torch.float64))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov_y.to(torch.float64) @ root
    # Symmetrised because eigvalsh reads one triangle only; tiny negative eigenvalues are rounding.
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    gap = (mean_x - mean_y).to(torch.float64).square().sum()
    return float(gap + cov_x.trace() + cov_y.trace() - 2 * trace)


def fd(x: Tensor, y: Tensor) -> float:
    """Frechet distance of generated [N, D] and reference [M, D] features; biased upward for small N.

    Errors and the warning are those of `moments`; ValueError also if D differs.
    """
    x, y = as_pair(("generated features", "reference features"), x, y, at_least=2)
    return frechet_distance(*moments(x, "generated features"), *moments(y, "reference features"))


def _moments(x: Samples) -> tuple[Tensor, Tensor]:
    return moments(x.features, f"{x.name} features")


def _meaning(features: str) -> str:
    where = "in Inception features" if features == "inception" else f"in the features {features} (not an FID)"
    return (
        f"the Fréchet distance {where}; two halves of the real images score worse than a good model of many samples, since "
        "they are smaller sets, so their distance is biased upward"
    )


FD = Metric(
    "fd",
    order=40,
    measure=lambda x: frechet_distance(*x.once(_moments), *x.real.once(_moments)),
    meaning=_meaning,
    of="images",
    better="lower",
    in_space=lambda features: "fid" if features == "inception" else f"fd_{features}",
    of_count=True,
    floor=True,
    monitored=True,
    reads=("features",),
)
