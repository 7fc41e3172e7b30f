"""Start times, noise and samples of a student of score distillation during training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.data.rng import Draws, stream_key
from distill.models.denoiser import Denoiser
from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.samplers.student_rollout import check_times, few_step_output, mixture_output


class StudentInput:
    """Start times and noise of the student's steps.

    Args:
        levels: noise levels sigma / alpha of the N start times, falling; None: one step from t_max. SiD: [2.5].
        unit_noise: feed unit noise at the first time instead of noise of that level (DMD2's one-step SDXL).
        name: of the option that gives the levels, for messages.

    Raises:
        ValueError: levels that are not a falling list of positive numbers, or outside the range of the process.
    """

    def __init__(
        self,
        process: Process,
        levels: Sequence[float] | None,
        unit_noise: bool = False,
        name: str = "sampling.levels",
    ) -> None:
        self.process, self.unit_noise = process, unit_noise
        if levels is None:
            self.times = [process.t_max]
        else:
            self.times = process.time_of(_falling(process, levels, name)).tolist()
        check_times(process, self.times)
        first = torch.tensor([self.times[0]], dtype=torch.float64)
        whole = float(process.prior(torch.ones(1, 1, dtype=torch.float64)))
        # At t_max the start is the prior of the process, as in every sampler.
        start = whole if self.times[0] == process.t_max else float(process.sigma(first))
        self.scale = (1.0 if unit_noise else start) / whole
        if unit_noise and math.isclose(start, 1.0):
            raise ValueError(
                f"sampling.unit_noise: found true, which changes nothing: the noise at the first time, t = {self.times[0]:g}, "
                "has unit size; expected false"
            )

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times)

    def spec(self, guidance_baked: float, noise_scale: float) -> SamplerSpec:
        """Exactly N steps, each from fresh noise."""
        return SamplerSpec(
            steps=self.steps,
            times={self.steps: (*self.times, self.process.t_min)},
            mode="sde",
            start_scale=self.scale,
            guidance_baked=guidance_baked,
            noise_scale=noise_scale,
        )

    def _given(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Callable[[int], Tensor]]:
        z = draws.normal("z", shape)
        return self.process.prior(self.scale * z), lambda i: draws.normal(f"renoise{i}", shape)

    def output(self, student: Denoiser, cond: Cond, draws: Draws) -> Tensor:
        """x [B,*S], the output of one of the N steps, with its graph; the same step for the whole batch on all processes."""
        start, noise = self._given(draws, student.sample_shape)
        k = stream_key(draws.seed, draws.stream, draws.step, "k") % self.steps
        return few_step_output(lambda x, t: student.x0(x, t, cond), self.process, start, self.times, noise, k)

    def mixture(self, student: Denoiser, cond: Cond, draws: Draws) -> Tensor:
        """x [B,*S] of a step drawn for each sample, without a graph: the samples of the fake score."""
        start, noise = self._given(draws, student.sample_shape)
        k = draws.integer("k", self.steps)
        return mixture_output(lambda x, t: student.x0(x, t, cond), self.process, start, self.times, noise, k)


def _falling(process: Process, levels: Sequence[float], name: str) -> Tensor:
    """Log ratios [N] of falling noise levels."""
    listed = isinstance(levels, Sequence) and not isinstance(levels, str)
    wanted = list(levels) if listed else []
    numbers = all(isinstance(level, float | int) and level > 0 for level in wanted)
    if not wanted or not numbers or any(not a > b for a, b in pairwise(wanted)):
        raise ValueError(
            f"{name}: found {levels!r}, expected a list of positive, falling noise levels, or null"
        )
    ratio = -torch.log(torch.tensor(wanted, dtype=torch.float64))
    if not bool(process.covers(ratio).all()):
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
        low, high = torch.exp(-process.log_ratio(ends)).tolist()
        raise ValueError(
            f"{name}: found {wanted}, expected noise levels that {process!r} has: {low:.4g} .. {high:.4g}"
        )
    return ratio
