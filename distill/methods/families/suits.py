"""Checks of a method when it is built: processes and kinds of prediction that its formula allows, options without effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from distill.models.denoiser import Denoiser
from distill.process.base import Process
from distill.process.edm import EDM

# Stable Diffusion's first step, 14.6, and EDM's 80 work.
LARGEST_FACTOR = 100.0


def error_factor(process: Process, kind: str, target: str, t: Tensor) -> Tensor:
    """Factor on the error of a prediction of `kind` when it is converted to `target`, at times t [B] (float64): the derivative
    of `Process.convert` times the size sqrt(p^2 + q^2) of the prediction. Infinite where the conversion does not exist.

    For `target` = "x0": 1 of x0, sigma of v and of a flow's velocity, sigma / alpha of eps."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = _parts(process, kind, t)
    p2, q2 = _parts(process, target, t)
    across = (alpha * q - sigma * p) / torch.sqrt(p.square() + q.square())
    if kind == target:
        return torch.sqrt(p.square() + q.square())
    return ((alpha * q2 - sigma * p2) / across).abs()


def _parts(process: Process, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    p, q = process.target(kind, one, zero, t)[:, 0], process.target(kind, zero, one, t)[:, 0]
    if kind == "score":  # alpha 0 and sigma 0: the parts are 0 and -1 / sigma
        return torch.zeros_like(q), q
    return p, q


def check_start(process: Process, kind: str, t: float) -> float:
    """Refuse a student whose predicted x0 is mostly its own error at the start of its first step. Returns the factor on that
    error.

    Raises:
        ValueError: names `kind`.
    """
    factor = float(error_factor(process, kind, "x0", torch.tensor([t], dtype=torch.float64, device="cpu")))
    if not factor <= LARGEST_FACTOR:
        raise ValueError(
            f"kind: found {kind!r}, but under {process!r} it multiplies its error by {factor:.4g} to predict x0 at the "
            f"first step, t = {t:g}; expected at most {LARGEST_FACTOR:g}: a student that predicts {_others(process)}"
        )
    return factor


def check_clean_end(
    process: Process,
    kind: str,
    target: str,
    weight: Callable[[Tensor], Tensor] = torch.ones_like,
    what: str = "kind",
) -> None:
    """Refuse a loss weight(t) |error in `target`|^2 of a net of `kind`, at uniform times down to t_min, whose weight on the
    net's own error is unbounded there: its variance is infinite, and single samples near t_min dominate the steps.

    Raises:
        ValueError: names `what`.
    """
    span = process.t_max - process.t_min
    t = process.t_min + span * torch.tensor([1e-6, 1e-12], dtype=torch.float64, device="cpu")
    near, nearer = (weight(t) * error_factor(process, kind, target, t).square()).tolist()
    if not nearer < 1000 * near:
        raise ValueError(
            f"{what}: under {process!r} this loss weighs the error of a net that predicts {kind!r} without bound towards the "
            f"clean end, t = {process.t_min:g}; expected another weight, later times, or a net that predicts {_others(process)}"
        )


def check_asked(process: Process, kind: str, times: Tensor) -> None:
    """Refuse a net whose x0 does not exist at one of the times [N] at which it is evaluated.

    Raises:
        ValueError: names `kind`.
    """
    factors = error_factor(process, kind, "x0", times.double().cpu())
    if not bool(factors.isfinite().all()):
        t = float(times.double().cpu()[~factors.isfinite()][0])
        raise ValueError(
            f"kind: found {kind!r}, but under {process!r} x0 cannot be computed from it at t = {t:g}; expected a net that "
            f"predicts {_others(process)}"
        )


def step_factors(process: Process, kind: str, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Factors by which one step between neighbours of falling times [N] multiplies the error of a teacher of `kind`, in units
    of the state: [N - 1] for an evaluation at the start of the step, and at its end (Heun's second call)."""
    times = levels.double().cpu()
    size = torch.hypot(process.alpha(times), process.sigma(times))
    factors = error_factor(process, kind, "velocity", times) / size
    step = -times.diff()
    return step * factors[:-1], step / 2 * factors[1:]


def check_own_clock(process: Process, what: str, found: str, instead: str) -> None:
    """Refuse times that are uniform in the process's own time where that time is the noise level itself: 97 % of 0 .. 80 lie
    above 2.5, where hardly any data is left.

    Raises:
        ValueError: names `what`.
    """
    if isinstance(process, EDM):
        raise ValueError(
            f"{what}: found {found} under {process!r}, whose time is the noise level, nearly all of it noise; "
            f"expected {instead}"
        )


def _others(process: Process) -> str:
    return (
        "x0 or v" if process.variance_preserving else "x0" if isinstance(process, EDM) else "velocity or x0"
    )


def guides(teacher: Denoiser) -> bool:
    """Whether guidance of a teacher changes anything: it was trained with a null condition, and has others."""
    return teacher.guidable and teacher.conditions.has_null


def refuse_unused(method: object, given: Mapping[str, Any], because: str) -> None:
    """Refuse options that change nothing, where they are not the defaults of the method's constructor.

    Raises:
        ValueError: names the option.
    """
    known = inspect.signature(type(method)).parameters
    for name, value in given.items():
        default = known[name].default if name in known else value
        if value != default:
            raise ValueError(
                f"{name}: found {value!r}, which changes nothing {because}; expected {default!r}"
            )


def refuse_idle(options: Any, names: Sequence[str], where: str, because: str) -> None:
    """Refuse fields of a dataclass instance that change nothing, where they are not its defaults.

    Raises:
        ValueError: names the option, `where.name`.
    """
    for field in fields(options):
        if field.name in names and (value := getattr(options, field.name)) != field.default:
            raise ValueError(
                f"{where}.{field.name}: found {value!r}, which changes nothing {because}; expected {field.default!r}"
            )


def check_null_prob(method: object, null_prob: float, student: Denoiser) -> None:
    """Refuse a share of dropped conditions outside [0, 1), or one for a net without conditions.

    Raises:
        ValueError: names `null_prob`.
    """
    if not 0 <= null_prob < 1:
        raise ValueError(f"null_prob: expected a probability in [0, 1), found {null_prob}")
    if not student.conditions.has_null and null_prob != 0:
        refuse_unused(method, {"null_prob": null_prob}, "for a net without classes")
