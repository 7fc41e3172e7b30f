"""Checkpoints on disk: one folder each, with the tensors in shards and a manifest.

`step_0000200/`, after 200 steps of the student (`step_0000200+3`: and three more iterations), holds

    shard_00000.safetensors ...  rows of tensors, written by one process each
    state.pt                     plain values, and in which shard every row of a tensor is
    MANIFEST.json                bytes and sha256 of every file

A folder is written under the name `.step_0000200.part`, the manifest last, and then renamed; it is never written to again.
Every process reads the rows that it needs, from whatever number of shards.

torch.distributed.checkpoint does the same with a pickled index, for which code would have to be unpickled, without checksums,
and in three times the time for small networks.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor

from distill.engine.parallel import laid_out_like
from distill.files import (
    TEMPORARY_SUFFIX,
    await_file,
    canonical_json,
    make_folder,
    move,
    read_json,
    remove,
    sha256_file,
    sha256_text,
    stamp,
    write_atomic,
    write_json,
    write_safetensors,
)
from distill.typed import parse
from distill.world import World

SCHEMA = 3
MANIFEST, STATE = "MANIFEST.json", "state.pt"
PARTS = ("networks", "ema", "optimizers", "progress", "nonfinite", "sampler", "method", "record")
_FOLDER = r"step_\d{7,}(?:\+\d+)?"
_FILE = r"(?:MANIFEST\.json|state\.pt|shard_\d{5,}\.safetensors)"
_PART = re.escape(TEMPORARY_SUFFIX)
FORMER = "last.ckpt"  # of earlier versions
# Patterns of all files in a folder of checkpoints, for its owner.
FILES = (
    re.escape(FORMER),
    *(f"{folder}/{_FILE}" for folder in (_FOLDER, rf"\.{_FOLDER}{_PART}")),
)

Key = tuple[str, ...]  # ("networks" or "ema", role, name) or ("optimizers", update, "role.name", entry)


class Refused(ValueError):
    """Training cannot continue from a checkpoint."""


class Piece(NamedTuple):
    """Rows of a tensor, from row `start`: those that one process writes. A tensor without dimensions has one row."""

    value: Tensor
    start: int = 0

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + (len(self.value) if self.value.dim() else 1)


class Stored(ABC):
    """A checkpoint that training can go on from.

    Attributes:
        path: of the checkpoint. state: its plain values: of `networks` and `ema` the roles, of `optimizers` update -> parameter
            -> the values that are no tensors.
        shapes: shapes of the whole tensors.
    """

    def __init__(self, path: Path, state: dict[str, Any], shapes: dict[Key, tuple[int, ...]]) -> None:
        self.path, self.state, self.shapes = path, state, shapes

    @abstractmethod
    def rows(self, key: Key, start: int, stop: int) -> Tensor:
        """Rows `start` .. `stop` - 1 of a tensor; of one without dimensions, all of it."""

    def whole(self, key: Key) -> Tensor:
        """A whole tensor."""
        return self.rows(key, 0, self.shapes[key][0] if self.shapes[key] else 1)

    def like(self, key: Key, value: Tensor) -> Tensor:
        """A tensor, laid out as `value` is if it has its shape; of a sharded one only the rows of this process are read."""
        if self.shapes[key] != tuple(value.shape):
            return self.whole(key)
        return laid_out_like(value, lambda start, stop: self.rows(key, start, stop))

    def under(self, *place: str) -> dict[str, Key]:
        """Keys that begin with `place`, by their next part."""
        return {key[len(place)]: key for key in self.shapes if key[: len(place)] == place}


class Folder(Stored):
    """A checkpoint in a folder whose files fit its manifest."""

    def __init__(self, path: Path) -> None:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        tensors = state.pop("tensors")
        super().__init__(path, state, {key: tuple(shape) for key, (shape, _) in tensors.items()})
        self.pieces = {key: pieces for key, (_, pieces) in tensors.items()}
        self.files: dict[str, Any] = {}

    def rows(self, key: Key, start: int, stop: int) -> Tensor:
        """Rows `start` .. `stop` - 1 of a tensor; of one without dimensions, all of it."""
        pieces, found = self.pieces[key], list[Tensor]()
        if not self.shapes[key]:
            return cast(Tensor, self._file(pieces[0][0]).get_tensor("/".join(key)))
        for name, begin, end in pieces:
            first, last = max(start, begin), min(stop, end)
            if first < last or (start == stop and not found):  # no rows have a type and a shape too
                rows = self._file(name).get_slice("/".join(key))
                found.append(rows[first - begin : last - begin] if first < last else rows[0:0])
        return found[0] if len(found) == 1 else torch.cat(found)

    def _file(self, name: str) -> Any:
        if name not in self.files:
            self.files[name] = safe_open(self.path / name, framework="pt")
        return self.files[name]


@dataclass(frozen=True)
class File:
    """Of a file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The schema of MANIFEST.json. `sha256`: of the canonical JSON of the other entries."""

    schema: int
    files: dict[str, File]
    sha256: str


def write_manifest(folder: Path, files: Mapping[str, File]) -> None:
    """Write the manifest of a folder."""
    content = {"schema": SCHEMA, "files": {name: asdict(file) for name, file in sorted(files.items())}}
    write_json(folder / MANIFEST, content | {"sha256": sha256_text(canonical_json(content))})


def described(path: Path) -> File:
    """Size and digest of a file."""
    return File(path.stat().st_size, sha256_file(path))


def write(
    folder: Path,
    name: str,
    state: Mapping[str, Any],
    shapes: Mapping[Key, Sequence[int]],
    own: Mapping[Key, Piece],
    world: World,
    keep: int,
) -> Path:
    """Write the checkpoint `name` in `folder`, and delete those before the `keep` newest. Collective.

    Args:
        state: plain values. shapes: of the whole tensors. own: the rows that this process writes, on the CPU.

    Raises OSError, on every process, where one of them cannot write."""
    target, part = folder / name, folder / f".{name}{TEMPORARY_SUFFIX}"
    world.decided(lambda: clear(part))

    def shard() -> tuple[str, File | None, dict[Key, tuple[int, int]]]:
        path = part / f"shard_{world.rank:05d}.safetensors"
        if not own:
            return path.name, None, {}
        write_safetensors(path, {"/".join(key): value for key, value in _apart(own)})
        return path.name, described(path), {key: (piece.start, piece.stop) for key, piece in own.items()}

    def finish(written: Sequence[tuple[str, File | None, Mapping[Key, tuple[int, int]]]]) -> None:
        files = {name: file for name, file, _ in written if file is not None}
        tensors = {
            key: (list(shape), [(name, *rows[key]) for name, _, rows in written if key in rows])
            for key, shape in shapes.items()
        }
        make_folder(part)
        write_atomic(part / STATE, lambda path: torch.save({**state, "tensors": tensors}, path))
        write_manifest(part, files | {STATE: described(part / STATE)})
        clear(target)
        move(part, target)
        tidy(folder, name, keep)

    try:
        parts = world.together(shard)
        world.decided(lambda: finish(parts))
    finally:  # of a disk that is full
        if world.main:
            clear(part)
    return target


def _apart(own: Mapping[Key, Piece]) -> Iterator[tuple[Key, Tensor]]:
    """Tensors with a storage of their own each, as safetensors wants them."""
    seen = set()
    for key, (value, _) in own.items():
        address = value.untyped_storage().data_ptr()
        yield key, value.clone() if address in seen else value
        seen.add(address)


def checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first, whether they are sound or not."""
    if not folder.is_dir():
        return []
    found = [name for name in os.listdir(folder) if re.fullmatch(_FOLDER, name)]
    return sorted((name for name in found if _own_folder(folder / name)), key=_order, reverse=True)


