"""A time grid as data: what recipes and model files name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import Tensor

from distill.models.scheduler_grid import scheduler_grid
from distill.process.base import Process
from distill.process.times import GRIDS
from distill.typed import check_keys, parse

NAMED: dict[str, Callable[..., Tensor]] = {**GRIDS, "scheduler": scheduler_grid}
"""Name -> (process, steps, **options) -> [steps + 1] float64."""


@dataclass(frozen=True)
class TimeGrid:
    """A grid of ``NAMED`` with the options of its function: ``{name: shifted, factor: 3}``."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, value: Any, where: str = "grid") -> TimeGrid:
        """From ``{name: ..., option: ...}``.

        Raises:
            ValueError: starts with ``where``: no mapping, an unknown name or option, or an option of another type.
        """
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{where}: found {value!r}, expected a mapping with a name of {sorted(NAMED)} and its options"
            )
        name = value.get("name")
        if not isinstance(name, str) or name not in NAMED:
            raise ValueError(f"{where}.name: found {name!r}, expected one of {sorted(NAMED)}")
        given = {option: found for option, found in value.items() if option != "name"}
        known = _options(name)
        check_keys(given, known, where)
        return cls(name, {o: parse(known[o], found, f"{where}.{o}") for o, found in given.items()})

    def to_dict(self) -> dict[str, Any]:
        """Inverse of ``from_dict``."""
        return {"name": self.name, **self.options}

    def make(self, process: Process, steps: int) -> Tensor:
        """[steps + 1] float64 times of ``process``.

        Raises:
            ValueError: names the grid: ``process`` has no such grid, or not of so many steps.
        """
        try:
            return NAMED[self.name](process, steps, **self.options)
        except ValueError as error:
            raise ValueError(f"grid: {self.to_dict()}: {error}") from error


def _options(name: str) -> dict[str, Any]:
    """option -> its type, of the grid ``name``."""
    hints = get_type_hints(NAMED[name])
    known = inspect.signature(NAMED[name]).parameters
    return {option: hints[option] for option in known if option not in ("process", "steps", "device")}
