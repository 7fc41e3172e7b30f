"""`python -m distill.sample model=runs/instaflow/export count=64 out=grid.png`: a picture of samples, from an
export alone."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.evaluation.grid import save_samples
from distill.models.native import load_model

PASSED_ON = ("seed", "steps", "force", "guidance_scale", "guidance_w", "noise_scale")


@dataclass
class Options:
    """model: an export (or any model folder); count, label, seed: what to draw; steps: null is the model's
    own; force: allow step counts that the model is not valid for; guidance_scale: null is the model's own; guidance_w: the
    guidance less 1 as an input, of models that take it so; noise_scale: of the fresh noise that few-step students add between
    steps, null is the model's own; out: the PNG, of images in `columns` or of points in the plane."""

    model: str = ""
    out: str = "grid.png"
    count: int = 64
    label: int | None = None
    seed: int = 0
    steps: int | None = None
    force: bool = False
    columns: int | None = None
    guidance_scale: float | None = None
    guidance_w: float | None = None
    noise_scale: float | None = None
    device: str = "cpu"


def parse(arguments: list[str]) -> Options:
    """key=value arguments -> Options; errors name the key and the nearest valid one."""
    names = [field.name for field in fields(Options)]
    for argument in arguments:
        key = argument.partition("=")[0]
        if key not in names or "=" not in argument:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]}=?" if near else ""
            raise ValueError(f"{argument}: expected key=value with a key among {', '.join(names)}{hint}")
    merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.from_dotlist(arguments))
    options = OmegaConf.to_object(merged)
    assert isinstance(options, Options)
    return options


def main() -> None:
    """Draw and save."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__}\n\n{Options.__doc__}")
        return
    try:
        options = parse(sys.argv[1:])
        if not options.model:
            raise ValueError("model: missing; expected a model folder, such as model=runs/instaflow/export")
        if not options.out.endswith(".png"):
            raise ValueError(f"out: found {options.out!r}, expected a .png file")
        if options.columns is not None and options.columns < 1:
            raise ValueError(f"columns: found {options.columns}, expected at least 1")
        generator = load_model(options.model, device=options.device)
        passed = {name: getattr(options, name) for name in PASSED_ON}
        samples = generator.sample(options.count, options.label, **passed)
        columns = options.columns or min(options.count, generator.num_classes or 10, 16)
        save_samples(samples, columns, Path(options.out))
    except (ValueError, OSError, RuntimeError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    steps = options.steps or generator.spec.steps
    print(f"{options.out}: {options.count} samples of {options.model}, {steps} step(s)")


if __name__ == "__main__":
    main()