def _order(name: str) -> tuple[int, int]:
    step, _, further = name.removeprefix("step_").partition("+")
    return int(step), int(further or 0)


def _own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def unsound(path: Path, world: World) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing. Each file is read by one process. Collective."""
    found = world.decided(lambda: _listed(path))
    if isinstance(found, str):
        return found

    def check() -> str | None:
        for number, (name, (digest, seen)) in enumerate(found.items()):
            if world.size > 1:
                await_file(path / name, seen)
            if number % world.size == world.rank and sha256_file(path / name) != digest:
                return f"{name}: its content does not fit its sha256: it was changed"
        return None

    return next((sentence for sentence in world.together(check) if sentence is not None), None)


def _listed(path: Path) -> dict[str, tuple[str, tuple[int, int]]] | str:
    """name -> digest and `stamp` of each file of the manifest, or what is wrong with it.

    Raises `Refused` for the checkpoint of a newer version."""
    try:
        found = read_json(path / MANIFEST)
        if isinstance(found, dict) and isinstance(schema := found.get("schema"), int) and schema > SCHEMA:
            raise Refused(f"{path / MANIFEST}: schema: found {schema}, this version reads {SCHEMA}")
        manifest = parse(Manifest, found, f"{MANIFEST}: ")
    except FileNotFoundError:
        return f"{MANIFEST}: missing: it was not written to its end"
    except Refused:
        raise
    except (ValueError, OSError) as error:
        return str(error).replace(f"{path}{os.sep}", "")
    rest = {key: value for key, value in found.items() if key != "sha256"}
    if manifest.schema != SCHEMA or manifest.sha256 != sha256_text(canonical_json(rest)):
        return f"{MANIFEST}: its content does not fit its sha256: it was changed"
    for name, file in manifest.files.items():
        if not (path / name).is_file():
            return f"{name}: missing"
        if (size := (path / name).stat().st_size) != file.bytes:
            return f"{name}: found {size} bytes, expected {file.bytes}"
    return {name: (file.sha256, stamp(path / name)) for name, file in manifest.files.items()}


def tidy(folder: Path, latest: str, keep: int) -> None:
    """Delete what a killed process left half-written, what is newer than `latest` (broken, or training would go on from it),
    and all but the `keep` newest of `latest` and those before it."""
    if not folder.is_dir():
        return
    parts = [name for name in os.listdir(folder) if re.fullmatch(rf"\.{_FOLDER}{_PART}", name)]
    names = checkpoints(folder)
    place = names.index(latest) if latest in names else len(names)
    for name in [*parts, *names[:place], *names[place + keep :]]:
        clear(folder / name)


def clear(path: Path) -> None:
    """Delete the files of a checkpoint, the manifest first, and the folder if it holds nothing else."""
    if not _own_folder(path):
        return
    for name in sorted(os.listdir(path)):  # capitals first
        if re.fullmatch(rf"\.?{_FILE}(?:\.[0-9a-f]{{8}})?(?:{_PART})?", name) and not (path / name).is_dir():
            remove(path / name)
    with suppress(OSError):  # files of the user
        path.rmdir()


def not_finite(state: Mapping[str, Any], tensors: Mapping[Key, Tensor]) -> str | None:
    """A sentence for the first network, average or optimizer state that holds a number that is not finite."""
    for part, *names in tensors:
        if not bool(tensors[part, *names].isfinite().all()):
            if part == "optimizers":
                update, parameter, entry = names
                return f"optimizer {update!r}: {entry} of {parameter} is not finite"
            return f"{'network' if part == 'networks' else 'average'} {names[0]!r}: weights are not finite"
    for update, parameters in state["optimizers"].items():
        for name, values in parameters.items():
            for entry, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return f"optimizer {update!r}: {entry} of {name} is not finite"
    return None
