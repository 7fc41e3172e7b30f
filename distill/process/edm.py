"""The variance-exploding process of EDM and of consistency models (arXiv 2206.00364, 2303.01469)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
"""EDM's noise levels and the exponent of its grid (arXiv 2206.00364, table 1)."""


class EDM(Process):
    """x_t = x0 + t eps: the time IS the noise level sigma, t in [0, sigma_max]; velocity = eps = (x_t - x0) / t.

    t = 0 is clean data and t = sigma_max starts from ``sigma_max z``: the data in it is too small to matter (a standard
    deviation of 0.5 beside 80) and is left out, as in the paper's sampler. ``sigma_min`` and ``rho`` do not enter any function
    of time: they shape ``distill.process.times.karras_grid``, whose noise levels end at sigma_min, the lowest a network sees,
    with one more step to exactly 0. That step does not evaluate t = 0, where the velocity is 0 / 0: ``regular_end`` is False.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or rho is not positive.
    """

    t_min = 0.0
    regular_end = False

    def __init__(self, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> None:
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise ValueError(
                f"sigma_min, sigma_max: found {sigma_min} and {sigma_max}, need 0 < sigma_min < sigma_max"
            )
        if not rho > 0:
            raise ValueError(f"rho must be positive, got {rho}")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.t_max = float(sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))

    def sigma(self, t: Tensor) -> Tensor:
        return at_least_float32(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(at_least_float32(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))

    def log_ratio(self, t: Tensor) -> Tensor:
        return -torch.log(at_least_float32(t))

    def time_of(self, log_ratio: Tensor) -> Tensor:
        return torch.exp(-at_least_float32(log_ratio)).clamp(self.t_min, self.t_max)

    def prior(self, z: Tensor) -> Tensor:
        """sigma_max z, in at least float32."""
        return self.sigma_max * at_least_float32(z)
