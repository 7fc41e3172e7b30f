"""Rows of an evaluation: which model, how it is sampled, and what it is compared with."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from distill.models.generator import Generator
from distill.models.time_grid import TimeGrid
from distill.typed import unknown_key


@dataclass(frozen=True)
class Row:
    """One evaluated model: a row of the table for each of its step counts.

    Attributes:
        stage: name of the stage whose model is measured.
        steps: step counts.
        which: "last", the model at the end of training, or "best", the one kept by the stage's `monitor`.
        follows_teacher: the model is meant to reproduce the trajectories of the row `follows`, so `teacher_mse` is
            measured. The guidance that it learned must be the guidance of that row.
        baseline: `teacher_mse` is measured although the guidance is another one: what guided distillation starts from.
        guidance_scale: g in u + g (c - u) to sample with; None: the model's own.
        guidance_w: w = guidance_scale - 1 as an input, for a net that embeds it; None: the model's own.
        grid: a time grid by name, {name: shifted, factor: 3}, for a model that is valid for any steps; None: its own.
    """

    stage: str
    steps: list[int]
    which: Literal["last", "best"] = "last"
    follows_teacher: bool = False
    guidance_scale: float | None = None
    guidance_w: float | None = None
    grid: dict[str, Any] | None = None
    baseline: bool = False

    def __post_init__(self) -> None:
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) != len(self.steps):
            raise ValueError(f"steps: found {self.steps}, expected counts of at least 1, each once")
        if self.baseline and not self.follows_teacher:
            raise ValueError(
                "baseline: found true without follows_teacher, so nothing is compared; expected false"
            )

    def sampled(self, generator: Generator) -> Generator:
        """`generator` with this row's guidance and grid in its sampler.

        Raises ValueError where the model is not valid at one of the step counts or does not take the guidance."""
        spec, model = generator.spec, generator.denoiser
        if self.guidance_w is not None:
            spec = replace(spec, guidance_w=spec.embedded(self.guidance_w))
        if self.guidance_scale is not None:
            spec.check_asked(self.guidance_scale)
            spec = replace(spec, guidance_scale=float(self.guidance_scale))
        if spec.guidance_scale != 1 and not model.guidable:
            raise ValueError(
                f"guidance_scale: found {spec.guidance_scale:g}, but this model was not trained with a null condition; "
                "expected 1"
            )
        if self.grid is not None:
            if not spec.any_steps:
                raise ValueError(
                    f"grid: found {self.grid}, but this model was distilled for times of its own; expected null"
                )
            spec = replace(spec, time_grid=TimeGrid.from_dict(self.grid))
        for steps in self.steps:
            spec.grid(model.process, steps)
        return Generator(model, spec)


@dataclass(frozen=True)
class Straightness:
    """The Euler run along which straightness is measured: its steps, and how many samples."""

    steps: int
    count: int

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps: found {self.steps}, expected at least 2")
        if self.count < 1:
            raise ValueError(f"count: found {self.count}, expected at least 1")


def check_row(where: str, named: Any, rows: Collection[tuple[str, int]]) -> None:
    """Raise ValueError unless `named`, where it is a row (model, steps), is one of `rows`."""
    if isinstance(named, tuple) and named not in rows:
        listed = ", ".join(f"[{label}, {steps}]" for label, steps in sorted(rows))
        raise ValueError(f"{where}: names the row [{named[0]}, {named[1]}], expected one of {listed}")


def unknown_metric(where: str, metric: str, measured: Sequence[str]) -> str:
    """The message for a metric that rows do not have."""
    return unknown_key("", metric, measured).replace(
        f"{metric}: no such key", f"{where}: no such metric as {metric!r}", 1
    )


def guidance_of(generator: Generator) -> float:
    """The guidance scale whose trajectories a model samples: learned from its teacher, given as an input, or applied.

    Applying guidance to a model that has learned guided results multiplies the two, as the record of chained
    distillation does."""
    spec = generator.spec
    learned = spec.guidance_baked if spec.guidance_w is None else 1.0 + spec.guidance_w
    return learned * spec.guidance_scale


def check_follows(
    generators: Mapping[str, Generator], models: Mapping[str, Row], follows: tuple[str, int] | None
) -> None:
    """Raise ValueError where a row that follows the teacher has learned another guidance than the row `follows` is
    sampled with: their trajectories differ, and `teacher_mse` would be meaningless."""
    if follows is None:
        if label := next((label for label, row in models.items() if row.follows_teacher), None):
            raise ValueError(
                f"models.{label}.follows_teacher: found true, but `follows` names no row to compare with"
            )
        return
    teacher = guidance_of(generators[follows[0]])
    for label, row in models.items():
        student = guidance_of(generators[label])
        if row.follows_teacher and not row.baseline and not math.isclose(student, teacher, rel_tol=1e-6):
            raise ValueError(
                f"models.{label}.follows_teacher: {label} samples with guidance {student:g} (learned or applied), but the "
                f"row {list(follows)} that it is compared with is sampled with {teacher:g}; give the row {follows[0]} "
                f"guidance_scale: {student:g} (+eval.models.{follows[0]}.guidance_scale={student:g}), or "
                f"{label} follows_teacher: false"
            )
