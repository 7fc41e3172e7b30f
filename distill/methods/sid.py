"""SiD, score identity distillation: the student minimises a Fisher divergence between its samples and the teacher's, at all
noise levels, without data.

Zhou et al. 2024 (arXiv 2404.04057), Algorithm 1; long-short guidance (LSG, arXiv 2406.01561) through the four guidance
scales; few-step students (arXiv 2505.12674): the loss is applied to the output of a step drawn uniformly, with one fake
score for all. `noise_scale` below 1 dampens the fresh noise of a few-step student in sampling only.

What the loss should look like: NOT a measure of progress. With alpha = 1 its expectation is zero where the fake score is
exact, so it moves about zero, and for alpha > 1 it is negative; `student/loss`, which has the factor `loss_scale_g` in it and
is a sum over pixels, may show -60 in a healthy run (`student/loss_unscaled`), and falls or rises while samples improve. The
numbers to watch are `diagnostics/gap_*` (|teacher x0 - fake x0|^2 on the student's samples at three noise levels, falling),
`fake/loss` (settles to a level), `diagnostics/x_std` (near the data's; far below it is collapse) and `eval/fd`.

Deviations: samples that are not finite are not dropped one by one (that does not protect the gradients): the engine skips
and counts the step, on all processes. The augmentation of the images that the fake score learns is left out. The time samplers
and the weight of the fake score's loss are options, so that flow and variance-preserving teachers are distilled in their own
time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distill.data.batch import Batch
from distill.engine.update import Loss, Step, Update
from distill.methods.families.score import ScoreDistillation, check_ratio
from distill.methods.losses.score import sid_loss
from distill.methods.losses.score_times import usual_times
from distill.models.denoiser import Denoiser


class SiD(ScoreDistillation):
    """Score identity distillation.

    Args:
        student: starts from the teacher.
        teacher: a diffusion or flow model; the fake score starts as its copy.
        alpha: 1 is safe; 1.2 as in the paper's CIFAR-10 and ImageNet runs; 0 is the plain projected loss.
        levels: noise levels sigma / alpha at which the student's steps start; null: one step from t_max. The paper, under
            EDM: [2.5].
        generator_times, fake_times: see `losses.score_times.times_of`; null: under EDM SiD's polynomial with t_max = 800 and
            EDM's log-normal, else what suits the process (`losses.score_times.usual_times`).
        fake_updates_per_generator: fake updates for each one of the student, which comes last.
        loss_scale_g: factor on the student's loss (the reference: 100); with Adam and beta1 = 0 it changes nothing but the
            distance to Adam's epsilon.
        floor: of the weight's normaliser.
        The others: see `families.score.ScoreDistillation`.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        alpha: float = 1.0,
        levels: Sequence[float] | None = None,
        unit_noise: bool = False,
        generator_times: Mapping[str, Any] | None = None,
        fake_times: Mapping[str, Any] | None = None,
        weighting: str = "auto",
        sigma_data: float = 0.5,
        guidance_teacher: float = 1.0,
        guidance_fake: float = 1.0,
        guidance_fake_train: float = 1.0,
        null_prob: float = 0.0,
        fake_updates_per_generator: int = 1,
        loss_scale_g: float = 100.0,
        floor: float = 1e-5,
        labels: str = "data",
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(
            student,
            teacher,
            levels=levels,
            unit_noise=unit_noise,
            generator_times=usual_times(
                student.process, generator_times, {"name": "sid", "t_max": 800.0}, fake=False
            ),
            fake_times=usual_times(
                student.process, fake_times, {"name": "lognormal", "mean": -1.2, "std": 1.2}, fake=True
            ),
            weighting=weighting,
            sigma_data=sigma_data,
            reduction="sum",
            guidance_teacher=guidance_teacher,
            guidance_fake=guidance_fake,
            guidance_fake_train=guidance_fake_train,
            null_prob=null_prob,
            labels=labels,
            noise_scale=noise_scale,
        )
        check_ratio(fake_updates_per_generator)
        for name, value in (("loss_scale_g", loss_scale_g), ("floor", floor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        one = torch.ones(1, 1)
        sid_loss(one, one, one, alpha=alpha, floor=floor)
        self.alpha, self.floor, self.loss_scale_g = alpha, floor, loss_scale_g
        self.ratio = fake_updates_per_generator

    def updates(self) -> Sequence[Update]:
        """The fake score first, then the student."""
        return [
            Update("fake", {"fake": self.fake}, self.fake_loss),
            Update(
                "student",
                {"student": self.student},
                self.student_loss,
                every=self.ratio,
                start=self.ratio - 1,
            ),
        ]

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """The fake score learns the student's samples; noise of their own, not the student's update's."""
        cond = self.conditions(batch, step.draws)
        x = self.input.mixture(self.student, cond, step.draws)
        return Loss(self.fake_errors(x, cond, step.draws).mean())

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """(yT - yF) ((yT - x) - alpha (yT - yF)) / m, its gradient also through the inputs of both networks."""
        cond = self.conditions(batch, step.draws)
        x = self.input.output(self.student, cond, step.draws)
        x_t, _, t = self.noised(x, self.generator_times, step.draws)
        y_teacher = self.teacher.x0(x_t, t, cond, self.guidance_teacher)
        y_fake = self.fake.x0(x_t, t, cond, self.guidance_fake)
        per_sample = sid_loss(x, y_teacher, y_fake, alpha=self.alpha, floor=self.floor)
        with torch.no_grad():
            error = (x - y_teacher).abs().flatten(1).mean(1)
            logs = {
                "loss_unscaled": per_sample.mean(),
                "gap": (y_teacher - y_fake).abs().mean(),
                "teacher_error": error.mean(),
                "teacher_error_min": error.min(),
                "x_mean": x.mean(),
                "x_std": x.std(),
            }
        return Loss(self.loss_scale_g * per_sample.mean(), logs)
