"""Rebuilds a trained model with other net options or another prediction kind."""

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
    """The option `adapt` of a training stage.

    Attributes:
        kind: the new prediction kind, or None to keep it.
        net: changed options of the net, or None.
    """

    kind: str | None = None
    net: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind: found {self.kind!r}, expected one of {list(KINDS)}")


def adapted(student: Denoiser, changes: Mapping[str, Any]) -> Denoiser:
    """Return the model with changed net options or prediction kind.

    All weights are kept; new parameters have their initial values. The output of the net is not converted to the new kind:
    its predictions are wrong until the method has trained it.

    Raises:
        ValueError: if the weights do not fit the changed net.
    """
    config = merged(student.net_config(), changes.get("net") or {})
    built, state = build_net(config, "adapt.net"), student.net.state_dict()
    try:
        missing, unexpected = built.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"adapt.net: the weights do not fit the changed net: {error}") from error
    if unexpected or not set(missing) <= set(built.state_dict()) - set(state):
        raise ValueError(f"adapt.net: {config} has no parameters for the weights {list(unexpected)[:4]}")
    return student.with_(net=built, kind=changes.get("kind") or student.kind, conditions=None)


def merged(config: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `changes` into `config` and its nested mappings, in place; returns `config`."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            config[key] = merged(dict(config[key]), value)
        else:
            config[key] = copy.deepcopy(value)
    return config
