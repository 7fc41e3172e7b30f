"""Samplers that add noise on the way: DDIM with eta, and EDM's churn.

They draw nothing: ``noise`` gives the standard normal numbers of each step (``Noise``), so a sample is a function of its own
noises, whatever the batch. With fixed noises they are differentiable in the initial noise. Other arguments are those of
``distill.samplers.ode``, with ``predict(x, t)`` a network of ``kind``; ``times`` falls strictly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distill.process.base import Process
from distill.samplers.march import (
    Field,
    Noise,
    OnState,
    check_final,
    check_times,
    march,
    noise_of,
    per_sample,
)


def stochastic_ddim(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    eta: float = 1.0,
    kind: str = "x0",
    on_state: OnState | None = None,
    return_path: bool = False,
    final: str = "x0",
) -> Tensor:
    """DDIM with noise (arXiv 2010.02502, eq. 12 and 16); eta = 0 is ``ddim``, eta = 1 ancestral sampling (DDPM's posterior).

    x_s = alpha_s x0_hat + sqrt(sigma_s^2 - c^2) eps_hat + c n with c = eta sigma_s sqrt(1 - SNR_t / SNR_s): eq. 16 for any
    process, since c / eta is the standard deviation of q(x_s | x_t, x0) (SNR = alpha^2 / sigma^2). Finite at both ends: from
    pure noise c = eta sigma_s, into clean data 0. ``final`` as in ``ddim``; the noise of a last step that returns x0_hat is
    not asked for. One call a step, order 1.

    Raises:
        ValueError: ``eta`` outside [0, 1], ``noise`` of another shape, ``times`` does not fall strictly, ``final`` is
        neither, or the kind does not exist.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: found {eta}, expected a number in [0, 1]")
    steps = check_times(times, descending=True)
    check_final(final)
    draw = noise_of(noise, x, steps)
    alpha, sigma = process.alpha(times.double()), process.sigma(times.double())
    # 1 - SNR_t / SNR_s, from the weights: no infinite ratio at either end.
    renewed = (1 - (alpha[:-1] * sigma[1:] / (sigma[:-1] * alpha[1:])).square()).clamp(min=0)
    kept, fresh = sigma[1:] * (1 - eta**2 * renewed).sqrt(), sigma[1:] * eta * renewed.sqrt()

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        here = per_sample(t, x)
        out = predict(x, here)
        x0 = process.convert(kind, out, x, here, "x0")
        if final == "x0" and i == steps - 1:
            return x0
        eps = process.convert(kind, out, x, here, "eps")
        return alpha[i + 1] * x0 + kept[i] * eps + fresh[i] * draw(i)

    return march(step, x, times, on_state, return_path)


def churn(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    noise: Noise,
    kind: str = "x0",
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    on_state: OnState | None = None,
    return_path: bool = False,
    last_euler: bool = True,
) -> Tensor:
    """EDM's stochastic sampler (arXiv 2206.00364, Algorithm 2): raise the noise level, then one step of ``heun``.

    At noise level l = sigma / alpha in [s_min, s_max] the level is first raised to (1 + gamma) l with gamma = min(s_churn / N,
    sqrt(2) - 1), by noise of standard deviation ``s_noise`` times what that takes. For ``EDM`` this is Algorithm 2 as printed;
    other processes go to the time t' of the raised level, x' = alpha' / alpha x + sqrt(sigma'^2 - (alpha' / alpha sigma)^2)
    s_noise n, and Heun runs in their own time. Levels stay in the process's range: what would go beyond t_max stops there (the
    paper's s_max lies far below it), and pure noise (alpha = 0) stays as it is. s_churn = 0 is ``heun``. ``last_euler`` is the
    algorithm's exception for a last step to 0. Two calls a step.

    Raises:
        ValueError: a negative ``s_churn``, ``s_min`` or ``s_noise``, s_min > s_max, ``noise`` of another shape, ``times``
        does not fall strictly, or the kind does not exist.
    """
    for name, value in (("s_churn", s_churn), ("s_min", s_min), ("s_noise", s_noise)):
        if not value >= 0:
            raise ValueError(f"{name}: found {value}, expected a number >= 0")
    if not s_min <= s_max:
        raise ValueError(f"s_min, s_max: found {s_min} and {s_max}, expected s_min <= s_max")
    steps = check_times(times, descending=True)
    draw = noise_of(noise, x, steps)
    raised, keep, added = _raise(process, times[:-1], min(s_churn / steps, math.sqrt(2) - 1), s_min, s_max)
    raised = raised.to(x.device, times.dtype, non_blocking=True)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        here = per_sample(t, x)
        return process.convert(kind, predict(x, here), x, here, "velocity").to(x.dtype)

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if s_churn > 0:
            x, t = keep[i] * x + s_noise * added[i] * draw(i), raised[i]
        slope = velocity(x, t)
        ahead = x + (s - t) * slope
        if last_euler and i == steps - 1:
            return ahead
        return x + (s - t) * (slope + velocity(ahead, s)) / 2

    return march(step, x, times, on_state, return_path)


def _raise(
    process: Process, times: Tensor, gamma: float, s_min: float, s_max: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per step [N], float64: the time t' after churning, alpha' / alpha, and the standard deviation of the noise to add."""
    times = times.double()
    alpha, sigma, log_ratio = process.alpha(times), process.sigma(times), process.log_ratio(times)
    level = torch.exp(-log_ratio)
    churned = (level >= s_min) & (level <= s_max) & level.isfinite()
    raised = torch.where(churned, process.time_of(log_ratio - math.log1p(gamma)), times)
    keep = torch.where(churned, process.alpha(raised) / alpha, 1)
    added = (process.sigma(raised).square() - (keep * sigma).square()).clamp(min=0).sqrt()
    return raised, keep, torch.where(churned, added, 0)
