"""Compares a student with a closed-form flow: on an even mixture of Gaussians (`models.analytic`) the teacher's flow and the
distribution of the data are known exactly.

`trajectory_error` measures methods that follow trajectories; `modes_found`, `share_near`, the energy distance and the sliced
Wasserstein distance measure methods that match distributions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.evaluation.checks import as_pair
from distill.evaluation.metrics.energy import energy_distance
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.models.denoiser import Denoiser
from distill.samplers.adaptive import rk45

MODE_STDS = (
    3.0  # a sample belongs to a mode within so many standard deviations: 98.9 % of true ones do in the plane
)
MODE_SHARE = 0.02  # a mode is found where it holds this share of all samples


@torch.no_grad()
def flow_map(
    model: Denoiser, z: Tensor, cond: Cond, *, guidance_scale: float = 1.0, tolerance: float = 1e-8
) -> Tensor:
    """Where the model's probability-flow ODE takes noise z [N, *S] at t_min: [N, *S] float64, by RK45 to the relative and
    absolute `tolerance`.

    A model that computes in float32 limits the accuracy to about 1e-6; the exact teacher does not.
    """
    process = model.process
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64, device="cpu")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model.predict(model.kind, x, t, cond, guidance_scale)

    start = process.prior(z.double())
    return rk45(predict, process, start, ends, kind=model.kind, rtol=tolerance, atol=tolerance)[0]


def trajectory_error(samples: Tensor, ends: Tensor) -> float:
    """Root of the mean squared distance |sample - end|^2, summed over coordinates, of pairs [N, ...] of one noise each.

    Raises ValueError for sets of different sizes or dimensions, empty ones or non-finite values.
    """
    a, b = as_pair(("samples", "ends of the exact flow"), samples, ends)
    if len(a) != len(b):
        raise ValueError(f"samples: found {len(a)}, expected one for each of {len(b)} ends of the exact flow")
    return float((a - b).square().sum(1).mean().sqrt())


def mode_of(samples: Tensor, means: Tensor, radius: float) -> Tensor:
    """[N] the number of the nearest mean, -1 where it is further away than `radius`; samples [N, ...], means [K, D]."""
    if not radius > 0:
        raise ValueError(f"radius: found {radius}, expected a positive distance")
    rows, centres = as_pair(("samples", "means"), samples, means)
    nearest = torch.cdist(rows, centres, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return torch.where(nearest.values <= radius, nearest.indices, -1)


def share_near(samples: Tensor, means: Tensor, std: float) -> float:
    """Share of samples [N, ...] within `MODE_STDS` standard deviations of a mean [K, D]: near 0 for samples between modes."""
    return float((mode_of(samples, means, MODE_STDS * std) >= 0).double().mean())


def modes_found(samples: Tensor, means: Tensor, std: float) -> int:
    """How many of the K means [K, D] hold `MODE_SHARE` of the samples [N, ...] within `MODE_STDS` standard deviations."""
    places = mode_of(samples, means, MODE_STDS * std)
    counts = torch.bincount(places[places >= 0], minlength=len(means))
    return int((counts >= MODE_SHARE * len(places)).sum())


@dataclass(frozen=True)
class Found:
    """The numbers of a certificate.

    Attributes:
        trajectory: RMS distance to the ends of the exact flow from the same noise.
        energy, sliced: energy distance (unbiased, so it may fall below 0) and sliced Wasserstein distance to fresh data.
        near: share of samples within `MODE_STDS` standard deviations of a mode.
        modes: modes that hold `MODE_SHARE` of the samples there.
    """

    trajectory: float
    energy: float
    sliced: float
    near: float
    modes: int


def measure(samples: Tensor, ends: Tensor, fresh: Tensor, means: Tensor, std: float) -> Found:
    """All of `Found` for samples [N, ...], the exact ends [N, ...] of their noise, and fresh data [M, ...] of the mixture with
    means [K, D] and standard deviation `std`. Raises ValueError as the single measures do."""
    return Found(
        trajectory=trajectory_error(samples, ends),
        energy=energy_distance(samples, fresh),
        sliced=sliced_wasserstein(samples, fresh),
        near=share_near(samples, means, std),
        modes=modes_found(samples, means, std),
    )
