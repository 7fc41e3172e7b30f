"""The sampler of a model (steps, times, guidance), saved with every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from distill.data.arguments import finite, integer
from distill.models.time_grid import TimeGrid
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.times import MAX_STEPS, default_grid, karras_grid
from distill.samplers.solvers import CALLS
from distill.typed import parse, settle


@dataclass(frozen=True)
class SamplerSpec:
    """The sampler that a model was made for.

    Attributes:
        steps: the default number of steps.
        times: exact times in the model's process for each step count, descending, `steps + 1` numbers each.
            If `any_steps`, a count that is not listed uses the default grid; otherwise the listed counts are
            the only valid ones. All lists start at one time.
        mode: "ode" (deterministic: `solver`), or "sde": predict x0, noise it again to the next time with fresh noise,
            repeat (multistep consistency sampling); then the times are those of the network calls and an end that is
            not called.
        solver: the solver of "ode", one of `samplers.solvers.CALLS`.
        start_scale: the net starts from `start_scale * z`, z ~ N(0, I).
        guidance_scale: the scale to sample with; 1 is none.
        guidance_baked: the scale that the student has learned from its teacher, for the record.
        guidance_w: the guidance w = guidance_scale - 1 that the net gets as an input (`guidance_w` of `Cond`), and the range
            that it was trained for; None for a net without that input.
        noise_scale: multiplies the fresh noise of "sde"; 1 is what the student was trained for.
        noise_floor: level sigma / alpha of noise that the predictions still hold (`samplers.fewstep`).
        renoise: "fresh" noise in each step of "sde", or the "same" in all of them, the sample's own z (Distilled Decoding).
        baked: in words, what the pairs were made with that the student learned from; None for students of no pairs of
            tokens. Where it is set, a request for another guidance is refused.
        time_grid: the grid of step counts that `times` does not list; None: the process's default grid.
    """

    steps: int
    times: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    any_steps: bool = False
    mode: Literal["ode", "sde"] = "ode"
    solver: str = "euler"
    start_scale: float = 1.0
    guidance_scale: float = 1.0
    guidance_baked: float = 1.0
    guidance_w: float | None = None
    guidance_w_range: tuple[float, float] | None = None
    noise_scale: float = 1.0
    noise_floor: float = 0.0
    time_grid: TimeGrid | None = None
    renoise: Literal["fresh", "same"] = "fresh"
    baked: str | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.solver not in CALLS:
            raise ValueError(f"solver: found {self.solver!r}, expected one of {list(CALLS)}")
        if not self.start_scale > 0:
            raise ValueError(f"start_scale: found {self.start_scale}, expected a positive number")
        if not 0 < self.noise_scale <= 1.5:
            raise ValueError(f"noise_scale: found {self.noise_scale}, expected a number in (0, 1.5]")
        if not self.noise_floor >= 0:
            raise ValueError(f"noise_floor: found {self.noise_floor}, expected a number of at least 0")
        if self.renoise == "same" and (self.mode, self.noise_scale, self.noise_floor) != ("sde", 1.0, 0.0):
            raise ValueError(
                "renoise: found 'same', expected mode 'sde' with noise_scale 1 and noise_floor 0"
            )
        self._check_guidance()
        self._check_steps()

    def check_asked(self, guidance_scale: float) -> None:
        """Raise ValueError for a guidance scale that a student cannot be sampled with, since pairs had another one."""
        if self.baked is not None and guidance_scale != 1:
            raise ValueError(
                f"guidance_scale: found {guidance_scale:g}, but {self.baked} is baked into the pairs that this student learned "
                "from; expected 1, or a student of pairs made with another guidance (stages.pairs.guidance_scale)"
            )

    def _check_guidance(self) -> None:
        if self.guidance_w is None or self.guidance_w_range is None:
            if (self.guidance_w is None) != (self.guidance_w_range is None):
                raise ValueError("guidance_w, guidance_w_range: expected both or neither")
            return
        low, high = self.guidance_w_range
        if not -1 <= low <= self.guidance_w <= high:
            raise ValueError(
                f"guidance_w, guidance_w_range: found {self.guidance_w} and {[low, high]}, expected a w in its range, which "
                "starts at -1 or above"
            )

    def _check_steps(self) -> None:
        for steps, times in self.times.items():
            if steps < 1 or len(times) != steps + 1 or any(not a > b for a, b in pairwise(times)):
                raise ValueError(
                    f"times[{steps}]: expected {steps + 1} descending times, found {list(times)}"
                )
        if len(starts := {times[0] for times in self.times.values()}) > 1:
            raise ValueError(
                f"times: start at {sorted(starts)}, expected one start, which `start_scale` is the scale of"
            )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps: found {self.steps}, expected 1 .. {MAX_STEPS}")
        if self.steps not in self.times and not self.any_steps:
            raise ValueError(f"steps: {self.steps} is not among the valid step counts {sorted(self.times)}")

    def valid(self, steps: int) -> bool:
        """Whether the model was made for this many steps."""
        return steps >= 1 and (self.any_steps or steps in self.times)

    def grid(self, process: Process, steps: int | None = None, *, force: bool = False) -> Tensor:
        """[steps + 1] float64 times to sample at; `force` allows the default grid where the model is not
        valid."""
        steps = self.steps if steps is None else integer("steps", steps)
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps: expected 1 .. {MAX_STEPS}, found {steps}")
        if steps in self.times:
            self._check_times(process, steps)
            return torch.tensor(self.times[steps], dtype=torch.float64, device="cpu")
        if not (self.any_steps or force):
            raise ValueError(
                f"steps: this model was distilled for {sorted(self.times)} step(s) and is not valid at "
                f"{steps}; "
                "more steps make its images worse, not better (force=true samples all the same)"
            )
        if self.time_grid is not None:
            return self.time_grid.make(process, steps)
        start = self.start(process)
        if start == process.t_max:
            return default_grid(process, steps)
        if isinstance(process, EDM) and start > process.sigma_min:
            return karras_grid(process, steps, sigma_max=start)
        return torch.linspace(start, process.t_min, steps + 1, dtype=torch.float64, device="cpu")

    def start(self, process: Process) -> float:
        """The time that sampling starts at, where the state is `start_scale` times the process's prior."""
        return next((times[0] for times in self.times.values()), process.t_max)

    def check_process(self, process: Process) -> None:
        """Raise ValueError where the sampler's times are not times of the process that the model lives under."""
        for steps in self.times:
            self._check_times(process, steps)
        if self.steps not in self.times:
            self.grid(process)

    def _check_times(self, process: Process, steps: int) -> None:
        first, last = self.times[steps][0], self.times[steps][-1]
        if not process.t_min <= last < first <= process.t_max:
            raise ValueError(
                f"sampler.times[{steps}]: found {last} .. {first}, expected times of {process!r}: "
                f"{process.t_min} .. {process.t_max}"
            )

    def embedded(self, w: float | None = None) -> float | None:
        """The guidance w to give the net: `w`, or the spec's; refuses one where the net takes none, and one outside the
        range that the net was trained for."""
        if self.guidance_w is None or self.guidance_w_range is None:
            if w is not None:
                raise ValueError(
                    f"guidance_w: found {w}, but this model does not take the guidance as an input"
                )
            return None
        w, (low, high) = self.guidance_w if w is None else finite("guidance_w", w), self.guidance_w_range
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
        if self.mode != "sde" or self.renoise == "same" or (not self.any_steps and max(self.times) == 1):
            raise ValueError(
                f"noise_scale: found {scale}, but this model's sampler draws no fresh noise between steps; expected none"
            )
        return replace(self, noise_scale=finite("noise_scale", scale))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        plain = asdict(self) | {"times": {str(n): list(t) for n, t in sorted(self.times.items())}}
        plain.pop("time_grid")
        for name, default in (
            ("renoise", "fresh"),
            ("baked", None),
        ):  # files of older versions have no such entries
            if plain[name] == default:
                plain.pop(name)
        return plain if self.time_grid is None else plain | {"time_grid": self.time_grid.to_dict()}

    @classmethod
    def from_dict(cls, value: Any, where: str = "sampler", *, kind: str | None = None) -> SamplerSpec:
        """Inverse of `to_dict`. Files of older versions repeat the model's `kind` here, which must be the same.

        Raises ValueError that starts with `where` and the entry."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: found {value!r}, expected a mapping")
        read = dict(value)
        if (found := read.pop("kind", kind)) != kind:
            raise ValueError(f"{where}.kind: found {found!r}, expected the model's {kind!r}")
        times = parse(dict[str, tuple[float, ...]], read.get("times", {}), f"{where}.times")
        for steps in times:
            if not steps.isdecimal() or steps != str(int(steps)):
                raise ValueError(f"{where}.times: found the key {steps!r}, expected a number of steps")
        read["times"] = {int(steps): given for steps, given in times.items()}
        if read.get("time_grid") is not None:
            read["time_grid"] = TimeGrid.from_dict(read["time_grid"], f"{where}.time_grid")
        return parse(cls, read, where)
