"""Progressive distillation: a student of N steps learns to do in one DDIM step what its teacher of 2N steps does in two.

Salimans & Ho 2022 (arXiv 2202.00512), Algorithm 2; with `w_min`, `w_max` the second stage of guided distillation (Meng et al.
2022, arXiv 2210.03142), where teacher and student get the same guidance w as an input. One stage of training is one halving;
a recipe's `halve` block makes the chain of stages.

What the loss should look like: at each halving it starts small (the student is its teacher) and falls by two or more in the
first tenth; it rises from halving to halving (about 1e-5 at 32 steps to 1e-3 at 1 in two dimensions). Watch
`diagnostics/match`: |student in N steps - teacher in 2N|^2 from the same noise, to be far below `diagnostics/undistilled`.

Deviations: the last step lands on clean data exactly, where the reference lands on log-SNR 20 and then replaces the target by
the teacher's second x0 (the same number). The target is computed without the paper's division, which loses accuracy (see
`losses.progressive.two_step_target`). An average may be kept and becomes the next teacher; the reference keeps none. x0 is
never clipped in a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.families.suits import guides
from distill.methods.losses.progressive import StudentGrid, check_student, progressive_loss, two_step_target
from distill.models.denoiser import Denoiser, check_same_samples
from distill.models.guidance import check_guidance_range, check_guidance_scale
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.base import at_least_float32
from distill.process.guidance_w import draw_w
from distill.process.tables import VPTable
from distill.process.times import default_grid, student_grid


class Progressive(DistillModule):
    """One halving.

    Args:
        student: starts from the teacher; predicts v or x0 (eps only above 8 steps).
        teacher: valid in 2 `steps` steps, under the same process; where it was made for that count, at its times.
        steps: N, the student's steps.
        weight: on the error of x0: "constant", "snr", "snr_trunc" (max(SNR, 1), the paper's default) or "snr+1".
        guidance_scale: the teacher's guidance; the student learns the guided result.
        w_min, w_max: range of the guidance w = guidance_scale - 1 that both nets get as an input, drawn uniformly; None for
            nets without that input.
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        steps: int = 1,
        weight: str = "snr_trunc",
        guidance_scale: float = 1.0,
        w_min: float | None = None,
        w_max: float | None = None,
    ) -> None:
        super().__init__(student)
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps: found {steps!r}, expected an integer of at least 1")
        check_student(student.process, student.kind, steps, weight)
        check_same_samples(student, teacher)
        if teacher.sampler is not None and not teacher.sampler.valid(2 * steps):
            found = sorted(teacher.sampler.times)
            raise ValueError(
                f"teacher: made for {found} step(s); a student of {steps} needs one of {2 * steps}"
            )
        if teacher.sampler is None and teacher.coupling in ("endpoint", "few_step"):
            raise ValueError(
                "teacher: found a few-step student without a sampler, so its times are unknown; expected one with"
            )
        if teacher.boundary is not None or (teacher.sampler is not None and teacher.sampler.mode == "sde"):
            raise ValueError(
                "teacher: found a consistency model, which is not sampled by DDIM; expected another"
            )
        check_guidance_scale(guides(teacher), guidance_scale)
        check_guidance_range(student.embeds_guidance, w_min, w_max)
        check_guidance_range(teacher.embeds_guidance, w_min, w_max, "teacher")
        _check_trained_range(teacher, w_min, w_max)
        self.teacher = self.keep_frozen("teacher", teacher)
        self.weight, self.guidance_scale = weight, guidance_scale
        self.w_range = None if w_min is None or w_max is None else (w_min, w_max)
        self.grid = StudentGrid(student.process, _teacher_times(teacher, 2 * steps))
        self.student = student.with_(boundary=None)

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """Exactly N steps of DDIM, on every second time of the teacher. Not guidable: the student is trained without a null
        condition; the teacher's guidance is baked in, or the input w."""
        steps, times = self.grid.steps, tuple(self.grid.times[::2].tolist())
        earlier = self.teacher.sampler
        sampler = SamplerSpec(
            steps=steps,
            times={steps: times},
            solver="ddim",
            guidance_baked=self.guidance_scale * (1.0 if earlier is None else earlier.guidance_baked),
            guidance_w=None if self.w_range is None else self.w_range[0],
            guidance_w_range=self.w_range,
        )
        return Result(sampler, "few_step")

    def guided(self, cond: Cond, draws: Draws) -> Cond:
        """The conditions, with a guidance w a sample where the nets take one."""
        if self.w_range is None:
            return cond
        return cond.with_guidance(draw_w(draws.uniform("w"), *self.w_range))

    def loss(self, batch: Batch, step: Step) -> Loss:
        """w(SNR) |x0_hat - x0~|^2 with x0~ from two steps of the teacher (arXiv 2202.00512, Algorithm 2)."""
        assert batch.x0 is not None
        process, kind = self.student.process, self.student.kind
        index = step.draws.integer("i", self.grid.steps)
        at = self.grid.step(index)
        z = process.add_noise(batch.x0, step.draws.normal("eps", batch.x0.shape[1:]), at.u)
        cond = self.guided(batch.cond, step.draws)

        def teach(x: Tensor, t: Tensor) -> Tensor:
            return at_least_float32(self.teacher(x, t, cond, self.guidance_scale))

        target = two_step_target(teach, process, self.teacher.kind, z, at).target
        out = self.student(z, at.u, cond)
        per_sample = progressive_loss(process, kind, out, target, z, at.u, self.weight)
        with torch.no_grad():
            logs = {
                "loss_noisiest": _mean_where(per_sample, index == self.grid.steps - 1),
                "loss_cleanest": _mean_where(per_sample, index == 0),
                "share_cleanest": (index == 0).float().mean(),
                "target_max": target.x0.abs().max(),
            }
        return Loss(per_sample.mean(), logs)

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Squared distance to the teacher in 2N steps of the student in N steps and of the teacher in N, from the same
        noise."""
        z, cond = draws.normal("z", self.student.sample_shape), self.guided(batch.cond, draws)
        student = self.best()
        assert isinstance(student, Denoiser)

        def run(model: Denoiser, times: Tensor, scale: float) -> Tensor:
            return model.transport(z, cond, solver="ddim", grid=times, guidance_scale=scale)[0]

        times, half = self.grid.times, self.grid.times[::2]
        wanted, naive = (
            run(self.teacher, times, self.guidance_scale),
            run(self.teacher, half, self.guidance_scale),
        )
        made = run(student, half, 1.0)
        scalars = {
            "match": (made - wanted).square().mean(),
            "undistilled": (naive - wanted).square().mean(),
            "x_mean": made.mean(),
            "x_std": made.std(),
            "x_max": made.abs().max(),
        }
        n = self.grid.steps
        rows = [(f"teacher, {2 * n}", wanted), (f"teacher, {n}", naive), (f"student, {n}", made)]
        return Diagnostics(scalars, rows)


def _teacher_times(teacher: Denoiser, steps: int) -> Tensor:
    """The times [steps + 1] at which the teacher is sampled: its own, so that the grids of a chain of rounds never mix, or,
    where it is valid in any number of steps, those of its process."""
    own = None if teacher.sampler is None else teacher.sampler.times.get(steps)
    if own is not None:
        return torch.tensor(own, dtype=torch.float64)
    make = student_grid if isinstance(teacher.process, VPTable) else default_grid
    return make(teacher.process, steps)


def _check_trained_range(teacher: Denoiser, w_min: float | None, w_max: float | None) -> None:
    """Refuse guidance outside of the range that the teacher was trained for."""
    trained = None if teacher.sampler is None else teacher.sampler.guidance_w_range
    if trained is None or w_min is None or w_max is None or trained[0] <= w_min <= w_max <= trained[1]:
        return
    raise ValueError(
        f"w_min, w_max: found {w_min} and {w_max}, but the teacher was trained for {trained[0]} .. {trained[1]}"
    )


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values under a mask, 0 where it is empty; no host sync."""
    return (values.detach() * mask).sum() / mask.sum().clamp(min=1)
