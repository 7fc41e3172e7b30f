"""Time grids for samplers and time samplers for losses: pure functions, in this package's time (0 = data).

A grid is a 1-D float64 tensor [N + 1] from noisy to clean. A time sampler maps given uniform or normal draws
to times, so the caller decides where its randomness comes from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.process.base import Process


def uniform_grid(process: Process, steps: int, device: torch.device | str | None = None) -> Tensor:
    """``steps + 1`` equally spaced times from ``process.t_max`` down to ``process.t_min``, float64.

    For a flow these are InstaFlow's network times divided by 1000 (1000 (1 - i/N), N of them and the end).

    Raises:
        ValueError: ``steps`` is below 1.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got {steps}")
    return torch.linspace(process.t_max, process.t_min, steps + 1, dtype=torch.float64, device=device)


def shift(t: Tensor, factor: float) -> Tensor:
    """Flow times moved towards noise: factor t / (1 + (factor - 1) t) (SD3, arXiv 2403.03206, eq. 23).

    ``factor`` is sqrt of the ratio of resolutions; 1 changes nothing, 3 is SD3's sampler. t in [0, 1], any
    shape.
    """
    return factor * t / (1 + (factor - 1) * t)


def uniform_times(u: Tensor, t_min: float, t_max: float) -> Tensor:
    """u ~ U[0, 1] of any shape -> times uniform in [t_min, t_max]."""
    return t_min + (t_max - t_min) * u


def logit_normal(n: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """n ~ N(0, 1) of any shape -> sigmoid(mean + std n) in (0, 1) (arXiv 2403.03206, eq. 19).

    A positive ``mean`` favours noise. Libraries that call the case (0, 1) "lognormal" use tau = 1 - t, i.e.
    -n here.
    """
    return torch.sigmoid(mean + std * n)


def truncated_exponential(u: Tensor, rate: float = 4.0) -> Tensor:
    """u ~ U[0, 1] -> the exponential of ``rate`` truncated to [0, 1], by its quantile function.

    -ln(1 - u (1 - e^-rate)) / rate. Densest at 0; u = 0 gives 0 and u = 1 gives 1.
    """
    return -torch.log1p(u * math.expm1(-rate)) / rate


def u_shaped(u: Tensor, rate: float = 4.0) -> Tensor:
    """u ~ U[0, 1] -> even mixture of ``truncated_exponential`` and its mirror (arXiv 2405.20320).

    One draw decides both the side and the place: q(2u) for u <= 1/2, else 1 - q(2 - 2u) with q the quantile
    above, so that u_shaped(1 - u) = 1 - u_shaped(u) and the direction of time does not matter.
    """
    clean_half = u <= 0.5
    place = truncated_exponential(torch.where(clean_half, 2 * u, 2 - 2 * u), rate)
    return torch.where(clean_half, place, 1 - place)


def skewed(n: Tensor, mean: float = -1.2, std: float = 1.2, t_max: float = 1 - 1e-4) -> Tensor:
    """n ~ N(0, 1) -> EDM's log-normal noise level s = exp(mean + std n) as a flow time, s / (1 + s) <= t_max.

    This is flow_matching's "skewed" sampler (there tau = 1 - t = 1 / (1 + s), clipped below at 1e-4);
    densities of arXiv 2206.00364, table 1.
    """
    return torch.sigmoid(mean + std * n).clamp(max=t_max)
