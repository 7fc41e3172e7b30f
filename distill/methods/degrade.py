"""Degradation recording, DisBack's first stage: train a copy of the teacher on the initial student's samples and store nodes.

Zhang et al. 2024 (arXiv 2408.15991). A copy of the teacher is trained on samples of the initial student with the fake
score's loss. The stored nodes s_1 ... s_N lead from the teacher (s_0, not stored) to a model that fits the student. The second
stage, `disback`, uses them as targets in reverse order.

What the loss should look like: it starts at the teacher's error on samples outside of its training data and falls quickly,
mostly within ten to a hundred steps. Place the nodes there: before and after, they hardly differ from each other.

Deviations: the initial student is the teacher itself, used as a one-step (or few-step) generator, unless another stage is
named; the public SDXL run starts from an already distilled student. The GAN head that the public code trains here as well is
not part of the paper's stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.networks import check_apart
from distill.engine.update import Loss, Step, Update
from distill.methods.families.options import FakeScore, Sampling
from distill.methods.families.score_matching import ScoreMatching, conditions_of
from distill.methods.families.student_input import StudentInput
from distill.methods.losses.backtrack import node_steps
from distill.models.denoiser import Denoiser, check_same
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.typed import filled

SAMPLING = Sampling(labels="uniform")
FAKE_TIMES = {"name": "karras", "low": 0, "high": 999}  # under EDM
Given = Mapping[str, Any]


class Degrade(DistillModule):
    """Record the path from the teacher to the initial student.

    Args:
        student: starts from the teacher and is degraded.
        generator: the initial student, frozen; makes samples in the steps of `sampling.levels`.
        total_steps, node_every: optimizer steps of the stage (null: the stage's), and steps between stored nodes; the last
            step always stores one.
        sampling, fake, reduction: as in the second stage, see `families.options`.
    """

    def __init__(
        self,
        student: Denoiser,
        generator: Denoiser,
        *,
        total_steps: int | None = None,
        node_every: int = 50,
        sampling: Sampling | Given = SAMPLING,
        fake: FakeScore | Given = FakeScore(),
        reduction: str = "mean",
    ) -> None:
        super().__init__(student)
        options = filled(SAMPLING, sampling, "sampling")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps: found {total_steps}, expected at least 1, or null")
        self.nodes = node_steps(total_steps or 0, node_every)
        self.input = StudentInput(student.process, options.levels, options.unit_noise)
        _check_models(student, generator, self.input)
        self.matching = ScoreMatching(student, filled(FakeScore(), fake, "fake"), FAKE_TIMES, reduction)
        self.generator = self.keep_frozen("generator", generator)
        self.labels = options.labels

    def updates(self) -> Sequence[Update]:
        """One update: the degraded teacher."""
        return [Update("student", {"student": self.student}, self.loss)]

    def snapshots(self) -> Sequence[int]:
        """The steps after which a node is stored."""
        return self.nodes

    def result(self) -> Result:
        """The teacher's sampler: a node is a score model. Not guidable, even where the teacher is: conditions are not dropped,
        so the null condition is forgotten."""
        own = self.student.sampler or SamplerSpec(steps=50, any_steps=True, solver="ddim")
        return Result(replace(own, guidance_scale=1.0), "independent", boundary=self.student.boundary)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """Denoising score matching on the initial student's samples."""
        cond = conditions_of(self.labels, self.student.conditions, batch, step.draws)
        x = self.input.mixture(self.generator, cond, step.draws)
        return Loss(self.matching(self.student, x, cond, step.draws).mean(), {"x_std": x.std()})


def _check_models(teacher: Denoiser, generator: Denoiser, start: StudentInput) -> None:
    """Refuse models that do not fit together, and a distilled generator at other times than its own."""
    check_apart("generator", generator, teacher)
    check_same("generator", generator, "teacher", teacher)
    if generator.process.config() != teacher.process.config():
        raise ValueError(
            f"generator: lives under {generator.process!r}, the teacher under {teacher.process!r}; expected one process"
        )
    if teacher.coupling != "independent":
        raise ValueError(
            f"init: found a model of {teacher.coupling} noise and data, which has no score; expected a diffusion or flow "
            "model"
        )
    for name, model in (("generator", generator), ("init", teacher)):
        if model.embeds_guidance:
            raise ValueError(
                f"{name}: takes the guidance as an input, which this method does not give; expected a model without"
            )
    if generator.coupling in ("endpoint", "few_step"):
        _check_start(generator, start)


def _check_start(generator: Denoiser, start: StudentInput) -> None:
    """Refuse to sample a distilled generator at other times than those that it was made for."""
    made, wanted = generator.sampler, start.spec(1.0, 1.0)
    if made is None:
        return
    times, ours = made.times.get(start.steps), wanted.times[start.steps]
    near = times is not None and all(
        math.isclose(a, b, rel_tol=1e-6) for a, b in zip(times, ours, strict=True)
    )
    if not near or not math.isclose(made.start_scale, wanted.start_scale, rel_tol=1e-6):
        raise ValueError(
            f"sampling.levels, unit_noise: start steps at {ours} from {wanted.start_scale:.4g} z, but the generator was made "
            f"for {dict(made.times)} from {made.start_scale:.4g} z"
        )
