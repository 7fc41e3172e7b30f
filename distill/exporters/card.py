"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.evaluation.protocol import Protocol
from distill.evaluation.report import prose, table
from distill.models.generator import Generator


def card(
    recipe: str,
    generator: Generator,
    rows: Sequence[Mapping[str, Any]],
    protocol: Protocol | None,
    *,
    grid: bool,
    note: str = "",
    use: str | None = None,
) -> str:
    """README.md of an export: what the model is, how it is sampled, what was measured. `rows` may be
    empty; otherwise `protocol` describes the measurement. `use`: how to use another format than the native one."""
    conditions = generator.conditions
    shape = "x".join(str(n) for n in generator.shape)
    images, facts = generator.decoder.images, _facts(generator, shape)
    label = f", label={min(3, conditions.num_classes - 1)}" if conditions.num_classes else ""
    label = ', prompt="a photo of a dog"' if conditions.kind == "prompts" else label
    samples = "images" if images else "points"
    native = (
        f'```python\nimport distill\n\n{samples} = distill.load("path/to/this/folder").sample(8{label})  # '
        f"[8, {shape.replace('x', ', ')}]\n```\n\n"
        "```\npython -m distill.sample model=path/to/this/folder count=64 out=grid.png\n```"
    )
    parts = [
        f"# {prose(recipe)}: distilled student",
        f"**{prose(note)}**" if note else "",
        f"![{'one noise a column' if images else 'paths from noise to points'}](grid.png)" if grid else "",
        "\n".join(facts),
        use or native,
    ]
    if rows:
        if protocol is None:
            raise ValueError("protocol: found None, expected how the rows were measured")
        parts += ["## Measured", table(rows, protocol.names()), f"Protocol: {prose(protocol.describe())}."]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(generator: Generator, shape: str) -> list[str]:
    """Lines on what a model makes and how it is sampled."""
    spec, model, conditions = generator.spec, generator.denoiser, generator.conditions
    valid = "any number of" if spec.any_steps else " or ".join(str(n) for n in sorted(spec.times))
    guided = spec.guidance_scale != 1
    what = (
        f"images of {shape} (channels x height x width) in [-1, 1]"
        if generator.decoder.images
        else f"points of {shape} numbers"
    )
    alone = not spec.any_steps and set(spec.times) == {1}
    again = "predicts" if alone else "predicts, adds fresh noise, predicts again (sde)"
    if spec.renoise == "same" and not alone:
        again = "predicts all tokens, keeps the first groups, predicts the others again from the same noise"
    how = f"solver {spec.solver}, ode" if spec.mode == "ode" else again
    facts = [
        f"- makes {what}" + (f" for {conditions.words()}" if conditions.has_null else ""),
        f"- valid for {valid} step(s); default {spec.steps}; {how}",
        f"- guidance scale {spec.guidance_scale:g}"
        + (" (two network calls a step)" if guided else ": one network call a step"),
        f"- predicts {model.kind} under {type(model.process).__name__}; starts from "
        f"{spec.start_scale:g} x the noise of its process's end, at t = {spec.start(model.process):g}",
    ]
    if spec.baked is not None:
        facts.append(
            f"- {spec.baked}: baked into the pairs that it learned from; another guidance needs a student of other pairs"
        )
    if model.coupling == "endpoint":
        facts.append("- knows the noisiest time alone: not a start for further reflow or multi-step sampling")
    if model.coupling == "few_step":
        facts.append("- knows its sampler's times alone: not a start for reflow, no ODE for other solvers")
    return facts
