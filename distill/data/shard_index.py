"""Indexes of tar shards: which members a sample has and where they lie, so that samples are read in any order.

The index of `x.tar` is the file `x.tar.index` beside it, or, where that folder cannot be written, in the user's cache folder.
It is made once, holds the size, the time and the sha256 of its shard, and is made again when size or time differ."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.data.machine import available_cores
from distill.files import sha256_file, write_safetensors

SCHEMA, SUFFIX = "1", ".index"
BLOCK = 512  # bytes of a tar block
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LARGEST = 10**6  # shards that one pattern may name
SHOWN = 3  # broken shards in a message
THREADS = 8
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Summary:
    """The head of an index. `counts`: samples that have a member, by extension."""

    path: Path
    size: int
    modified: int
    sha256: str
    count: int
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Index:
    """The samples of a shard: keys, and by extension the (offset, size) [n, 2] of its members, -1 where a sample has none."""

    keys: list[str]
    members: Mapping[str, Tensor]


def braces(pattern: str) -> list[str]:
    """Expand `{000..127}` (with its leading zeros) and `{a,b}` as a shell does; patterns may hold several and nest.

    Raises ValueError for braces that are not closed and for more than `LARGEST` names."""
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise ValueError(f"found '}}' without '{{' in {pattern!r}")
        return [pattern]
    depth, commas, end = 0, [start], -1
    for place in range(start, len(pattern)):
        letter = pattern[place]
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 1:
            commas.append(place)
        if depth == 0:
            end = place
            break
    if end < 0:
        raise ValueError(f"found '{{' without '}}' in {pattern!r}")
    inside = pattern[start + 1 : end]
    if found := _RANGE.fullmatch(inside):
        choices = _numbers(*found.groups())
    elif len(commas) > 1:
        ends = [*commas[1:], end]
        choices = [name for a, b in zip(commas, ends, strict=True) for name in braces(pattern[a + 1 : b])]
    else:
        raise ValueError(f"found {{{inside}}}, expected {{000..127}} or {{a,b}}")
    rest = braces(pattern[end + 1 :])
    if len(choices) * len(rest) > LARGEST:
        raise ValueError(f"found {len(choices) * len(rest)} names in {pattern!r}, expected at most {LARGEST}")
    return [f"{pattern[:start]}{choice}{tail}" for choice in choices for tail in rest]


def _numbers(first: str, last: str) -> list[str]:
    low, high = int(first), int(last)
    if abs(high - low) >= LARGEST:
        raise ValueError(f"found {{{first}..{last}}}, expected at most {LARGEST} numbers")
    padded = any(len(end.lstrip("-")) > 1 and end.lstrip("-").startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    step = 1 if high >= low else -1
    return [f"{number:0{width}d}" for number in range(low, high + step, step)]


def indexed(shards: Sequence[Path], folder: Path | None = None) -> list[Summary]:
    """The heads of the indexes of all shards; those that are missing or out of date are made first, in threads.

    Several processes begin at different shards and skip those that another has indexed meanwhile. `folder`: where indexes
    lie; None: beside the shards.

    Raises:
        FileNotFoundError, ValueError: name the shards that are missing, empty, truncated, no tar files or compressed.
    """
    found = {shard: _summary(shard, folder) for shard in shards}
    missing = [shard for shard, summary in found.items() if summary is None]
    start = os.getpid() % max(1, len(missing))
    errors: dict[Path, Exception] = {}

    def make(shard: Path) -> None:
        try:
            found[shard] = _summary(shard, folder) or _make(shard, folder)
        except (OSError, ValueError) as error:
            errors[shard] = error

    if missing:
        with ThreadPoolExecutor(min(THREADS, available_cores())) as pool:
            list(pool.map(make, [*missing[start:], *missing[:start]]))
    if errors:
        raised = [errors[shard] for shard in missing if shard in errors]
        more = f"; and {len(raised) - SHOWN} more" if len(raised) > SHOWN else ""
        kind = FileNotFoundError if isinstance(raised[0], FileNotFoundError) else ValueError
        raise kind("; ".join(map(str, raised[:SHOWN])) + more)
    return [summary for shard in shards if (summary := found[shard]) is not None]


def places(shard: Path, folder: Path | None) -> list[Path]:
    """Where the index of a shard may lie, in the order in which they are looked at."""
    digest = hashlib.sha256(str(shard.absolute()).encode()).hexdigest()[:16]
    if folder is not None:
        return [folder / f"{digest}-{shard.name}{SUFFIX}"]
    found = [shard.with_name(shard.name + SUFFIX)]
    with suppress(RuntimeError):  # a user without a home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        found.append(cache / "distill" / "shards" / f"{digest}-{shard.name}{SUFFIX}")
    return found


def read_index(summary: Summary, folder: Path | None) -> Index:
    """The index of a shard, whose head `indexed` returned. Raises OSError where it has changed since."""
    for place in places(summary.path, folder):
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            if _head(place, summary.path) != summary:
                continue
            with safe_open(place, "pt") as file:
                text = bytes(file.get_tensor("keys").tolist()).decode()
                names = [name for name in file.keys() if name != "keys"]  # noqa: SIM118
                members = {name.removeprefix("members."): file.get_tensor(name) for name in names}
            return Index(text.split("\n"), members)
    raise OSError(f"{summary.path}: its index was changed or removed while it was used; start again")


def _summary(shard: Path, folder: Path | None) -> Summary | None:
    """The head of an index that is up to date, or None."""
    for place in places(shard, folder):
        with suppress(OSError, SafetensorError, KeyError, ValueError):
            head = _head(place, shard)
            status = shard.stat()
            if (head.size, head.modified) == (status.st_size, status.st_mtime_ns):
                return head
    return None


def _head(place: Path, shard: Path) -> Summary:
    with safe_open(place, "pt") as file:
        head = file.metadata() or {}
    if head.get("schema") != SCHEMA:
        raise ValueError(f"{place}: schema: found {head.get('schema')!r}, expected {SCHEMA!r}")
    counts = {str(key): int(value) for key, value in json.loads(head["counts"]).items()}
    return Summary(
        shard, int(head["size"]), int(head["modified"]), head["sha256"], int(head["count"]), counts
    )


def _make(shard: Path, folder: Path | None) -> Summary:
    if not shard.is_file():
        raise FileNotFoundError(f"{shard}: no such shard; expected a tar file")
    status = shard.stat()
    keys, members = _scan(shard, status.st_size)
    sha256 = sha256_file(shard)
    after = shard.stat()
    if (after.st_size, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise ValueError(f"{shard}: was changed while it was indexed; start again when it is finished")
    tensors = {f"members.{name}": torch.tensor(table, dtype=torch.int64) for name, table in members.items()}
    counts = {name: int((table[:, 1] >= 0).sum()) for name, table in tensors.items()}
    text = bytearray("\n".join(keys).encode())
    head = {
        "schema": SCHEMA,
        "size": str(status.st_size),
        "modified": str(status.st_mtime_ns),
        "sha256": sha256,
        "count": str(len(keys)),
        "counts": json.dumps({name.removeprefix("members."): count for name, count in counts.items()}),
    }
    tensors["keys"] = torch.frombuffer(text, dtype=torch.uint8)
    options = places(shard, folder)
    for number, place in enumerate(options, 1):
        try:
            write_safetensors(place, tensors, head)
            break
        except OSError:  # a folder that cannot be written: the next place
            if number == len(options):
                raise
    return _head(place, shard)


def _scan(shard: Path, size: int) -> tuple[list[str], dict[str, list[tuple[int, int]]]]:
    """(keys, (offset, size) of each sample's members by extension) of a shard, checked up to its last byte."""
    _check_start(shard, size)
    keys: list[str] = []
    members: dict[str, list[tuple[int, int]]] = {}
    seen: set[str] = set()
    for name, offset, length in _members(shard, size):
        place, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{place}/{stem}" if place else stem, extension.lower()
        if not stem or not extension or (base.startswith("__") and base.endswith("__")):
            continue  # no sample in the format: no key (._1.jpg of macOS), no extension, or data about the shard
        if not keys or key != keys[-1]:
            if key in seen:
                raise ValueError(
                    f"{shard}: {name}: found other samples between the members of {key!r}, expected them side by side"
                )
            seen.add(key)
            keys.append(key)
        table = members.setdefault(extension, [])
        table += [(-1, -1)] * (len(keys) - len(table))
        if table[-1][1] >= 0:
            raise ValueError(f"{shard}: {name}: found twice in the sample, expected once")
        table[-1] = (offset, length)
    if not keys:
        raise ValueError(f"{shard}: holds no samples; expected members such as 000.jpg and 000.txt")
    for table in members.values():
        table += [(-1, -1)] * (len(keys) - len(table))
    return keys, members


def _check_start(shard: Path, size: int) -> None:
    if size == 0:
        raise ValueError(f"{shard}: is empty, expected a tar file")
    with shard.open("rb") as file:
        start = file.read(8)
    for mark, kind in COMPRESSED.items():
        if start.startswith(mark):
            raise ValueError(
                f"{shard}: is compressed with {kind}, which cannot be read in any order; decompress it "
                "(images are compressed already)"
            )


def _members(shard: Path, size: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of the regular files of a shard.

    `tarfile` takes a broken header or a cut for the end, so what follows the last member is checked here: the mark of the end,
    and zeros up to the last byte (a tar file that was appended to it would be lost)."""
    try:
        with tarfile.open(shard, "r:", errors="strict") as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members = []  # else all of them stay in memory
                if member.issparse() or member.islnk() or member.issym():
                    raise ValueError(f"{shard}: {member.name}: is a link or sparse, expected regular files")
                if member.isfile():
                    if member.offset_data + member.size > size:
                        raise ValueError(f"{shard}: is truncated inside {member.name}")
                    if "\n" in member.name:
                        raise ValueError(f"{shard}: {member.name!r}: has a line break in its name")
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, UnicodeError, EOFError) as error:
        raise ValueError(f"{shard}: is truncated or no tar file: {error}") from error
    with shard.open("rb") as file:
        file.seek(end)
        if len(mark := file.read(BLOCK)) < BLOCK:
            raise ValueError(f"{shard}: is truncated: its end is missing")
        if mark.count(0) != BLOCK:
            raise ValueError(f"{shard}: found a broken header at byte {end}, expected a member or the end")
        while chunk := file.read(2**20):
            if chunk.count(0) != len(chunk):
                raise ValueError(
                    f"{shard}: found data behind its end at byte {end}; tar files cannot be joined with cat"
                )
