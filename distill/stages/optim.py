"""Checks and builds the `optim` entries of a training stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from distill.engine.update import Optim
from distill.stages.targets import check_targets, resolve
from distill.typed import parse


@dataclass(frozen=True)
class OptimSettings:
    """The entry of one update: configs of optimizer and schedule; other fields as in `engine.update.Optim`."""

    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    clip: float | None = 1.0
    ema: float | None = 0.999
    ema_ramp: bool = True
    ema_halflife: float | None = None


def check_optim(optim: Mapping[str, Mapping[str, Any]], steps: int) -> None:
    """Build every entry once. Raises ValueError for wrong options before any stage runs."""
    for key, settings in optim.items():
        where = f"optim.{key}"
        parse(OptimSettings, settings, where)
        for part, config in (("optimizer", settings["optimizer"]), ("schedule", _schedule(settings, steps))):
            resolve(config, f"{where}.{part}")
            check_targets(config, f"{where}.{part}")
        try:
            probe = Optim(**build_optim({key: settings}, steps)[key])
            probe.optimizer([torch.zeros(1, requires_grad=True)])
            probe.schedule(0)
        except (TypeError, ValueError, RuntimeError, InstantiationException) as error:
            message = str(error.__cause__ or error)
            inner = message.startswith("optim.")
            raise ValueError(f"{where}{'.' if inner else ': '}{message.removeprefix('optim.')}") from error


def build_optim(optim: Mapping[str, Mapping[str, Any]], steps: int) -> dict[str, dict[str, Any]]:
    """Return optimizer settings with their objects. Schedules with `total: null` get `total: steps`."""
    built: dict[str, dict[str, Any]] = {}
    for key, settings in optim.items():
        built[key] = dict(settings) | {
            "optimizer": instantiate(settings["optimizer"], _partial_=True, _convert_="all"),
            "schedule": instantiate(_schedule(settings, steps)),
        }
    return built


def _schedule(settings: Mapping[str, Any], steps: int) -> dict[str, Any]:
    schedule = dict(settings["schedule"])
    if "total" in schedule and schedule["total"] is None:
        schedule["total"] = steps
    return schedule
