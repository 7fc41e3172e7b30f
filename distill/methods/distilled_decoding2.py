"""Distilled Decoding 2: one-step sampling of autoregressive models by matching the scores of tokens, without pairs.

Liu et al. 2025 (arXiv 2510.21003), section 3.3. The generator reads the noise of the positions before and makes all code
vectors q in one call. At each position, given the codes before it in the generator's own sample, the teacher's score is exact,
and a guidance network follows the score of the generator's samples; the generator descends their difference (SiD's loss). Both
networks start from the first stage (method `teacher_score`).

What the loss should look like: it is no measure of progress, as SiD's; `gap` (|teacher - fake|^2 of predicted codes) and
`distance` of the samples to their nearest codes fall. The generator is useless at the start: it makes conditional means.

Deviations: the weight of the generator's loss is not in the paper; ours is SiD's, 1 / mean |q - teacher|, a position. The codes
before a position are the nearest ones (`nearest`), which any teacher takes; the paper adapts teachers to vectors. Its last
phase (averaged weights into the generator, the guidance network alone, then both) is a second stage with `lead`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.networks import trainable_copy
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.families.code_scores import CodeScores
from distill.methods.losses.score import fake_score_loss, sid_loss
from distill.models.code_flow import CodeFlow, with_context
from distill.models.denoiser import check_same
from distill.models.model import Model
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher


class DistilledDecoding2(DistillModule):
    """CSD: SiD's loss of each position at a time of its own, with the codes before it as a condition.

    Args:
        student: the generator. teacher: a model of tokens.
        guidance: the network that follows the generator's scores starts as this one, that of the first stage.
        alpha, floor: of SiD's loss. fake_per_student: K, updates of the guidance network for each of the generator.
        lead: updates of the guidance network before the first of the generator.
        draws: noisy states of a sequence in its updates. t_min, t_max, guidance_scale: see `TeacherScore`.
        nearest: the codes before a position are the nearest ones; false: the vectors as they are.
    """

    MODELS: ClassVar[tuple[type[Model], ...]] = (CodeFlow, TokenTeacher)

    def __init__(
        self,
        student: Model,
        teacher: Model,
        guidance: Model,
        *,
        alpha: float = 1.0,
        floor: float = 1e-3,
        fake_per_student: int = 1,
        lead: int = 0,
        draws: int = 2,
        t_min: float = 0.02,
        t_max: float = 0.98,
        guidance_scale: float = 1.0,
        nearest: bool = True,
    ) -> None:
        super().__init__(student)
        if fake_per_student < 1 or lead < 0:
            raise ValueError(
                f"fake_per_student, lead: found {fake_per_student} and {lead}, expected at least 1 and 0"
            )
        if not floor > 0:
            raise ValueError(f"floor: found {floor}, expected a positive number")
        one = torch.ones(1, 1)
        sid_loss(one, one, one, alpha=alpha, floor=floor)  # raises for an alpha that is not finite
        self.scores = CodeScores(student, teacher, draws, t_min, t_max, guidance_scale)
        self.teacher = self.keep_frozen("teacher", teacher)
        self.fake = trainable_copy(guidance, student)
        if not isinstance(guidance, CodeFlow):
            raise ValueError(f"guidance: found a {type(guidance).__name__}, expected a flow of codes")
        check_same("guidance", guidance, "student", student)
        self.alpha, self.floor, self.nearest = alpha, floor, nearest
        self.ratio, self.lead = fake_per_student, lead

    def updates(self) -> Sequence[Update]:
        """The guidance network in every iteration; the generator in every K-th, after `lead`."""
        return [
            Update("fake", {"fake": self.fake}, self.fake_loss),
            Update(
                "student",
                {"student": self.student},
                self.student_loss,
                every=self.ratio,
                start=self.lead + self.ratio - 1,
            ),
        ]

    def result(self) -> Result:
        """One step from pure noise."""
        sampler = SamplerSpec(steps=1, times={1: (1.0, 0.0)}, mode="sde", **self.scores.record())
        return Result(sampler, "endpoint")

    def generated(self, model: Model, cond: Cond, draws: Draws) -> Tensor:
        """Code vectors q [B,L,C] of the generator."""
        z = draws.normal("z", self.student.sample_shape)
        return model.x0(z, z.new_ones(len(z)), cond)

    def before(self, q: Tensor) -> Tensor:
        """The codes that scores are conditioned on, without a gradient."""
        flow = self.student
        assert isinstance(flow, CodeFlow)
        return flow.nearest(q.detach()) if self.nearest else q.detach()

    def predictions(self, q: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Tensor]:
        """Predicted codes [B L,C] of teacher and guidance network, at one noisy state of q, which gets their gradient."""
        codes = self.before(q)
        q_t, t, _ = self.scores.noisy(q, draws, 1)
        y_teacher = self.scores.teacher_x0(self.teacher, codes, q_t, t, cond)
        y_fake = self.fake.x0(q_t, t, with_context(cond, codes))
        return y_teacher.flatten(0, 1), y_fake.flatten(0, 1)

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """SiD's loss, arXiv 2404.04057, of every position: [B L,C]."""
        q = self.generated(self.student, batch.cond, step.draws)
        y_teacher, y_fake = self.predictions(q, batch.cond, step.draws)
        loss = sid_loss(q.flatten(0, 1), y_teacher, y_fake, alpha=self.alpha, floor=self.floor)
        distance = (q.detach() - self.before(q)).square().sum(-1).sqrt().mean()
        return Loss(loss.mean(), {"gap": (y_teacher - y_fake).square().mean(), "distance": distance})

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """FCS as a regression of velocities: |v(q_t, t | q_<i) - (eps - q)|^2 of the generator's samples."""
        with torch.no_grad():
            q = self.generated(self.student, batch.cond, step.draws)
        q_t, t, eps = self.scores.noisy(q, step.draws)
        made = self.fake(q_t, t, with_context(batch.cond, self.before(q)))
        clean = q.repeat_interleave(len(q_t) // len(q), 0)
        made, clean, eps, t = (value.flatten(0, 1) for value in (made, clean, eps, t))
        loss = fake_score_loss(made, clean, eps, t, self.student.process, weighting="flow", reduction="mean")
        return Loss(loss.mean())

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Of samples of the average: the gap between teacher and guidance network at a quarter of the positions each, and the
        distance to the nearest codes."""
        best = self.best()
        assert isinstance(best, CodeFlow)
        q = self.generated(best, batch.cond, draws)
        y_teacher, y_fake = self.predictions(q, batch.cond, draws)
        gap = (y_teacher - y_fake).square().mean(-1).view(q.shape[:2])
        parts = gap.chunk(min(4, gap.shape[1]), 1)
        scalars = {f"gap_{number + 1}": part.mean() for number, part in enumerate(parts)}
        distance = (q - self.before(q)).square().sum(-1).sqrt().mean()
        return Diagnostics(scalars | {"distance": distance}, [("student", q)])
