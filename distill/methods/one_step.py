"""One-step distillation of a (re)flow: the student jumps from noise to the end of the teacher's ODE in one
network call.

Liu et al. 2023, "InstaFlow" (arXiv 2309.06380), stage "distill", and the k-step variant of the rectified-flow
code base. The student is G(z) = z - v(z, t = 1) (the papers' tau = 0); the loss D(G(z), x0) is the squared L2
distance over stored pairs.

What the loss should look like: it starts at the squared gap between the (re)flow's one-step and many-step samples and falls
by a factor of two to ten; after a reflow it is small from the start. It is the distance to the teacher's samples, so lower is
better.

Deviations: the papers end with an LPIPS stage; here the loss is L2 (LPIPS needs images of at least 16 pixels
and weights that no package ships). tau is exactly 0, as in InstaFlow's inference (`t_eps` = 0); the
rectified-flow code uses 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.losses.flow import flow_matching_loss, k_step_times, require_flow
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec


class OneStep(DistillModule):
    """L2 regression of the teacher's endpoints.

    Args:
        student: starts from the teacher (a flow).
        steps: k; the student learns the k left points of the uniform grid and is sampled with k Euler steps.
            1: one step.
        t_eps: training and sampling times stay this far below t = 1.
    """

    reads = ("x0", "z")

    def __init__(self, student: Denoiser, *, steps: int = 1, t_eps: float = 0.0) -> None:
        super().__init__(student)
        require_flow(student.process)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, found {steps!r}")
        if not 0 <= t_eps < 1:
            raise ValueError(f"t_eps: expected a time in [0, 1), found {t_eps}")
        self.steps, self.t_eps = steps, t_eps

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Exactly the steps that it was trained for: "endpoint" for one step from t_max, else "few_step". Not guidable:
        conditions are not dropped, so the null condition is forgotten."""
        starts = k_step_times(torch.arange(self.steps), self.steps, self.t_eps).tolist()
        sampler = SamplerSpec(steps=self.steps, times={self.steps: (*starts, 0.0)})
        whole = starts == [self.student.process.t_max]
        return Result(sampler, "endpoint" if whole else "few_step", boundary=self.student.boundary)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """E |v - (z - x0)|^2 at the sampling times; for one step this is |G(z) - x0|^2."""
        assert batch.x0 is not None
        assert batch.z is not None
        index = step.draws.integer("j", self.steps)
        t = k_step_times(index, self.steps, self.t_eps).to(batch.z.dtype)
        velocity = self.student.velocity(self.student.process.add_noise(batch.x0, batch.z, t), t, batch.cond)
        return Loss(flow_matching_loss(velocity, batch.x0, batch.z).mean())
