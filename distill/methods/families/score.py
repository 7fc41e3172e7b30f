"""Base class of SiD, DMD and DisBack: networks, samples of the student, order of updates, loss of the fake score.

Three networks: the student G, the frozen teacher T, and the fake score F, a copy of the teacher that is trained on samples of
the student. A subclass defines the student's loss, `student_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.networks import trainable_copy
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.families.options import FakeScore, Guidance, Sampling, Updates
from distill.methods.families.score_checks import (
    check_amplification,
    check_guidance,
    check_models,
    check_order,
)
from distill.methods.families.score_diagnostics import diagnose
from distill.methods.families.score_matching import ScoreMatching, conditions_of
from distill.methods.families.student_input import StudentInput
from distill.methods.families.suits import refuse_unused
from distill.methods.losses.score_times import times_of, usual_times
from distill.models.denoiser import Denoiser
from distill.models.result import Result


class ScoreDistillation(DistillModule):
    """Student, frozen teacher and fake score.

    Args:
        student: starts from the teacher. teacher: a diffusion or flow model; the fake score starts as its copy.
        sampling, fake, guidance, updates: see `families.options`.
        generator_times: times of the student's loss, see `losses.score_times.times_of`; None: those of the paper under EDM
            (`GENERATOR_TIMES`), else `usual_times`.
        reduction: of losses over the dimensions of a sample, "sum" or "mean".
        noise_scale: of the student's sampler, see `SamplerSpec`; training never uses it.
    """

    replaces_teacher: ClassVar[bool] = False  # whether the method loads other weights into its teacher
    GENERATOR_TIMES: ClassVar[Mapping[str, Any]]  # the paper's times under EDM
    FAKE_TIMES: ClassVar[Mapping[str, Any]]
    ORDER: ClassVar[tuple[str, str]]  # the paper's `updates.first` and `updates.samples`

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        sampling: Sampling,
        generator_times: Mapping[str, Any] | None,
        fake: FakeScore,
        guidance: Guidance,
        updates: Updates,
        reduction: str,
        noise_scale: float,
    ) -> None:
        super().__init__(student)
        check_models(student, teacher)
        check_guidance(teacher, guidance)
        process = student.process
        self.input = StudentInput(process, sampling.levels, sampling.unit_noise)
        check_amplification(process, student.kind, self.input.times[0])
        times = usual_times(process, generator_times, self.GENERATOR_TIMES, fake=False)
        self.generator_times = times_of(process, times, "generator_times")
        self.matching = ScoreMatching(
            teacher, fake, self.FAKE_TIMES, reduction, guidance.fake_train, guidance.null_prob
        )
        self.fake = trainable_copy(teacher, student)
        # Where its weights are replaced, those that were given stay.
        self.teacher = self.keep_frozen(
            "teacher", trainable_copy(teacher, student) if self.replaces_teacher else teacher
        )
        self.guidance, self.labels, self.reduction = guidance, sampling.labels, reduction
        self.ratio, self.noise_scale = updates.fake_per_student, noise_scale
        self.first, self.shares_samples = check_order(updates, self.ORDER)
        self.result()
        if self.input.steps == 1:
            refuse_unused(self, {"noise_scale": noise_scale}, "for a student of one step")

    def critics(self) -> dict[str, nn.Module]:
        """The networks that the fake score's update trains."""
        return {"fake": self.fake}

    def updates(self) -> Sequence[Update]:
        """Student and fake score in their order; the fake score runs in every iteration, the student in every `ratio`-th: of
        `ratio` iterations in the first where it is first, else in the last."""
        student, fake = {"student": self.student}, self.critics()
        if self.first == "student":
            return [
                Update("student", student, self.student_loss, every=self.ratio),
                Update("fake", fake, self.fake_loss),
            ]
        return [
            Update("fake", fake, self.fake_loss),
            Update("student", student, self.student_loss, every=self.ratio, start=self.ratio - 1),
        ]

    def result(self) -> Result:
        """Exactly the steps that it was trained for: "endpoint" for one step from t_max, else "few_step". Not guidable: the
        student is trained with conditions alone, and the teacher's guidance is baked in."""
        sampler = self.input.spec(self.guidance.teacher, self.noise_scale)
        whole = self.input.times == [self.student.process.t_max]
        return Result(sampler, "endpoint" if whole else "few_step", boundary=self.student.boundary)

    def conditions(self, batch: Batch, draws: Draws) -> Cond:
        """Conditions of the samples, as `sampling.labels` says."""
        return conditions_of(self.labels, self.student.conditions, batch, draws)

    def samples(self, batch: Batch, step: Step, cond: Cond) -> Tensor:
        """x [B,*S] of the student's update, with the graph of the student's last step."""
        return self.input.output(self.student, cond, step.draws)

    def fresh_samples(self, batch: Batch, step: Step, cond: Cond) -> Tensor:
        """x [B,*S] of the fake score's update, made with the student's current weights."""
        return self.input.mixture(self.student, cond, step.draws)

    def student_samples(self, batch: Batch, step: Step) -> tuple[Tensor, Cond]:
        """(x [B,*S] with its graph, conditions) of the student's update; kept for the fake score where it shares them."""
        cond = self.conditions(batch, step.draws)
        x = self.samples(batch, step, cond)
        if self.shares_samples:
            step.shared |= {"x": x.detach(), "cond": cond}
        return x, cond

    @torch.no_grad()
    def fake_samples(self, batch: Batch, step: Step) -> tuple[Tensor, Cond]:
        """(x [B,*S], conditions) that the fake score learns: those of the student's update of this iteration where there are
        any, else fresh ones."""
        if "x" in step.shared:
            return step.shared.pop("x"), step.shared.pop("cond")
        cond = self.conditions(batch, step.draws)
        return self.fresh_samples(batch, step, cond), cond

    def predictions(self, x: Tensor, cond: Cond, draws: Draws) -> tuple[Tensor, Tensor]:
        """(yT, yF) [B,*S]: teacher's and fake score's predictions of x0 at x_t = alpha x + sigma eps."""
        t, eps = self.generator_times(draws), draws.normal("eps", self.student.sample_shape)
        x_t = self.student.process.add_noise(x, eps, t)
        y_teacher = self.teacher.x0(x_t, t, cond, self.guidance.teacher)
        return y_teacher, self.fake.x0(x_t, t, cond, self.guidance.fake)

    @staticmethod
    @torch.no_grad()
    def describe(x: Tensor, y_teacher: Tensor, y_fake: Tensor) -> dict[str, Tensor]:
        """Scalars to log of a student's update."""
        error = (x - y_teacher).abs().flatten(1).mean(1)
        return {
            "gap": (y_teacher - y_fake).abs().mean(),
            "teacher_error": error.mean(),
            "teacher_error_min": error.min(),
            "x_mean": x.mean(),
            "x_std": x.std(),
        }

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """Loss of the student."""
        raise NotImplementedError

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """Denoising score matching of the fake score on the student's samples."""
        x, cond = self.fake_samples(batch, step)
        return Loss(self.matching(self.fake, x, cond, step.draws).mean())

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Samples of the average, predictions of teacher and fake score on them at three noise levels, and errors by level."""
        student, process = self.best(), self.student.process
        assert isinstance(student, Denoiser)
        cond = self.conditions(batch, draws)
        x = self.input.mixture(student, cond, draws)
        eps = draws.normal("eps", self.student.sample_shape)

        def predict(t: Tensor) -> tuple[Tensor, Tensor]:
            x_t = process.add_noise(x, eps, t)
            teacher = self.teacher.x0(x_t, t, cond, self.guidance.teacher)
            return teacher, self.fake.x0(x_t, t, cond, self.guidance.fake)

        return diagnose(x, batch.x0, self.generator_times(draws), process, predict)
