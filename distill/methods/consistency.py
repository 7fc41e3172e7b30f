"""Consistency distillation: the student learns to predict the same data from every point of a teacher's trajectory.

Song et al. 2023 (arXiv 2303.01469), Algorithm 2: f(x_t, t) regresses the detached f(x_u, u), where x_u is one step of the
teacher's ODE from x_t; both calls use the same dropout mask. The teacher must have a velocity; times t > u are neighbours on a
grid of `scales` levels.

What the loss should look like: it falls by a factor of two or so within the first tenth and then hardly moves, while samples
go on improving: target and student move together. It is no measure of progress; watch `diagnostics/trajectory` (distance to the
teacher's endpoint from the same noise) and `eval/fd`. `diagnostics/boundary` must stay at 0.

Deviations: the distance is a pseudo-Huber of the whole sample by default (arXiv 2310.14189; the paper's LPIPS needs images of
64 pixels and weights that no package ships). The grid and the solver live in the teacher's own process; on a flow the uniform
grid is the default, and no boundary scaling is needed, since x0 = x_t - t v is x_t at t = 0. Where Heun's step would end at a
time without a velocity (t = 0 of a predicted x0), or where it is mostly the teacher's error (t_min of a predicted x0 under a
cosine), an Euler step is taken. Few-step times are evenly spaced on the grid; the paper searches them by FID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Average, Diagnostics, Loss, Step, Update
from distill.methods.families.suits import (
    check_asked,
    check_own_clock,
    check_start,
    guides,
    refuse_unused,
    step_factors,
)
from distill.methods.families.trajectory import (
    boundary_at,
    by_thirds,
    check_pair_of_models,
    check_sample_steps,
    level_grid,
    noise_level,
    target_network,
    trajectory_diagnostics,
)
from distill.methods.losses.consistency import grid_pair, teacher_step
from distill.methods.losses.distances import distance
from distill.models.denoiser import Denoiser, velocity_at_end
from distill.models.guidance import check_guidance_scale
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.scalings import SIGMA_DATA, sigma_weight
from distill.samplers.fewstep import spread_times

# Largest factor by which one step may multiply the error of the teacher's prediction: it is 2 on EDM's grid of 18 levels, and
# 1000 for an x0 that is converted to a velocity at t_min of a cosine schedule.
LARGEST_STEP = 100.0


class Consistency(DistillModule):
    """Consistency distillation.

    Args:
        student: starts from the teacher.
        teacher: a diffusion or flow teacher under the same process.
        scales: N, levels of the grid.
        grid: "karras", "uniform" in the process's time, or "auto": Karras for EDM, uniform for the others.
        solver: "heun" (two network calls) or "euler".
        loss: "pseudo_huber" of a whole sample, "huber" of its elements, "l2" or "l1".
        huber_c: c of both Huber losses.
        weight: over noise levels: "uniform", "snr", "snr+1", "karras" or "truncated-snr".
        target_decay: of the target network, an average of the student; 0: the student itself.
        guidance_scale: the teacher's guidance; the student learns the guided trajectories.
        sample_steps: the step counts that the student is sampled with.
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        scales: int = 18,
        grid: str = "auto",
        solver: str = "heun",
        loss: str = "pseudo_huber",
        huber_c: float = 0.03,
        weight: str = "uniform",
        target_decay: float = 0.0,
        guidance_scale: float = 1.0,
        sample_steps: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__(student)
        check_pair_of_models(student, teacher)
        if not isinstance(scales, int) or scales < 2:
            raise ValueError(f"scales: found {scales!r}, expected an integer of at least 2")
        if not 0 <= target_decay < 1:
            raise ValueError(f"target_decay: expected a number in [0, 1), found {target_decay}")
        if solver not in ("heun", "euler"):
            raise ValueError(f"solver: found {solver!r}, expected 'heun' or 'euler'")
        check_guidance_scale(guides(teacher), guidance_scale)
        sigma_weight(weight, torch.ones(1))
        self.distance = distance(loss, huber_c)
        if loss in ("l1", "l2"):
            refuse_unused(self, {"huber_c": huber_c}, f"with the loss {loss!r}")
        if grid == "uniform":
            check_own_clock(student.process, "grid", "'uniform'", "'karras' or 'auto'")
        check_start(student.process, student.kind, student.process.t_max)
        self.teacher = self.keep_frozen("teacher", teacher)
        self.levels = level_grid(student.process, scales, grid)
        check_asked(student.process, student.kind, self.levels)
        self.solver, self.weight, self.target_decay = solver, weight, target_decay
        self.guidance_scale, self.sample_steps = guidance_scale, check_sample_steps(sample_steps, scales - 1)
        # Heun's last step evaluates the end, where the velocity may be undefined or mostly the teacher's error.
        before, after = step_factors(teacher.process, teacher.kind, self.levels)
        if not bool((before <= LARGEST_STEP).all()):
            raise ValueError(
                f"teacher: predicts {teacher.kind!r}, whose error a step from t = {float(self.levels[0]):g} multiplies by "
                f"{float(before[0]):.4g} under {teacher.process!r}; expected a teacher that predicts x0 or v, or more scales"
            )
        self.singular = None if velocity_at_end(teacher) else student.process.t_min
        if self.singular is None and float(after[-1]) > LARGEST_STEP:
            self.singular = float(self.levels[-1])
        boundary = boundary_at(student.process, self.levels, student.kind, student.sigma_data)
        self.student = student.with_(boundary=boundary)

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def averages(self) -> Mapping[str, Average]:
        """The target network, where it is not the student itself."""
        return target_network(self.target_decay)

    def result(self) -> Result:
        """Multistep consistency sampling at times evenly spaced on the grid. Not guidable: the student is trained without a
        null condition; the teacher's guidance is baked in."""
        sampler = SamplerSpec(
            steps=min(self.sample_steps),
            times=spread_times(self.levels, self.sample_steps, self.student.process.t_min),
            mode="sde",
            guidance_baked=self.guidance_scale,
            noise_floor=0.0 if self.student.boundary is None else self.student.boundary.sigma_min,
        )
        return Result(sampler, "few_step", boundary=self.student.boundary)

    def loss(self, batch: Batch, step: Step) -> Loss:
        """w(t) d(f(x_t, t), sg f(x_u, u)) with x_u from one step of the teacher (arXiv 2303.01469, eq. 7)."""
        assert batch.x0 is not None
        process, draws = self.student.process, step.draws
        index = draws.integer("n", len(self.levels) - 1)
        t, u = grid_pair(self.levels, index)
        x_t = process.add_noise(batch.x0, draws.normal("eps", batch.x0.shape[1:]), t)

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            return self.teacher.velocity(x, time, batch.cond, self.guidance_scale)

        x_u = teacher_step(velocity, x_t, t, u, self.solver, self.singular)
        target_net = self.average("target") if "target" in self.further else self.student
        with torch.no_grad(), step.same_dropout():
            target = target_net.x0(x_u, u, batch.cond)
        with step.same_dropout():
            prediction = self.student.x0(x_t, t, batch.cond)
        per_sample = self.distance(prediction, target)
        weight = sigma_weight(self.weight, noise_level(process, t), self.student.sigma_data or SIGMA_DATA)
        with torch.no_grad():
            logs = by_thirds(per_sample, index / (len(self.levels) - 1))
            logs["unweighted"] = per_sample.mean()
            logs["x_std"] = prediction.std()
        return Loss((weight * per_sample).mean().to(prediction.dtype), logs)

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Distance to the teacher's endpoints from the same noise, the boundary, mean and spread of samples."""
        z = draws.normal("z", self.student.sample_shape)
        wanted = self.teacher.transport(
            z, batch.cond, solver="heun", steps=len(self.levels), guidance_scale=self.guidance_scale
        )[0]
        return trajectory_diagnostics(self.as_generator(), batch, z, wanted, self.levels)
