"""Which stages a stage config refers to, and how such references are renamed when stages are repeated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from hydra.utils import get_class


def reference_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a stage that name other stages, as its class says."""
    stage: Any = get_class(config["_target_"])
    return tuple(stage.REFERENCES)


def references(config: Mapping[str, Any]) -> list[str]:
    """Names of the stages that a stage config refers to."""
    named = [config[key] for key in reference_keys(config) if isinstance(config.get(key), str)]
    named += list((config.get("networks") or {}).values())
    models = config.get("models")
    return named + ([model["stage"] for model in models.values()] if isinstance(models, Mapping) else [])


def redirect(config: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The same stage with its references to other stages renamed."""
    changed = copy.deepcopy(dict(config)) | {
        key: mapping[value]
        for key in reference_keys(config)
        if isinstance(value := config.get(key), str) and value in mapping
    }
    if changed.get("networks"):
        changed["networks"] = {role: mapping.get(name, name) for role, name in changed["networks"].items()}
    return changed
