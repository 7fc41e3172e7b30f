"""Expands a composed recipe to its stages: repeated rounds, halvings, loaded models, limits of the profile."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.recipe.encoding import encode
from distill.recipe.halving import halve
from distill.recipe.profile import limit, limits_of, with_values
from distill.recipe.references import redirect, references, stage_class, stage_fields
from distill.typed import check_keys, parse

LOAD, TRAIN = "distill.stages.load.Load", "distill.stages.train.Train"


@dataclass(frozen=True)
class Repeat:
    """The block `repeat` of a recipe; see the function `repeat`."""

    stages: list[str]
    times: Any  # often the key `rounds` of a recipe
    carry: dict[str, str] | None = None
    then: dict[str, dict[str, Any]] | None = None


def expand(recipe: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return stage configs by name, in execution order, from `stages`, `repeat`, `halve` and `profile` of a composed config.

    Raises:
        ValueError: names the stage or key and what is wrong with it.
    """
    stages: dict[str, dict[str, Any]] = {}
    for name, config in parse(dict[str, dict[str, Any] | None], recipe["stages"], "stages").items():
        if config is not None:  # null removes a stage
            stage_class(config, f"stages.{name}")
            stages[name] = copy.deepcopy(config)
    if not stages:
        raise ValueError("stages: found none, expected a mapping of names to stages")
    for name, config in stages.items():
        if config["_target_"] == TRAIN and config.get("path") is not None:
            stages[name] = {"_target_": LOAD, "path": config["path"]}
    profile, block = recipe.get("profile") or {}, recipe.get("halve")
    stages, block = with_values(in_order(encode(stages)), block, profile)
    if recipe.get("repeat"):
        stages = repeat(stages, recipe["repeat"])
    if block:
        stages = halve(stages, block)
    limits = limits_of(profile, stages)
    return {name: limit(config, limits) for name, config in stages.items()}


def in_order(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the stages sorted so that each follows those it refers to; otherwise the order is kept.

    (Merging configs does not preserve the order.)"""
    ordered: dict[str, dict[str, Any]] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"stages: {' -> '.join([*path[path.index(name) :], name])}: circular reference")
        for target in references(stages[name]):
            if target not in stages:
                raise ValueError(f"stages.{name}: refers to {target!r}, expected one of {list(stages)}")
            visit(target, (*path, name))
        ordered[name] = stages[name]

    for name in stages:
        visit(name, ())
    return ordered


def repeat(stages: dict[str, dict[str, Any]], block: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Insert rounds 2 .. `times` of the stages of `block` after their first round.

    In round r > 1 a stage is named `<name>_round<r>` and refers to the stages of its own round. Stages after the block
    refer to the last round. Evaluated models of the block get one set of rows per round.

    Args:
        stages: stage configs by name.
        block: {stages: [pairs, reflow], times: k, carry: {teacher: reflow}, then: {reflow: {init: reflow}}}.
            `carry` replaces references to a stage outside the block by the result of the previous round.
            `then` sets fields from round 2 on; names of stages in it refer to the previous round.
    """
    settings = parse(Repeat, block, "repeat")
    names, times, carry, then = settings.stages, settings.times, settings.carry or {}, settings.then or {}
    _check_repeat(settings, stages)
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


def _check_repeat(block: Repeat, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a part of `repeat` has no effect, names unknown stages, or its rounds have names already in use."""
    names, carry, then = block.stages, block.carry or {}, block.then or {}
    if isinstance(block.times, bool) or not isinstance(block.times, int) or block.times < 1:
        raise ValueError(f"repeat.times, rounds: expected an integer of at least 1, found {block.times!r}")
    if missing := [name for name in [*names, *carry, *carry.values(), *then] if name not in stages]:
        raise ValueError(f"repeat: found the stages {missing}, expected some of {list(stages)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"repeat.stages: found {names}, expected the names of stages, each once")
    for key, inner in (("carry", carry.values()), ("then", then)):
        if outside := [name for name in inner if name not in names]:
            raise ValueError(
                f"repeat.{key}: found {outside[0]!r}, expected a stage of repeat.stages: {names}"
            )
    for old in carry:
        if not any(old in references(stages[name]) for name in names):
            raise ValueError(
                f"repeat.carry.{old}: has no effect: no stage of {names} refers to it; remove it"
            )
    for name, options in then.items():
        check_keys(options, stage_fields(stages[name]), f"repeat.then.{name}")
    copies = [f"{name}_round{number}" for name in names for number in range(2, block.times + 1)]
    if taken := [name for name in copies if name in stages]:
        raise ValueError(
            f"repeat.stages: the rounds need the names {taken}; rename the stages of these names"
        )


def _rounds_of_models(models: Mapping[str, Any], names: list[str], times: int) -> dict[str, Any]:
    """Return the evaluated models with one entry per round for those of the repeated block: reflow, reflow2, ..."""
    rows: dict[str, Any] = {}
    for label, model in models.items():
        rows[label] = copy.deepcopy(model)
        if isinstance(model, Mapping) and model.get("stage") in names:
            for number in range(2, times + 1):
                if f"{label}{number}" in models:
                    raise ValueError(
                        f"models.{label}{number}: is used for round {number} of {label!r}; expected another label"
                    )
                rows[f"{label}{number}"] = dict(model) | {"stage": f"{model['stage']}_round{number}"}
    return rows
