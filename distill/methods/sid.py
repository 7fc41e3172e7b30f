"""SiD, score identity distillation: minimise a Fisher divergence between the student's and the teacher's samples at all noise
levels, without data.

Zhou et al. 2024 (arXiv 2404.04057), Algorithm 1; long-short guidance (LSG, arXiv 2406.01561) through the four guidance
scales; few-step students (arXiv 2505.12674): the loss is applied to the output of a step drawn uniformly, with one fake
score for all. `noise_scale` below 1 dampens the fresh noise of a few-step student in sampling only.

What the loss should look like: NOT a measure of progress. With alpha = 1 its expectation is zero where the fake score is
exact, so it moves about zero, and for alpha > 1 it is negative; `student/loss`, which has the factor `loss_scale_g` in it and
is a sum over pixels, may show -60 in a healthy run (`student/loss_unscaled`), and falls or rises while samples improve. The
numbers to watch are `diagnostics/gap_*` (|teacher x0 - fake x0|^2 on the student's samples at three noise levels, falling),
`fake/loss` (settles to a level), `diagnostics/x_std` (near the data's; far below means collapse) and `eval/fd`.

Deviations: samples that are not finite are not dropped one by one (that does not protect the gradients): the engine skips
and counts the step, on all processes. The augmentation of the images that the fake score learns is left out. The time samplers
and the weight of the fake score's loss are options, so that flow and variance-preserving teachers are distilled in their own
time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from distill.data.batch import Batch
from distill.engine.update import Loss, Step
from distill.methods.families.options import FakeScore, Guidance, Sampling, Updates
from distill.methods.families.score import ScoreDistillation
from distill.methods.losses.score import sid_loss
from distill.models.denoiser import Denoiser
from distill.typed import filled

SAMPLING = Sampling()
UPDATES = Updates(fake_per_student=1)
Given = Mapping[str, Any]


class SiD(ScoreDistillation):
    """Score identity distillation.

    Args:
        student: starts from the teacher.
        teacher: a diffusion or flow model; the fake score starts as its copy.
        alpha: 1 is safe; 1.2 as in the paper's CIFAR-10 and ImageNet runs; 0 is the plain projected loss.
        sampling, fake, guidance, updates: see `families.options`.
        generator_times: times of the student's loss, see `losses.score_times.times_of`; null: under EDM SiD's polynomial with
            t_max = 800, else `losses.score_times.usual_times`. `fake.times`: null: under EDM its log-normal.
        loss_scale_g: factor on the student's loss (the reference: 100); with Adam and beta1 = 0 it changes nothing but the
            distance to Adam's epsilon.
        floor: of the weight's normaliser.
        noise_scale: of the student's sampler, see `SamplerSpec`; training never uses it.
    """

    GENERATOR_TIMES: ClassVar[Mapping[str, Any]] = {"name": "sid", "t_max": 800.0}
    FAKE_TIMES: ClassVar[Mapping[str, Any]] = {"name": "lognormal", "mean": -1.2, "std": 1.2}
    ORDER: ClassVar[tuple[str, str]] = ("fake", "fresh")

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        alpha: float = 1.0,
        sampling: Sampling | Given = SAMPLING,
        generator_times: Given | None = None,
        fake: FakeScore | Given = FakeScore(),
        guidance: Guidance | Given = Guidance(),
        updates: Updates | Given = UPDATES,
        loss_scale_g: float = 100.0,
        floor: float = 1e-5,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(
            student,
            teacher,
            sampling=filled(SAMPLING, sampling, "sampling"),
            generator_times=generator_times,
            fake=filled(FakeScore(), fake, "fake"),
            guidance=filled(Guidance(), guidance, "guidance"),
            updates=filled(UPDATES, updates, "updates"),
            reduction="sum",
            noise_scale=noise_scale,
        )
        for name, value in (("loss_scale_g", loss_scale_g), ("floor", floor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        one = torch.ones(1, 1)
        sid_loss(one, one, one, alpha=alpha, floor=floor)
        self.alpha, self.floor, self.loss_scale_g = alpha, floor, loss_scale_g

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """(yT - yF) ((yT - x) - alpha (yT - yF)) / m, its gradient also through the inputs of both networks."""
        x, cond = self.student_samples(batch, step)
        y_teacher, y_fake = self.predictions(x, cond, step.draws)
        per_sample = sid_loss(x, y_teacher, y_fake, alpha=self.alpha, floor=self.floor)
        logs = {"loss_unscaled": per_sample.mean().detach(), **self.describe(x, y_teacher, y_fake)}
        return Loss(self.loss_scale_g * per_sample.mean(), logs)
