"""Pairs, teacher steps, targets and weights of consistency models (arXiv 2303.01469, 2310.14189, 2406.14548): pure functions.

A student f learns f(x_t, t) = f(x_u, u) for neighbours t > u of one trajectory. Time is this package's (0 = data); in these
papers it is the noise level sigma of the ``EDM`` process. Where x_u comes from:

- consistency distillation: ``teacher_step``, one step of the teacher's probability-flow ODE from (x_t, t);
- consistency training: ``process.add_noise(x0, eps, u)`` with the SAME eps that made x_t, which is Euler's step with the data
  in the place of the teacher's prediction.

Distances are in ``losses.distances``, weights of one time in ``process.scalings.sigma_weight``, the form of f that is the
identity at the clean end in ``models.boundary``. Targets are made without
gradients. Values that are not finite are not replaced: the engine counts and skips such a step.

Deviations: where r = 0, the references evaluate the network at ln 0 and turn its NaN into 0 before they discard it;
``masked_target`` does not evaluate the network there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import at_least_float32, combine, expand
from distill.process.scalings import edm_scalings
from distill.samplers.ode import Field

SOLVERS = ("heun", "euler")
PAIR_WEIGHTS = ("default", "c_out", "c_out_sq", "sigma_sq", "sqrt", "one")


def grid_pair(levels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(t, u) [B]: the neighbours levels[i] > levels[i + 1] of a falling grid [N] for integers i [B] in 0 .. N-2.

    ``karras_levels(N)`` is the grid of consistency models. (The papers index it rising; the code, like this, falling.)

    Raises:
        ValueError: fewer than two levels, or an index that is not integer.
    """
    if levels.dim() != 1 or len(levels) < 2:
        raise ValueError(f"levels: found the shape {tuple(levels.shape)}, expected [N] with N >= 2")
    if index.dtype.is_floating_point:
        raise ValueError(f"index: found {index.dtype}, expected integers")
    levels = levels.to(index.device, non_blocking=True)
    return levels.index_select(0, index), levels.index_select(0, index + 1)


@torch.no_grad()
def teacher_step(
    velocity: Field, x: Tensor, t: Tensor, u: Tensor, solver: str = "heun", singular: float | None = None
) -> Tensor:
    """x_u [B, *S] from x_t by one step of dx/dt = ``velocity``(x, t), for times t > u that differ per sample, [B] each.

    ``heun`` (arXiv 2303.01469, section 4: two calls, local error of order 3) or ``euler`` (one call, order 2). A teacher that
    predicts x0 has the velocity ``process.convert("x0", x0_hat, x, t, "velocity")``, (x - x0_hat) / t for EDM. The callable
    applies guidance. Heun evaluates the field at u: where it is singular there (EDM at u = 0) the result is not
    finite, unless ``singular`` names that time: steps that end there are then Euler's.

    Raises:
        ValueError: an unknown solver, or integer times.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: found {solver!r}, expected one of {list(SOLVERS)}")
    _check_continuous(t, u)
    x = at_least_float32(x)
    step, one = u - t, torch.ones_like(t)
    slope = velocity(x, t)
    ahead = combine(one, x, step, slope).to(x.dtype)
    if solver == "euler":
        return ahead
    ends = torch.zeros_like(u, dtype=torch.bool) if singular is None else u <= singular
    again = velocity(
        ahead, torch.where(ends, t, u)
    )  # in the place of a singular end: at t, and that value is discarded
    corrected = combine(one, x, step / 2, at_least_float32(slope) + at_least_float32(again)).to(x.dtype)
    return torch.where(expand(ends, x), ahead, corrected)


@torch.no_grad()
def masked_target(f: Field, x_r: Tensor, r: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """f(x_r, r) [B, *S] where r > 0, the clean data x0 [B, *S] where r <= 0; r and t [B] (arXiv 2406.14548).

    The network is called on the whole batch once; in the place of r <= 0, where noise embeddings such as ln r end, it is
    called at t, and that value is discarded.

    Raises:
        ValueError: integer times, or f(x_r, r) and x0 differ in shape.
    """
    _check_continuous(t, r)
    noisy = r > 0
    out = at_least_float32(f(x_r, torch.where(noisy, r, t)))
    if out.shape != x0.shape:
        raise ValueError(f"shapes differ: target {tuple(out.shape)}, x0 {tuple(x0.shape)}")
    return torch.where(expand(noisy, out), out, at_least_float32(x0).to(out.dtype))


def pair_weight(name: str, t: Tensor, r: Tensor, sigma_data: float = 0.5) -> Tensor:
    """Weight [B] of the pair t > r, float64 for float64 times.

    ``default`` 1 / (t - r), of iCT and ECT; ``sqrt`` (t - r)^(-1/2); ``c_out`` 1 / c_out(t), ``c_out_sq`` its square, with
    EDM's c_out; ``sigma_sq`` t^-2; ``one``. Where r = t the first two are infinite.

    Raises:
        ValueError: an unknown name, or integer times.
    """
    _check_continuous(t, r)
    t, r = at_least_float32(t), at_least_float32(r)
    if name == "default":
        return 1 / (t - r)
    if name == "sqrt":
        return (t - r) ** -0.5
    if name == "c_out":
        return 1 / edm_scalings(t, sigma_data).c_out
    if name == "c_out_sq":
        return edm_scalings(t, sigma_data).c_out ** -2
    if name == "sigma_sq":
        return t**-2
    if name == "one":
        return torch.ones_like(t)
    raise ValueError(f"weight: found {name!r}, expected one of {list(PAIR_WEIGHTS)}")


def _check_continuous(*times: Tensor) -> None:
    for t in times:
        if not t.dtype.is_floating_point:
            raise ValueError(
                f"time: found {t.dtype}, but noise levels are continuous; expected a floating dtype"
            )
