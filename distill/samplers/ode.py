"""Deterministic samplers: one short function each, on plain callables, differentiable in the initial noise.

Shared arguments: ``x`` [B, *S] is the state at ``times[0]``; ``times`` is 1-D [N + 1], descending (noise to
data; an ascending grid integrates back to noise), moved to the device of ``x``; networks are called with t
[B] in the dtype of ``times``. States are kept in at least float32 whatever the network returns. ``on_state(i,
state)`` is called for i = 0..N. Each sampler returns the final state, or with ``return_path`` all states [N +
1, B, *S].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32

Field = Callable[[Tensor, Tensor], Tensor]
"""(x [B, *S], t [B]) -> [B, *S]: a velocity dx/dt, or the prediction of a network."""
OnState = Callable[[int, Tensor], None]


def euler(
    velocity: Field, x: Tensor, times: Tensor, on_state: OnState | None = None, return_path: bool = False
) -> Tensor:
    """Explicit Euler: x += (s - t) velocity(x, t) from each time t to the next, s. One evaluation a step.

    Rectified flow's sampler (arXiv 2209.03003, Algorithm 1, there in tau = 1 - t); on a uniform flow grid of
    N steps it is InstaFlow's ``x += v / N``. Order 1.
    """

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        return x + (s - t) * velocity(x, _per_sample(t, x)).to(x.dtype)

    return _march(step, x, times, on_state, return_path)


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

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        slope = velocity(x, _per_sample(t, x)).to(x.dtype)
        ahead = x + (s - t) * slope
        if last and last_euler:
            return ahead
        return x + (s - t) * (slope + velocity(ahead, _per_sample(s, x)).to(x.dtype)) / 2

    return _march(step, x, times, on_state, return_path)


def ddim_step(
    process: Process, kind: str, out: Tensor, z_t: Tensor, t: Tensor, s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One DDIM step t -> s, both [B], from ``out`` of ``kind`` at (z_t, t): (x0_hat, eps_hat, z_s).

    arXiv 2010.02502, eq. 12 with zero noise: z_s = alpha_s x0_hat + sigma_s eps_hat. It is Euler's method in
    the coordinates of the straight flow with the same signal-to-noise ratios.
    """
    x0 = process.convert(kind, out, z_t, t, "x0")
    eps = process.convert(kind, out, z_t, t, "eps")
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
    if final not in ("x0", "state"):
        raise ValueError(f"final must be 'x0' or 'state', got {final!r}")

    def step(x: Tensor, t: Tensor, s: Tensor, last: bool) -> Tensor:
        here, there = _per_sample(t, x), _per_sample(s, x)
        x0, _, z_s = ddim_step(process, kind, predict(x, here), x, here, there)
        return x0 if last and final == "x0" else z_s

    return _march(step, x, times, on_state, return_path)


def rollout(velocity: Field, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Euler's path [N + 1, B, *S] and its left-point velocities [N, B, *S], for ``straightness``."""
    velocities: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        velocities.append(velocity(x, t).to(x.dtype))
        return velocities[-1]

    path = euler(recorded, x, times, return_path=True)
    return path, torch.stack(velocities)


def _per_sample(t: Tensor, x: Tensor) -> Tensor:
    return t.expand(x.shape[0])


def _march(
    step: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
    x: Tensor,
    times: Tensor,
    on_state: OnState | None,
    return_path: bool,
) -> Tensor:
    """Apply ``step(x, t, s, is_last)`` along the grid: the dtype rule and bookkeeping of every sampler."""
    if times.dim() != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be 1-D with at least two entries, got shape {tuple(times.shape)}")
    x = at_least_float32(x)
    times = times.to(x.device, non_blocking=True)
    steps = times.shape[0] - 1
    path = [x]
    for i in range(steps + 1):
        if i > 0:
            x = step(x, times[i - 1], times[i], i == steps).to(x.dtype)
            if return_path:
                path.append(x)
        if on_state is not None:
            on_state(i, x)
    return torch.stack(path) if return_path else x
