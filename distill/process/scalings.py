"""Boundary scalings of preconditioned networks and weights over noise levels: pure functions [B] -> [B].

A network F that sees c_in x_t makes the prediction ``c_skip x_t + c_out F(c_in x_t, c_noise)``. All of them take noise
levels sigma in the coordinates x = x0 + sigma eps (``lcm_scalings`` the integer times of a table). Arithmetic is float64 for
a float64 argument and float32 for anything narrower. Nothing is read on the host, so ranges are the caller's concern except
for the plain numbers, which are checked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.process.base import at_least_float32

SIGMA_DATA = 0.5
"""EDM's standard deviation of the data (arXiv 2206.00364), where a model has none of its own."""

SIGMA_WEIGHTS = ("uniform", "snr", "snr+1", "karras", "truncated-snr")


class Scalings(NamedTuple):
    """The four coefficients of a preconditioned network, [B] each."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def edm_scalings(sigma: Tensor, sigma_data: float = 0.5) -> Scalings:
    """EDM's preconditioning (arXiv 2206.00364, table 1) at noise levels sigma [B] > 0.

    With r = sqrt(sigma^2 + sd^2): c_skip = (sd / r)^2, c_out = sigma sd / r, c_in = 1 / r, c_noise = ln(sigma) / 4. At sigma
    = 0 the prediction is the input itself; c_noise is then -inf.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """
    _positive("sigma_data", sigma_data)
    sigma = at_least_float32(sigma)
    radius = _radius(sigma, sigma_data)
    return Scalings((sigma_data / radius) ** 2, sigma * sigma_data / radius, 1 / radius, torch.log(sigma) / 4)


def cm_scalings(sigma: Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Scalings:
    """Consistency models' preconditioning (arXiv 2303.01469, appendix C): the identity at sigma_min, sigma [B].

    c_skip = sd^2 / ((sigma - sigma_min)^2 + sd^2) and c_out = (sigma - sigma_min) sd / sqrt(sigma^2 + sd^2): the paper's
    form, where the denominator of c_out keeps sigma. c_in and c_noise are EDM's. At sigma = sigma_min in the dtype of
    ``sigma`` (as a float64 or as a float32) c_skip is exactly 1 and c_out exactly 0.

    Raises:
        ValueError: ``sigma_data`` or ``sigma_min`` is not positive.
    """
    _positive("sigma_data", sigma_data)
    _positive("sigma_min", sigma_min)
    edm = edm_scalings(sigma, sigma_data)
    sigma = at_least_float32(sigma)
    above = sigma - sigma_min  # the number is rounded to the dtype of sigma first: exactly 0 at sigma_min
    c_skip = sigma_data**2 / (above**2 + sigma_data**2)
    return edm._replace(c_skip=c_skip, c_out=above * sigma_data / _radius(sigma, sigma_data))


def lcm_scalings(t: Tensor, timestep_scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """Latent consistency models' (c_skip, c_out) at integer or fractional times t [B] of a table (arXiv 2310.04378).

    With q = timestep_scaling t: c_skip = sd^2 / (q^2 + sd^2), c_out = q / sqrt(q^2 + sd^2). c_out has no factor sd because
    it multiplies a prediction of x0, not a raw network output. At t = 0 this is the identity, a few steps on it is x0 alone.

    Raises:
        ValueError: ``timestep_scaling`` or ``sigma_data`` is not positive.
    """
    _positive("timestep_scaling", timestep_scaling)
    _positive("sigma_data", sigma_data)
    q = timestep_scaling * at_least_float32(t)
    radius = _radius(q, sigma_data)
    return (sigma_data / radius) ** 2, q / radius


def rescaled_time(sigma: Tensor) -> Tensor:
    """The time 250 ln(sigma + 1e-44), [B], that the U-Nets of the consistency-models code receive: 1000 c_noise."""
    return 250 * torch.log(at_least_float32(sigma) + 1e-44)


def sigma_weight(name: str, sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight [B] of a consistency loss by its name, at noise levels sigma [B] > 0.

    ``uniform`` 1; ``snr`` sigma^-2; ``snr+1`` sigma^-2 + 1; ``karras`` sigma^-2 + sd^-2; ``truncated-snr`` max(sigma^-2, 1).

    Raises:
        ValueError: an unknown name, or ``sigma_data`` is not positive.
    """
    _positive("sigma_data", sigma_data)
    sigma = at_least_float32(sigma)
    snr = sigma**-2
    if name == "uniform":
        return torch.ones_like(sigma)
    if name == "snr":
        return snr
    if name == "snr+1":
        return snr + 1
    if name == "karras":
        return snr + sigma_data**-2
    if name == "truncated-snr":
        return snr.clamp(min=1)
    raise ValueError(f"weight: found {name!r}, expected one of {list(SIGMA_WEIGHTS)}")


def edm_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's lambda(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2, [B] (arXiv 2206.00364, table 1).

    It makes the loss of a preconditioned network one of unit size at every noise level; ``karras`` is the same number.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """
    return sigma_weight("karras", sigma, sigma_data)


def _radius(sigma: Tensor, sigma_data: float) -> Tensor:
    return torch.sqrt(sigma**2 + sigma_data**2)


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: found {value}, expected a positive number")
