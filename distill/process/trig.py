"""TrigFlow, the process of continuous-time consistency models (arXiv 2410.11081)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32


class TrigFlow(Process):
    """x_t = cos(t) x0 + sin(t) sigma_data eps, eps ~ N(0, I), t in [0, pi/2].

    The paper's noise z ~ N(0, sigma_data^2 I) is sigma_data eps: sigma_data enters through sigma(t) = sigma_data sin(t), so
    that eps keeps unit variance as in every process here, and ``prior`` scales the noise. The state then has the variance
    sigma_data^2 of the data at every time, which is alpha^2 + sigma^2 = 1 (and the kind ``v``, equal to the velocity) only
    for sigma_data = 1. The paper's network F predicts velocity / sigma_data; t = atan(sigma_EDM / sigma_data) and x_t =
    cos(t) x_EDM.

    Raises:
        ValueError: ``sigma_data`` is not positive.
    """

    t_min = 0.0
    t_max = math.pi / 2

    def __init__(self, sigma_data: float = 0.5) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {sigma_data}")
        self.sigma_data = sigma_data
        self.variance_preserving = sigma_data == 1

    def alpha(self, t: Tensor) -> Tensor:
        # cos(t) as a sine: exactly 0 at t_max, where cos(float(pi/2)) is 6e-17, and accurate beside it.
        return torch.sin(self.t_max - at_least_float32(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(at_least_float32(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.sin(at_least_float32(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * self.alpha(t)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        """atan(sigma_EDM / sigma_data) with sigma_EDM = exp(-log_ratio): nothing is clamped."""
        ratio = torch.exp(-at_least_float32(log_ratio)) / self.sigma_data
        return torch.atan(ratio).clamp(self.t_min, self.t_max)

    def prior(self, z: Tensor) -> Tensor:
        """sigma_data z, in at least float32."""
        return self.sigma_data * at_least_float32(z)
