"""Learning-rate schedules: functions of the optimizer step, without state."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """1 after `warmup` steps of linear rise."""

    warmup: int = 0

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class Linear:
    """Linear rise over `warmup` steps, then linear fall to `final` at `total` steps."""

    total: int
    warmup: int = 0
    final: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return 1.0 + (self.final - 1.0) * done


@dataclass(frozen=True)
class Cosine:
    """Linear rise over `warmup` steps, then half a cosine down to `final` at `total` steps (Loshchilov &
    Hutter 2017)."""

    total: int
    warmup: int = 0
    final: float = 0.05

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + math.cos(math.pi * done))
