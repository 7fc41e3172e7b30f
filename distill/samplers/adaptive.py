"""RK45: the probability-flow ODE to a tolerance, by the Runge-Kutta pair 5(4) of Dormand and Prince (JCAM 6, 1980).

Step control is that of Hairer, Norsett and Wanner ("Solving Ordinary Differential Equations I", sections II.4 and II.6), which
scipy's ``solve_ivp`` follows as well: steps and calls are the same as there on the flattened batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32, expand
from distill.process.flow import Flow
from distill.samplers.integrate import Field, OnState, check_times

# The pair's tableau: stage i of 1 .. 6 is at NODES[i - 1] and starts from the slopes before it with STAGES[i - 1]. The last
# stage is the step itself, and its slope the first of the next step.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Difference of the two orders, and the last coefficient of the continuous extension of order 4 (HNW, eq. II.6.12).
ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
DENSE = (
    -12715105075 / 11282082432,
    0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
CUT = 1e-4

Slope = Callable[[Tensor, float], Tensor]


def rk45(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    kind: str = "x0",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    on_state: OnState | None = None,
    return_path: bool = False,
    max_calls: int = 20_000,
) -> tuple[Tensor, int]:
    """(final state [B, *S] or path [N + 1, B, *S], network calls), with ``predict(x, t)`` a network of ``kind``.

    It integrates dy/dtau = eps_hat - x0_hat in the coordinates of the straight flow, y = x / (alpha + sigma) at tau = sigma /
    (alpha + sigma), where every process is regular and of unit scale; for ``Flow`` these are x and t. ``times`` (either
    direction) only sets where states are returned: steps are chosen by the tolerance |error| <= atol + rtol |y|, in ONE root
    mean square over the whole batch. So the samples of a batch depend on each other, within the tolerance, and so do the calls.
    States between steps come from the continuous extension of order 4.

    Predicted data give no noise where sigma is 0: with ``kind`` "x0" (or "score") the network is
    not called below tau = 1e-4, and the rest is one Euler step, which is exact up to tau^2.

    Every step waits for the device, for its error decides the next. The gradient is that of the steps taken: the dependence of
    their sizes on x is left out, which is below the tolerance.

    Raises:
        ValueError: ``times`` is not 1-D, has fewer than two entries or turns back, a tolerance is not positive, or the kind
        does not exist.
        RuntimeError: the step fell below the resolution of time (the field is singular or not finite), or ``max_calls`` did
        not suffice.
    """
    _check(times, rtol, atol)
    x, flow, calls = at_least_float32(x), Flow(), 0
    at = flow.matching_time(process, times.double()).tolist()
    scale = flow.matching_scale(process, times.double()).to(x.device)

    def slope(y: Tensor, tau: float) -> Tensor:
        nonlocal calls
        if calls == max_calls:
            raise RuntimeError(f"rk45: max_calls = {max_calls} calls ended at tau = {tau}, short of {at[-1]}")
        calls += 1
        here = torch.full((len(y),), tau, dtype=torch.float64, device=y.device)
        t = process.matching_time(flow, here)
        state, t = expand(process.matching_scale(flow, here).to(y.dtype), y) * y, t.to(times.dtype)
        out = predict(state, t)
        x0, eps = (process.convert(kind, out, state, t, wanted) for wanted in ("x0", "eps"))
        return (eps - x0).to(y.dtype)

    path = []
    cut = CUT if kind in ("x0", "score") else 0.0
    for i, y in enumerate(_states(slope, scale[0] * x, at, rtol, atol, cut)):
        x = y / scale[i]
        if on_state is not None:
            on_state(i, x)
        if return_path:
            path.append(x)
    return (torch.stack(path) if return_path else x), calls


def _check(times: Tensor, rtol: float, atol: float) -> None:
    check_times(times)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: found {value}, expected a positive number")
    if times.tolist() not in (sorted(times.tolist()), sorted(times.tolist(), reverse=True)):
        raise ValueError(f"times: expected times in one direction, found {times.tolist()}")


def _states(
    slope: Slope, y: Tensor, at: list[float], rtol: float, atol: float, cut: float
) -> Iterator[Tensor]:
    """The states at each of ``at``; below ``cut``, on the tangent there."""
    yield y
    tau, wanted, rejected = at[0], 1, False
    direction = math.copysign(1.0, at[-1] - tau)
    end = max(at[-1], cut) if direction < 0 else at[-1]
    first = slope(y, tau)
    size = _first_size(slope, y, first, tau, end, rtol, atol)
    while direction * (end - tau) > 0:
        if not size >= 10 * abs(math.nextafter(tau, end) - tau):  # also where it is not a number
            raise RuntimeError(
                f"rk45: no step from tau = {tau} meets rtol = {rtol} and atol = {atol}; the field is singular "
                "or not finite there, or the tolerance is below the precision of the states"
            )
        arrival = end if direction * (tau + direction * size - end) >= 0 else tau + direction * size
        h = arrival - tau
        new, slopes = _step(slope, y, first, tau, h)
        error = _size(h * _sum(ERROR, slopes), y, new, rtol, atol)
        factor = SAFETY * error**-0.2 if error > 0 else (GROW if error == 0 else math.nan)
        if not error < 1:
            size, rejected = abs(h) * max(SHRINK, factor), True
            continue
        while wanted < len(at) and direction * (at[wanted] - arrival) <= 0:
            yield new if at[wanted] == arrival else _between(y, new, slopes, h, (at[wanted] - tau) / h)
            wanted += 1
        size, rejected = abs(h) * min(GROW if not rejected else 1.0, factor), False
        tau, y, first = arrival, new, slopes[-1]
    for place in at[wanted:]:
        yield y + (place - tau) * first


def _step(slope: Slope, y: Tensor, first: Tensor, tau: float, h: float) -> tuple[Tensor, list[Tensor]]:
    """The state of order 5 after a step h, and the seven slopes."""
    slopes, new = [first], y
    for node, row in zip(NODES, STAGES, strict=True):
        new = y + h * _sum(row, slopes)
        slopes.append(slope(new, tau + node * h))
    return new, slopes


def _between(y: Tensor, new: Tensor, slopes: list[Tensor], h: float, theta: float) -> Tensor:
    """The continuous extension at the fraction theta of a step: order 4, with the values and slopes of both ends."""
    rise = new - y
    left = h * slopes[0] - rise
    right = rise - h * slopes[-1] - left
    inner = left + theta * (right + (1 - theta) * h * _sum(DENSE, slopes))
    return y + theta * (rise + (1 - theta) * inner)


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    pairs = [weight * k for weight, k in zip(weights, slopes, strict=True) if weight]
    return torch.stack(pairs).sum(0)


def _size(error: Tensor, y: Tensor, other: Tensor, rtol: float, atol: float) -> float:
    """Root mean square of error / (atol + rtol max(|y|, |other|)) over the batch, on the host."""
    with torch.no_grad():
        return float((error / (atol + rtol * torch.maximum(y.abs(), other.abs()))).square().mean().sqrt())


def _first_size(
    slope: Slope, y: Tensor, first: Tensor, tau: float, end: float, rtol: float, atol: float
) -> float:
    """HNW's first step (section II.4): 1% of |y| / |y'|, then by an Euler step's estimate of |y''|."""
    length = abs(end - tau)
    value, speed = (_size(part, y, y, rtol, atol) for part in (y, first))
    trial = min(1e-6 if value < 1e-5 or speed < 1e-5 else 0.01 * value / speed, length)
    h = math.copysign(trial, end - tau)
    with torch.no_grad():
        bend = _size(slope(y + h * first, tau + h) - first, y, y, rtol, atol) / trial if trial else 0.0
    sharpest = max(speed, bend)
    size = (0.01 / sharpest) ** 0.2 if sharpest > 1e-15 else max(1e-6, trial * 1e-3)
    return min(100 * trial, size, length)
