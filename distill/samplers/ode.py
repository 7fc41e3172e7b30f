"""Deterministic samplers: one short function each, on plain callables, differentiable in the initial noise.

Shared arguments: ``x`` [B, *S] is the state at ``times[0]``; ``times`` is 1-D [N + 1], descending (noise to
data; an ascending grid integrates back to noise), moved to the device of ``x``; networks are called with t
[B] in the dtype of ``times``. States are kept in at least float32 whatever the network returns. ``on_state(i,
state)`` is called for i = 0..N. Each sampler returns the final state, or with ``return_path`` all states [N +
1, B, *S].
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import Process
from distill.samplers.integrate import Field, OnState, check_final, integrate, per_sample

__all__ = ["Field", "OnState", "ddim", "ddim_step", "euler", "heun", "rollout"]


def euler(
    velocity: Field, x: Tensor, times: Tensor, on_state: OnState | None = None, return_path: bool = False
) -> Tensor:
    """Explicit Euler: x += (s - t) velocity(x, t) from each time t to the next, s. One evaluation a step.

    Rectified flow's sampler (arXiv 2209.03003, Algorithm 1, there in tau = 1 - t); on a uniform flow grid of
    N steps it is InstaFlow's ``x += v / N``. Order 1.
    """

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + (s - t) * velocity(x, per_sample(t, x)).to(x.dtype)

    return integrate(step, x, times, on_state, return_path)


def heun(
    velocity: Field,
    x: Tensor,
    times: Tensor,
    on_state: OnState | None = None,
    return_path: bool = False,
    last_euler: bool = False,
) -> Tensor:
    """Heun's method (arXiv 2206.00364, Algorithm 1) for any field. Two evaluations a step, order 2.

    ``last_euler`` skips the correction of the last step, for fields that are singular at ``times[-1]``
    (variance exploding at sigma = 0, ``VPLinear`` at t = 0); a flow needs no such care.
    """

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        slope = velocity(x, per_sample(t, x)).to(x.dtype)
        ahead = x + (s - t) * slope
        if last_euler and i == len(times) - 2:
            return ahead
        return x + (s - t) * (slope + velocity(ahead, per_sample(s, x)).to(x.dtype)) / 2

    return integrate(step, x, times, on_state, return_path)


def ddim_step(
    process: Process, kind: str, out: Tensor, z_t: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One DDIM step t -> s, both [B], from ``out`` of ``kind`` at (z_t, t): (x0_hat, eps_hat, z_s).

    arXiv 2010.02502, eq. 12 with zero noise: z_s = alpha_s x0_hat + sigma_s eps_hat. It is Euler's method in
    the coordinates of the straight flow with the same signal-to-noise ratios.
    """
    x0, eps = process.x0_and_eps(kind, out, z_t, t)
    return x0, eps, process.add_noise(x0, eps, s)


def ddim(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    kind: str = "x0",
    on_state: OnState | None = None,
    return_path: bool = False,
    final: str = "x0",
) -> Tensor:
    """Deterministic DDIM (arXiv 2010.02502, eq. 12) with a network ``predict(x, t)`` of ``kind``.

    ``final="x0"`` (as in progressive distillation, arXiv 2202.00512) returns x0_hat of the last step in place
    of the state at ``times[-1]``; ``final="state"`` returns that state. One evaluation a step, order 1.

    Raises:
        ValueError: ``final`` is neither, or the kind does not exist for the process.
    """
    check_final(final)

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        here, there = per_sample(t, x), per_sample(s, x)
        x0, _, z_s = ddim_step(process, kind, predict(x, here), x, here, there)
        return x0 if final == "x0" and i == len(times) - 2 else z_s

    return integrate(step, x, times, on_state, return_path)


def rollout(velocity: Field, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Euler's path [N + 1, B, *S] and its left-point velocities [N, B, *S], for ``straightness``."""
    velocities: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        velocities.append(velocity(x, t).to(x.dtype))
        return velocities[-1]

    path = euler(recorded, x, times, return_path=True)
    return path, torch.stack(velocities)
