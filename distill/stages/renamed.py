"""Former names of options of methods and evaluations: where they are now, and the names that digests keep."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

MOVED: dict[str, str] = {
    "levels": "sampling.levels",
    "unit_noise": "sampling.unit_noise",
    "labels": "sampling.labels",
    "fake_times": "fake.times",
    "weighting": "fake.weighting",
    "sigma_data": "fake.sigma_data",
    "guidance_teacher": "guidance.teacher",
    "guidance_fake": "guidance.fake",
    "guidance_fake_train": "guidance.fake_train",
    "null_prob": "guidance.null_prob",
    "fake_updates_per_generator": "updates.fake_per_student",
    "steps_per_node": "backtrack.steps_per_node",
    "criterion": "backtrack.criterion",
    "window": "backtrack.window",
    "tolerance": "backtrack.tolerance",
}
"""Former names of options of methods -> their names now. Digests and records of nodes use the former names, so that finished
stages of earlier versions are still found."""


LATER: dict[str, Any] = {"embed_w": True}
"""Options that methods of earlier versions did not have -> the value that they had. Digests leave them out at that value."""


MOVED_TO_METERS = {name: f"meter.{name}" for name in ("data", "features", "k", "grid_columns", "paths")}


def moved_option(name: str, options: Collection[str]) -> str | None:
    """Where an option of that former name is now, for a method or an evaluation with these options."""
    found = MOVED.get(name) or MOVED_TO_METERS.get(name)
    return found if found is not None and found.partition(".")[0] in options else None


def with_name_of_now(difference: str, method: Mapping[str, Any]) -> str:
    """A line `config.method.levels: a -> b` of an identity, whose options have their former names, with the name of now."""
    found = re.match(r"config\.method\.(\w+)", difference)
    moved = None if found is None else moved_option(found[1], method)
    return (
        difference if found is None or moved is None else f"config.method.{moved}{difference[found.end() :]}"
    )


def former_names(method: Mapping[str, Any]) -> dict[str, Any]:
    """A method's config with the options of `MOVED` by their former names. Options of the blocks that had no former name
    stay in their block; left out where they are None, as are those of `LATER` at their value."""
    found = {
        key: dict(value) if isinstance(value, Mapping) else value
        for key, value in method.items()
        if key not in LATER or value != LATER[key]
    }
    for old, new in MOVED.items():
        block, _, name = new.partition(".")
        if old not in method and isinstance(found.get(block), dict) and name in found[block]:
            found[old] = found[block].pop(name)
    for block in {new.partition(".")[0] for new in MOVED.values()}:
        if isinstance(found.get(block), dict):
            found[block] = {name: value for name, value in found[block].items() if value is not None}
            if not found[block]:
                del found[block]
    return found
