"""Pairs and guided solver steps of latent consistency distillation (arXiv 2310.04378, 2311.05556): pure functions.

Times are indices of a table (``VPScaledLinear``); the student's function is ``samplers.fewstep.lcm_boundary`` of its x0, the
distances are ``l2`` and ``elementwise_huber``. Weights w are this family's ``guidance_w`` = guidance_scale - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.models.guidance import guide
from distill.process.base import Process
from distill.process.guidance_w import scale_of_w
from distill.samplers.ode import ddim_step


class SolverStep(NamedTuple):
    """Guided predictions at (x_t, t) and the state that they lead to, [B, *S] each."""

    x0: Tensor
    eps: Tensor
    x_u: Tensor


def lcm_pair(grid: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(t, u) [B]: t = G_j and u = G_{j-1} (0 for j = 0) of ``samplers.fewstep.lcm_grid`` [k], for integers j [B] in 0 .. k - 1.

    u = 0 is the table's first level, which is not clean (alpha^2 = 0.99915 for Stable Diffusion).

    Raises:
        ValueError: a grid that is not [k], or an index that is not integer.
    """
    if grid.dim() != 1 or len(grid) < 1:
        raise ValueError(f"grid: found the shape {tuple(grid.shape)}, expected [k]")
    if index.dtype.is_floating_point:
        raise ValueError(f"index: found {index.dtype}, expected integers")
    grid = grid.to(index.device, non_blocking=True)
    before = torch.cat([grid.new_zeros(1), grid[:-1]])
    return grid.index_select(0, index), before.index_select(0, index)


@torch.no_grad()
def guided_ddim_step(
    process: Process,
    kind: str,
    cond: Tensor,
    uncond: Tensor,
    x_t: Tensor,
    t: Tensor,
    u: Tensor,
    guidance_w: float | Tensor,
) -> SolverStep:
    """One DDIM step t -> u, [B] each, from the teacher's predictions with and without condition, guided with ``guidance_w``.

    x0_hat and eps_hat are both y_c + w (y_c - y_u) (arXiv 2310.04378, section 4.3); w = 0 is the conditional prediction alone.
    ``cond`` and ``uncond`` [B, *S] are outputs of ``kind`` at (x_t, t). Conversions are affine in the output, so it is guided
    as what it is and converted once. Then x_u = alpha_u x0_hat + sigma_u eps_hat.

    Raises:
        ValueError: an unknown kind, or shapes that differ.
    """
    return SolverStep(*ddim_step(process, kind, guide(uncond, cond, scale_of_w(guidance_w)), x_t, t, u))


def check_teacher(process: Process, kind: str) -> None:
    """Refuse a teacher whose x0 does not exist at the noisiest time. For use while a method is built.

    Raises:
        ValueError: an unknown kind, or a prediction of noise where no signal is left at t_max (zero terminal SNR).
    """
    process.check_kind(kind)
    if kind in ("eps", "score") and float(process.alpha(torch.tensor([process.t_max]).double())) == 0:
        raise ValueError(
            f"kind: found {kind!r}, but nothing of the data is left at t_max of {process!r}, so x0 cannot be "
            "computed from predicted noise; expected 'v' or 'x0'"
        )
