"""Steps whose loss or gradient is not finite are skipped and counted, on an accelerator without a host sync."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from distill.world import World

WINDOW = 1000


class NonFinite:
    """Skipped steps of each update: in total, in a row, and since the last multiple of 1000 steps. Tensors on an accelerator,
    to avoid a host sync; numbers on a CPU."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor | int] = {}
        self.streak: dict[str, Tensor | int] = {}
        self.recent: dict[str, Tensor | int] = {}

    def to(self, device: torch.device) -> None:
        """Move the counters."""
        for counters in (self.total, self.streak, self.recent):
            for name, value in counters.items():
                on_cpu = device.type == "cpu"
                counters[name] = int(value) if on_cpu else torch.tensor(float(value), device=device)

    def count(self, update: str, step: int, bad: Tensor | bool) -> None:
        """Count optimizer step `step` (from 0); `bad`: 1 or True if it is skipped."""
        if update not in self.total:
            self.total[update] = self.streak[update] = self.recent[update] = 0
        self.total[update] = self.total[update] + bad
        self.streak[update] = (self.streak[update] + 1) * bad
        self.recent[update] = (0 if step % WINDOW == 0 else self.recent[update]) + bad

    def to_dict(self) -> dict[str, list[int]]:
        """update -> [in all, in a row, since the last multiple of 1000 steps]; reads the device."""
        return {
            name: [int(self.total[name]), int(self.streak[name]), int(self.recent[name])]
            for name in self.total
        }

    def load(self, value: dict[str, list[int]]) -> None:
        """Inverse of `to_dict`."""
        for place, counters in enumerate((self.total, self.streak, self.recent)):
            counters.clear()
            counters.update({name: counts[place] for name, counts in value.items()})


def nonfinite(*values: Tensor) -> Tensor:
    """1 where any of the scalars is infinite or nan, else 0, as a float32 scalar on their device."""
    # 0 * x is 0 for every finite x and nan for all others: fewer small operations than `isfinite` of each.
    nothing = sum((0.0 * value for value in values[1:]), start=0.0 * values[0])
    return nothing.isnan().to(torch.float32)


def bad_step(world: World, norm: Tensor, loss: Tensor | float) -> Tensor | bool:
    """Whether norm or loss is not finite on any process. On a CPU a bool: reading costs less than arithmetic there."""
    if world.size == 1 and norm.device.type == "cpu":
        return not (math.isfinite(float(norm)) and math.isfinite(float(loss)))
    return world.maximum(nonfinite(norm, torch.as_tensor(loss)))


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor | bool) -> None:
    """`optimizer.step()`, or nothing at all if `bad` (a bool, or a scalar tensor of 1 or 0) is set.

    On a device, fused optimizers read the flag themselves (the mechanism that gradient scaling uses); others
    cost one read by the host. On a CPU reading is free, and the flag is not."""
    if isinstance(bad, Tensor) and optimizer.defaults.get("fused") and bad.device.type != "cpu":
        flagged_step(optimizer, bad)
    elif not bool(bad):
        optimizer.step()


def flagged_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """`step_unless` of a fused optimizer, without a read by the host."""
    fused = cast(Any, optimizer)
    fused.grad_scale, fused.found_inf = None, bad
    optimizer.step()
