"""Consistency training: the student learns to predict the same data at two noise levels of one (data, noise) pair. There is no
teacher. Student and target use the same dropout mask.

The closer the two levels, the smaller the bias and the larger the variance, so their distance shrinks during training. There
are three curricula:
- "cm": Song et al. 2023 (arXiv 2303.01469), Algorithm 3: N(k) levels of Karras's grid, growing; squared distance; the target
  is an average of the student whose decay mu(k) grows with N.
- "ict": Song & Dhariwal 2023 (arXiv 2310.14189): N(k) doubles; indices by a log-normal; pseudo-Huber; weight 1 / (t - u); the
  target is the student.
- "ect": Geng et al. 2024 (arXiv 2406.14548), easy consistency tuning: starts from a trained diffusion model; t log-normal,
  r = r(t, stage); the unsquared norm; weight 1 / (t - r); where r = 0 the target is the image itself, so that no boundary
  has to be built into the net.

What the loss should look like: relative to the distance of the levels it jumps up each time that distance shrinks (with weight
1 / (t - u) the reported loss keeps its size), so only `diagnostics` and `eval/fd` compare across stages.
`diagnostics/boundary` must stay at 0 (near 0 for "ect").

Deviations: levels are noise levels sigma / alpha of the student's own process, so flows and variance-preserving nets are
trained in their own time. `decay(k)` of "cm" is that of the released code (it divides by N - 1). Stages of "ect" follow the
optimizer step and `stages`, not a count of images: stage floor(stages k / total).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Average, Diagnostics, Loss, Step, Update
from distill.methods.families.suits import check_asked, check_start, refuse_unused
from distill.methods.families.trajectory import (
    boundary_at,
    by_thirds,
    check_sample_steps,
    level_grid,
    noise_level,
    trajectory_diagnostics,
)
from distill.methods.losses.consistency import grid_pair, masked_target, pair_weight
from distill.methods.losses.distances import ict_huber_c, l2, pseudo_huber
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.curriculum import adaptive_ema, doubling_scales, ect_r, progressive_scales
from distill.process.times import index_of, lognormal_level, lognormal_step_weights
from distill.samplers.fewstep import spread_times

CURRICULA = ("cm", "ict", "ect")


class ConsistencyTraining(DistillModule):
    """Consistency training and tuning.

    Args:
        student: a fresh net ("cm", "ict") or a trained diffusion or flow model ("ect").
        curriculum: "cm", "ict" or "ect".
        total_steps: length of the curriculum in optimizer steps; null: the stage's, which fills it in.
        s0, s1: first and last number of levels ("cm": 2 and 150 as published, "ict": 10 and 1280); null: those.
        mu0: "cm": the decay that mu(k) is made from.
        q, stages: "ect": the gap shrinks by q a stage; number of stages.
        mean, std: of ln(sigma): the law of noise levels ("ict", "ect").
        huber_c: c of the pseudo-Huber distance; null: 0.00054 sqrt(D) for "ict", 0 for "ect".
        sample_steps: the step counts that the student is sampled with.
    """

    reads = ("x0",)

    def __init__(
        self,
        student: Denoiser,
        *,
        curriculum: str = "ect",
        total_steps: int | None = None,
        s0: int | None = None,
        s1: int | None = None,
        mu0: float = 0.9,
        q: float = 2.0,
        stages: int = 8,
        mean: float = -1.1,
        std: float = 2.0,
        huber_c: float | None = None,
        sample_steps: Sequence[int] = (1, 2, 4),
    ) -> None:
        super().__init__(student)
        if curriculum not in CURRICULA:
            raise ValueError(f"curriculum: found {curriculum!r}, expected one of {list(CURRICULA)}")
        if student.coupling in ("endpoint", "paired"):
            raise ValueError(
                f"init: found a model of {student.coupling} noise and data; expected a diffusion or flow model"
            )
        if total_steps is None or total_steps < 1:
            raise ValueError(
                f"total_steps: found {total_steps}, expected at least 1 (a training stage fills in its own)"
            )
        self.curriculum, self.total = curriculum, total_steps
        self.s0, self.s1 = _scales_of(curriculum, s0, s1, total_steps)
        _check_laws(mu0, q, stages, std, huber_c)
        self.mu0, self.q, self.stages, self.mean, self.std = mu0, q, stages, mean, std
        size = torch.Size(student.sample_shape).numel()
        self.huber_c = huber_c if huber_c is not None else ict_huber_c(size) if curriculum == "ict" else 0.0
        self.levels = level_grid(student.process, 18)
        self.sample_steps = check_sample_steps(sample_steps, len(self.levels) - 1)
        # The cleanest level at which the student is evaluated.
        self.end = self.levels[-1:] if curriculum == "ect" else level_grid(student.process, 2, "karras")[-1:]
        check_start(student.process, student.kind, student.process.t_max)
        check_asked(student.process, student.kind, self.end)
        self._refuse_of_others(
            {"mu0": mu0, "q": q, "stages": stages, "mean": mean, "std": std, "huber_c": huber_c}
        )
        boundary = None
        if curriculum != "ect":
            boundary = boundary_at(student.process, self.end, student.kind, student.sigma_data)
        self.student = student.with_(boundary=boundary)

    def _refuse_of_others(self, given: Mapping[str, Any]) -> None:
        """Refuse options of the other curricula."""
        used = {
            "cm": ("mu0",),
            "ict": ("mean", "std", "huber_c"),
            "ect": ("q", "stages", "mean", "std", "huber_c"),
        }
        others = {name: value for name, value in given.items() if name not in used[self.curriculum]}
        refuse_unused(self, others, f"with the curriculum {self.curriculum!r}")

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def averages(self) -> Mapping[str, Average]:
        """The target network of "cm", whose decay follows the number of levels."""
        return {"target": Average("student", self.decay)} if self.curriculum == "cm" else {}

    def decay(self, step: int) -> float:
        """mu(k) of "cm"."""
        return adaptive_ema(min(step, self.total), self.total, self.mu0, self.s0, self.s1)

    def scales(self, step: int) -> int:
        """N(k), levels of the grid at an optimizer step ("cm", "ict"); the stage ("ect")."""
        step = min(step, self.total)
        if self.curriculum == "ect":
            return min(self.stages - 1, self.stages * step // self.total)
        grow = progressive_scales if self.curriculum == "cm" else doubling_scales
        return grow(step, self.total, self.s0, self.s1)

    def result(self) -> Result:
        """Multistep consistency sampling at times evenly spaced on a grid of 18 levels. Not guidable: conditions are not
        dropped."""
        sampler = SamplerSpec(
            steps=min(self.sample_steps),
            times=spread_times(self.levels, self.sample_steps, self.student.process.t_min),
            mode="sde",
            noise_floor=0.0 if self.student.boundary is None else self.student.boundary.sigma_min,
        )
        return Result(sampler, "few_step", boundary=self.student.boundary)

    def pair(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """(t, u) [B] float64 times of the student and of its target, t > u."""
        process, count = self.student.process, self.scales(step)
        if self.curriculum == "ect":
            level = lognormal_level(draws.normal("t").double(), self.mean, self.std)
            t = process.time_of(-torch.log(level))
            level = noise_level(process, t)  # clamped to the range of the process
            r = ect_r(level, count, self.q)
            return t, torch.where(r > 0, process.time_of(-torch.log(r.clamp(min=1e-30))), process.t_min)
        grid = level_grid(process, count, "karras")
        if self.curriculum == "cm":
            return grid_pair(grid, draws.integer("n", count - 1))
        weights = lognormal_step_weights(noise_level(process, grid), self.mean, self.std)
        return grid_pair(grid, index_of(draws.uniform("n"), weights.to(draws.index.device)))

    def loss(self, batch: Batch, step: Step) -> Loss:
        """w(t, u) d(f(x_t, t), sg f(x_u, u)) with x_t and x_u of the same data and noise (arXiv 2303.01469, eq. 10)."""
        assert batch.x0 is not None
        process, student, x0 = self.student.process, self.student, batch.x0
        t, u = self.pair(step.draws, step.iteration)
        eps = step.draws.normal("eps", x0.shape[1:])
        x_t, x_u = process.add_noise(x0, eps, t), process.add_noise(x0, eps, u)
        target_net = self.average("target") if "target" in self.further else student
        clean = (u <= 0) if self.curriculum == "ect" else torch.zeros_like(u, dtype=torch.bool)
        with torch.no_grad(), step.same_dropout():
            if self.curriculum == "ect":
                target = masked_target(lambda x, time: target_net.x0(x, time, batch.cond), x_u, u, t, x0)
            else:
                target = target_net.x0(x_u, u, batch.cond)
        with step.same_dropout():
            prediction = student.x0(x_t, t, batch.cond)
        if self.curriculum == "cm":
            per_sample, weight = l2(prediction, target), torch.ones_like(t)
        else:
            per_sample = pseudo_huber(prediction, target, self.huber_c)
            # A clean target has noise level 0, even if the process ends above it (index 0 of a table).
            level_u = torch.where(clean, 0.0, noise_level(process, u))
            weight = pair_weight("default", noise_level(process, t), level_u)
        with torch.no_grad():
            share = torch.sigmoid(-torch.log(noise_level(process, t)))  # 0 noisy, 1 clean
            logs = by_thirds(per_sample, share.clamp(max=0.999))
            logs |= {
                "unweighted": per_sample.mean(),
                "levels": torch.tensor(float(self.scales(step.iteration))),
                "share_clean_target": clean.double().mean(),
                "ratio": (noise_level(process, u) / noise_level(process, t)).mean(),
                "x_std": prediction.std(),
            }
            if self.curriculum == "cm":
                logs["target_decay"] = torch.tensor(self.decay(step.iteration))
        return Loss((weight * per_sample).mean().to(prediction.dtype), logs)

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """The boundary, mean and spread of samples; the student's own samples in most steps replace the teacher's."""
        shape, generator = self.student.sample_shape, self.as_generator()
        z = draws.normal("z", shape)
        most = max(self.sample_steps)
        again = [draws.normal(f"renoise{i}", shape) for i in range(most)]
        slow = generator.generate(z, batch.cond, most, noise=lambda i: again[i])
        return trajectory_diagnostics(generator, batch, z, slow, self.end, f"student, {most} steps")


def _scales_of(curriculum: str, s0: int | None, s1: int | None, total: int) -> tuple[int, int]:
    """(s0, s1), None replaced by the published numbers. Raises ValueError for an invalid pair."""
    if curriculum == "ect":
        if (s0, s1) != (None, None):
            raise ValueError(f"s0, s1: found {s0} and {s1}, but 'ect' has no levels to count; expected null")
        return 0, 0
    first, last = (2, 150) if curriculum == "cm" else (10, 1280)
    low, high = first if s0 is None else s0, last if s1 is None else s1
    if not (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high):
        raise ValueError(f"s0, s1: found {low!r} and {high!r}, expected integers with 1 <= s0 <= s1")
    try:
        (progressive_scales if curriculum == "cm" else doubling_scales)(0, total, low, high)
    except ValueError as error:
        raise ValueError(f"total_steps: {str(error).removeprefix('total: ')}") from None
    return low, high


def _check_laws(mu0: float, q: float, stages: int, std: float, huber_c: float | None) -> None:
    """Raise ValueError for a number outside its range; the message names the option."""
    if not 0 < mu0 < 1:
        raise ValueError(f"mu0: found {mu0}, expected a number in (0, 1)")
    if not q > 1 or not isinstance(stages, int) or stages < 1:
        raise ValueError(f"q, stages: found {q} and {stages}, expected q > 1 and at least one stage")
    if not std > 0:
        raise ValueError(f"std: found {std}, expected a positive number")
    if huber_c is not None and not huber_c >= 0:
        raise ValueError(f"huber_c: found {huber_c}, expected a number of at least 0, or null")
