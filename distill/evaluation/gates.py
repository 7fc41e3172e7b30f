"""Quality gates: bounds on entries of rows, listed by a recipe and checked by `check`.

    bound = factor * (metric of row `times`, or the value named by `reference`, or 1) + (`plus`, or 0)

where factor is `at_most`, `at_least`, or both ends of `within`. So `at_most=0.25, times=("teacher", 1)` is a
quarter of the teacher's one-step value, and `at_least=-0.03, plus=("teacher", 50)` the teacher's less 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = tuple[str, int]
"""(model, steps) of a row of metrics.json."""


class GateError(ValueError):
    """A gate cannot be evaluated: it is malformed, or names a row, metric or reference that is not there."""


@dataclass(frozen=True)
class Gate:
    """One requirement on `metric` of `row`; exactly one of `at_most`, `at_least`, `within` is given."""

    name: str
    row: Row
    metric: str
    at_most: float | None = None
    at_least: float | None = None
    within: tuple[float, float] | None = None
    times: Row | None = None
    """Multiplies by the same metric of this row."""
    reference: str | None = None
    """Multiplies by this entry of the references (e.g. `heldout_nn`) instead."""
    plus: Row | float | None = None
    """Adds the same metric of this row, or a number."""

    def __post_init__(self) -> None:
        if sum(limit is not None for limit in (self.at_most, self.at_least, self.within)) != 1:
            raise GateError(f"gate {self.name!r}: give exactly one of at_most, at_least, within")
        if self.times is not None and self.reference is not None:
            raise GateError(f"gate {self.name!r}: times and reference exclude each other")
        # Recipes are YAML, which has lists only.
        for key in ("row", "times", "plus"):
            value = getattr(self, key)
            if value is not None and not (key == "plus" and isinstance(value, int | float)):
                object.__setattr__(self, key, _row(self.name, key, value))
        if self.within is not None:
            low, high = self.within
            if low > high:
                raise GateError(f"gate {self.name!r}: within [{low}, {high}] is empty")
            object.__setattr__(self, "within", (float(low), float(high)))


@dataclass(frozen=True)
class GateResult:
    """What `check` found: `bound` is one number, or the two ends of `within`."""

    name: str
    value: float
    bound: float | tuple[float, float]
    relation: str
    passed: bool

    def describe(self) -> str:
        """One line: passed or FAILED, the name, the value and its bound."""
        if isinstance(self.bound, tuple):
            bound = f"[{self.bound[0]:.4g}, {self.bound[1]:.4g}]"
        else:
            bound = f"{self.bound:.4g}"
        return (
            f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.value:.4g} {self.relation} {bound}"
        )


def check(
    gates: Sequence[Gate], rows: Sequence[Mapping[str, Any]], references: Mapping[str, float] | None = None
) -> list[GateResult]:
    """Evaluate every gate on rows of metrics.json; a NaN on either side fails its gate.

    Raises GateError naming the gate and what is missing: a row, a metric that is absent or null, a reference.
    """
    return [_check(gate, rows, references or {}) for gate in gates]


def _check(gate: Gate, rows: Sequence[Mapping[str, Any]], references: Mapping[str, float]) -> GateResult:
    value = _metric(gate, gate.row, rows)
    factor, shift = 1.0, 0.0
    if gate.times is not None:
        factor = _metric(gate, gate.times, rows)
    elif gate.reference is not None:
        if gate.reference not in references:
            raise GateError(
                f"gate {gate.name!r}: no reference {gate.reference!r}; there are {sorted(references)}"
            )
        factor = float(references[gate.reference])
    if gate.plus is not None:
        shift = _metric(gate, gate.plus, rows) if isinstance(gate.plus, tuple) else float(gate.plus)
    if gate.within is not None:
        # A negative factor (KID) turns the ends round.
        low, high = sorted(end * factor + shift for end in gate.within)
        if math.isnan(factor + shift):
            low = high = math.nan
        return GateResult(gate.name, value, (low, high), "within", low <= value <= high)
    if gate.at_most is not None:
        bound = gate.at_most * factor + shift
        return GateResult(gate.name, value, bound, "<=", value <= bound)
    assert gate.at_least is not None
    bound = gate.at_least * factor + shift
    return GateResult(gate.name, value, bound, ">=", value >= bound)


def _metric(gate: Gate, wanted: Row, rows: Sequence[Mapping[str, Any]]) -> float:
    model, steps = wanted
    found = [row for row in rows if row["model"] == model and row["steps"] == steps]
    if len(found) != 1:
        have = ", ".join(f"{row['model']}@{row['steps']}" for row in rows) or "none"
        how = "no row" if not found else f"{len(found)} rows"
        raise GateError(f"gate {gate.name!r}: {how} {model}@{steps}; there are {have}")
    value = found[0].get(gate.metric)
    if value is None:
        state = "is null" if gate.metric in found[0] else "is missing"
        raise GateError(f"gate {gate.name!r}: metric {gate.metric!r} of row {model}@{steps} {state}")
    return float(value)


def _row(gate: str, key: str, value: Any) -> Row:
    try:
        model, steps = value
        return str(model), int(steps)
    except (TypeError, ValueError):
        raise GateError(f"gate {gate!r}: {key} must be [model, steps], got {value!r}") from None
