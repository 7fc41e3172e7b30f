"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.protocol import Protocol
from distill.evaluation.report import prose, table
from distill.models.build import build_process


def card(
    recipe: str,
    description: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    protocol: Protocol | None,
    *,
    grid: bool,
    note: str = "",
) -> str:
    """README.md of an export: what the model is, how it is sampled, what was measured. `rows` may be
    empty; where they are not, `protocol` says how they were measured."""
    sampler = description["sampler"]
    valid = "any number of" if sampler["any_steps"] else " or ".join(sorted(sampler["times"], key=int))
    classes = description["num_classes"]
    shape = "x".join(str(n) for n in description["sample_shape"])
    guided = sampler["guidance_scale"] != 1
    points = description.get("value_range", [-1.0, 1.0]) is None
    what = (
        f"points of {shape} numbers"
        if points
        else f"images of {shape} (channels x height x width) in [-1, 1]"
    )
    ode = sampler["mode"] == "ode"
    alone = not sampler["any_steps"] and set(sampler["times"]) == {"1"}
    again = "predicts" if alone else "predicts, adds fresh noise, predicts again (sde)"
    how = f"solver {sampler['solver']}, ode" if ode else again
    facts = [
        f"- makes {what}" + (f" for {classes} classes" if classes else ""),
        f"- valid for {valid} step(s); default {sampler['steps']}; {how}",
        f"- guidance scale {sampler['guidance_scale']:g}"
        + (" (two network calls a step)" if guided else ": one network call a step"),
        f"- predicts {description['kind']} under {description['process']['_target_'].rpartition('.')[2]}; "
        "starts from "
        f"{sampler['start_scale']:g} x the noise of its process's end, at t = "
        f"{max((t for ts in sampler['times'].values() for t in ts), default=build_process(description['process']).t_max):g}",
    ]
    if description["coupling"] == "endpoint":
        facts.append("- knows the noisiest time alone: not a start for further reflow or multi-step sampling")
    if description["coupling"] == "few_step":
        facts.append("- knows its sampler's times alone: not a start for reflow, no ODE for other solvers")
    label = f", label={min(3, classes - 1)}" if classes else ""
    samples = "points" if points else "images"
    use = (
        f'```python\nimport distill\n\n{samples} = distill.load("path/to/this/folder").sample(8{label})  # '
        f"[8, {shape.replace('x', ', ')}]\n```\n\n"
        "```\npython -m distill.sample model=path/to/this/folder count=64 out=grid.png\n```"
    )
    parts = [
        f"# {prose(recipe)}: distilled student",
        f"**{prose(note)}**" if note else "",
        f"![{'paths from noise to points' if points else 'one noise a column'}](grid.png)" if grid else "",
        "\n".join(facts),
        use,
    ]
    if rows:
        if protocol is None:
            raise ValueError("protocol: found None, expected how the rows were measured")
        parts += ["## Measured", table(rows, protocol.names()), f"Protocol: {prose(protocol.describe())}."]
    return "\n\n".join(part for part in parts if part) + "\n"
