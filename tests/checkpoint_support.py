"""Checkpoints as tests look at them and spoil them. No test itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.engine.checkpoint import newest
from distill.engine.former import content_digest
from distill.engine.stored import FORMER, STATE, Stored, checkpoints, described, write_manifest
from distill.world import World


def opened(folder: Path) -> Stored:
    """The newest sound checkpoint of a folder."""
    found, _ = newest(folder, World())
    assert found is not None, f"{folder}: no checkpoint"
    return found


def nested(found: Stored) -> dict[str, Any]:
    """Plain values and whole tensors: networks and averages by role, optimizers by update and parameter."""
    state = dict(found.state)
    for part in ("networks", "ema"):
        state[part] = {role: {} for role in found.state[part]}
    for key in found.shapes:
        place: Any = state
        for name in key[:-1]:
            place = place[name]
        place[key[-1]] = found.whole(key)
    return state


def checkpoint_of(folder: Path) -> dict[str, Any]:
    """`nested` of the newest checkpoint."""
    return nested(opened(folder))


def has_checkpoint(folder: Path) -> Callable[[], bool]:
    """A function that says whether there is one: to wait for it."""
    return lambda: bool(checkpoints(folder))


def last(folder: Path) -> Path:
    """The newest checkpoint's folder."""
    return folder / checkpoints(folder)[0]


def content(path: Path) -> dict[str, bytes]:
    """name -> bytes of all files below a folder."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def edited(folder: Path, target: Path, change: Callable[[Any], object], *, certified: bool = False) -> Path:
    """A folder with the newest checkpoint of another one, of one process, that somebody has loaded, changed and saved again;
    with `certified`, with a manifest that fits."""
    path = target / last(folder).name
    shutil.copytree(last(folder), path)
    (shard,) = path.glob("shard_*")
    tensors: dict[str, Tensor] = load_file(shard)
    state = torch.load(path / STATE, weights_only=True)
    plain = {name: value for name, value in state.items() if name != "tensors"}
    whole = nested(opened(folder))
    keys = list(state["tensors"])
    change(whole)
    for key in keys:
        place = whole
        for name in key[:-1]:
            place = place.get(name, {})
        if key[-1] in place:
            tensors["/".join(key)] = place[key[-1]]
        else:
            del tensors["/".join(key)], state["tensors"][key]
    for name in plain:
        if name in ("networks", "ema"):
            state[name] = list(whole[name])
        elif name != "optimizers":
            state[name] = whole[name]
    save_file(tensors, shard)
    torch.save(state, path / STATE)
    if certified:
        write_manifest(path, {file.name: described(file) for file in (shard, path / STATE)})
    return target


def former_file(folder: Path, target: Path, **changes: Any) -> Path:
    """`last.ckpt` in `target`, as earlier versions wrote it, with the newest checkpoint of `folder`."""
    state = {"schema": 2} | checkpoint_of(folder) | changes
    target.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"sha256": content_digest(state)}, target / FORMER)
    return target / FORMER


def given(source: Path, target: Path) -> None:
    """Give a folder the checkpoints of another, instead of its own."""
    shutil.rmtree(target)
    shutil.copytree(source, target)
