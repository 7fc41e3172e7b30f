"""An autoregressive model as a diffusion of code vectors, from its own exact scores: the first stage of Distilled Decoding 2.

Liu et al. 2025 (arXiv 2510.21003), section 3.2. Given the codes before, the teacher's probabilities of a token define the
score of its noisy code vector in closed form (`samplers.token_flow`). A network that starts from the teacher's body learns
this score, for every position at a time of its own: the guidance network and the generator of the second stage start here.

What the loss should look like: on the digits .16 at 60 steps, .10 at 300 and .08 at 400; most of it is that of small times,
where the small head has to know all codes. The model is sampled as autoregressive diffusion: watch `eval/fd`.

Deviations: the loss compares velocities (the paper's appendix E.1 does), each position's averaged over its numbers; times are
uniform in [t_min, t_max]. `draws` noisy states of a sequence share one call of the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.code_scores import CodeScores
from distill.methods.losses.tokens import mean_where
from distill.models.code_flow import CodeFlow, with_context
from distill.models.model import Model
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher


class TeacherScore(DistillModule):
    """|v_student(q_t, t | q_<i) - v_teacher(q_t, t | q_<i)|^2 / C of noisy sequences q of the teacher, at a time a position.

    Args:
        student: `adapt: {process: code_flow}` of the teacher. teacher: a model of tokens.
        draws: noisy states of a sequence. t_min, t_max: range of the times, within (0, 1].
        guidance_scale: of the teacher.
        steps: of the flow of each group when it is sampled (Euler).
    """

    MODELS: ClassVar[tuple[type[Model], ...]] = (CodeFlow, TokenTeacher)
    reads = ("x0",)

    def __init__(
        self,
        student: Model,
        teacher: Model,
        *,
        draws: int = 2,
        t_min: float = 0.02,
        t_max: float = 0.98,
        guidance_scale: float = 1.0,
        steps: int = 8,
    ) -> None:
        super().__init__(student)
        if steps < 1:
            raise ValueError(f"steps: found {steps}, expected at least 1")
        self.scores = CodeScores(student, teacher, draws, t_min, t_max, guidance_scale)
        self.teacher, self.steps = self.keep_frozen("teacher", teacher), steps

    def updates(self) -> Sequence[Update]:
        """One update: body and head."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of steps of the flow of each group."""
        sampler = SamplerSpec(steps=self.steps, any_steps=True, solver="euler", **self.scores.record())
        return Result(sampler, "independent")

    def loss(self, batch: Batch, step: Step) -> Loss:
        """See the class (GTS, as velocities)."""
        assert batch.x0 is not None
        q_t, t, _ = self.scores.noisy(batch.x0, step.draws)
        wanted = self.scores.teacher_velocity(self.teacher, batch.x0, q_t, t, batch.cond)
        error = (self.student(q_t, t, with_context(batch.cond, batch.x0)) - wanted).square().mean(-1)
        return Loss(
            error.mean(), {"small_t": mean_where(error, t < 0.3), "large_t": mean_where(error, t > 0.7)}
        )
