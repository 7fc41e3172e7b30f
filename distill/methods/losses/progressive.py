"""Targets and losses of progressive and guided distillation (arXiv 2202.00512, 2210.03142): pure functions.

A student of N steps learns to do in one DDIM step u -> s what its teacher does in two, u -> m -> s. Time is this package's
(0 = data), as in the papers. All of a target is computed without gradients, outside autocast and in at least float32.

Deviations: the reference lands the last step on sigma(0) = 4.5e-5 and replaces its target by the teacher's second x0; here the
last step lands on clean data (``StudentGrid.clean_end``), where the formula gives that second x0 by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.methods.losses.distances import l2
from distill.models.guidance import guide
from distill.process.base import Process, at_least_float32, combine, expand
from distill.process.edm import EDM
from distill.process.guidance_w import scale_of_w
from distill.samplers.ode import Field, ddim_step

# An eps student divides by alpha at its noisiest step, so few steps leave it no accuracy (arXiv 2202.00512, section 4).
_MIN_EPS_STEPS = 9


class Target(NamedTuple):
    """Data and noise [B, *S] with x_t = alpha x0 + sigma eps; ``process.target(kind, *pair, t)`` gives every other kind."""

    x0: Tensor
    eps: Tensor


class TwoSteps(NamedTuple):
    """What ``two_step_target`` returns: the student's target and the teacher's path to it, [B, *S] each."""

    target: Target
    first: Target
    z_m: Tensor
    second: Target
    z_s: Tensor


class StudentStep(NamedTuple):
    """Times [B] of one student step u -> s over the teacher's u -> m -> s; where ``clean`` (bool [B]), s means clean data."""

    u: Tensor
    m: Tensor
    s: Tensor
    clean: Tensor


class StudentGrid:
    """The N steps of a student on the 2N steps of its teacher: step i goes from teacher time 2(N-i)-2 to 2(N-i), i = 0 last.

    Args:
        process: the process of both.
        times: the teacher's grid [2N + 1], descending, float64: ``uniform_grid`` for the paper's u_i = (i + 1) / N,
            ``student_grid`` for a table.
        clean_end: whether the last step lands on clean data (alpha = 1, sigma = 0) whatever the process holds at
            ``times[-1]``, i.e. returns x0 as the paper's sampler does.

    Raises:
        ValueError: an even number of times, fewer than 3, times that do not descend or leave the process's range.
    """

    def __init__(self, process: Process, times: Tensor, clean_end: bool = True) -> None:
        if times.dim() != 1 or len(times) < 3 or len(times) % 2 == 0:
            raise ValueError(
                f"times: found the shape {tuple(times.shape)}, expected the teacher's 2N + 1 times for N >= 1 student steps"
            )
        times = times.detach().double()
        if not bool((times.diff() < 0).all()):
            raise ValueError(f"times: found {times.tolist()}, expected descending times")
        if not process.t_min <= float(times[-1]) or not float(times[0]) <= process.t_max:
            raise ValueError(
                f"times: found {float(times[-1])} .. {float(times[0])}, expected times of {process!r}: "
                f"{process.t_min} .. {process.t_max}"
            )
        self.process, self.times, self.clean_end = process, times, clean_end
        self._on = {times.device: times}

    @property
    def steps(self) -> int:
        """N, the student's number of steps."""
        return len(self.times) // 2

    def step(self, index: Tensor) -> StudentStep:
        """Times of the steps ``index`` (integers [B] in 0 .. N-1; N-1 starts from noise), on the device of ``index``."""
        if index.device not in self._on:
            self._on[index.device] = self.times.to(index.device, non_blocking=True)
        times = self._on[index.device]
        start = 2 * (self.steps - 1 - index)
        # index_select, unlike [], refuses an index that would wrap around.
        u, m, s = (times.index_select(0, start + k) for k in range(3))
        clean = (index == 0) if self.clean_end else torch.zeros_like(index, dtype=torch.bool)
        return StudentStep(u, m, s, clean)


