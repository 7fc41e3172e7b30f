"""Progressive distillation: expands one stage into a training stage per halving of the sampling steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.recipe.references import redirect
from distill.stages.adapt import merged
from distill.typed import parse


def step_counts(start: int, end: int) -> list[int]:
    """Return the students' step counts: start / 2, start / 4, ..., end.

    Raises ValueError unless start = end * 2^k with k >= 1."""
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"halve.{name}: expected an integer of at least 1, found {value!r}")
    visited, current = [], start
    while current > end and current % 2 == 0:
        current //= 2
        visited.append(current)
    if not visited or visited[-1] != end:
        raise ValueError(
            f"halve: found start {start} and end {end}; halving gives {[start, *visited]}, "
            "expected start = end * 2^k with k >= 1"
        )
    return visited


def halve(stages: Mapping[str, dict[str, Any]], block: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Replace the stage `block.stage` by one stage per halving.

    The stage for N steps is named `<stage>_<N>` and its method gets `steps: N`. In the first round, `init` and `teacher`
    are those of the template; later they are the previous round. References to the template become references to the
    last round. An evaluated model of the template gets one row per round, labelled `<label>_<N>`, the last one `<label>`.
    Only the first round uses `method.guidance_scale`; its student has learned the guidance, so later rounds use 1.

    Args:
        stages: stage configs by name.
        block: {stage: distill, start: 16, end: 1, rounds: {1: {steps: 600}}}; `rounds` overrides options of single
            rounds, keyed by N.
    """
    check_block(block, stages)
    name = block["stage"]
    counts = step_counts(block["start"], block["end"])
    special = _special(block.get("rounds") or {}, counts)
    result: dict[str, dict[str, Any]] = {}
    last = f"{name}_{counts[-1]}"
    if taken := [f"{name}_{count}" for count in counts if f"{name}_{count}" in stages]:
        raise ValueError(
            f"halve.stage: the rounds of {name!r} need the names {taken}; rename the stages of these names"
        )
    for other, config in stages.items():
        if other != name:
            changed = redirect(config, {name: last})
            if isinstance(config.get("models"), Mapping):
                changed["models"] = _models(config["models"], name, counts)
            result[other] = changed
            continue
        previous = None
        for count in counts:
            stage = merged(copy.deepcopy(config), {"method": {"steps": count}})
            if previous is not None:
                stage |= {role: previous for role in ("init", "teacher") if stage.get(role) is not None}
                if "guidance_scale" in stage["method"]:
                    stage["method"]["guidance_scale"] = 1.0
            stage["stream"] = f"{stage.get('stream', 'train')}_{count}"
            result[f"{name}_{count}"] = merged(stage, special.get(count, {}))
            previous = f"{name}_{count}"
    return result


@dataclass(frozen=True)
class Halve:
    """The block `halve` of a recipe; see the function `halve`, which checks `start`, `end` and `rounds`."""

    stage: str
    start: Any
    end: Any
    rounds: Any = None


def check_block(block: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if a `halve` block has unknown keys, or its stage does not train with a method."""
    name = parse(Halve, block, "halve").stage
    if name not in stages:
        raise ValueError(f"halve.stage: found {name!r}, expected one of {list(stages)}")
    if not isinstance(stages[name].get("method"), Mapping):
        found = str(stages[name]["_target_"]).rpartition(".")[2]
        raise ValueError(f"halve.stage: {name!r} is a {found} stage, expected one that trains with a method")


def _special(rounds: Any, counts: list[int]) -> dict[int, dict[str, Any]]:
    """Return step count -> options of that round."""
    if not isinstance(rounds, Mapping) or not all(isinstance(v, Mapping) for v in rounds.values()):
        raise ValueError(f"halve.rounds: found {rounds!r}, expected {{step count: {{option: value}}}}")
    if unknown := [count for count in rounds if str(count) not in map(str, counts)]:
        listed = ", ".join(str(count) for count in unknown)
        raise ValueError(f"halve.rounds: found [{listed}], expected step counts among {counts}")
    found: dict[int, dict[str, Any]] = {}
    for count, options in rounds.items():  # keys added on the command line are strings: merge 1 and "1"
        found[int(count)] = merged(found.get(int(count), {}), options)
    return found


def _models(models: Mapping[str, Any], name: str, counts: list[int]) -> dict[str, Any]:
    """Return the evaluated models with one entry per round for those of the template."""
    rows: dict[str, Any] = {}
    for label, model in models.items():
        if not isinstance(model, Mapping) or model.get("stage") != name:
            rows[label] = model
            continue
        for count in counts:
            label_here = label if count == counts[-1] else f"{label}_{count}"
            if label_here != label and label_here in models:
                raise ValueError(
                    f"models.{label_here}: is used for a round of {label!r}; expected another label"
                )
            rows[label_here] = dict(model) | {"stage": f"{name}_{count}", "steps": [count]}
    return rows
