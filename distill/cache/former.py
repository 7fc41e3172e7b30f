"""Headers of pair caches of earlier versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from distill.models.conditions import classes
from distill.models.description import decoder_of_schema_1
from distill.typed import parse


def of_schema_1(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The entries of a header of schema 1 as those of this one."""
    old = parse(_Old, {key: given.pop(key) for key in ("num_classes", "labels") if key in given}, where)
    if unknown := {"conditions", "decoder"} & set(given):
        raise ValueError(f"{where}.{min(unknown)}: found in a header of schema 1, expected none")
    return given | {
        "conditions": classes(old.num_classes).config(),
        "decoder": decoder_of_schema_1(given.get("sample_shape")).config(),
    }


@dataclass(frozen=True)
class _Old:
    """The entries of schema 1 about labels."""

    num_classes: int
    labels: Literal["balanced"] = "balanced"

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes: found {self.num_classes}, expected at least 0")