@torch.no_grad()
def two_step_target(predict: Field, process: Process, kind: str, z: Tensor, step: StudentStep) -> TwoSteps:
    """The target of a student step from z [B, *S] at ``step.u``: two DDIM steps of the teacher, seen as one.

    ``predict(x, t)`` is the frozen teacher (guided or not), its output of ``kind``. The target pair (x0, eps) is the one
    whose single DDIM step u -> s lands on z_s (arXiv 2202.00512, algorithm 2). It is computed as a weighted mean of the two
    predictions: on a variance-preserving process in angles phi = atan2(sigma, alpha), with d1 = phi_u - phi_m and d2 = phi_m
    - phi_s (phi_s = 0 where clean),

        v = [sin d1 cos d2 v1 + sin d2 v2 - sin d1 sin d2 z] / sin(d1 + d2),

    elsewhere in the coordinates of the straight flow with the same signal-to-noise ratios. The paper's division
    (``landing_x0``) is the same number but loses a factor of about 1 / (d1 + d2) to rounding.

    Raises:
        ValueError: an unknown kind, or half-precision z or predictions.
    """
    process.check_kind(kind)
    with torch.autocast(z.device.type, enabled=False):
        x = _precise("z", z)
        u, m, s = step.u, step.m, step.s
        out1 = _precise("the teacher's prediction", predict(x, u))
        x1, eps1, z_m = ddim_step(process, kind, out1, x, u, m)
        out2 = _precise("the teacher's prediction", predict(z_m, m))
        x2, eps2, z_s = ddim_step(process, kind, out2, z_m, m, s)
        if process.variance_preserving:
            v1, v2 = process.convert(kind, out1, x, u, "v"), process.convert(kind, out2, z_m, m, "v")
            target = _by_angles(process, x, v1, v2, step)
        else:
            target = _by_straight_path(process, x, eps1 - x1, eps2 - x2, step)
        z_s = torch.where(expand(step.clean, z_s), x2, z_s)
    return TwoSteps(target, Target(x1, eps1), z_m, Target(x2, eps2), z_s)


def _by_angles(process: Process, z: Tensor, v1: Tensor, v2: Tensor, step: StudentStep) -> Target:
    """The target from the two v, by arcs of the circle that DDIM turns on."""

    def angle(t: Tensor) -> Tensor:
        t = t.double()
        return torch.atan2(process.sigma(t), process.alpha(t))

    at_u, at_m = angle(step.u), angle(step.m)
    at_s = torch.where(step.clean, 0.0, angle(step.s))
    d1, d2 = at_u - at_m, at_m - at_s
    whole = torch.sin(d1 + d2)
    v = combine(torch.sin(d1) * torch.cos(d2) / whole, v1, torch.sin(d2) / whole, v2)
    v = combine(torch.ones_like(whole), v, -torch.sin(d1) * torch.sin(d2) / whole, z)
    return Target(combine(at_u.cos(), z, -at_u.sin(), v), combine(at_u.sin(), z, at_u.cos(), v))


