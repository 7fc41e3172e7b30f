"""Which stages a stage config refers to, and how such references are renamed when stages are repeated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hydra.utils import get_class

from distill.stages.artifact import FIRST_NAMES
from distill.stages.base import Stage
from distill.stages.targets import resolve


def stage_class(config: Any, where: str) -> type[Stage]:
    """The class of a stage config. Raises ValueError naming the place where it is none."""
    for name, first in FIRST_NAMES.items():
        if isinstance(config, Mapping) and config.get("_target_") == first:
            raise ValueError(
                f"{where}._target_: found {first!r}, which is called {name!r} now; expected that"
            )
    found = resolve(config, where)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ValueError(f"{where}._target_: found {config['_target_']!r}, expected a stage")
    return found


def reference_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a stage that name other stages, as its class says."""
    stage: Any = get_class(config["_target_"])
    return tuple(stage.REFERENCES)


def stage_fields(config: Mapping[str, Any]) -> list[str]:
    """The options that a stage's class has."""
    return [field.name for field in fields(get_class(config["_target_"])) if field.init]


def references(config: Mapping[str, Any]) -> list[str]:
    """Names of the stages that a stage config refers to."""
    named = [config[key] for key in reference_keys(config) if isinstance(config.get(key), str)]
    networks, models = config.get("networks"), config.get("models")
    named += (
        [name for name in networks.values() if isinstance(name, str)] if isinstance(networks, Mapping) else []
    )
    if isinstance(models, Mapping):  # of another form, they are told when the stage is made
        rows = [model for model in models.values() if isinstance(model, Mapping)]
        named += [row["stage"] for row in rows if isinstance(row.get("stage"), str)]
    return named


def redirect(config: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The same stage with its references to other stages renamed."""
    changed = copy.deepcopy(dict(config)) | {
        key: mapping[value]
        for key in reference_keys(config)
        if isinstance(value := config.get(key), str) and value in mapping
    }
    if isinstance(changed.get("networks"), Mapping):
        changed["networks"] = {
            role: mapping.get(name, name) if isinstance(name, str) else name
            for role, name in changed["networks"].items()
        }
    return changed
