"""Denoising score matching on data: how embedded diffusion teachers are trained, under any process and any kind of prediction.

Ho et al. 2020 (arXiv 2006.11239), Salimans & Ho 2022 (arXiv 2202.00512, v-prediction), Karras et al. 2022 (arXiv 2206.00364).
The net regresses its own kind of target from x_t = alpha(t) x0 + sigma(t) eps.

Deviations: none; `times` and `weight` name what the papers differ in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.suits import (
    check_clean_end,
    check_null_prob,
    check_own_clock,
    refuse_unused,
)
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.base import at_least_float32
from distill.process.edm import EDM
from distill.process.scalings import SIGMA_DATA, edm_weight
from distill.process.times import lognormal_level, uniform_times

TIMES, WEIGHTS = ("uniform", "lognormal"), ("own", "edm")


class Denoising(DistillModule):
    """Regress the net's own kind of prediction.

    Args:
        student: the net to train, of any kind under any process.
        null_prob: share of samples whose condition is dropped, so that guidance works afterwards.
        times: "uniform" in [t_min, t_max] (not under EDM, whose time is the noise level), or "lognormal" noise
            levels exp(mean + std n) (EDM's training distribution).
        mean, std: of ln(sigma / alpha), for "lognormal".
        weight: "own", mean square in the net's own kind (for v it is SNR + 1 on x0), or "edm", 1 / sigma^2 + 1 / sigma_data^2
            on x0 with the sigma_data that the net or its process assumes, else 0.5.
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        *,
        null_prob: float = 0.1,
        times: str = "uniform",
        mean: float = -1.2,
        std: float = 1.2,
        weight: str = "own",
    ) -> None:
        super().__init__(student)
        check_null_prob(self, null_prob, student)
        if times not in TIMES:
            raise ValueError(f"times: found {times!r}, expected one of {list(TIMES)}")
        if weight not in WEIGHTS:
            raise ValueError(f"weight: found {weight!r}, expected one of {list(WEIGHTS)}")
        if weight == "edm" and not isinstance(student.process, EDM):
            raise ValueError(f"weight: found 'edm' under {student.process!r}, expected the process EDM")
        if not std > 0:
            raise ValueError(f"std: found {std}, expected a positive number")
        if times == "uniform":
            check_own_clock(student.process, "times", "'uniform'", "'lognormal'")
            check_clean_end(student.process, student.kind, student.kind)
            refuse_unused(self, {"mean": mean, "std": std}, "where times are uniform")
        self.null_prob, self.times, self.mean, self.std, self.weight = null_prob, times, mean, std, weight
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the net itself."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of steps: Heun on Karras's grid for EDM (18 by default), else 50 steps of DDIM. Noise and data are
        independent; guidable where conditions are dropped."""
        steps, solver = (18, "heun") if isinstance(self.student.process, EDM) else (50, "ddim")
        sampler = SamplerSpec(steps=steps, any_steps=True, solver=solver)
        return Result(
            sampler, "independent", guidable=self.null_prob > 0 and self.student.conditions.has_null
        )

    def draw_times(self, step: Step) -> Tensor:
        """[B] times in the process's own clock."""
        process = self.student.process
        if self.times == "uniform":
            return uniform_times(step.draws.uniform("t"), process.t_min, process.t_max)
        return process.time_of(-torch.log(lognormal_level(step.draws.normal("t"), self.mean, self.std)))

    def loss(self, batch: Batch, step: Step) -> Loss:
        """E w(t) |prediction - target|^2 over fresh noise and times."""
        assert batch.x0 is not None
        process, kind = self.student.process, self.student.kind
        eps, t = step.draws.normal("eps", batch.x0.shape[1:]), self.draw_times(step)
        cond = batch.cond.drop(step.draws.uniform("null") < self.null_prob)
        x_t = process.add_noise(batch.x0, eps, t)
        out = at_least_float32(self.student(x_t, t, cond))
        if self.weight == "edm":
            error = (process.convert(kind, out, x_t, t, "x0") - batch.x0).square().flatten(1).mean(1)
            per_sample = edm_weight(t, self.student.sigma_data or SIGMA_DATA) * error
        else:
            per_sample = (out - process.target(kind, batch.x0, eps, t)).square().flatten(1).mean(1)
        noisy = process.sigma(t) > process.alpha(t)
        with torch.no_grad():
            noisy_half = (per_sample * noisy).sum() / noisy.sum().clamp(min=1)
        return Loss(per_sample.mean(), {"loss_noisy_half": noisy_half})
