"""The checks of `distill.doctor`: a fault, where it shows, and what to try. A new check is one entry of `CHECKS`.

Each looks at a run alone, and compares with the reference band where one holds (`Look.above`, `Look.below`)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.evaluation.band import Band
from distill.evaluation.examined import Examined, Measured, Trained
from distill.evaluation.look import Evidence, Look, now

TEACHER = "teacher"
MONITORED_FD = "eval/fd"
START_SHARE = 0.05  # of the weights at the start that an average may still hold at the end
# Spread within a class, in units of the data's, outside of which samples are collapsed or noisy.
NARROW, WIDE = 0.7, 1.3
UNMOVED = 0.15  # relative change of distance and spread over a training that has done nothing
# Of gradient norms: in units of those at the start, and of what they are clipped to.
GROWTH, OVER_CLIP = 10.0, 10.0
SKIPPED = 0.01  # share of steps with numbers that are not finite
CHANGED = 1.5  # factor between two learning rates that differ
MANY = 8  # steps in which a teacher should be good
POOR = 3.0  # distance of a teacher that is not, in units of that of two halves of the real images
TOO_LARGE = 1.6  # spread of all values of the first samples, in units of the data's
SAME = 0.05  # gap of two scores that are the same, in units of the teacher's error
BEGUN = 0.1  # share of the planned steps from which on they should differ
HALF_WAY = 0.5  # share of the planned steps from which on a student should have left its start


@dataclass(frozen=True)
class Finding:
    """A fault in a stage or a row, with its evidence and what to try."""

    fault: str
    place: str
    evidence: tuple[Evidence, ...]
    advice: str


Found = Iterator[tuple[str, Evidence]]  # (stage or row, evidence)


def _data_range(look: Look) -> Found:
    for stage in look.run.stages.values():
        data = stage.data
        if data is not None and data.ranged:
            if data.low >= 0:
                yield stage.name, Evidence(f"smallest value of {data.count} images", data.low, -1, 0)
            if max(-data.low, data.high) > 1.01:
                yield (
                    stage.name,
                    Evidence(f"largest value of {data.count} images", max(-data.low, data.high), -1, 1),
                )


def _wrong_sampler(look: Look) -> Found:
    for stage in look.run.stages.values():
        first = stage.values("student/x_std")[:1]
        if first and stage.data is not None and first[0] > TOO_LARGE * stage.data.std:
            what = "student/x_std when training begins, as a copy of the teacher"
            yield stage.name, Evidence(what, first[0], high=TOO_LARGE * stage.data.std)
    measured = look.run.measured
    for row in [] if measured is None else measured.rows:
        assert measured is not None
        unit, place = _unit(measured), f"{row['model']}, {row['steps']} steps"
        fewer = [
            r
            for r in measured.rows
            if r["model"] == row["model"] and _number(r, "steps") < _number(row, "steps")
        ]
        factor = 1.0 if _number(row, "steps") >= MANY else 2.0
        limit = factor * min((_number(r, "fd") for r in fewer), default=math.nan) + unit
        if _number(row, "fd") > limit:
            yield place, Evidence("fd, although fewer steps do better", _number(row, "fd"), high=limit)
        maker = look.run.stages.get(measured.stages.get(row["model"], ""))
        monitored = maker.values(MONITORED_FD) if maker is not None and not fewer else []
        if monitored and _number(row, "fd") > 2 * monitored[-1] + unit:
            limit = 2 * monitored[-1] + unit
            yield place, Evidence(f"fd, while training {monitored[-1]:.4g}", _number(row, "fd"), high=limit)
    yield from _sampled_elsewhere(look)


def _sampled_elsewhere(look: Look) -> Found:
    """The student's samples in the run, and those that the user made elsewhere."""
    own, other = look.run.measured, look.run.elsewhere
    if own is None or other is None:
        return
    student = own.rows[-1]
    for row in other.rows:
        place = f"{row['model']} ({look.run.name}'s {student['model']} elsewhere)"
        for name, low, high in (("pixel_std", 0.8, 1.25), ("class_std", 0.8, 1.25), ("fd", 0.0, 2.0)):
            if row.get(name) is None or student.get(name) is None:
                continue
            limits = low * student[name], high * student[name] + (_unit(own) if name == "fd" else 0.0)
            if not limits[0] <= row[name] <= limits[1]:
                yield place, Evidence(name, row[name], *limits)


