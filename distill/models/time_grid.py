"""A time grid as data: what recipes and model files name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from torch import Tensor

from distill.process.base import Process
from distill.process.times import GRIDS, grid
from distill.typed import check_keys, parse


@dataclass(frozen=True)
class TimeGrid:
    """A grid of ``process.times.GRIDS`` by name, with the options of its function: ``{name: shifted, factor: 3}``."""

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
                f"{where}: found {value!r}, expected a mapping with a name of {sorted(GRIDS)} and its options"
            )
        name = value.get("name")
        if not isinstance(name, str) or name not in GRIDS:
            raise ValueError(f"{where}.name: found {name!r}, expected one of {sorted(GRIDS)}")
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
            return grid(self.name, process, steps, **self.options)
        except ValueError as error:
            raise ValueError(f"grid: {self.to_dict()}: {error}") from error


def _options(name: str) -> dict[str, Any]:
    """option -> its type, of the grid ``name``."""
    hints = get_type_hints(GRIDS[name])
    known = inspect.signature(GRIDS[name]).parameters
    return {option: hints[option] for option in known if option not in ("process", "steps", "device")}
