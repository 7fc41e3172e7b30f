"""Reflow: straighten a flow by training on the pairs that it makes itself (2-, 3-, ... rectified flow).

Liu et al. 2022 (arXiv 2209.03003), Liu et al. 2023, "InstaFlow" (arXiv 2309.06380). The loss is flow matching
on *stored* pairs: z is the noise from which the teacher's ODE made x0, and is never redrawn. The papers' tau
= 1 - t.

What the loss should look like: deterministic pairs leave nothing to average over, so it falls far below that of the flow it
starts from (on the embedded digits from 0.6 to below 0.01 a dimension). A loss that stays near the first flow's means that the
pairs got shuffled.

Deviations: the published recipe gives no rate of unconditional dropout; `null_prob` is 0.1 (needed for
guidance > 1 afterwards). The student starts from the teacher's averaged weights (the reference starts from
the raw ones, while its pairs come from the average).
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.suits import check_clean_end, check_null_prob
from distill.methods.losses.flow import flow_matching_loss, require_flow
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.times import uniform_times


class Reflow(DistillModule):
    """Flow matching on pairs of noise and teacher sample.

    Args:
        student: starts from the teacher; a flow that predicts the velocity.
        null_prob: share of samples whose condition is dropped.
    """

    reads = ("x0", "z")

    def __init__(self, student: Denoiser, *, null_prob: float = 0.1) -> None:
        super().__init__(student)
        require_flow(student.process)
        if student.coupling == "endpoint":
            raise ValueError("init: reflow cannot start from a one-step student: it is valid at t_max alone")
        if student.coupling == "few_step":
            raise ValueError(
                "init: reflow cannot start from a few-step student: it is valid at its sampler's times alone"
            )
        check_clean_end(student.process, student.kind, "velocity")
        check_null_prob(self, null_prob, student)
        self.null_prob = null_prob
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of Euler steps, 8 by default, since the paths are nearly straight. Noise and data are paired;
        guidable where conditions are dropped."""
        sampler = SamplerSpec(steps=8, any_steps=True, solver="euler")
        return Result(sampler, "paired", guidable=self.null_prob > 0 and self.student.conditions.has_null)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """E |v((1 - t) x0 + t z, t) - (z - x0)|^2 over stored pairs and uniform times."""
        assert batch.x0 is not None
        assert batch.z is not None
        process, draws = self.student.process, step.draws
        t = uniform_times(draws.uniform("t"), process.t_min, process.t_max)
        cond = batch.cond.drop(draws.uniform("null") < self.null_prob)
        velocity = self.student.velocity(process.add_noise(batch.x0, batch.z, t), t, cond)
        return Loss(flow_matching_loss(velocity, batch.x0, batch.z).mean())