def _exploding(look: Look) -> Found:
    for stage in look.run.stages.values():
        for update, optim in stage.optim.items():
            key, steps = f"{update}/grad_norm", stage.at * stage.steps
            skipped = stage.values(f"{update}/skipped")
            if skipped and skipped[-1] > max(2, SKIPPED * steps):
                what = f"{update}: steps with numbers that are not finite"
                yield stage.name, Evidence(what, skipped[-1], high=SKIPPED * steps)
            norms = stage.values(key)
            first = norms[: max(1, len(norms) // 4)]
            if len(norms) >= 8:
                for evidence in look.recent(stage, key, high=GROWTH * statistics.median(first)):
                    yield stage.name, evidence
            if optim.get("clip") is not None:
                for evidence in look.recent(stage, key, high=OVER_CLIP * optim["clip"]):
                    yield stage.name, evidence


def _fake_lagging(look: Look) -> Found:
    for stage in look.run.stages.values():
        gap, error = stage.recent("student/gap"), stage.recent("student/teacher_error")
        if gap is not None and error is not None and stage.at >= BEGUN and gap < SAME * error:
            what = now(stage, "student/gap") + " (the fake score is still the teacher)"
            yield stage.name, Evidence(what, gap, low=SAME * error)
        for evidence in look.outside(stage, "student/gap", "fake/loss", "diagnostics/gap_1"):
            yield stage.name, evidence


def _average_behind(look: Look) -> Found:
    for stage in look.run.stages.values():
        if stage.start_share is not None and stage.start_share > START_SHARE:
            what = f"share of the starting weights in the average after {stage.steps} steps"
            yield stage.name, Evidence(what, stage.start_share, high=START_SHARE)


def _teacher_worse(look: Look) -> Found:
    stage, measured = look.run.stages.get(TEACHER), look.run.measured
    if stage is not None:
        for evidence in look.above(stage, "student/loss"):
            yield TEACHER, evidence
    rows = [row for row in measured.rows if row["model"] == TEACHER] if measured is not None else []
    if not rows or measured is None:
        return
    row = max(rows, key=lambda each: _number(each, "steps"))
    place = f"{TEACHER}, {row['steps']} steps"
    limits = look.row(measured, row)
    # Guidance alone takes samples away from the data.
    judged = not limits and _number(row, "steps") >= MANY and row.get("guidance_scale") in (None, 1)
    farthest = POOR * _unit(measured)
    if judged and row.get("guidance_w") is None and _number(row, "fd") > farthest:
        what = f"fd, the limit is {POOR:g} times the distance between two halves of the real images"
        yield place, Evidence(what, _number(row, "fd"), high=farthest)
    for name, worse in (("fd", 1), ("recall", -1), ("class_accuracy", -1)):
        low, high = limits.get(name, (-math.inf, math.inf))
        if worse * _number(row, name) > worse * (high if worse > 0 else low):
            yield place, Evidence(name, row[name], low, high, reference=True)


def _collapse(look: Look) -> Found:
    for stage in _students(look):
        real, unmoved = look.real("class_std"), _unmoved(look, stage)
        if stage.at >= HALF_WAY and real is not None and not unmoved:
            for evidence in look.recent(stage, "eval/class_std", low=NARROW * real):
                yield stage.name, evidence
        if not unmoved:
            for evidence in look.below(stage, "eval/class_std", "eval/recall", "diagnostics/x_std"):
                yield stage.name, evidence


def _rate_too_high(look: Look) -> Found:
    for stage in _students(look):
        real, rates = look.real("class_std"), look.rates(stage)
        evidence = [] if real is None else list(look.recent(stage, "eval/class_std", high=WIDE * real))
        if rates is not None and rates[0] > CHANGED * rates[1]:
            evidence += _worse(look, stage)
            if evidence:
                evidence.append(
                    Evidence("learning rate of the student", rates[0], rates[1], rates[1], reference=True)
                )
        yield from ((stage.name, each) for each in evidence)


def _rate_too_low(look: Look) -> Found:
    for stage in _students(look):
        rates, evidence = look.rates(stage), []
        if _unmoved(look, stage) and stage.at >= HALF_WAY:
            found = stage.values(MONITORED_FD)
            evidence = [
                Evidence(
                    f"{MONITORED_FD} at the end, {found[0]:.4g} at first",
                    found[-1],
                    high=(1 - UNMOVED) * found[0],
                )
            ]
        if rates is not None and rates[0] < rates[1] / CHANGED:
            evidence += _worse(look, stage)
            if evidence:
                evidence.append(
                    Evidence("learning rate of the student", rates[0], rates[1], rates[1], reference=True)
                )
        yield from ((stage.name, each) for each in evidence)


def _students(look: Look) -> list[Trained]:
    """The stages that train something else than the teacher, whose average has left its start."""
    return [s for s in look.run.stages.values() if s.name != TEACHER and (s.start_share or 0) <= START_SHARE]


def _worse(look: Look, stage: Trained) -> list[Evidence]:
    """Distances, and a loss that measures progress, above their bands."""
    regression = () if stage.values("fake/loss") else ("student/loss",)
    return list(look.above(stage, MONITORED_FD, "eval/sliced_wasserstein", *regression))


def _unmoved(look: Look, stage: Trained) -> bool:
    """Whether the samples are as narrow, and as far from the data, as at the first evaluation while training."""
    found, spread, real = stage.values(MONITORED_FD), stage.values("eval/class_std"), look.real("class_std")
    narrow = bool(spread) and real is not None and spread[-1] < NARROW * real
    still = narrow and spread[-1] < (1 + UNMOVED) * spread[0]
    return len(found) > 1 and still and found[-1] > (1 - UNMOVED) * found[0]


def _number(row: Mapping[str, Any], name: str) -> float:
    """An entry of a row; NaN, which is neither above nor below a limit, for null."""
    return math.nan if row.get(name) is None else float(row[name])


def _unit(measured: Measured) -> float:
    """The distance between two halves of the real images: what a difference of two distances must exceed to mean something."""
    return _number(measured.real, "floor_fd")


@dataclass(frozen=True)
class Check:
    """One fault that `distill.doctor` knows. `after`: faults that explain this one, which is then left out for their place."""

    fault: str
    find: Callable[[Look], Found]
    advice: str
    after: tuple[str, ...] = ()


CHECKS = (
    Check(
        "data range wrong",
        _data_range,
        "give images in [-1, 1]: 2 * x - 1 from [0, 1], x / 127.5 - 1 from bytes; then train the teacher again",
    ),
    Check(
        "wrong sampler",
        _wrong_sampler,
        "sample with what model.json says: `kind` (what the network predicts) and `sampler` (steps, times, guidance); "
        "no other step counts, no `force`, no second guidance",
    ),
    Check(
        "teacher worse than its reference",
        _teacher_worse,
        "train the teacher for longer, or load another one; no student can be better than what it learns from",
        after=("data range wrong", "wrong sampler"),
    ),
    Check(
        "exploding gradients",
        _exploding,
        "lower the learning rate, clip (optim.<update>.clip=1), use a loss weight that is bounded at low noise; "
        "with bf16, try precision=32-true",
    ),
    Check(
        "EMA not caught up",
        _average_behind,
        "use ema_ramp: true, a smaller ema, or more steps; the average is what is evaluated and exported",
    ),
    Check(
        "learning rate too high",
        _rate_too_high,
        "divide optim.student.optimizer.lr by 3 to 10, or warm up",
    ),
    Check(
        "learning rate too low",
        _rate_too_low,
        "multiply optim.student.optimizer.lr by 3 to 10, or train for more steps",
    ),
    Check(
        "fake score lagging",
        _fake_lagging,
        "raise updates.fake_per_student (5 in DMD2) or optim.fake.optimizer.lr, or lower the student's learning rate",
        after=("EMA not caught up",),
    ),
    Check(
        "collapse",
        _collapse,
        "lower guidance.teacher and the student's learning rate, give the fake score more updates, or stop at the best "
        "evaluation (which=best)",
        after=("learning rate too low", "data range wrong", "exploding gradients"),
    ),
)


def diagnose(run: Examined, band: Band | None) -> list[Finding]:
    """What is off, causes before consequences."""
    look = Look(run, band)
    found: list[Finding] = []
    for check in CHECKS:
        places: dict[str, list[Evidence]] = {}
        for place, evidence in check.find(look):
            places.setdefault(place, []).append(evidence)
        explained = {each.place for each in found if each.fault in check.after}
        found += [
            Finding(check.fault, place, tuple(evidence), check.advice)
            for place, evidence in places.items()
            if place not in explained
        ]
    return found
