"""The student's own sampler as a differentiable chain of network calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.data.arguments import integer
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.methods.families.suits import check_start
from distill.models.generator import Generator
from distill.models.model import Model
from distill.models.spec import SamplerSpec
from distill.models.time_grid import TimeGrid
from distill.nets.recomputed import Recomputed
from distill.process.base import Process

STEPS = 5  # MMD-DDM's number of steps, of models that have none of their own


def chain_spec(
    student: Model, steps: int | None, grid: Mapping[str, Any] | None, guidance_scale: float | None
) -> SamplerSpec:
    """The sampler that a student is finetuned with, for exactly one step count.

    Args:
        steps: None: those of a few-step student's sampler, else `STEPS`.
        grid: the times, {name, options} of `process.times.GRIDS`; None: those of the student's sampler.
        guidance_scale: in every step; None: that of the student's sampler.

    Raises:
        ValueError: names the option: a step count that the student is not valid for, a grid that its process does not have or
            that a few-step student has no use for, a first step where the state is mostly data, an adaptive solver, or guidance
            of a student without a null condition.
    """
    own = student.sampler or SamplerSpec(steps=STEPS, any_steps=True, solver="ddim")
    if own.mode == "ode" and own.solver == "rk45":
        raise ValueError(
            "student: is sampled with 'rk45', which chooses its own steps; expected a solver with fixed ones"
        )
    if steps is None:
        count = STEPS if own.any_steps else own.steps
    else:
        count = integer("steps", steps, at_least=1)
    if grid is None:
        times = own.grid(student.process, count)
    elif not own.any_steps:
        raise ValueError(
            f"grid: found {dict(grid)}, but the student is made for the times of its sampler; expected null"
        )
    else:
        times = TimeGrid.from_dict(grid).make(student.process, count)
    check_first(student.process, float(times[0]), count)
    check_start(student.process, student.kind, float(times[0]))
    scale = own.guidance_scale if guidance_scale is None else float(guidance_scale)
    if scale != 1 and not student.guidable:
        raise ValueError(
            f"guidance_scale: found {scale}, but the student was not trained with a null condition; expected 1"
        )
    return replace(
        own,
        steps=count,
        times={count: tuple(times.tolist())},
        any_steps=False,
        time_grid=None,
        guidance_scale=scale,
        guidance_w_range=None if own.guidance_w is None else (own.guidance_w, own.guidance_w),
    )


def check_first(process: Process, t: float, steps: int) -> None:
    """Refuse a first step at a time where a state holds more data than noise: noise alone is no such state.

    Raises:
        ValueError: names `grid`.
    """
    first = torch.tensor([t], dtype=torch.float64, device="cpu")
    alpha, sigma = float(process.alpha(first)), float(process.sigma(first))
    if sigma < alpha:
        raise ValueError(
            f"grid: the first of {steps} steps is at t = {t:g}, where a state holds {alpha:.3g} of the data and {sigma:.3g} of "
            "the noise, but sampling starts from noise alone; expected more steps, or another grid, such as {name: trailing}"
        )


def run_chain(student: Model, spec: SamplerSpec, cond: Cond, draws: Draws, recompute: bool) -> Tensor:
    """All states [steps + 1,B,*S] of the sampler, from noise to samples, with the graph of every call.

    `recompute` keeps the activations of no call: each is made again in the backward pass. All noise comes from `draws`, so the
    same draws make the same samples."""
    shape = student.sample_shape
    if recompute:
        student = student.with_(net=Recomputed(student.net), conditions=student.conditions)
    return Generator(student, spec).generate(
        draws.normal("z", shape),
        cond,
        noise=lambda step: draws.normal(f"renoise{step}", shape),
        return_path=True,
    )
