"""Diagnostics of score distillation: predictions of teacher and fake score on samples of the student's average."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.update import Diagnostics
from distill.models.denoiser import Denoiser
from distill.process.edm import EDM

if TYPE_CHECKING:
    from distill.methods.families.score import ScoreDistillation

# Noise levels sigma / alpha of the pictures.
SHOWN_LEVELS = (0.3, 1.0, 3.0)
# Errors by noise level are means over as many samples in each of these bins.
BINS = 10
# Below this share of the data's standard deviation a warning says that the student has collapsed.
COLLAPSED = 0.2


def diagnose(method: ScoreDistillation, batch: Batch, draws: Draws) -> Diagnostics:
    """Scalars and rows of images (of the average's samples, and both predictions of x0 at three noise levels)."""
    student, process = method.best(), method.student.process
    assert isinstance(student, Denoiser)
    cond = method.conditions(batch, draws)
    x = method.input.mixture(student, cond, draws)
    eps = draws.normal("eps", method.student.sample_shape)
    scalars = {"x_mean": x.mean(), "x_std": x.std(), "x_max": x.abs().max()}
    if batch.x0 is not None:
        scalars["x_std_data"] = batch.x0.std()
        _warn_of_collapse(float(scalars["x_std"]), float(scalars["x_std_data"]))
    t = method.generator_times(draws)
    y_teacher, y_fake = _predict(method, x, eps, t, cond)
    scalars |= _by_level(torch.exp(-process.log_ratio(t)), x, y_teacher, y_fake)
    rows = [("student", x)]
    for level in SHOWN_LEVELS:
        t = process.matching_time(EDM(), torch.full((len(x),), level, dtype=torch.float64, device=x.device))
        y_teacher, y_fake = _predict(method, x, eps, t, cond)
        scalars[f"gap_{level:g}"] = (y_teacher - y_fake).square().mean()
        rows += [(f"teacher x0, {level:g}", y_teacher), (f"fake x0, {level:g}", y_fake)]
    return Diagnostics(scalars, rows)


def _predict(
    method: ScoreDistillation, x: Tensor, eps: Tensor, t: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    """(yT, yF): both predictions of x0 at x noised to t."""
    x_t = method.student.process.add_noise(x, eps, t)
    guidance = method.guidance
    return method.teacher.x0(x_t, t, cond, guidance.teacher), method.fake.x0(x_t, t, cond, guidance.fake)


def _by_level(level: Tensor, x: Tensor, y_teacher: Tensor, y_fake: Tensor) -> dict[str, Tensor]:
    """Means over ten bins of the noise level [B], from clean to noisy, as many samples in each: the level, mean
    |teacher - fake|, |x - teacher| and (fake - x)^2."""
    found = {
        "level": level,
        "gap": (y_teacher - y_fake).abs().flatten(1).mean(1),
        "teacher_error": (x - y_teacher).abs().flatten(1).mean(1),
        "fake_error": (y_fake - x).square().flatten(1).mean(1),
    }
    order = level.argsort()
    return {
        f"{name}_bin{number}": part.mean()
        for name, values in found.items()
        for number, part in enumerate(values[order].tensor_split(BINS))
        if len(part)
    }


def _warn_of_collapse(found: float, data: float) -> None:
    if found < COLLAPSED * data:
        warnings.warn(
            f"the student's samples have the standard deviation {found:.3g}, the data {data:.3g}: the student has collapsed "
            "(lower the learning rates or raise updates.fake_per_student), or has hardly been trained",
            stacklevel=4,
        )
