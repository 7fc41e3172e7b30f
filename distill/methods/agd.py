"""Adapter guidance distillation (AGD): one network call a step in place of two, with the guidance as an input, by adapters that
are trained on the teacher's guided trajectories.

Jensen & Sadat 2025, "Efficient Distillation of Classifier-Free Guidance using Adapters" (arXiv 2503.07274). At the states of
stored guided trajectories the student's prediction regresses u + g (c - u), g drawn for each trajectory. The base stays as it
was: without the adapters it is the teacher with ordinary guidance. The number of steps stays the teacher's.

What the loss should look like: it starts at the mean squared difference that guidance makes and falls to a few percent of it
within some hundred steps; `student/share` is the part that is left.

Deviations: the paper stores guided predictions. Here states are stored, and the frozen teacher, which is the base itself,
predicts again: two more forward passes a step, for a fraction of the disk. All terms are 0 at the start. Times are given to the
adapters in [0, 1]. The default adapters are low-rank ones with features of w; the paper's cross-attention and offset are
`kind: attention` and `kind: offset` (docs/adapters.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.suits import guides
from distill.methods.families.trajectory import check_pair_of_models
from distill.methods.losses.distances import l2
from distill.models.denoiser import Denoiser
from distill.models.guidance import check_guidance_range, guide
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.guidance_w import w_of_scale


class AGD(DistillModule):
    """Regression of guided predictions along guided trajectories.

    Args:
        student: starts from the teacher and takes the guidance w as an input: `student=guidance`, or a net with
            `guidance_embedding`.
        teacher: an ODE model, trained with a null condition.
        guidance_scale: lowest and highest guidance scale; those that the pairs were made with.
        sample_scale: guidance scale to sample with by default; None: the middle.
    """

    PAIRS_OF = "teacher"
    reads = ("path", "times", "guidance")

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        guidance_scale: Sequence[float] = (1.0, 4.0),
        sample_scale: float | None = None,
    ) -> None:
        super().__init__(student)
        check_pair_of_models(student, teacher)
        if student.kind != teacher.kind:
            raise ValueError(
                f"student: predicts {student.kind!r}, the teacher {teacher.kind!r}; expected the same"
            )
        if not guides(teacher):
            raise ValueError(
                "teacher: found a model without a null condition, which has no guidance to distil; expected one that was "
                "trained with dropped conditions"
            )
        if len(guidance_scale) != 2 or not 0 <= guidance_scale[0] < guidance_scale[1]:
            raise ValueError(
                f"guidance_scale: found {list(guidance_scale)}, expected [low, high] with low < high"
            )
        low, high = (float(scale) for scale in guidance_scale)
        if not student.embeds_guidance:
            raise ValueError(
                "student: does not take the guidance as an input; expected student=guidance, or adapt: {lora: {guidance: {}}}"
            )
        self.range = (low - 1, high - 1)
        check_guidance_range(True, *self.range)
        self.sample_scale = (low + high) / 2 if sample_scale is None else sample_scale
        if not low <= self.sample_scale <= high:
            raise ValueError(f"sample_scale: found {sample_scale}, expected {low:g} .. {high:g}")
        self.guidance_range = (low, high)
        self.teacher = self.keep_frozen("teacher", teacher)
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """The teacher's sampler, each step one call. Not guidable: its guidance is the input w, and guidance on top would be
        applied twice."""
        own = self.teacher.sampler or SamplerSpec(steps=50, any_steps=True)
        w = self.sample_scale - 1
        sampler = replace(own, guidance_scale=1.0, guidance_w=w, guidance_w_range=self.range)
        return Result(sampler, self.teacher.coupling)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """|f(x_t, t, c, w) - (u + g (c - u))|^2 at a state of each trajectory but its last, g = 1 + w (arXiv 2503.07274)."""
        assert batch.path is not None
        assert batch.times is not None
        assert batch.guidance is not None
        index = step.draws.integer("k", batch.path.shape[1] - 1)
        x_t = batch.path[torch.arange(len(index), device=index.device), index]
        t = batch.times[index]
        with torch.no_grad():
            conditional, unconditional = self.teacher.branches(x_t, t, batch.cond)
            target = guide(unconditional, conditional, batch.guidance)
        w = w_of_scale(batch.guidance)
        loss = l2(self.student(x_t, t, batch.cond.with_guidance(w)), target).mean()
        whole = l2(conditional, target).mean()
        return Loss(
            loss, {"share": loss.detach() / whole.clamp(min=1e-12), "guidance": batch.guidance.mean()}
        )
