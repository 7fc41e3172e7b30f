"""Variance-preserving processes: alpha^2 + sigma^2 = 1, so kind ``v`` = alpha eps - sigma x0 exists."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distill.process.base import Process, at_least_float32


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
    time samplers above 0 where a velocity is asked for, and end an ODE there with a step that does not
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


class VPScaledLinear(Process):
    """Stable Diffusion's table: sqrt(beta) equally spaced, alpha^2 = cumprod(1 - beta).

    t is the FRACTIONAL INDEX into the table, in [0, num_timesteps - 1]; index 0 is not clean (alpha^2 =
    0.99915 for SD 1.5) and the last is not pure noise (0.0047). Between integer indices log(alpha / sigma) is
    piecewise linear, and the derivatives are those of that interpolation (the slope on the right at an
    integer index, on the left at the last). Times outside the table are clamped into it: a step "to -19" of a
    diffusers grid lands on index 0. Evaluated in float64 from the tables, then cast to the dtype of t
    (float32 at least).
    """

    t_min = 0.0
    variance_preserving = True

    def __init__(
        self, beta_start: float = 0.00085, beta_end: float = 0.012, num_timesteps: int = 1000
    ) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, got {num_timesteps}")
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.num_timesteps = num_timesteps
        self.t_max = float(num_timesteps - 1)
        # The device is named because models are often built inside `with torch.device("meta")`.
        roots = torch.linspace(
            beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64, device="cpu"
        )
        alphas_cumprod = torch.cumprod(1 - roots**2, 0)
        table = (torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)) / 2
        self._tables = {table.device: table}

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(2 * self._interpolate(t)[0])).to(at_least_float32(t).dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.sigmoid(-2 * self._interpolate(t)[0])).to(at_least_float32(t).dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        ratio, slope = self._interpolate(t)
        square = torch.sigmoid(2 * ratio)  # alpha^2
        return (square.sqrt() * (1 - square) * slope).to(at_least_float32(t).dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        ratio, slope = self._interpolate(t)
        square = torch.sigmoid(-2 * ratio)  # sigma^2
        return (-square.sqrt() * (1 - square) * slope).to(at_least_float32(t).dtype)

    def log_ratio(self, t: Tensor) -> Tensor:
        return self._interpolate(t)[0].to(at_least_float32(t).dtype)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        log_ratio = at_least_float32(log_ratio)
        table = self._table(log_ratio.device)
        wanted = log_ratio.double()
        # The table falls with the index and searchsorted wants it rising.
        index = (torch.searchsorted(-table, -wanted.contiguous()) - 1).clamp(0, self.num_timesteps - 2)
        left, right = table[index], table[index + 1]
        fractional = index + (wanted - left) / (right - left)
        return fractional.clamp(self.t_min, self.t_max).to(log_ratio.dtype)

    def _table(self, device: torch.device) -> Tensor:
        """log(alpha / sigma) at the integer indices, float64 [num_timesteps], copied once to each device."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device, non_blocking=True)
        return self._tables[device]

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log(alpha / sigma), its derivative in t), float64 [B] each."""
        table = self._table(t.device)
        t = t.double().clamp(self.t_min, self.t_max)
        index = t.floor().long().clamp(max=self.num_timesteps - 2)
        left, right = table[index], table[index + 1]
        slope = right - left
        return left + (t - index) * slope, slope
