"""How a model is to be sampled. Saved with every model, so nobody has to guess steps, times or guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.process.base import Process
from distill.process.times import default_grid


@dataclass(frozen=True)
class SamplerSpec:
    """The sampler that a model was made for.

    Attributes:
        steps: the default number of steps.
        times: exact times in the model's process for each step count, descending, `steps + 1` numbers each.
            If `any_steps`, a count that is not listed uses the default grid; otherwise the listed counts are
            the only valid ones.
        mode: "ode" (deterministic: `solver`), or "sde": predict x0, noise it again to the next time with fresh noise,
            repeat (multistep consistency sampling); then the times are those of the network calls and an end that is
            not called.
        solver: the solver of "ode", one of `samplers.solvers.CALLS`.
        kind: what the net predicts.
        start_scale: the net starts from `start_scale * z`, z ~ N(0, I).
        guidance_scale: the scale to sample with; 1 is none.
        guidance_baked: the scale that the student has learned from its teacher, for the record.
        guidance_w: the guidance w = guidance_scale - 1 that the net gets as an input (`Cond.guidance_w`), and the range
            that it was trained for; None for a net without that input.
        noise_scale: multiplies the fresh noise of "sde"; 1 is what the student was trained for.
        noise_floor: level sigma / alpha of noise that the predictions still hold (`samplers.fewstep`).
    """

    steps: int
    times: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    any_steps: bool = False
    mode: str = "ode"
    solver: str = "euler"
    kind: str = "velocity"
    start_scale: float = 1.0
    guidance_scale: float = 1.0
    guidance_baked: float = 1.0
    guidance_w: float | None = None
    guidance_w_range: tuple[float, float] | None = None
    noise_scale: float = 1.0
    noise_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("ode", "sde"):
            raise ValueError(f"sampler.mode: found {self.mode!r}, expected 'ode' or 'sde'")
        if not 0 < self.noise_scale <= 1.5:
            raise ValueError(f"sampler.noise_scale: found {self.noise_scale}, expected a number in (0, 1.5]")
        if (self.guidance_w is None) != (self.guidance_w_range is None):
            raise ValueError("sampler.guidance_w, guidance_w_range: expected both or neither")
        for steps, times in self.times.items():
            if len(times) != steps + 1 or any(a <= b for a, b in pairwise(times)):
                raise ValueError(
                    f"sampler.times[{steps}]: expected {steps + 1} descending times, found {list(times)}"
                )
        if self.steps not in self.times and not self.any_steps:
            raise ValueError(
                f"sampler.steps: {self.steps} is not among the valid step counts {sorted(self.times)}"
            )

    def valid(self, steps: int) -> bool:
        """Whether the model was made for this many steps."""
        return steps >= 1 and (self.any_steps or steps in self.times)

    def grid(self, process: Process, steps: int | None = None, *, force: bool = False) -> Tensor:
        """[steps + 1] float64 times to sample at; `force` allows the default grid where the model is not
        valid."""
        steps = self.steps if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, found {steps}")
        if steps in self.times:
            first, last = self.times[steps][0], self.times[steps][-1]
            if not process.t_min <= last < first <= process.t_max:
                raise ValueError(
                    f"sampler.times[{steps}]: found {last} .. {first}, expected times of {process!r}: "
                    f"{process.t_min} .. {process.t_max}"
                )
            return torch.tensor(self.times[steps], dtype=torch.float64, device="cpu")
        if not (self.any_steps or force):
            raise ValueError(
                f"steps: this model was distilled for {sorted(self.times)} step(s) and is not valid at "
                f"{steps}; "
                "more steps make its images worse, not better (force=true samples all the same)"
            )
        return default_grid(process, steps)

    def embedded(self, w: float | None = None) -> float | None:
        """The guidance w to give the net: `w`, or the spec's; refuses one where the net takes none, and one outside the
        range that the net was trained for."""
        if self.guidance_w is None or self.guidance_w_range is None:
            if w is not None:
                raise ValueError(
                    f"guidance_w: found {w}, but this model does not take the guidance as an input"
                )
            return None
        w, (low, high) = self.guidance_w if w is None else w, self.guidance_w_range
        if not low <= w <= high:
            raise ValueError(
                f"guidance_w: found {w}, expected {low} .. {high}, what the model was trained for "
                "(w is the guidance scale less 1)"
            )
        return w

    def with_noise_scale(self, scale: float | None) -> SamplerSpec:
        """The same sampler with another scale of its fresh noise (None: its own); refuses one where none is drawn."""
        if scale is None:
            return self
        if self.mode != "sde" or (not self.any_steps and max(self.times) == 1):
            raise ValueError(
                f"noise_scale: found {scale}, but this model's sampler draws no fresh noise between steps; expected none"
            )
        return replace(self, noise_scale=float(scale))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"times": {str(n): list(t) for n, t in sorted(self.times.items())}}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> SamplerSpec:
        """Inverse of `to_dict`."""
        read = dict(value) | {"times": {int(n): tuple(t) for n, t in value["times"].items()}}
        if read.get("guidance_w_range") is not None:
            read["guidance_w_range"] = tuple(read["guidance_w_range"])
        return cls(**read)
