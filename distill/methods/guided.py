"""One network call a step in place of two, and another kind of prediction: the student learns the teacher's (guided) x0 at
all times. It prepares a teacher for progressive distillation.

Meng et al. 2022 (arXiv 2210.03142), stage 1: f(z_u, w) learns x^w = (1 + w) x_cond - w x_uncond with w ~ U[w_min, w_max] as an
input of the student. With w_min = w_max = 0 and a student read as v (`adapt: {kind: v}` of the training stage) it is the
re-parameterisation of an eps teacher (Salimans & Ho 2022, arXiv 2202.00512, section 4 explains why eps students fail).

What the loss should look like: for a re-parameterised net it starts at the size of the data (its output now has another
meaning) and falls within some hundred steps to near 0; for a guided student it starts near 0 and stays there.

Deviations: the guidance's features enter through a layer that starts at 0, so that step 0 is the unguided teacher; the
reference embeds w like its time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill.data.batch import Batch
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step, Update
from distill.methods.families.suits import check_clean_end, check_own_clock, guides
from distill.methods.losses.progressive import check_student, guided_target, progressive_loss, snr_weight
from distill.models.denoiser import Denoiser, check_same_samples
from distill.models.guidance import check_guidance_range
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.base import at_least_float32
from distill.process.guidance_w import draw_w
from distill.process.times import uniform_times


class Guided(DistillModule):
    """Match the teacher's guided x0 at continuous times.

    Args:
        student: predicts v, x0 or the velocity, not under EDM (uniform times are noise levels of 0 .. 80 there); embeds the
            guidance unless w_min = w_max = 0.
        teacher: any kind, under the same process; trained with a null condition unless w_min = w_max = 0.
        w_min, w_max: guidance w = guidance_scale - 1, drawn uniformly; 0 and 0 for none.
        weight: on the error of x0, see `losses.progressive.snr_weight`.
        clip: clamp the guided x0 to [-clip, clip]; None: do not.
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        w_min: float = 0.0,
        w_max: float = 0.0,
        weight: str = "snr+1",
        clip: float | None = None,
    ) -> None:
        super().__init__(student)
        check_student(student.process, student.kind, 1, weight)
        instead = "a flow or a variance-preserving process (under EDM: progressive or consistency with guidance_scale)"
        check_own_clock(student.process, "student", "uniform times", instead)
        check_clean_end(
            student.process,
            student.kind,
            "x0",
            lambda t: snr_weight(weight, "x0", 2 * student.process.log_ratio(t)),
            "weight",
        )
        check_same_samples(student, teacher)
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: found {clip}, expected a positive number or null")
        if teacher.coupling in ("endpoint", "few_step"):
            raise ValueError(
                "teacher: found a few-step student, which is trained at its own times only; expected a model of all times"
            )
        if teacher.embeds_guidance:
            raise ValueError("teacher: takes the guidance as an input; expected a teacher without")
        self.embeds = (w_min, w_max) != (0, 0)
        check_guidance_range(student.embeds_guidance, *((w_min, w_max) if self.embeds else (None, None)))
        if self.embeds and not guides(teacher):
            raise ValueError(
                f"w_max: found {w_max}, but the teacher was trained without a null condition; expected 0"
            )
        self.teacher = self.keep_frozen("teacher", teacher)
        self.w_min, self.w_max, self.weight, self.clip = w_min, w_max, weight, clip
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Any number of DDIM steps, each one network call. The coupling is the teacher's (a rectified flow stays one). Not
        guidable: the student is trained without a null condition; its guidance is the input w."""
        sampler = SamplerSpec(
            steps=50,
            any_steps=True,
            solver="ddim",
            guidance_w=self.w_min if self.embeds else None,
            guidance_w_range=(self.w_min, self.w_max) if self.embeds else None,
        )
        return Result(sampler, self.teacher.coupling)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """w(SNR) |x0_hat - x^w|^2 at uniform times."""
        assert batch.x0 is not None
        process, draws = self.student.process, step.draws
        u = uniform_times(draws.uniform("u"), process.t_min, process.t_max)
        z = process.add_noise(batch.x0, draws.normal("eps", batch.x0.shape[1:]), u)
        w = draw_w(draws.uniform("w"), self.w_min, self.w_max)
        with torch.no_grad():
            branches = self.teacher.branches(z, u, batch.cond, guided=self.embeds)
            conditional, unconditional = (at_least_float32(branch) for branch in branches)
            target = guided_target(process, self.teacher.kind, conditional, unconditional, z, u, w, self.clip)
        out = self.student(z, u, batch.cond.with_guidance(w) if self.embeds else batch.cond)
        per_sample = progressive_loss(process, self.student.kind, out, target, z, u, self.weight)
        return Loss(per_sample.mean(), {"target_max": target.x0.abs().max()})
