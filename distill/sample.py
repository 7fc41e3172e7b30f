"""`python -m distill.sample model=runs/instaflow/export count=64 out=grid.png`: draws a picture of samples of a model."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

import torch

from distill import load, terminal
from distill.evaluation.grid import save_samples
from distill.stages.outputs import SAMPLED, output_picture

PASSED_ON = ("label", "prompt", "seed", "steps", "force", "guidance_scale", "guidance_w", "noise_scale")


@dataclass
class Options:
    """Options:

    model: an export, any model folder, or a student of the package, such as digits/dmd
    out: a PNG; null: grid.png, if it does not exist or was drawn by this command
    count: number of samples
    label: class; null: all classes in turn
    prompt: of all samples, for models that take prompts; null: those that it was trained with, in turn
    seed: of the noise
    steps: null: the model's own
    force: allow step counts for which the model is not valid
    columns: images per row; null: the number of classes, or 10; at most 16
    guidance_scale: null: the model's own
    guidance_w: guidance - 1, for models that take it as an input
    noise_scale: scale of the noise that few-step students add between steps; null: the model's own
    strength: factor on the terms of an adapter; 0: its base's weights, null: 1
    device: cpu, cuda, cuda:N or mps"""

    model: str = ""
    out: str | None = None
    count: int = 64
    label: int | None = None
    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    force: bool = False
    columns: int | None = None
    guidance_scale: float | None = None
    guidance_w: float | None = None
    noise_scale: float | None = None
    strength: float | None = None
    device: str = "cpu"


def parse(arguments: list[str]) -> Options:
    """Parse `key=value` arguments. Raises ValueError naming the key."""
    options = terminal.read_options(Options, arguments)
    if not options.model:
        raise ValueError("model: missing; expected a model folder, or a student of the package: digits/dmd")
    for name in ("count", "columns", "steps"):
        if (found := getattr(options, name)) is not None and found < 1:
            raise ValueError(f"{name}: expected at least 1, found {found}")
    check_device(options.device)
    return options


def check_device(name: str) -> None:
    """Raise ValueError unless the device is available."""
    found = re.fullmatch(r"(cpu|cuda|mps)(?::(0|[1-9]\d*))?", name)
    if found is None:
        raise ValueError(f"device: found {name!r}, expected cpu, cuda, cuda:N or mps")
    there = 1 if found[1] == "cpu" else getattr(torch, found[1]).device_count()
    if int(found[2] or 0) >= there:
        raise ValueError(f"device: found {name!r}, but this machine has {there} of them; expected cpu")


def main() -> None:
    """Draw samples and save the picture."""
    with terminal.report_errors():
        if terminal.asked_for_help(__doc__, Options.__doc__):
            return
        options = parse(sys.argv[1:])
        out = output_picture(options.out, "grid.png")
        loaded = load(options.model, device=options.device)
        generator = loaded.with_strength(options.strength)
        samples = generator.sample(options.count, **{name: getattr(options, name) for name in PASSED_ON})
        columns = options.columns or min(options.count, generator.conditions.period or 10, 16)
        save_samples(samples, columns, out, SAMPLED, images=generator.decoder.images)
        steps = options.steps or generator.spec.steps
        print(terminal.line(f"{out}: {options.count} samples of {options.model}, {steps} step(s)"))


if __name__ == "__main__":
    main()
