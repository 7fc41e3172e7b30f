"""Checkpoints of earlier versions: one file, `last.ckpt`, with whole tensors. Read, no longer written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.engine.made import feed
from distill.engine.stored import PARTS, Key, Refused, Stored, not_finite

SCHEMA = 2


class Former(Stored):
    """The content of such a file, in memory."""

    def __init__(self, path: Path, state: dict[str, Any], tensors: Mapping[Key, Tensor]) -> None:
        super().__init__(path, state, {key: tuple(value.shape) for key, value in tensors.items()})
        self.tensors = tensors

    def rows(self, key: Key, start: int, stop: int) -> Tensor:
        """Rows `start` .. `stop` - 1 of a tensor; of one without dimensions, all of it."""
        value = self.tensors[key]
        return value[start:stop] if value.dim() else value


def read(path: Path) -> Former:
    """Read a file onto the CPU. Raises `Refused` where it cannot be read, is older than schema 2, was changed afterwards, or
    holds numbers that are not finite; the error names the file."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch documents no errors, and raises many kinds for broken files
        raise Refused(f"{path}: not a readable checkpoint ({error})") from error
    found = state.get("schema") if isinstance(state, dict) else type(state).__name__
    if found == 1:
        raise Refused(
            f"{path}: schema: found 1, expected {SCHEMA}: an earlier version wrote it, which did not note what was trained"
        )
    if found != SCHEMA:
        raise Refused(f"{path}: schema: found {found!r}, this version reads {SCHEMA} in a file of this name")
    digest = state.pop("sha256", None)
    if missing := [part for part in PARTS if not isinstance(state.get(part), dict)]:
        raise Refused(f"{path}: not a readable checkpoint ({missing[0]}: missing)")
    if digest != content_digest(state):
        raise Refused(
            f"{path}: not a readable checkpoint (its content does not fit its sha256: it was changed)"
        )
    tensors: dict[Key, Tensor] = {}
    for part in ("networks", "ema"):
        tensors |= {(part, role, name): v for role, own in state[part].items() for name, v in own.items()}
        state[part] = list(state[part])
    for update, parameters in state["optimizers"].items():
        for name, entries in parameters.items():
            for entry in [entry for entry, value in entries.items() if isinstance(value, Tensor)]:
                tensors["optimizers", update, name, entry] = entries.pop(entry)
    if (wrong := not_finite(state, tensors)) is not None:
        raise Refused(f"{path}: {wrong}; expected a state to go on from")
    return Former(path, state, tensors)


def content_digest(state: Any) -> str:
    """sha256 over nested plain containers and tensors."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        feed(digest, value)
    elif isinstance(value, Mapping):
        digest.update(f"{{{len(value)} ".encode())
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)} ".encode())
        for entry in value:
            _feed(digest, entry)
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())