def _by_straight_path(process: Process, z: Tensor, w1: Tensor, w2: Tensor, step: StudentStep) -> Target:
    """The target from the two eps - x0, where DDIM is Euler: in y = z / (alpha + sigma), tau = sigma / (alpha + sigma)."""

    def place(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha(t.double()), process.sigma(t.double())
        return sigma / (alpha + sigma), 1 / (alpha + sigma)

    (tau_u, scale), (tau_m, _), (tau_s, _) = place(step.u), place(step.m), place(step.s)
    tau_s = torch.where(step.clean, 0.0, tau_s)
    velocity = combine((tau_u - tau_m) / (tau_u - tau_s), w1, (tau_m - tau_s) / (tau_u - tau_s), w2)
    return Target(combine(scale, z, -tau_u, velocity), combine(scale, z, 1 - tau_u, velocity))


def landing_x0(process: Process, z_u: Tensor, z_s: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """The x0 [B, *S] whose DDIM step u -> s takes z_u to z_s: (z_s - r z_u) / (alpha_s - r alpha_u), r = sigma_s / sigma_u.

    arXiv 2202.00512, algorithm 2, as printed: a check of ``two_step_target``, which is exact where this one cancels.
    """
    ratio = process.sigma(s) / process.sigma(u)
    over = 1 / (process.alpha(s) - ratio * process.alpha(u))
    return combine(over, z_s, -ratio * over, z_u)


@torch.no_grad()
def guided_target(
    process: Process,
    kind: str,
    cond: Tensor,
    uncond: Tensor,
    z: Tensor,
    u: Tensor,
    guidance_w: float | Tensor,
    clip: float | None = None,
) -> Target:
    """Stage 1 of guided distillation: x^w = (1 + w) x_cond - w x_uncond and its noise (arXiv 2210.03142, section 3.1).

    cond, uncond: the teacher's two predictions of ``kind`` at (z, u), [B, *S]; ``guidance_w`` is w = guidance_scale - 1, a
    float or [B], 0 for the conditional prediction alone. ``clip`` clamps x^w to [-clip, clip] and recomputes the noise.

    Raises:
        ValueError: an unknown kind, half-precision inputs, shapes that differ, or a ``clip`` that is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: found {clip}, expected a positive number or None")
    with torch.autocast(z.device.type, enabled=False):
        x, cond, uncond = _precise("z", z), _precise("cond", cond), _precise("uncond", uncond)
        out = guide(uncond, cond, scale_of_w(guidance_w))
        x0, eps = process.x0_and_eps(kind, out, x, u)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
            eps = process.convert("x0", x0, x, u, "eps")
    return Target(x0, eps)


_Weight = Callable[[Tensor], Tensor]


def _floor_exp(x: Tensor) -> Tensor:
    """max(exp(x), 1), finite where exp(-x) overflows."""
    return torch.exp(x.clamp(min=0))


# Weight on the squared error of each kind from log SNR: one loss in three coordinates (eps: / SNR, v: / (1 + SNR)).
_WEIGHTS: dict[str, dict[str, _Weight]] = {
    "constant": {
        "x0": torch.ones_like,
        "eps": lambda log_snr: torch.exp(-log_snr),
        "v": lambda log_snr: torch.sigmoid(-log_snr),
    },
    "snr": {"x0": torch.exp, "eps": torch.ones_like, "v": torch.sigmoid},
    "snr_trunc": {
        "x0": _floor_exp,
        "eps": lambda log_snr: _floor_exp(-log_snr),
        "v": lambda log_snr: torch.sigmoid(log_snr.abs()),
    },
    "snr+1": {
        "x0": lambda log_snr: 1 + torch.exp(log_snr),
        "eps": lambda log_snr: 1 + torch.exp(-log_snr),
        "v": torch.ones_like,
    },
}


def snr_weight(name: str, kind: str, log_snr: Tensor) -> Tensor:
    """Weight [B] on the squared error of ``kind`` (x0, eps or v) that weighs the x0 error by w(SNR); log_snr = 2 log_ratio.

    ``constant`` w = 1; ``snr`` w = SNR (mean square of eps); ``snr_trunc`` w = max(SNR, 1), the paper's default; ``snr+1``
    w = SNR + 1 (mean square of v). arXiv 2202.00512, section 4.

    Raises:
        ValueError: an unknown name, or another kind.
    """
    if name not in _WEIGHTS:
        raise ValueError(f"weight: found {name!r}, expected one of {list(_WEIGHTS)}")
    if kind not in _WEIGHTS[name]:
        raise ValueError(f"kind: found {kind!r}, expected one of {list(_WEIGHTS[name])}")
    return _WEIGHTS[name][kind](at_least_float32(log_snr))


def progressive_loss(
    process: Process, kind: str, out: Tensor, target: Target, z: Tensor, u: Tensor, weight: str = "snr_trunc"
) -> Tensor:
    """w(SNR) mean |x0_hat - x0~|^2 per sample, [B], for the student's prediction ``out`` of ``kind`` at (z, u), [B, *S].

    The error is taken in the student's own kind with the weight of that kind (kinds other than x0, eps and v as x0), so that
    nothing is divided by a small alpha or sigma. Gradients reach ``out`` alone; the caller averages over the batch.

    Raises:
        ValueError: an unknown kind or weight, or shapes that differ.
    """
    process.check_kind(kind)
    out = at_least_float32(out)
    if kind not in ("x0", "eps", "v"):
        kind, out = "x0", process.convert(kind, out, z, u, "x0")
    error = l2(out, process.target(kind, target.x0, target.eps, u))
    return snr_weight(weight, kind, 2 * process.log_ratio(u)).to(error.dtype) * error


def check_student(process: Process, kind: str, steps: int, weight: str = "snr_trunc") -> None:
    """Refuse a student that cannot work, warn about one that learns nothing somewhere. For use while a method is built.

    Raises:
        ValueError: an unknown kind or weight; fewer than 1 step; an ``eps`` student with 8 steps or fewer, or where no
        signal is left at t_max.
    """
    process.check_kind(kind)
    snr_weight(weight, "x0", torch.zeros(1))
    if steps < 1:
        raise ValueError(f"steps: found {steps}, expected at least 1")
    no_signal = float(process.alpha(torch.tensor([process.t_max], dtype=torch.float64))) == 0
    noise = kind in ("eps", "score") or (
        kind == "velocity" and isinstance(process, EDM)
    )  # EDM's velocity is eps
    if noise and (steps < _MIN_EPS_STEPS or no_signal):
        reason = "nothing of the data is left at t_max" if no_signal else f"it has {steps} steps"
        raise ValueError(
            f"kind: found {kind!r}, but the student divides by alpha and {reason}; expected 'v' or 'x0' (fine-tune an eps "
            "teacher to one of them first)"
        )
    if weight == "snr" and no_signal:
        warnings.warn(
            f"weight: 'snr' is zero at t_max of {process!r}, which learns nothing there", stacklevel=2
        )


def _precise(name: str, x: Tensor) -> Tensor:
    """x, or ValueError: targets amplify the rounding of half precision."""
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: found {x.dtype}, expected float32 or float64 in a distillation target")
    return x
