"""Diagnostics of score distillation: predictions of teacher and fake score on samples of the student's average."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from distill.engine.update import Diagnostics
from distill.process.base import Process
from distill.process.edm import EDM

# Noise levels sigma / alpha of the pictures.
SHOWN_LEVELS = (0.3, 1.0, 3.0)
# Errors by noise level are means over as many samples in each of these bins.
BINS = 10
# Below this share of the data's standard deviation a warning says that the student has collapsed.
COLLAPSED = 0.2


def diagnose(
    x: Tensor,
    data: Tensor | None,
    t: Tensor,
    process: Process,
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Diagnostics:
    """Scalars and rows of images: the samples, and both predictions of x0 at three noise levels.

    Args:
        x: samples [B,*S] of the student's average.
        data: x0 [B,*S] of the batch, to compare their spread with.
        t: [B] times of the student's loss.
        process: of the networks.
        predict: times [B] -> (yT, yF), the predictions of x0 by teacher and fake score at x noised to them.
    """
    scalars = {"x_mean": x.mean(), "x_std": x.std(), "x_max": x.abs().max()}
    if data is not None:
        scalars["x_std_data"] = data.std()
        _warn_of_collapse(float(scalars["x_std"]), float(scalars["x_std_data"]))
    y_teacher, y_fake = predict(t)
    scalars |= _by_level(torch.exp(-process.log_ratio(t)), x, y_teacher, y_fake)
    rows = [("student", x)]
    for level in SHOWN_LEVELS:
        t = process.matching_time(EDM(), torch.full((len(x),), level, dtype=torch.float64, device=x.device))
        y_teacher, y_fake = predict(t)
        scalars[f"gap_{level:g}"] = (y_teacher - y_fake).square().mean()
        rows += [(f"teacher x0, {level:g}", y_teacher), (f"fake x0, {level:g}", y_fake)]
    return Diagnostics(scalars, rows)


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
