"""The block `profile` of a config: upper limits of sizes, and values for options of the stages of any recipe."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from distill.recipe.references import references
from distill.stages.adapt import merged
from distill.typed import check_keys, parse

SIZES = ("steps", "count", "batch_size")
TRAIN, GENERATE = "distill.stages.train.Train", "distill.stages.generate.Generate"
EVALUATE = "distill.stages.evaluate.Evaluate"
# Values: `methods` and `adapters` by method for the stages that train (the second over the first, where adapters are trained),
# `pairs` for the stages that sample a teacher or a student, `rows` for evaluated models by label.
VALUES = ("methods", "adapters", "pairs", "rows")
TYPED = "typed"  # keys of the command line, which profiles do not change


def with_values(
    stages: Mapping[str, dict[str, Any]], block: Any, profile: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], Any]:
    """Set the profile's values in the stages, where the command line does not set them. Returns the stages, and the block
    `halve` without the options of single rounds that the profile sets for all.

    Raises:
        ValueError: names the key of the profile that is of another type.
    """
    by_method = {
        name: parse(dict[str, dict[str, Any]], profile.get(name) or {}, f"profile.{name}")
        for name in ("methods", "adapters")
    }
    pairs = parse(dict[str, dict[str, Any]], profile.get("pairs") or {}, "profile.pairs")
    check_keys(pairs, ("teacher", "student"), "profile.pairs")
    rows = parse(dict[str, dict[str, Any]], profile.get("rows") or {}, "profile.rows")
    typed = list(profile.get(TYPED) or ())
    result = {}
    for name, config in stages.items():
        values: dict[str, Any] = {}
        if config["_target_"] == TRAIN and isinstance(config.get("method"), Mapping):
            method = str(config["method"].get("_target_")).split(".")[-2:][0]
            adapts = (config.get("adapt") or {}).get("lora") is not None
            values = copy.deepcopy(by_method["methods"].get(method, {}))
            values = merged(values, by_method["adapters"].get(method, {}) if adapts else {})
        elif config["_target_"] == GENERATE:
            trained = any(stages[other]["_target_"] == TRAIN for other in references(config))
            values = pairs.get("student" if trained else "teacher", {})
            if config.get("states"):  # trajectories: fewer samples, of the recipe's own guidance
                values = {key: v for key, v in values.items() if key not in ("count", "guidance_scale")}
            values = _untyped(
                values, typed, f"data.{name}"
            )  # of the stage that the expansion inserts for prompts
        elif config["_target_"] == EVALUATE:
            own = {label: options for label, options in rows.items() if label in (config.get("models") or {})}
            values = _untyped({"models": own}, typed, "eval")  # as they are typed in most recipes
        values = _untyped(values, typed, f"stages.{name}")
        result[name] = merged(copy.deepcopy(config), values)
        if values and isinstance(block, Mapping) and block.get("stage") == name:
            block = _without(block, values, typed)
    return result, block


def _without(
    block: Mapping[str, Any], values: Mapping[str, Any], typed: Collection[str]
) -> Mapping[str, Any]:
    """A block `halve` without the options of single rounds that `values` sets; rounds of the command line stay."""
    rounds = block.get("rounds")
    if not isinstance(rounds, Mapping) or any(key.startswith("halve.rounds") for key in typed):
        return block
    kept = {
        count: {key: value for key, value in options.items() if key not in values}
        if isinstance(options, Mapping)
        else options
        for count, options in rounds.items()
    }
    return {**block, "rounds": kept}


def _untyped(values: Mapping[str, Any], typed: Collection[str], place: str) -> dict[str, Any]:
    """The values below `place` that no key of the command line sets, in whole or in part."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{place}.{key}"
        if any(where == other or where.startswith(f"{other}.") for other in typed):
            continue
        if isinstance(value, Mapping):
            found[key] = _untyped(value, typed, where)
        elif not any(other.startswith(f"{where}.") for other in typed):
            found[key] = value
    return found


def limits_of(profile: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Return upper limits by field: `SIZES` and every integer field of a stage or monitor of the recipe."""
    given = {key: value for key, value in profile.items() if key not in (*VALUES, TYPED)}
    found = parse(dict[str, int | None], given, "profile")
    fields = [part for config in stages.values() for part in (config, config.get("monitor"))]
    numbers = {
        key for part in fields if isinstance(part, Mapping) for key, v in part.items() if type(v) is int
    }
    check_keys(found, [*SIZES, *sorted(numbers - set(SIZES))], "profile")
    if wrong := [key for key, value in found.items() if value is not None and value < 1]:
        raise ValueError(f"profile.{wrong[0]}: found {found[wrong[0]]!r}, expected an integer of at least 1")
    return {key: value for key, value in found.items() if value is not None}


def limit(config: dict[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """Apply the profile's upper limits to a stage. If there are any, quality gates are removed: they would be meaningless."""
    config = copy.deepcopy(config)
    if not limits:
        return config
    for key, cap in limits.items():
        if isinstance(config.get(key), int):
            config[key] = min(config[key], cap)
        if isinstance(config.get("monitor"), dict) and isinstance(config["monitor"].get(key), int):
            config["monitor"][key] = min(config["monitor"][key], cap)
    if "gates" in config:
        config["gates"] = []
        config["note"] = (
            "The sizes of this run were limited by a profile: its numbers and images mean nothing."
        )
    return config
