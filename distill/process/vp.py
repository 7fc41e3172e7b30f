"""Variance-preserving processes, continuous and tabulated: alpha^2 + sigma^2 = 1, so ``v`` = alpha eps - sigma x0 exists."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill.process.base import Process, at_least_float32
from distill.process.tables import VPTable, from_betas, zero_terminal_snr

MAX_TIMESTEPS = 100_000
"""The longest table: usual ones have 1000 entries; a limit for tables that are described by a file."""


class VPCosine(Process):
    """Cosine schedule with the log-SNR clipped to +-logsnr_max (arXiv 2202.00512), t in [0, 1].

    alpha = cos(phi), sigma = sin(phi), phi = a t + b, b = atan(exp(-logsnr_max / 2)), a = pi/2 - 2b. Even t =
    0 keeps a trace of noise (sigma = 4.5e-5 at the default). Not the beta-clipped cosine of iDDPM (arXiv
    2102.09672).
    """

    t_min = 0.0
    t_max = 1.0
    variance_preserving = True

    def __init__(self, logsnr_max: float = 20.0) -> None:
        if not logsnr_max > 0:
            raise ValueError(f"logsnr_max must be positive, got {logsnr_max}")
        self.logsnr_max = logsnr_max
        self._b = math.atan(math.exp(-logsnr_max / 2))
        self._a = math.pi / 2 - 2 * self._b

    def alpha(self, t: Tensor) -> Tensor:
        # cos(a t + b) as a sine: near t = 1 it keeps the relative accuracy that a float32 cosine loses.
        return torch.sin(self._a * (1 - at_least_float32(t)) + self._b)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(self._a * at_least_float32(t) + self._b)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self._a * self.sigma(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self._a * self.alpha(t)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        phi = torch.atan(torch.exp(-at_least_float32(log_ratio)))
        return ((phi - self._b) / self._a).clamp(self.t_min, self.t_max)


class VPLinear(Process):
    """Continuous VP, linear beta (arXiv 2011.13456, appendix C): d log alpha / dt = -beta / 2, t in [0, 1].

    beta(t) = beta_min + t (beta_max - beta_min). At t = 0 the state is clean and d_sigma is infinite: start
    time samplers above 0 where velocities are evaluated, and end an ODE there with a step that does not
    evaluate t = 0.
    """

    t_min = 0.0
    t_max = 1.0
    variance_preserving = True
    regular_end = False

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min = beta_min
        self.beta_max = beta_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return -t * (t * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def _d_log_alpha(self, t: Tensor) -> Tensor:
        return -(self.beta_min + at_least_float32(t) * (self.beta_max - self.beta_min)) / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self._d_log_alpha(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.d_alpha(t) / self.sigma(t)

    def log_ratio(self, t: Tensor) -> Tensor:
        log_alpha = self._log_alpha(t)
        return log_alpha - torch.log(-torch.expm1(2 * log_alpha)) / 2

    def time_of(self, log_ratio: Tensor) -> Tensor:
        # c = -2 log alpha is the integral of beta: solve t^2 (beta_max - beta_min) / 2 + t beta_min = c,
        # in the form without cancellation for small c.
        c = softplus(-2 * at_least_float32(log_ratio))
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * c)
        # A ratio of -inf makes c infinite and the quotient inf / inf, so the end is chosen, not clamped to.
        full = (self.beta_min + self.beta_max) / 2
        return torch.where(c < full, 2 * c / (self.beta_min + root), self.t_max)


class VPScaledLinear(VPTable):
    """Stable Diffusion's table: sqrt(beta) equally spaced, alpha^2 = cumprod(1 - beta); t is a fractional index.

    Index 0 is not clean (alpha^2 = 0.99915 for SD 1.5) and the last is not pure noise (0.0047), unless
    ``zero_terminal_snr`` rescales the table so that it is (arXiv 2305.08891; diffusers' ``rescale_betas_zero_snr``), where
    x0 cannot be computed from predicted noise. Between the indices: ``VPTable``.

    Raises:
        ValueError: not 0 < beta_start <= beta_end < 1, or fewer than two timesteps.
    """

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        self.beta_start, self.beta_end, self.zero_terminal_snr = beta_start, beta_end, zero_terminal_snr
        betas = _linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
        super().__init__(_table(betas, zero_terminal_snr))


class VPLinearBetas(VPTable):
    """DDPM's table (arXiv 2006.11239): beta equally spaced, alpha^2 = cumprod(1 - beta); t is a fractional index.

    ``zero_terminal_snr`` as in ``VPScaledLinear``. ``VPLinear`` is the continuous process of linear beta.

    Raises:
        ValueError: not 0 < beta_start <= beta_end < 1, or fewer than two timesteps.
    """

    def __init__(
        self,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_timesteps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> None:
        _check_betas(beta_start, beta_end, num_timesteps)
        self.beta_start, self.beta_end, self.zero_terminal_snr = beta_start, beta_end, zero_terminal_snr
        super().__init__(_table(_linspace(beta_start, beta_end, num_timesteps), zero_terminal_snr))


class VPCosineIDDPM(VPTable):
    """iDDPM's cosine table (arXiv 2102.09672, eq. 17), ``cosine_iddpm``; t is a fractional index.

    beta_i = min(1 - f((i + 1) / T) / f(i / T), max_beta), f(u) = cos^2(pi/2 (u + s) / (1 + s)), alpha^2 = cumprod(1 - beta).
    The clip acts on the last entries alone: those of T / 2 are every second of T but for the last. Not the cosine of
    ``VPCosine``, whose log-SNR is clipped.

    Raises:
        ValueError: s is not positive, max_beta is outside (0, 1), or fewer than two timesteps.
    """

    def __init__(self, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> None:
        _check_timesteps(num_timesteps)
        if not s > 0:
            raise ValueError(f"s must be positive, got {s}")
        if not 0 < max_beta < 1:
            raise ValueError(f"max_beta must lie in (0, 1), got {max_beta}")
        self.s, self.max_beta = s, max_beta
        edges = _linspace(0.0, 1.0, num_timesteps + 1)
        f = torch.cos(math.pi / 2 * (edges + s) / (1 + s)) ** 2
        super().__init__(from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta)))


class VPLinearTable(VPTable):
    """``VPLinear`` at the times (i + 1) / T as a table of T entries (ProDiff's "vpsde", arXiv 2207.06389).

    beta_i = 1 - exp(-beta_min / T - (beta_max - beta_min) (2 i + 1) / (2 T^2)), i = 0..T-1; t is the fractional index, so
    t = 0 is the time 1 / T of ``VPLinear``, not clean data.

    Raises:
        ValueError: not 0 < beta_min <= beta_max, or fewer than two timesteps.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 40.0, num_timesteps: int = 5) -> None:
        _check_timesteps(num_timesteps)
        continuous = VPLinear(beta_min, beta_max)
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__(continuous.alpha(_linspace(0.0, 1.0, num_timesteps + 1)[1:]) ** 2)


def _linspace(first: float, last: float, count: int) -> Tensor:
    # The device is named because models are often built inside `with torch.device("meta")`.
    return torch.linspace(first, last, count, dtype=torch.float64, device="cpu")


def _table(betas: Tensor, zero_end: bool) -> Tensor:
    return zero_terminal_snr(from_betas(betas)) if zero_end else from_betas(betas)


def _check_betas(beta_start: float, beta_end: float, num_timesteps: int) -> None:
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
    _check_timesteps(num_timesteps)


def _check_timesteps(num_timesteps: int) -> None:
    if not 2 <= num_timesteps <= MAX_TIMESTEPS:
        raise ValueError(f"num_timesteps must be at least 2 and at most {MAX_TIMESTEPS}, got {num_timesteps}")
