"""Losses and times of rectified flow, reflow and InstaFlow (arXiv 2209.03003, 2309.06380): pure functions.

The papers use tau = 1 - t and velocity = data - noise; here t = 0 is data and velocity = eps - x0. Losses are
even in the sign, so their values are the papers'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32
from distill.process.flow import Flow


def flow_matching_loss(pred_velocity: Tensor, x0: Tensor, eps: Tensor, reduction: str = "mean") -> Tensor:
    """|pred - (eps - x0)|^2 per sample, from [B, *S] each to [B] in at least float32; the caller averages.

    ``reduction`` acts on the sample dimensions: ``"mean"``, or ``"halfsum"`` = 0.5 * sum (RectifiedFlow's
    ``reduce_mean=False``). For reflow, (x0, eps) is a stored pair; for the first flow they are independent.

    Raises:
        ValueError: shapes differ (nothing is broadcast), or an unknown reduction.
    """
    if not pred_velocity.shape == x0.shape == eps.shape:
        raise ValueError(
            f"shapes differ: velocity {tuple(pred_velocity.shape)}, x0 {tuple(x0.shape)}, "
            f"eps {tuple(eps.shape)}"
        )
    error = at_least_float32(pred_velocity) - (at_least_float32(eps) - at_least_float32(x0))
    squares = error.square().flatten(1)
    if reduction == "mean":
        return squares.mean(1)
    if reduction == "halfsum":
        return 0.5 * squares.sum(1)
    raise ValueError(f"unknown reduction {reduction!r}; it is 'mean' or 'halfsum'")


def require_flow(process: Process) -> None:
    """Raise ValueError unless velocities are eps - x0, which is what these losses regress."""
    if not isinstance(process, Flow):
        raise ValueError(
            f"process: found {process!r}, but this method trains flows; expected Flow() (student=flow, or "
            "adapt: {process: flow} of the stage, makes a flow of another model)"
        )


def k_step_times(index: Tensor, k: int, t_eps: float = 0.0) -> Tensor:
    """Start times of the steps ``index`` (integers [B] in 0..k-1) of a k-step student, float64 [B].

    They are (1 - t_eps)(1 - index / k). In the paper's tau these are t_eps + j (1 - t_eps) / k. Index 0 is
    noise; k = 1 is one-step distillation. The default keeps InstaFlow's exact t = 1 there; RectifiedFlow's
    code uses ``t_eps=1e-3``.

    Raises:
        ValueError: k < 1, or t_eps outside [0, 1).
    """
    if k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k}")
    if not 0 <= t_eps < 1:
        raise ValueError(f"t_eps must lie in [0, 1), got {t_eps}")
    return (1 - t_eps) * (1 - index.to(torch.float64) / k)
