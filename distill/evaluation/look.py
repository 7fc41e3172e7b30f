"""A run beside the reference band of its recipe, and the numbers that the checks of `distill.doctor` answer with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.evaluation.band import Band, differing
from distill.evaluation.examined import BINS, RECENT, Examined, Measured, Trained


@dataclass(frozen=True)
class Evidence:
    """A number that was found, and the limits that were expected (None: none on that side); `reference`: those of the band."""

    what: str
    found: float
    low: float | None = None
    high: float | None = None
    reference: bool = False

    def describe(self) -> str:
        """One line."""
        ends = [None if end is None else f"{end:.4g}" for end in (self.low, self.high)]
        if ends[0] is None:
            limits = f"at most {ends[1]}"
        elif ends[1] is None or ends[0] == ends[1]:
            limits = f"at least {ends[0]}" if ends[1] is None else f"{ends[0]}"
        else:
            limits = f"{ends[0]} to {ends[1]}"
        return f"{self.what}: {self.found:.4g}, {'reference' if self.reference else 'expected'} {limits}"


@dataclass(frozen=True)
class Look:
    """A run and the reference band of its recipe, if there is one."""

    run: Examined
    band: Band | None

    def recent(
        self, stage: Trained, key: str, low: float | None = None, high: float | None = None
    ) -> Iterator[Evidence]:
        """Evidence where a curve is now outside fixed limits."""
        value = stage.recent(key)
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            yield Evidence(now(stage, key), value, low, high)

    def above(self, stage: Trained, *keys: str) -> Iterator[Evidence]:
        """Evidence for each curve that is now above its band."""
        for key, value, (low, high) in self._banded(stage, keys):
            if value > high:
                yield Evidence(now(stage, key), value, low, high, reference=True)

    def below(self, stage: Trained, *keys: str) -> Iterator[Evidence]:
        """Evidence for each curve that is now below its band."""
        for key, value, (low, high) in self._banded(stage, keys):
            if value < low:
                yield Evidence(now(stage, key), value, low, high, reference=True)

    def outside(self, stage: Trained, *keys: str) -> Iterator[Evidence]:
        """Evidence for each curve that is now outside its band."""
        yield from self.above(stage, *keys)
        yield from self.below(stage, *keys)

    def _banded(
        self, stage: Trained, keys: tuple[str, ...]
    ) -> Iterator[tuple[str, float, tuple[float, float]]]:
        for key in keys:
            value = stage.recent(key)
            limits = self.band.limits(stage, key) if self.band is not None else None
            if value is not None and limits is not None:
                yield key, value, limits

    def row(self, measured: Measured, row: Mapping[str, Any]) -> Mapping[str, list[float]]:
        """metric -> limits of the band for a row; empty where it does not hold for the stage that made the model."""
        if self.band is None:
            return {}
        name = measured.stages.get(row["model"], "")
        stage, known = self.run.stages.get(name), self.band.stages.get(name)
        if stage is not None and known is not None and differing(known.settings, stage.settings):
            return {}
        return self.band.row(measured, row["model"], row["steps"])

    def real(self, name: str) -> float | None:
        """A value of the real images: of the evaluation, or of a training stage's data."""
        found = self.run.measured.real.get(name) if self.run.measured is not None else None
        spreads = [getattr(s.data, name) for s in self.run.stages.values() if s.data is not None]
        return found if found is not None else next(iter(spreads), None)

    def rates(self, stage: Trained) -> tuple[float, float] | None:
        """(found, reference) of the student's learning rate."""
        known = self.band.stages.get(stage.name) if self.band is not None else None
        found, reference = _rate(stage.optim), None if known is None else _rate(known.optim)
        return None if found is None or reference is None else (found, reference)


def _rate(optim: Mapping[str, Any]) -> float | None:
    rate = optim.get("student", {}).get("optimizer", {}).get("lr")
    return float(rate) if isinstance(rate, int | float) else None


def now(stage: Trained, key: str) -> str:
    """What `stage.recent(key)` is, in words."""
    end = round(stage.at * stage.steps)
    return f"{key}, mean of steps {max(0, end - round(stage.steps * RECENT / BINS))} to {end}"
