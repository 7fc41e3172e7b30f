"""Latent consistency distillation: consistency along the guided trajectories of a variance-preserving teacher, the guidance an
input of the student.

Luo et al. 2023 (arXiv 2310.04378), Algorithm 1: t and u = t - T / k on a grid of k levels of the teacher's table; x_u by one
guided DDIM step, w ~ U[w_min, w_max]; f(x_t, t, w) regresses the detached f(x_u, u, w); both calls use the same dropout mask.
Works on any samples, not only on latents.

What the loss should look like: it falls within some hundred steps to a plateau whose height depends on huber_c and stays there
while samples sharpen; watch `diagnostics/trajectory` (distance to the teacher's guided endpoints from one noise) and `eval/fd`.
`diagnostics/boundary` is near 0 (the table's first level is not quite clean).

Deviations: the features of w enter through a layer that starts at 0, so that the student begins as its teacher. Guidance acts
on the net's own prediction after both branches of one batched call; the paper's script guides raw outputs as noise, which is
wrong for v (its later versions convert first). A student without the input w is recorded as one of the mean guidance; the
published LCM-LoRA are sampled with a guidance of 1 to 2 on top, which is not offered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Average, Diagnostics, Loss, Step, Update
from distill.methods.families.suits import check_start, guides, refuse_unused
from distill.methods.families.trajectory import (
    by_thirds,
    check_pair_of_models,
    check_sample_steps,
    target_network,
    trajectory_diagnostics,
)
from distill.methods.losses.distances import distance
from distill.methods.losses.lcm import check_teacher, guided_ddim_step, lcm_pair
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.guidance import check_guidance_range
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.guidance_w import draw_w
from distill.process.tables import VPTable
from distill.samplers.fewstep import lcm_grid, lcm_times


class LCM(DistillModule):
    """Latent consistency distillation.

    Args:
        student: starts from the teacher; a net with `guidance_embedding`, unless w_min = w_max or not `embed_w`.
        teacher: under a table of noise levels (`VPTable`), trained with a null condition unless w_min = w_max = 0.
        w_min, w_max: range of the guidance w = guidance_scale - 1 (the published script: 5 .. 15).
        ddim_steps: k, levels of the training grid; divides the table's length.
        loss: "huber" of the elements, "l2", "l1", or "pseudo_huber" of a whole sample.
        huber_c: c of the Huber losses.
        target_decay: of the target network, an average of the student; 0: the student itself.
        timestep_scaling: of the boundary's coefficients.
        sample_steps: the step counts that the student is sampled with.
        sample_w: guidance w to sample with; null: w_min.
        embed_w: the student takes w as an input. False: it learns the mean of w_min .. w_max (LCM-LoRA, arXiv 2311.05556).
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        w_min: float = 0.0,
        w_max: float = 1.0,
        ddim_steps: int = 50,
        loss: str = "huber",
        huber_c: float = 0.001,
        target_decay: float = 0.95,
        timestep_scaling: float = 10.0,
        sample_steps: Sequence[int] = (1, 2, 4, 8),
        sample_w: float | None = None,
        embed_w: bool = True,
    ) -> None:
        super().__init__(student)
        process = student.process
        if not isinstance(process, VPTable):
            raise ValueError(
                f"student: found {process!r}, expected a table of noise levels such as VPScaledLinear"
            )
        check_pair_of_models(student, teacher)
        check_teacher(process, teacher.kind)
        if not 0 <= target_decay < 1:
            raise ValueError(f"target_decay: expected a number in [0, 1), found {target_decay}")
        check_guidance_range(True, w_min, w_max)
        if w_min == w_max:
            refuse_unused(self, {"embed_w": embed_w}, "for one value of w")
        if not embed_w:
            refuse_unused(self, {"sample_w": sample_w}, "for a student without the input w")
        if student.embeds_guidance != (embed_w and w_min < w_max):
            wanted = "without" if student.embeds_guidance else "with"
            raise ValueError(
                f"w_min, w_max, embed_w: found {w_min}, {w_max}, {embed_w}, expected a student {wanted} a guidance embedding "
                "(adapt: {net: {guidance_embedding: 64}} adds one; embed_w: false needs none)"
            )
        check_start(process, student.kind, process.t_max)
        if (w_min, w_max) != (0, 0) and not guides(teacher):
            raise ValueError(
                f"w_max: found {w_max}, but the teacher was trained without a null condition; expected 0"
            )
        self.grid = lcm_grid(process.num_timesteps, ddim_steps)
        self.distance = distance(loss, huber_c)
        if loss in ("l1", "l2"):
            refuse_unused(self, {"huber_c": huber_c}, f"with the loss {loss!r}")
        self.teacher = self.keep_frozen("teacher", teacher)
        self.w_min, self.w_max, self.ddim_steps = w_min, w_max, ddim_steps
        self.target_decay, self.sample_steps = target_decay, check_sample_steps(sample_steps, ddim_steps)
        self.mean_w = (w_min + w_max) / 2
        self.sample_w = sample_w if sample_w is not None else w_min if embed_w else self.mean_w
        if not w_min <= self.sample_w <= w_max:
            raise ValueError(
                f"sample_w: found {sample_w}, expected {w_min} .. {w_max}, what the student is trained for"
            )
        self.student = student.with_(boundary=Boundary("lcm", timestep_scaling=timestep_scaling))

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def averages(self) -> Mapping[str, Average]:
        """The target network, where it is not the student itself."""
        return target_network(self.target_decay)

    def result(self) -> Result:
        """Latent consistency sampling at diffusers' timesteps. Not guidable: the student is trained without a null
        condition; its guidance is the input w, or baked in."""
        process, embeds = self.student.process, self.student.embeds_guidance
        assert isinstance(process, VPTable)
        times = {
            n: tuple(
                lcm_times(n, num_timesteps=process.num_timesteps, original_steps=self.ddim_steps).tolist()
            )
            for n in self.sample_steps
        }
        sampler = SamplerSpec(
            steps=min(4, max(self.sample_steps)) if 4 in self.sample_steps else min(self.sample_steps),
            times=times,
            mode="sde",
            guidance_baked=1.0 if embeds else 1 + self.mean_w,
            guidance_w=self.sample_w if embeds else None,
            guidance_w_range=(self.w_min, self.w_max) if embeds else None,
        )
        return Result(sampler, "few_step", boundary=self.student.boundary)

    def draw_w(self, draws: Draws) -> Tensor:
        """[B] guidance w."""
        return draw_w(draws.uniform("w"), self.w_min, self.w_max)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """d(f(x_t, t, w), sg f(x_u, u, w)) with x_u from a guided DDIM step of the teacher (arXiv 2310.04378, Algorithm 1)."""
        assert batch.x0 is not None
        process, draws = self.student.process, step.draws
        assert isinstance(process, VPTable)
        index = draws.integer("j", len(self.grid))
        t, u = (time.double() for time in lcm_pair(self.grid, index))
        x_t = process.add_noise(batch.x0, draws.normal("eps", batch.x0.shape[1:]), t)
        w = self.draw_w(draws)
        cond = batch.cond.with_guidance(w) if self.student.embeds_guidance else batch.cond
        with torch.no_grad():
            guided = (self.w_min, self.w_max) != (0, 0)
            conditional, unconditional = self.teacher.branches(x_t, t, batch.cond, guided=guided)
            x_u = guided_ddim_step(process, self.teacher.kind, conditional, unconditional, x_t, t, u, w).x_u
            target_net = self.average("target") if "target" in self.further else self.student
            with step.same_dropout():
                target = target_net.x0(x_u, u, cond)
        with step.same_dropout():
            prediction = self.student.x0(x_t, t, cond)
        per_sample = self.distance(prediction, target)
        with torch.no_grad():
            logs = by_thirds(per_sample, 1 - (index + 1) / len(self.grid))
            logs |= {"x_std": prediction.std(), "w": w.mean()}
        return Loss(per_sample.mean(), logs)

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Distance to the teacher's guided endpoints from the same noise, the boundary, mean and spread of samples."""
        z, scale = draws.normal("z", self.student.sample_shape), 1 + self.sample_w
        wanted = self.teacher.transport(
            z, batch.cond, solver="ddim", steps=self.ddim_steps, guidance_scale=scale
        )[0]
        levels = torch.cat([self.grid.flip(0).double(), torch.zeros(1, dtype=torch.float64)])
        return trajectory_diagnostics(self.as_generator(), batch, z, wanted, levels)
