"""References from stage configs to other stages: finds them, and renames them when stages are repeated."""

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
    """Return the class of a stage config. Raises ValueError with the place if it is not a stage."""
    for name, first in FIRST_NAMES.items():
        if isinstance(config, Mapping) and config.get("_target_") == first:
            raise ValueError(f"{where}._target_: found {first!r}, which was renamed; expected {name!r}")
    if isinstance(config, Mapping) and str(config.get("_target_")).endswith(".points.EvaluatePoints"):
        raise ValueError(
            f"{where}._target_: found {config['_target_']!r}, which was replaced; expected "
            "'distill.stages.evaluate.Evaluate' with meter: {_target_: distill.evaluation.meters.points.PointMeter, ...}"
        )
    found = resolve(config, where)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise ValueError(f"{where}._target_: found {config['_target_']!r}, expected a stage")
    return found


def reference_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields of a stage that name other stages (`Stage.REFERENCES`)."""
    stage: Any = get_class(config["_target_"])
    return tuple(stage.REFERENCES)


def stage_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the options of a stage's class."""
    return [field.name for field in fields(get_class(config["_target_"])) if field.init]


def references(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the stages that a stage config refers to."""
    named = [config[key] for key in reference_keys(config) if isinstance(config.get(key), str)]
    networks, models = config.get("networks"), config.get("models")
    named += (
        [name for name in networks.values() if isinstance(name, str)] if isinstance(networks, Mapping) else []
    )
    if isinstance(models, Mapping):  # other types are reported when the stage is built
        rows = [model for model in models.values() if isinstance(model, Mapping)]
        named += [row["stage"] for row in rows if isinstance(row.get("stage"), str)]
    return named


def redirect(config: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of a stage config with its references to other stages renamed."""
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
