"""The straight process of rectified flow and flow matching (arXiv 2209.03003, 2210.02747)."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32


class Flow(Process):
    """x_t = (1 - t) x0 + t eps, t in [0, 1]; velocity = eps - x0, constant along a straight path.

    The papers write tau = 1 - t and velocity = data - noise.
    """

    t_min = 0.0
    t_max = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - at_least_float32(t)

    def sigma(self, t: Tensor) -> Tensor:
        return at_least_float32(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(at_least_float32(t))

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(at_least_float32(t))

    def log_ratio(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return torch.log1p(-t) - torch.log(t)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        """sigma / (alpha + sigma) for any process's ratio, infinite ones included: nothing is clamped."""
        return torch.sigmoid(-at_least_float32(log_ratio))
