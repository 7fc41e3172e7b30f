"""Multistep solvers of the probability-flow ODE in lambda = log(alpha / sigma): DPM-Solver++(2M) and UniPC.

They are functions of our own rather than an adapter to a library's schedulers: stateless, in float64 times, differentiable in
the initial noise, for any process on any grid, and without a wait for the device. Schedulers hold the state of a run, are tied
to a training table of 1000 steps and drop gradients.

Both integrate, exactly but for a polynomial stand-in of the predicted data x0(lambda), the variation of constants (arXiv
2211.01095, eq. 8), with h = lambda_s - lambda_t and lambda the time inside the integral:

    x_s = sigma_s / sigma_t x_t + alpha_s int_0^h e^-(h - u) x0(lambda_t + u) du.

**Ends.** With a constant x0 the integral is alpha_s (1 - e^-h) = alpha_s - alpha_t sigma_s / sigma_t, finite at both ends:
DDIM's step. From pure noise (alpha_t = 0, lambda_t = -inf) the first step is that; afterwards the point at -inf is a node
infinitely far away, whose weight is exactly 0, so it drops out of the polynomial. Into clean data (sigma_s = 0, lambda_s = inf)
no polynomial but a constant can be integrated, so that step is DDIM's: it lands on the predicted data. On a grid that steps
uniformly to such an end the ends cost a logarithm, N^-2 log N, and order 3 is not reached; on grids that are smooth in lambda,
or finer towards the ends (``karras_grid``), the orders are those stated.

Shared arguments are those of ``distill.samplers.ode``, with ``predict(x, t)`` a network of ``kind``; ``times`` falls strictly.
One call of the network a step. ``final="x0"`` returns the prediction of the data at ``times[-2]`` in place of the state at
``times[-1]`` (equal where that is clean). ``lower_order_final`` lowers the order towards the last step, which steadies few
steps into a nearly clean end, where h grows without bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.process.base import Process
from distill.samplers.integrate import Field, OnState, as_x0, check_final, check_times, integrate


class _Levels(NamedTuple):
    """Coefficients of the steps of a grid, float64, on the device of its times: mostly the CPU, where they cost little."""

    carry: Tensor  # [N] sigma_s / sigma_t
    gain: Tensor  # [N] alpha_s (1 - e^-h)
    log_ratio: Tensor  # [N + 1] lambda
    h: Tensor  # [N]

    @classmethod
    def of(cls, process: Process, times: Tensor) -> _Levels:
        times = times.double()
        alpha, sigma, log_ratio = process.alpha(times), process.sigma(times), process.log_ratio(times)
        carry = sigma[1:] / sigma[:-1]
        return cls(carry, alpha[1:] - carry * alpha[:-1], log_ratio, log_ratio[1:] - log_ratio[:-1])


def dpmpp_2m(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    kind: str = "x0",
    on_state: OnState | None = None,
    return_path: bool = False,
    final: str = "x0",
    lower_order_final: bool = True,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2). Order 2; the first step is DDIM's.

    x_s = sigma_s / sigma_t x_t + alpha_s (1 - e^-h) D with D = x0_t + (x0_t - x0_before) h / (2 h_before).

    Raises:
        ValueError: ``times`` does not fall strictly, ``final`` is neither, or the kind does not exist.
    """
    steps = check_times(times, descending=True)
    check_final(final)
    carry, gain, _, h = _Levels.of(process, times)
    half_back = torch.zeros_like(h)
    half_back[1:] = h[1:] / (2 * h[:-1])
    if lower_order_final:
        half_back[-1] = 0
    half_back = torch.where(h.isinf(), 0, half_back)  # into clean data: first order
    x0_at = as_x0(predict, process, kind)
    before: list[Tensor] = []

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x0 = x0_at(x, t)
        if final == "x0" and i == steps - 1:
            return x0
        direction = x0 + half_back[i] * (x0 - before.pop()) if before else x0
        before.append(x0)
        return carry[i] * x + gain[i] * direction

    return integrate(step, x, times, on_state, return_path)


