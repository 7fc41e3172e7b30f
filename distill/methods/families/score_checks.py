"""Checks of score distillation when a method is built: models, guidance, start and order of updates."""

from __future__ import annotations

import torch

from distill.engine.networks import check_apart
from distill.methods.families.options import Guidance, Updates
from distill.methods.families.suits import LARGEST_FACTOR, error_factor, guides
from distill.models.denoiser import Denoiser, check_same_samples
from distill.process.base import Process


def check_models(student: Denoiser, teacher: Denoiser) -> None:
    """Refuse networks that do not fit together, or a teacher without a score."""
    check_apart("teacher", teacher, student)
    check_same_samples(student, teacher)
    if teacher.coupling != "independent" or teacher.boundary is not None:
        raise ValueError(
            f"teacher: found a model of {teacher.coupling} noise and data, which has no score; expected a diffusion or "
            "flow model"
        )
    for name, model in (("student", student), ("teacher", teacher)):
        if model.embeds_guidance:
            raise ValueError(
                f"{name}: takes the guidance as an input, which this method does not give; expected a model without"
            )
    for name, weight in teacher.named_parameters():
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise ValueError(f"teacher: {name}: found weights that are not finite")


def check_guidance(teacher: Denoiser, guidance: Guidance) -> None:
    """Refuse guidance of a teacher without a null condition, and of a fake score that never learns one."""
    for name in ("teacher", "fake", "fake_train"):
        if (scale := getattr(guidance, name)) != 1 and not guides(teacher):
            raise ValueError(
                f"guidance.{name}: found {scale}, but the teacher was trained without a null condition; expected 1"
            )
    if guidance.null_prob > 0 and not teacher.conditions.has_null:
        raise ValueError(
            f"guidance.null_prob: found {guidance.null_prob}, but the teacher has no conditions to drop; expected 0"
        )
    for name in ("fake", "fake_train"):
        if (scale := getattr(guidance, name)) != 1 and guidance.null_prob == 0:
            raise ValueError(
                f"guidance.null_prob: found 0, but guidance.{name} = {scale} needs the fake score's prediction without a "
                "condition, which it would never learn; expected a share above 0, such as 0.1"
            )


def check_amplification(process: Process, kind: str, t: float) -> None:
    """Refuse an eps student whose x0 = (x - sigma eps) / alpha is mostly its own error at the first step."""
    level = float(error_factor(process, kind, "x0", torch.tensor([t], dtype=torch.float64)))
    if not level <= LARGEST_FACTOR:
        raise ValueError(
            f"sampling.levels: the first is {level:.4g}, and a student that predicts {kind} multiplies its error by that to "
            f"predict x0; expected at most {LARGEST_FACTOR:g}, such as levels: [2.5], or a student that predicts v or x0"
        )


def check_order(updates: Updates, paper: tuple[str, str]) -> tuple[str, bool]:
    """(which update is first, whether the fake score shares the student's samples), None as in the `paper`.

    Raises:
        ValueError: shared samples where the fake score comes before the student.
    """
    first = updates.first or paper[0]
    if first == "fake" and updates.samples == "shared":
        raise ValueError(
            "updates.samples: found 'shared' with updates.first 'fake', but then the student has made no samples when the fake "
            "score is updated; expected 'fresh', or updates.first: student"
        )
    return first, first == "student" and (updates.samples or paper[1]) == "shared"
