"""Flow matching on data: how the embedded flow teacher is trained (1-rectified flow).

Liu et al. 2022 (arXiv 2209.03003, eq. 1), Lipman et al. 2022 (arXiv 2210.02747). The papers' tau = 1 - t and
their velocity is data minus noise; here t = 0 is data and the velocity is eps - x0.

What the loss should look like: it falls within the first hundreds of steps and then stays at the variance of eps - x0 given
x_t, far above 0, while samples go on improving; use `eval/fd` or samples to decide when to stop.

Deviations: none; t ~ U[t_min, t_max] and weight 1, as in the public recipes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.suits import check_clean_end, check_null_prob
from distill.methods.losses.flow import flow_matching_loss, require_flow
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.times import uniform_times


class FlowMatching(DistillModule):
    """Regress the velocity of independent noise and data.

    Args:
        student: the net to train; its process must be a flow, and it predicts the velocity (the loss of a predicted x0 is
            weighed by 1 / t^2, which has no mean).
        null_prob: share of samples whose condition is dropped, so that guidance works afterwards.
    """

    reads = ("x0",)

    def __init__(self, student: Denoiser, *, null_prob: float = 0.1) -> None:
        super().__init__(student)
        require_flow(student.process)
        check_clean_end(student.process, student.kind, "velocity")
        check_null_prob(self, null_prob, student)
        self.null_prob = null_prob
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the net itself."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of Euler steps, 50 by default. Noise and data are independent; guidable where conditions are dropped."""
        sampler = SamplerSpec(steps=50, any_steps=True, solver="euler")
        return Result(
            sampler, "independent", guidable=self.null_prob > 0 and self.student.conditions.has_null
        )

    def loss(self, batch: Batch, step: Step) -> Loss:
        """E |v(x_t, t) - (eps - x0)|^2 over fresh noise and uniform times."""
        assert batch.x0 is not None
        process, draws = self.student.process, step.draws
        eps = draws.normal("eps", batch.x0.shape[1:])
        t = uniform_times(draws.uniform("t"), process.t_min, process.t_max)
        cond = batch.cond.drop(draws.uniform("null") < self.null_prob)
        velocity = self.student.velocity(process.add_noise(batch.x0, eps, t), t, cond)
        per_sample = flow_matching_loss(velocity, batch.x0, eps)
        return Loss(per_sample.mean(), {"loss_noisy_half": _mean_where(per_sample, t > 0.5 * process.t_max)})


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the values under a mask, 0 where it is empty; no host sync."""
    return (values.detach() * mask).sum() / mask.sum().clamp(min=1)
