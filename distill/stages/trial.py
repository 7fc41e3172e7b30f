"""Builds meters, and data and features of meters and methods, from configs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from distill.evaluation.meters.meter import Meter
from distill.stages.targets import resolve


def build_part(config: Any, where: str, device: torch.device | str = "cpu") -> Any:
    """The object of a config, on `device` where its class takes one. Raises ValueError that begins with `where`."""
    takes = inspect.signature(resolve(config, where)).parameters
    try:
        return instantiate(
            dict(config), _convert_="all", **({"device": str(device)} if "device" in takes else {})
        )
    except InstantiationException as error:
        raise ValueError(f"{where}: {error.__cause__ or error}") from error


def build_meter(config: Mapping[str, Any], device: torch.device | str = "cpu") -> Meter:
    """The meter of a config, its data and features built. Raises ValueError that names the option."""
    options = {
        key: build_part(value, f"meter.{key}", device)
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for key, value in config.items()
        if key != "_target_"
    }
    try:
        meter: Meter = resolve(config, "meter")(**options)
    except ValueError as error:
        raise ValueError(f"meter.{error}") from error
    return meter


def parts_digest(method: Mapping[str, Any]) -> str:
    """Fingerprints of the data and sha256 of the networks that a method's options name, such as feature extractors; empty for
    none."""
    found = []
    for key, value in method.items():
        if isinstance(value, Mapping) and "_target_" in value:
            part = build_part(value, f"method.{key}")
            known = getattr(part, "fingerprint", None)
            found.append(known() if callable(known) else str(part.sha256))
    return " ".join(found)
