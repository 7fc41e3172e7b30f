"""From a composed recipe to the list of stages that run: repeated rounds, pretrained teachers, profile
limits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from distill.pipeline.halving import halve
from distill.pipeline.references import redirect, references

LOAD, TRAIN = "distill.pipeline.stages.Load", "distill.pipeline.stages.Train"


def expand(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage configs by name, in order, from a composed config's `stages`, `repeat`, `halve` and `profile` (plain
    containers)."""
    stages = {
        name: copy.deepcopy(dict(config)) for name, config in recipe["stages"].items() if config is not None
    }
    if not stages:
        raise ValueError(
            "stages: found none; a recipe of your own starts with the line `# @package _global_` and has a `stages` block"
        )
    for name, config in stages.items():
        if "_target_" not in config:
            raise ValueError(
                f"stages.{name}: has no _target_; expected a stage such as distill.pipeline.stages.Train"
            )
        if config["_target_"] == TRAIN and config.get("path") is not None:
            stages[name] = {"_target_": LOAD, "path": config["path"]}
    stages = in_order(stages)
    if recipe.get("repeat"):
        stages = repeat(stages, recipe["repeat"])
    if recipe.get("halve"):
        stages = halve(stages, recipe["halve"])
    limits = {key: value for key, value in (recipe.get("profile") or {}).items() if value is not None}
    if wrong := [key for key, value in limits.items() if not isinstance(value, int) or value < 1]:
        raise ValueError(f"profile.{wrong[0]}: found {limits[wrong[0]]!r}, expected an integer of at least 1")
    return {name: limit(config, limits) for name, config in stages.items()}


def in_order(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages with every stage after those it refers to, else as written (merging configs does not keep their
    order)."""
    ordered: dict[str, dict[str, Any]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(
                f"stages: {' -> '.join([*path[path.index(name) :], name])} refer to each other in a circle"
            )
        for target in references(stages[name]):
            if target not in stages:
                raise ValueError(f"stages.{name}: refers to {target!r}, expected one of {list(stages)}")
            visit(target, (*path, name))
        ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered


def repeat(stages: dict[str, dict[str, Any]], block: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Insert rounds 2 .. times of the stages of `block` after their first round.

    block: {stages: [pairs, reflow], times: k, carry: {teacher: reflow}, then: {reflow: {init: reflow}}}. In round
    r > 1 a stage is named `<name>_round<r>`; its references to stages of the block mean this round's, and `carry` says
    which earlier stage's place the previous round's result takes. `then` gives fields that a stage has from round 2
    on; a stage of the block named there means the previous round's. Stages after the block refer to the last round;
    evaluated models of the block get a row set a round.
    """
    names, times, carry = list(block["stages"]), block["times"], dict(block.get("carry") or {})
    if not isinstance(times, int) or times < 1:
        raise ValueError(f"rounds: expected an integer of at least 1, found {times!r}")
    then = dict(block.get("then") or {})
    if missing := [name for name in [*names, *carry, *carry.values(), *then] if name not in stages]:
        raise ValueError(f"repeat: names the stages {missing}, found only {list(stages)}")
    result: dict[str, dict[str, Any]] = {}
    order = list(stages)
    last = max(order.index(name) for name in names)
    current = {name: name for name in names}
    for position, name in enumerate(order):
        config = stages[name]
        if position > last:
            config = redirect(config, current)
            if isinstance(config.get("models"), Mapping):
                config["models"] = _rounds_of_models(stages[name]["models"], names, times)
        result[name] = config
        if position != last:
            continue
        for number in range(2, times + 1):
            previous, current = current, {n: f"{n}_round{number}" for n in names}
            mapping = current | {old: previous[new] for old, new in carry.items()}
            for n in names:
                copied = redirect(stages[n], mapping)
                changed = {"_target_": copied["_target_"], **(then.get(n) or {})}
                copied |= redirect(changed, previous)
                if "stream" in copied:
                    copied["stream"] = f"{copied['stream']}_round{number}"
                result[current[n]] = copied
    return result


def _rounds_of_models(models: Mapping[str, Any], names: list[str], times: int) -> dict[str, Any]:
    """Evaluated models, with one entry a round for those of the repeated block: reflow, reflow2, ..."""
    rows: dict[str, Any] = {}
    for label, model in models.items():
        rows[label] = dict(model)
        if model["stage"] in names:
            for number in range(2, times + 1):
                rows[f"{label}{number}"] = dict(model) | {"stage": f"{model['stage']}_round{number}"}
    return rows


def limit(config: dict[str, Any], limits: Mapping[str, int]) -> dict[str, Any]:
    """A stage with the profile's upper limits on its sizes; with any limit, quality gates say nothing and are
    dropped."""
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
