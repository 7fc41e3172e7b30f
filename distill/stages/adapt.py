"""A trained model with another net or another meaning, for a student that is to learn something that its teacher has not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.models.build import build_net
from distill.models.denoiser import Denoiser
from distill.process.base import KINDS


@dataclass(frozen=True)
class Adapt:
    """What `adapt` of a training stage says: the kind that the model is read as, and options of its net."""

    kind: str | None = None
    net: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind: found {self.kind!r}, expected one of {list(KINDS)}")


def adapted(
    student: Denoiser, net: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[Denoiser, dict[str, Any]]:
    """The same model with other options of its net, or read as a predictor of another kind; and its net's config.

    Every weight that there was is kept; parameters that the options add start as the net makes them. A net that is read
    as another kind starts wrong: the method has to repair it."""
    config = merged(copy.deepcopy(dict(net)), changes.get("net") or {})
    built, state = build_net(config, "adapt.net"), student.net.state_dict()
    try:
        missing, unexpected = built.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"adapt.net: the weights do not fit the changed net: {error}") from error
    if unexpected or not set(missing) <= set(built.state_dict()) - set(state):
        raise ValueError(f"adapt.net: {config} has no place for the weights {list(unexpected)[:4]}")
    other = Denoiser(
        built,
        student.process,
        changes.get("kind") or student.kind,
        student.sample_shape,
        conditions=student.conditions,
        guidable=student.guidable,
        coupling=student.coupling,
        boundary=student.boundary,
    )
    return other, config


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `changes` merged into its nested mappings."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            config[key] = merged(dict(config[key]), value)
        else:
            config[key] = copy.deepcopy(value)
    return config
