"""What a metric declares of itself, and the search for all of them: every `Metric` at the top of a file of `metrics/`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import distill.evaluation.metrics as package

FEATURES: Literal["features"] = "features"
ARROWS = {"lower": " ↓", "higher": " ↑"}


@dataclass(frozen=True)
class Metric:
    """One entry of a row of metrics.json. Rows, gates, tables, plots, monitors and docs read these declarations alone.

    Attributes:
        name: the key in metrics.json.
        order: columns are sorted by it.
        measure: the value, None where it is undefined: of a `Samples` that is compared with its `real`, or, for a metric of
            `rows`, of a `Sampled`.
        meaning: what it says, for the legend; or a function of the name of the feature space.
        of: whose rows have it; "both": all. rows: it follows from how the samples were made.
        title: heading of its column, where `Protocol.names` has none; default: the name. form: format of a cell; "": no column.
            scale, unit: cells show value * scale; the unit says so.
        better: "real": the closer to the value of the real set, the better; "": neither is better in itself.
        comparable: a best value among several runs means something. plotted: `distill.compare metric=` accepts it.
        in_space: feature space -> the name in it, None where it is undefined there; set for metrics of features. FEATURES:
            `<name>_digits64` in the space `digits64`.
        of_count: its expected value, or what is published, depends on the number of samples, so that the name carries a reduced
            count.
        floor: also measured between two halves of the real set.
        monitored: logged while a student trains; a "lower" one may choose the best model.
        reads: fields of `Samples` that `measure` needs, also those of `real`.
        real: the value of the real set itself, `real_name` (default: `name`) in the file; `real_words` is its label in plots.
    """

    name: str
    order: int
    measure: Callable[[Any], float | None]
    meaning: str | Callable[[str], str] = ""
    of: Literal["images", "points", "prompts", "both"] = "both"
    rows: bool = False
    title: str = ""
    form: str = ".3f"
    scale: float = 1
    unit: str = ""
    better: Literal["lower", "higher", "real", ""] = ""
    comparable: bool = True
    plotted: bool = True
    in_space: Callable[[str], str | None] | Literal["features"] | None = None
    of_count: bool = False
    floor: bool = False
    monitored: bool = False
    reads: tuple[str, ...] = ("values",)
    real: Callable[[Any], float | None] | None = None
    real_name: str = ""
    real_words: str = "real images"

    def heading(self, names: Mapping[str, str]) -> str:
        """The name under a protocol's `names`, without unit and direction."""
        return names.get(self.name, self.title or self.name)

    def name_in(self, features: str) -> str | None:
        """The name in a feature space; None where the metric is undefined there."""
        if self.in_space == FEATURES:
            return f"{self.name}_{features}"
        return self.name if self.in_space is None else self.in_space(features)

    @property
    def real_key(self) -> str:
        """The name of the real set's value."""
        return self.real_name or self.name

    @property
    def suffix(self) -> str:
        """Unit and direction, which follow the name in a heading."""
        return self.unit + ARROWS.get(self.better, "")

    def cell(self, value: float | None) -> str:
        """A value as its column prints it."""
        return "-" if value is None else f"{value * self.scale:{self.form}}"

    def sentence(self, features: str) -> str:
        """`meaning` in a feature space."""
        return self.meaning if isinstance(self.meaning, str) else self.meaning(features)


@cache
def metrics(of: str = "") -> tuple[Metric, ...]:
    """All metrics in the order of their columns; `of`: those of rows of "images", "points" or "prompts".

    Raises ValueError for a name that two files declare."""
    if of:
        return tuple(metric for metric in metrics() if metric.of in (of, "both"))
    found: dict[str, Metric] = {}
    for module in pkgutil.iter_modules(package.__path__):
        for value in vars(importlib.import_module(f"{package.__name__}.{module.name}")).values():
            if isinstance(value, Metric) and found.setdefault(value.name, value) is not value:
                raise ValueError(f"{module.name}.py: declares {value.name!r}, which another metric is called")
    return tuple(sorted(found.values(), key=lambda metric: metric.order))


def metric(name: str) -> Metric:
    """The metric of a name; for other numbers of a row, one that only prints them."""
    found = next((known for known in metrics() if known.name == name), None)
    return found or Metric(name, 0, lambda _: None, form="g")


def values(samples: Any, of: str) -> dict[str, float | None]:
    """The entries of a row that follow from a `Samples` of images or points."""
    return {known.name: known.measure(samples) for known in metrics(of) if not known.rows}
