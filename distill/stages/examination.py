"""Reads a run folder, finished or under way, for `distill.doctor`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.engine.logging import read_entries
from distill.engine.module import STUDENT
from distill.engine.update import Optim
from distill.evaluation import comparison
from distill.evaluation.evaluation import METRICS
from distill.evaluation.examined import Curve, Examined, Measured, Spread, Trained, spread_of
from distill.files import read_json
from distill.stages.evaluate import Evaluate
from distill.stages.optim import build_optim
from distill.stages.ownership import PLAN, is_run
from distill.stages.targets import resolve
from distill.stages.train import Train
from distill.stages.trial import build_part

# Options of a training stage that its curves depend on, beside the optimizers. The rest names stages or streams.
SETTINGS = ("method", "data", "net", "process", "kind", "steps", "batch_size", "adapt", "model")
MONITOR = ("count", "k", "data", "features")
COUNTERS = ("iteration", "step", "images", "seconds")
SAMPLES, VALUES = 512, 2**22  # of the data that are read, at most


def examine(folder: Path, elsewhere: str | None = None) -> Examined:
    """What a run folder tells; `elsewhere`: a folder of `distill.evaluate`, see `Examined`.

    Raises ValueError for a folder that is no run, or in which nothing has been trained yet."""
    if not folder.is_dir() or not is_run(folder) or not (folder / PLAN).is_file():
        raise ValueError(f"{folder}: is no run, expected a folder of distill.train, such as runs/sid")
    plan = read_json(folder / PLAN)
    kinds = {name: resolve(config, f"{folder / PLAN}: {name}") for name, config in plan["stages"].items()}
    notes: list[str] = []
    stages: dict[str, Trained] = {}
    data: dict[str, Spread | None] = {}
    for name, config in plan["stages"].items():
        entries = read_entries(folder / name / "logs" / "metrics.jsonl") if kinds[name] is Train else []
        if entries:
            source = str(config["data"])
            if source not in data:
                data[source] = _spread(config["data"], notes)
            stages[name] = _trained(name, config, entries, data[source])
    if not stages:
        raise ValueError(f"{folder}: nothing has been logged yet, expected a run that trains")
    measured = None
    for name, config in plan["stages"].items():
        if kinds[name] is Evaluate and (folder / name / METRICS).is_file():
            measured = _measured(folder / name / METRICS, config["models"])
    return Examined(
        name=str(folder),
        recipe=plan["recipe"],
        seed=plan["seed"],
        stages=stages,
        measured=measured,
        elsewhere=None if elsewhere is None else _measured(comparison.find([elsewhere])[0][0], {}),
        notes=notes,
    )


def _measured(path: Path, models: Mapping[str, Any]) -> Measured:
    run = comparison.read([path])[0]
    return Measured(run.protocol, run.rows, run.real, {label: row["stage"] for label, row in models.items()})


def _trained(
    name: str, config: Mapping[str, Any], entries: list[dict[str, Any]], data: Spread | None
) -> Trained:
    steps, monitor = config["steps"], config.get("monitor")
    curves: dict[str, list[tuple[float, float | None]]] = {}
    for entry in entries:
        for key, value in entry.items():
            if key not in COUNTERS and "_bin" not in key:
                curves.setdefault(key, []).append((entry["step"] / steps, value))
    curve: dict[str, Curve] = dict(curves)
    return Trained(
        name=name,
        settings=settings_of(config),
        optim=config["optim"],
        monitor=None if monitor is None else {key: monitor.get(key) for key in MONITOR},
        steps=steps,
        at=entries[-1]["step"] / steps,
        curves=curve,
        start_share=_start_share(config["optim"].get(STUDENT), steps, config["batch_size"]),
        data=data,
    )


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """`Trained.settings` of the config of a training stage."""
    found = {key: config.get(key) for key in SETTINGS}
    if isinstance(found["data"], str):
        found["data"] = "pairs"  # of a stage, whatever its name
    return found


def _start_share(settings: Mapping[str, Any] | None, steps: int, images: int) -> float | None:
    """The share of the weights at the start in the average after all steps: the product of its decays."""
    if settings is None:
        return None
    optim = Optim(**build_optim({STUDENT: settings}, steps)[STUDENT])
    if not optim.averaged:
        return None
    return math.prod(optim.decay_at(step, images) for step in range(steps))


def _spread(config: Any, notes: list[str]) -> Spread | None:
    """Statistics of samples that lie evenly over a data set; None, with a note, where they cannot be read."""
    if isinstance(config, str):  # made by a stage
        return None
    try:
        source = build_part(config, "data")
        count = min(SAMPLES, len(source), max(2, VALUES // math.prod(source.sample_shape)))
        rows = torch.arange(count) * len(source) // count
        batch = source.fetch(rows, rows)
    except (ValueError, OSError, ImportError) as error:
        notes.append(f"the data could not be read, so their range is not checked ({error})")
        return None
    if batch.x0 is None or count < 2:
        return None
    ranged = getattr(source, "value_range", None) is not None
    return spread_of(batch.x0, batch.cond.values.get("label"), ranged)
