"""Noising processes x_t = alpha(t) x0 + sigma(t) eps, and every conversion between predictions, written once.

Time runs from data to noise everywhere in this package: t = 0 is data and larger is noisier. Rectified flow,
InstaFlow, flow_matching and torchcfm use the opposite direction (tau = 1 - t, velocity = data - noise).

A process is four functions of time (alpha, sigma and their derivatives) and a range. The conversions follow:
each kind of prediction is a fixed combination ``out = p x0 + q eps`` and the state is another, ``x_t = alpha
x0 + sigma eps``; solving the two for (x0, eps) gives any further combination (p2, q2) as

    out2 = [(p2 q - q2 p) x_t + (alpha q2 - sigma p2) out] / (alpha q - sigma p).

============  =========  =========  ==========================================================
kind          p          q          note
============  =========  =========  ==========================================================
``x0``        1          0
``eps``       0          1
``v``         -sigma     alpha      only where alpha^2 + sigma^2 = 1 (arXiv 2202.00512, app. D)
``velocity``  alpha'     sigma'     dx/dt of the probability-flow ODE (arXiv 2011.13456, eq. 13)
``score``     0          -1/sigma   gradient of log p_t(x_t)
============  =========  =========  ==========================================================

Nothing here reads a value of a tensor on the host, so all of it may stand in a training step.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

KINDS = ("x0", "eps", "v", "velocity", "score")

# Bisection halves [t_min, t_max] this often: past the 53 bits of a float64 mantissa nothing changes any more.
_BISECTIONS = 60


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` unchanged where it is float32 or float64, else (half precisions, integers) as float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def expand(t: Tensor, x: Tensor) -> Tensor:
    """View numbers [B] (or [B, leading sizes of S], one a position) as [B, ..., 1] with the rank of ``x`` [B, *S]; done
    nowhere else.

    Raises:
        ValueError: ``t`` is a scalar, or its shape is not that of the leading dimensions of ``x``.
    """
    if t.dim() < 1 or t.shape != x.shape[: t.dim()]:
        raise ValueError(
            f"per-sample values must be [B] for a tensor [B, *S], or [B, leading sizes of S]: got rank {t.dim()}, shape "
            f"{tuple(t.shape)} for rank {x.dim()}, shape {tuple(x.shape)}"
        )
    return t.reshape(*t.shape, *(1,) * (x.dim() - t.dim()))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """``a x + b y`` for coefficients a, b [B] and tensors x, y [B, *S], in at least float32.

    The result has the wider dtype of x and y; a float64 time makes exact coefficients, not a float64 image.

    Raises:
        ValueError: x and y differ in shape, or a, b do not fit their batch.
    """
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return expand(a.to(dtype), x) * x.to(dtype) + expand(b.to(dtype), y) * y.to(dtype)


class Process(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps, eps ~ N(0, I); t [B] in [t_min, t_max], 0 is data, larger is noisier.

    A subclass gives alpha, sigma, their derivatives and the range; it may replace ``log_ratio`` and
    ``time_of`` by closed forms. alpha / sigma must fall strictly with t. It keeps each constructor argument
    as an attribute of the same name, which is all that ``config`` needs. Functions of time return [B] in
    float64 for a float64 t and in float32 for anything narrower (integers included).
    """

    t_min: float
    t_max: float
    variance_preserving: bool = False
    """alpha^2 + sigma^2 = 1 at every time: only then does the kind ``v`` exist."""
    regular_end: bool = True
    """Whether velocities are finite at t_min; if not, solvers must not evaluate there."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data, [B] -> [B]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight (standard deviation) of the noise, [B] -> [B]."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt, [B] -> [B]."""

    @abstractmethod
    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt, [B] -> [B]."""

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), [B] each; replaced where the two share work."""
        return self.alpha(t), self.sigma(t)

    # ---- the order of noise levels ----

    def log_ratio(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), half the log-SNR, [B] -> [B]; infinite where either weight is 0."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def time_of(self, log_ratio: Tensor) -> Tensor:
        """Inverse of ``log_ratio``, [B] -> [B], clamped to [t_min, t_max] (see ``covers``).

        This default bisects, 60 evaluations of ``log_ratio``; subclasses with a closed form replace it.
        """
        log_ratio = at_least_float32(log_ratio)
        low, high = torch.full_like(log_ratio, self.t_min), torch.full_like(log_ratio, self.t_max)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_clean = self.log_ratio(middle) > log_ratio
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return (low + high) / 2

    def covers(self, log_ratio: Tensor) -> Tensor:
        """Boolean [B]: whether ``time_of`` finds this ratio inside [t_min, t_max], i.e. does not clamp it."""
        log_ratio = at_least_float32(log_ratio)
        noisiest = self.log_ratio(torch.full_like(log_ratio, self.t_max))
        cleanest = self.log_ratio(torch.full_like(log_ratio, self.t_min))
        return (noisiest <= log_ratio) & (log_ratio <= cleanest)

    def matching_time(self, other: Process, t: Tensor) -> Tensor:
        """The time [B] of SELF with the signal-to-noise ratio that ``other`` has at its time ``t`` [B].

        To evaluate a VP teacher for a flow student at flow time t, use the teacher's process:
        ``vp.matching_time(flow, t)``. Clamped like ``time_of``.
        """
        return self.time_of(other.log_ratio(t))

    def matching_scale(self, other: Process, t: Tensor) -> Tensor:
        """The factor c [B] with x_self = c x_other between the matched states of ``matching_time(other, t)``.

        Equals alpha_self / alpha_other = sigma_self / sigma_other; taken as a ratio of sums it stays finite
        at both ends, and where the time was clamped it uses self's own end weights throughout.
        """
        mine = self.matching_time(other, t)
        return (self.alpha(mine) + self.sigma(mine)) / (other.alpha(t) + other.sigma(t))

    # ---- states and predictions ----

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, [B, *S], in at least float32."""
        alpha, sigma = self.weights(t)
        return combine(alpha, x0, sigma, eps)

    def prior(self, z: Tensor) -> Tensor:
        """The state at t_max from z ~ N(0, I), [B, *S].

        It is z itself here: sigma(t_max) is one for a flow and one up to the remaining signal for the
        variance-preserving processes, whose marginal keeps unit variance. A variance-exploding process
        replaces this.
        """
        return z

    def known_time(self, count: int) -> float:
        """The time at which the first ``count`` positions of a state are data and the others noise.

        Raises:
            ValueError: names ``known``: the process has no such states, or none of so many positions.
        """
        raise ValueError(
            f"known: found {count} known positions, but states of {self!r} are noisy everywhere; expected a model of tokens"
        )

    def target(self, kind: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What a perfect prediction of ``kind`` would be given the data and the noise, [B, *S], p x0 + q eps.

        Raises:
            ValueError: unknown kind, or ``v`` on a process that does not preserve variance.
        """
        self.check_kind(kind)
        if kind == "score":
            return combine(torch.zeros_like(at_least_float32(t)), x0, -1 / self.sigma(t), eps)
        p, q = self._parts(kind, t, *self.weights(t))
        return combine(p, x0, q, eps)

    def convert(self, kind_from: str, out: Tensor, x_t: Tensor, t: Tensor, kind_to: str) -> Tensor:
        """Turn the prediction ``out`` [B, *S], made at (x_t, t), into another kind; see the module's table.

        Affine in ``out`` with coefficients that depend on t alone, so guidance commutes with it. Coefficients
        are float64 where t is, else float32; half-precision inputs are promoted to float32. Asking for the
        kind that ``out`` already is returns it untouched. Singular only where the prediction carries no
        information: ``eps`` where alpha = 0, ``x0`` or ``score`` out of sigma = 0.

        Raises:
            ValueError: unknown kind, ``v`` on a process that does not preserve variance, or shapes that
            differ.
        """
        self.check_kind(kind_from)
        self.check_kind(kind_to)
        if kind_from == kind_to:
            return out
        if kind_from == "score":
            # Through eps: finite where sigma = 0 and, unlike the general formula, where alpha = 0.
            kind_from, out = "eps", _scale(-self.sigma(t), out)
        through = "eps" if kind_to == "score" else kind_to
        if kind_from != through:
            (out,) = self._solve(kind_from, out, x_t, t, through)
        return _scale(-1 / self.sigma(t), out) if kind_to == "score" else out

    def x0_and_eps(self, kind: str, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Both conversions of ``convert``, to "x0" and to "eps", of one prediction: (x0, eps), [B, *S] each."""
        if kind not in ("v", "velocity"):
            return self.convert(kind, out, x_t, t, "x0"), self.convert(kind, out, x_t, t, "eps")
        self.check_kind(kind)
        x0, eps = self._solve(kind, out, x_t, t, "x0", "eps")
        return x0, eps

    def config(self) -> dict[str, Any]:
        """``{"_target_": import path, **constructor arguments}``, JSON-able; enough to build it again."""
        kind = type(self)
        arguments = {name: getattr(self, name) for name in inspect.signature(kind).parameters}
        return {"_target_": f"{kind.__module__}.{kind.__qualname__}", **arguments}

    def __repr__(self) -> str:
        _, *arguments = self.config().items()
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments)})"

    def _solve(self, kind_from: str, out: Tensor, x_t: Tensor, t: Tensor, *kinds_to: str) -> list[Tensor]:
        """The formula of the module's docstring, for every kind of ``kinds_to``."""
        alpha, sigma = self.weights(t)
        p, q = self._parts(kind_from, t, alpha, sigma)
        det = alpha * q - sigma * p
        found = []
        for kind_to in kinds_to:
            p2, q2 = self._parts(kind_to, t, alpha, sigma)
            found.append(combine((p2 * q - q2 * p) / det, x_t, (alpha * q2 - sigma * p2) / det, out))
        return found

    def _parts(self, kind: str, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) [B] each, with prediction = p x0 + q eps; ``score`` never comes here."""
        if kind == "v":
            return -sigma, alpha
        if kind == "velocity":
            return self.d_alpha(t), self.d_sigma(t)
        zero, one = torch.zeros_like(at_least_float32(t)), torch.ones_like(at_least_float32(t))
        return (one, zero) if kind == "x0" else (zero, one)

    def check_kind(self, kind: str) -> None:
        """Raise ValueError for a kind that does not exist, or not under this process."""
        if kind not in KINDS:
            raise ValueError(f"unknown prediction kind {kind!r}; kinds are {', '.join(KINDS)}")
        if kind == "v" and not self.variance_preserving:
            raise ValueError(
                f"kind 'v' needs alpha^2 + sigma^2 = 1, which {type(self).__name__} does not keep"
            )


def _scale(a: Tensor, x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return expand(a.to(dtype), x) * x.to(dtype)
