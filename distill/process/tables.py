"""Processes that are tables of noise levels, with a time between the entries: the base of all discrete schedules."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from distill.process.base import Process, at_least_float32


class VPTable(Process):
    """A variance-preserving process given at integer indices by ``alphas_cumprod`` = alpha^2.

    t is the FRACTIONAL INDEX into the table, in [0, num_timesteps - 1]. Between integer indices log(alpha / sigma) is
    piecewise linear, and the derivatives are those of that interpolation (the slope on the right at an integer index, on the
    left at the last). Where the last entry is 0 (zero terminal SNR) its log-ratio is -inf, and over the last interval it is
    alpha / sigma itself that falls linearly to 0: exact at both ends, strictly monotone, with finite derivatives, and
    inverted by ``time_of`` in closed form. Times outside the table are clamped into it: a step "to -19" of a diffusers grid
    lands on index 0. Evaluated in float64 from the tables, then cast to the dtype of t (float32 at least).

    Subclasses make the table from a few numbers, which are their config.

    Args:
        alphas_cumprod: [num_timesteps] float64 on the CPU, falling strictly, all in (0, 1) but for a last 0.

    Raises:
        ValueError: a table of fewer than two entries, or one that is no falling sequence in (0, 1).
    """

    t_min = 0.0
    variance_preserving = True
    alphas_cumprod: Tensor
    """alpha^2 at the integer indices, [num_timesteps] float64 on the CPU."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        values = alphas_cumprod.tolist()
        falls = all(above > below for above, below in pairwise(values))
        if not (len(values) > 1 and falls and values[0] < 1 and values[-1] >= 0):
            raise ValueError(
                f"alphas_cumprod must fall strictly inside (0, 1), found {len(values)} entries from {values[:1]} to "
                f"{values[-1:]}"
            )
        self.alphas_cumprod = alphas_cumprod
        self.num_timesteps = len(values)
        self.t_max = float(len(values) - 1)
        self.zero_end = values[-1] == 0
        table = (torch.log(alphas_cumprod) - torch.log1p(-alphas_cumprod)) / 2
        self._tables = {table.device: table}

    def alpha(self, t: Tensor) -> Tensor:
        return self._weight(2 * self._log_ratio(t), t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._weight(-2 * self._log_ratio(t), t)

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = 2 * self._log_ratio(t)
        return self._weight(log_snr, t), self._weight(-log_snr, t)

    @staticmethod
    def _weight(log_snr: Tensor, t: Tensor) -> Tensor:
        """sqrt(sigmoid(log SNR)) = alpha, of -log SNR sigma, in the dtype of t (float32 at least)."""
        return torch.sigmoid(log_snr).sqrt().to(at_least_float32(t).dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        # With q = alpha / sigma: alpha = q / sqrt(1 + q^2), so d alpha / dq = sigma^3 and d sigma / dq = -alpha sigma^2.
        ratio, slope = self._interpolate(t)
        return (torch.sigmoid(-2 * ratio) ** 1.5 * slope).to(at_least_float32(t).dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        ratio, slope = self._interpolate(t)
        alpha = torch.sigmoid(2 * ratio).sqrt()
        return (-alpha * torch.sigmoid(-2 * ratio) * slope).to(at_least_float32(t).dtype)

    def log_ratio(self, t: Tensor) -> Tensor:
        return self._log_ratio(t).to(at_least_float32(t).dtype)

    def time_of(self, log_ratio: Tensor) -> Tensor:
        log_ratio = at_least_float32(log_ratio)
        table = self._table(log_ratio.device)
        wanted = log_ratio.double()
        # The table falls with the index and searchsorted wants it rising.
        index = (torch.searchsorted(-table, -wanted.contiguous()) - 1).clamp(0, self.num_timesteps - 2)
        left = table[index]
        fraction = (wanted - left) / (table[index + 1] - left)
        if self.zero_end:
            fraction = torch.where(index == self.num_timesteps - 2, -torch.expm1(wanted - left), fraction)
        return (index + fraction).clamp(self.t_min, self.t_max).to(log_ratio.dtype)

    def _table(self, device: torch.device) -> Tensor:
        """log(alpha / sigma) at the integer indices, float64 [num_timesteps], copied once to each device."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device, non_blocking=True)
        return self._tables[device]

    def _log_ratio(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), float64 [B]."""
        return self._segment(t)[0]

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(log(alpha / sigma), d(alpha / sigma) / dt), float64 [B] each."""
        ratio, slope, left, last = self._segment(t)
        falls = torch.exp(ratio) * slope
        return ratio, falls if last is None else torch.where(last, -torch.exp(left), falls)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(log(alpha / sigma), its slope, its value at the index below, whether that starts the last interval of a table that
        ends in 0), [B] each."""
        table = self._table(t.device)
        t = t.double().clamp(self.t_min, self.t_max)
        index = t.long().clamp_(max=self.num_timesteps - 2)  # t >= 0: rounds down
        left = table[index]
        slope = table[index + 1] - left
        if not self.zero_end:
            return left + (t - index) * slope, slope, left, None
        # t_max - t is the part of the last interval that is left; it is exact and 0 at the end.
        last = index == self.num_timesteps - 2
        slope = slope.masked_fill(last, 0.0)
        remaining = torch.where(last, self.t_max - t, torch.ones_like(t))
        return left + (t - index) * slope + torch.log(remaining), slope, left, last


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """alpha moved and scaled so that the first entry stays and the last is exactly 0 (arXiv 2305.08891, Algorithm 1).

    [T] alpha^2 -> [T] alpha^2, float64.
    """
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def from_betas(betas: Tensor) -> Tensor:
    """[T] noise rates beta -> [T] alpha^2 = cumprod(1 - beta)."""
    return torch.cumprod(1 - betas, 0)