def unipc(
    predict: Field,
    process: Process,
    x: Tensor,
    times: Tensor,
    kind: str = "x0",
    order: int = 2,
    corrector: bool = True,
    on_state: OnState | None = None,
    return_path: bool = False,
    final: str = "x0",
    lower_order_final: bool = True,
) -> Tensor:
    """UniPC (arXiv 2302.04867): predictor UniP-p (Algorithm 2), corrector UniC-p (Algorithm 1), B(h) = e^h - 1 ("bh2").

    In the form for predicted data (its appendix), where B becomes 1 - e^-h. The predictor of ``order`` p interpolates x0
    through the last p predictions, the corrector through the new one as well; that one, made at the predicted state, also
    serves the next step, so correcting is free, and the last step goes uncorrected. As in the paper the weights of UniP-2 and
    UniC-1 are 1/2 instead of the solution of their 1 x 1 system: UniP-2 alone is DPM-Solver++(2M), UniP-1 alone DDIM. Steps
    are of order p, p + 1 once corrected. The first p - 1 steps have fewer predictions to go by, orders 1, 2, ...; as a first
    corrected step errs by h^3, once, a whole run is of order 3 for p = 2 and between 3 and 4 in practice for p = 3 (without
    the corrector 2 for both, a first step erring by h^2).

    Raises:
        ValueError: ``order`` is not 1, 2 or 3; else as ``dpmpp_2m``.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order: found {order!r}, expected 1, 2 or 3")
    steps = check_times(times, descending=True)
    check_final(final)
    levels = _Levels.of(process, times)
    x0_at = as_x0(predict, process, kind)
    known: list[Tensor] = []  # predictions of the data, newest first

    def step(i: int, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        if i == 0:
            known.append(x0_at(x, t))
        last = i == steps - 1
        if last and final == "x0":
            return known[0]
        p = min(order, i + 1, steps - i if lower_order_final else order)
        behind = _nodes(levels, i, p)
        differences = [older - known[0] for older in known[1:p]]
        ahead = _advance(levels, i, x, known[0], differences, _weights(levels.h[i], behind, halve=p == 2))
        if last:
            return ahead
        newest = x0_at(ahead, s)
        if corrector:
            weights = _weights(levels.h[i], [*behind, torch.ones_like(levels.h[i])], halve=p == 1)
            ahead = _advance(levels, i, x, known[0], [*differences, newest - known[0]], weights)
        known.insert(0, newest)
        del known[order:]
        return ahead

    return integrate(step, x, times, on_state, return_path)


def _advance(
    levels: _Levels, i: int, x: Tensor, x0: Tensor, differences: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    """sigma_s / sigma_t x + alpha_s (1 - e^-h) (x0 + sum_m w_m D_m)."""
    for weight, difference in zip(weights, differences, strict=True):
        x0 = x0 + weight * difference
    return levels.carry[i] * x + levels.gain[i] * x0


def _nodes(levels: _Levels, i: int, order: int) -> list[Tensor]:
    """r_m = (lambda_{i-m} - lambda_i) / h_i for m = 1 .. order - 1: the positions of earlier predictions, in steps."""
    at = levels.log_ratio
    return [(at[i - m] - at[i]) / levels.h[i] for m in range(1, order)]


def _weights(h: Tensor, nodes: Sequence[Tensor], *, halve: bool) -> list[Tensor]:
    """Weights w_m of the differences D_m = x0(r_m) - x0(0) of one step; all scalars, float64.

    The mean of x0 - x0(0) under the density e^-(h - u) du / (1 - e^-h), replaced by the polynomial through the nodes and 0:
    sum_m w_m r_m^k = M_k / M_0 for k = 1 .. len(nodes), with M_0 = 1 - e^-h and M_k = 1 - k M_{k-1} / h. UniPC writes w_m =
    a_m / r_m. ``halve``: the single node's a is 1/2. Infinite nodes weigh 0, and so do all for an infinite step, except the
    corrector's half (it needs no h). M_k loses k digits for each decade of h below 1: 1e-7 of a third-order term at h = 1e-3.
    """
    if halve:
        (node,) = nodes
        return [torch.where(node == 1, 0.5, torch.where(h.isinf(), 0, 0.5 / node))]
    moment = total = -torch.expm1(-h)
    means = []
    for k in range(1, len(nodes) + 1):
        moment = 1 - k * moment / h
        means.append(moment / total)
    weights = []
    for m, node in enumerate(nodes):
        # Lagrange's polynomial of the node, rho / r_m prod_j (rho / r_j - 1) / (r_m / r_j - 1), integrated power by power.
        powers = [1 / node]
        for other in (*nodes[:m], *nodes[m + 1 :]):
            scale = node / other - 1
            shifted = zip([*powers, torch.zeros_like(h)], [torch.zeros_like(h), *powers], strict=True)
            powers = [(up / other - same) / scale for same, up in shifted]
        weight = sum((p * mean for p, mean in zip(powers, means, strict=True)), torch.zeros_like(h))
        weights.append(torch.where(h.isinf(), 0, weight))
    return weights
