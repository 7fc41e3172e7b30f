"""Degradation recording, DisBack's first stage: the teacher unlearns itself on the initial student's samples; the way is kept.

Zhang et al. 2024 (arXiv 2408.15991). A copy of the teacher is trained on samples of the initial student (the fake score's
loss); stored nodes s_1 ... s_N lead from the teacher (which is s_0 and not stored) to a model that fits the student. The
second stage, `disback`, walks back.

What the loss should look like: it starts at the teacher's error on samples that it does not know and falls quickly: some
ten to a hundred steps carry most of the way. A node where nothing has changed yet is useless, and so are many where nothing
changes any more.

Deviations: the initial student is the teacher itself, read as a one-step (or few-step) generator, unless another stage is
named; the public SDXL run starts from an already distilled student. The GAN head that the public code trains here as well
is not part of the paper's stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.losses.backtrack import node_steps
from distill.methods.losses.score_student import StudentInput, score_errors, times_of, weighting_for
from distill.models.denoiser import Denoiser
from distill.models.spec import SamplerSpec


class Degrade(DistillModule):
    """Record the way from the teacher to the initial student.

    Args:
        student: starts from the teacher and is degraded.
        generator: the initial student, frozen: a model read as a generator of the steps that `levels` says.
        steps: optimizer steps of the stage (null: the stage's) and `node_every`, steps between stored nodes; the last step
            always stores one.
        levels, unit_noise, fake_times, weighting, sigma_data, reduction, labels: as in the second stage, see
            `losses.score_student.ScoreDistillation`.
    """

    def __init__(
        self,
        student: Denoiser,
        generator: Denoiser,
        *,
        total_steps: int | None = None,
        node_every: int = 50,
        levels: Sequence[float] | None = None,
        unit_noise: bool = False,
        fake_times: Mapping[str, Any] | None = None,
        weighting: str = "auto",
        sigma_data: float = 0.5,
        reduction: str = "mean",
        labels: str = "uniform",
    ) -> None:
        super().__init__(student)
        if generator.process.config() != student.process.config():
            raise ValueError(
                f"generator: lives under {generator.process!r}, the teacher under {student.process!r}; expected one process"
            )
        if student.coupling != "independent":
            raise ValueError(
                f"init: found a model of {student.coupling} noise and data, which has no score; expected a diffusion or flow "
                "model"
            )
        if labels not in ("data", "uniform"):
            raise ValueError(f"labels: found {labels!r}, expected 'data' or 'uniform'")
        self.nodes = node_steps(total_steps or 0, node_every)
        self.input = StudentInput(student.process, levels, unit_noise)
        given = fake_times or {"name": "karras", "low": 0, "high": 999}
        self.times = times_of(student.process, given, "fake_times")
        self.generator = self.keep_frozen("generator", generator)
        self.weighting, self.sigma_data = weighting_for(weighting, student.kind), sigma_data
        self.reduction, self.labels = reduction, labels

    def updates(self) -> Sequence[Update]:
        """One update: the degraded teacher."""
        return [Update("student", {"student": self.student}, self.loss)]

    def snapshots(self) -> Sequence[int]:
        """The steps after which a node is stored."""
        return self.nodes

    def spec(self) -> SamplerSpec:
        """That of the teacher: a node is a score model like it."""
        return self.student.sampler or SamplerSpec(
            steps=50, any_steps=True, solver="ddim", kind=self.student.kind
        )

    def loss(self, batch: Batch, step: Step) -> Loss:
        """Denoising score matching on the initial student's samples."""
        cond = batch.cond
        if self.labels == "uniform" and self.student.num_classes:
            cond = Cond.of_labels(step.draws.integer("label", self.student.num_classes))
        x = self.input.mixture(self.generator, cond, step.draws)
        errors = score_errors(
            self.student,
            x,
            cond,
            step.draws,
            self.times,
            weighting=self.weighting,
            sigma_data=self.sigma_data,
            reduction=self.reduction,
        )
        return Loss(errors.mean(), {"x_std": x.std()})
