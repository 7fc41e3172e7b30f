"""Every translation from a golden file's convention to ours, and the exact fields that the files use.

rectified_flow: tau = 0 is noise (called x0 or z0 there), tau = 1 is data (x1 or z1), velocity = d x / d tau =
data - noise. Here t = 1 - tau, velocity = eps - x0 = -(theirs); alpha still multiplies data. flow_matching's
VP time also runs that way, and so does the time of its samplers. diffusers' flow scheduler has our time and
sign (sigma = t, noise - data). progressive: u = 0 is data, u = 1 noise, as here; its kind "x" is our "x0";
its discrete tables are indexed by integers, which are times of ``VPScaledLinear``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32, expand
from distill.samplers.ode import Field

KIND = {"x": "x0", "eps": "eps", "v": "v"}
"""progressive's names of predictions -> ours."""


def flip_time(tau: Tensor) -> Tensor:
    """Time of the other direction, both ways: t = 1 - tau."""
    return 1 - tau


def flip_velocity(v: Tensor) -> Tensor:
    """dx/dtau -> dx/dt, both ways; also for d alpha and d sigma."""
    return -v


def flip_field(field: Field) -> Field:
    """A velocity field in (x, tau), data - noise -> ours in (x, t), eps - x0."""
    return lambda x, t: flip_velocity(field(x, flip_time(t)))


def numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """The integers that ``pattern`` (one group) finds in the keys of a file, sorted; none is a failure."""
    found = sorted(int(match[1]) for key in keys if (match := re.fullmatch(pattern, key)))
    assert found, f"no key matches {pattern!r}"
    return found


def close(actual: Tensor, expected: Tensor, atol: float = 1e-8, rtol: float = 1e-8) -> None:
    """assert_close that names the tolerance of the families' READMEs as its default."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=atol, rtol=rtol)


def mixture_field(means: Tensor, std: float | Tensor) -> Field:
    """Exact velocity E[eps - x0 | x_t] for x0 ~ even mixture of N(mean_k, std^2 I), OUR convention.

    ``means`` [K, D]; ``std`` 0 makes it the empirical distribution of the means (then not at t = 0). A single
    mean with ``std`` [D] is a diagonal Gaussian. Closed form: given the component, x0 and eps are jointly
    Gaussian with x_t.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x0, eps = mixture_posterior(means, std, x, t)
        return eps - x0

    return velocity


def mixture_posterior(means: Tensor, std: float | Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(E[x0 | x_t], E[eps | x_t]) [B, D] of ``mixture_field``'s distribution on the straight path."""
    time = expand(t, x).unsqueeze(1)  # [B, 1, 1]
    variance = (1 - time) ** 2 * std**2 + time**2
    from_mean = x.unsqueeze(1) - (1 - time) * means  # [B, K, D]
    # With several means std is one number, so the normalising constant is common to the components.
    weight = torch.softmax(-(from_mean.square() / (2 * variance)).sum(2), 1).unsqueeze(2)
    x0 = means + (1 - time) * std**2 / variance * from_mean
    eps = time / variance * from_mean
    return (weight * x0).sum(1), (weight * eps).sum(1)


class Spherical(Process):
    """The great circle alpha = cos(pi t / 2), sigma = sin(pi t / 2): a process is four functions."""

    t_min, t_max = 0.0, 1.0
    variance_preserving = True

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * at_least_float32(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * at_least_float32(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * self.alpha(t)


# ---- consistency: images [B, C, H, W]; noise levels are times of EDM, integer timesteps those of VPScaledLinear ----


def bounded_net(abk: Tensor) -> Field:
    """The consistency files' network F(x, c) = a tanh(b x) + k sin(c), x [B, *S], c [B], differentiable in abk = [a, b, k]."""

    def net(x: Tensor, c: Tensor) -> Tensor:
        return abk[0] * torch.tanh(abk[1] * x) + abk[2] * torch.sin(expand(c, x).to(x.dtype))

    return net
