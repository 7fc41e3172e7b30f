"""Shards in the format of webdataset as training data: tar files whose samples are members of the same name."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.decode import to_float
from distill.data.folder import size_of
from distill.data.machine import machine_memory
from distill.data.members import Members
from distill.data.plain import plain_torch
from distill.data.shard_index import Index, braces, indexed, read_index
from distill.data.shard_order import ShardOrder

BROKEN = ("fatal", "replace")
OPEN = 16  # shards, and indexes, that a process keeps open
TRIES = 64  # rows that are looked at in place of a broken one
REMOTE = re.compile(r"pipe:|[a-zA-Z][a-zA-Z0-9+.-]*://")
T = TypeVar("T")


class Shards:
    """Images in local tar shards, with captions or classes, read in any order by an index of their members.

    Samples are numbered by shard (as the patterns name them) and by their place in the shard. An epoch has each of them once,
    in the order of `ShardOrder`. Indexes are made when the shards are first used (`shard_index`); the digest of the data is
    that of the shards' sha256 in them.

    Args:
        shards: paths of tar files, or patterns: `data/train-{00000..00127}.tar`. URLs and `pipe:` are read by `Resampled`.
        image, caption, label, num_classes, channels: see `Members`.
        resolution: a side or [H, W]: images of another size are centre-cropped to this aspect ratio and resized. None: all
            images have the size of the first.
        limit: use the first so many samples; None: all.
        window: shards that are shuffled together.
        broken: what a sample that cannot be decoded does: "fatal" raises an error that names it; "replace" reads the next
            one of its shard, and counts it in `replaced`: the batch keeps its size on every process.
        index_dir: where the indexes lie; None: beside the shards, or in the user's cache folder.

    Raises:
        FileNotFoundError, ValueError: name the option, or the shards and samples that are missing or broken.
    """

    name = "webdataset"
    value_range = (-1.0, 1.0)
    reads_files = True  # decoding takes long: workers pay

    @plain_torch()
    def __init__(
        self,
        shards: str | Sequence[str],
        image: str = "jpg;jpeg;png;webp",
        caption: str | None = None,
        label: str | None = None,
        num_classes: int = 0,
        resolution: int | Sequence[int] | None = None,
        channels: int = 3,
        limit: int | None = None,
        window: int = 4,
        broken: str = "fatal",
        index_dir: str | None = None,
    ) -> None:
        self.members = Members(image, caption, label, num_classes, channels)
        self._size = size_of(resolution)
        self.sample_shape: tuple[int, ...] = ()
        _check(limit, window, broken)
        self.broken, self.window, self.replaced = broken, window, 0
        self._folder = None if index_dir is None else Path(index_dir).expanduser()
        self.summaries = indexed(paths_of(shards), self._folder)
        self.counts = _limited([summary.count for summary in self.summaries], limit)
        self.summaries = self.summaries[: len(self.counts)]
        self._ends = list(itertools.accumulate(self.counts))
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._warned = False
        self.num_classes = num_classes
        if broken == "fatal":
            self._check_members()
        self.sample_shape = tuple(self._one(0)[1].shape)
        self.replaced = 0  # of what was looked at here

    def __len__(self) -> int:
        return self._ends[-1]

    def order(self, seed: int, stream: str) -> ShardOrder:
        """The order of training."""
        return ShardOrder(self.counts, seed, stream, self.window)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """The images at `rows` with their classes; the id of a sample is its row, of a replaced one that of the row that was
        read."""
        found = [self._one(row) for row in rows.tolist()]
        ids = torch.tensor([row for row, _, _ in found], dtype=torch.int64, device="cpu")
        x0 = to_float(torch.stack([pixels for _, pixels, _ in found]))
        if self.members.label is None:
            return Batch(ids=ids, index=index, cond=Cond.nothing(len(rows)), x0=x0)
        return Batch(ids=ids, index=index, cond=Cond.of_labels([label for _, _, label in found]), x0=x0)

    def captions(self) -> list[str]:
        """The captions of all samples; of a broken one, that of the sample that replaces it."""
        return [
            self._replacing(row, lambda at: self.members.text(*self._sample(at, self.members.texts)))
            for row in range(len(self))
        ]

    @property
    def labels(self) -> Tensor | None:
        """The classes [n] of all samples, or None; for evaluation, to which a broken sample is an error."""
        if self.members.label is None:
            return None
        found = [self.members.number(*self._sample(row, self.members.texts)) for row in range(len(self))]
        return torch.tensor(found, dtype=torch.int64, device="cpu")

    @property
    def images(self) -> Tensor:
        """All images [n,C,H,W] float32 in [-1, 1], for evaluation, to which a broken sample is an error.

        Raises ValueError naming `limit` where they take more than half of the memory."""
        total = 4 * len(self) * math.prod(self.sample_shape)
        if total > (memory := machine_memory()) // 2:
            raise ValueError(
                f"limit: {len(self)} images take {total} bytes, and this machine has {memory}; expected a limit for those that "
                "are measured (eval.meter.data.limit, monitor.data.limit)"
            )
        return to_float(torch.stack([self._decoded(row)[1] for row in range(len(self))]))

    def fingerprint(self) -> str:
        """A digest of the shards' contents, and of the options that samples and their order depend on."""
        shards = [[summary.sha256, count] for summary, count in zip(self.summaries, self.counts, strict=True)]
        content = [shards, vars(self.members), self._size, self.window, self.broken, self.sample_shape]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _check_members(self) -> None:
        """Every sample has the members that are read; by the indexes' heads, so it costs nothing."""
        for shard, (summary, count) in enumerate(zip(self.summaries, self.counts, strict=True)):
            for names in self.members.needed:
                found = sum(summary.counts.get(name, 0) for name in names)
                if found >= summary.count:
                    continue
                index = self._index(shard)
                for number in range(count):
                    if not any(
                        name in index.members and index.members[name][number, 1] >= 0 for name in names
                    ):
                        raise ValueError(
                            f"{summary.path}: {index.keys[number]}: has no member {' or '.join(names)}; expected one in each "
                            "sample; broken=replace reads the next sample in its place"
                        )

    def _one(self, row: int) -> tuple[int, Tensor, int]:
        """(row that was read, bytes [C,H,W], class or 0)."""
        return self._replacing(row, self._decoded)

    def _decoded(self, row: int) -> tuple[int, Tensor, int]:
        sample, where = self._sample(row, [name for names in self.members.needed for name in names])
        pixels = self.members.pixels(sample, self._size, where)
        if self.sample_shape and tuple(pixels.shape) != self.sample_shape:
            raise ValueError(
                f"{where}: found {pixels.shape[1]}x{pixels.shape[2]} pixels (height x width), but the first image has "
                f"{self.sample_shape[1]}x{self.sample_shape[2]}; expected one size; resolution=... resizes the images"
            )
        if self.members.caption is not None:
            self.members.text(sample, where)
        return row, pixels, 0 if self.members.label is None else self.members.number(sample, where)

    def _replacing(self, row: int, read: Callable[[int], T]) -> T:
        """`read(row)`; with broken=replace that of the next row of its shard that is not broken."""
        if self.broken == "fatal":
            return read(row)
        shard, first, count = self._place(row)
        tries = min(TRIES, count)
        for offset in range(tries):
            at = first + (row - first + offset) % count
            try:
                return read(at)
            except ValueError as error:
                self.replaced += 1
                if not self._warned:
                    self._warned = True
                    warnings.warn(
                        f"data: replaced by the next sample, as are others like it: {error}", stacklevel=5
                    )
        raise OSError(f"{self.summaries[shard].path}: found {tries} broken samples in a row, expected images")

    def _place(self, row: int) -> tuple[int, int, int]:
        """(number of the shard of a row, its first row, its samples)."""
        shard = bisect.bisect_right(self._ends, row)
        return shard, self._ends[shard] - self.counts[shard], self.counts[shard]

    def _sample(self, row: int, names: Sequence[str]) -> tuple[dict[str, bytes], str]:
        """(the contents of a sample's members by extension, shard and key for messages)."""
        shard, first, _ = self._place(row)
        index, file = self._index(shard), self._open(shard)
        sample: dict[str, bytes] = {}
        for name in names:
            table = index.members.get(name)
            offset, size = (-1, -1) if table is None else table[row - first].tolist()
            if size >= 0:
                sample[name] = os.pread(file, size, offset)
        return sample, f"{self.summaries[shard].path}: {index.keys[row - first]}"

    def _index(self, shard: int) -> Index:
        if shard not in self._indexes:
            self._indexes[shard] = read_index(self.summaries[shard], self._folder)
            if len(self._indexes) > OPEN:
                self._indexes.popitem(last=False)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _open(self, shard: int) -> int:
        """The descriptor of a shard, which is as it was when it was indexed. Reading at an offset needs no lock, and processes
        that were forked can share it."""
        if shard not in self._files:
            summary = self.summaries[shard]
            file = os.open(summary.path, os.O_RDONLY)
            status = os.fstat(file)
            if (status.st_size, status.st_mtime_ns) != (summary.size, summary.modified):
                os.close(file)
                raise OSError(f"{summary.path}: has changed since it was indexed; start again")
            self._files[shard] = file
            if len(self._files) > OPEN:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: without open files."""
        return self.__dict__ | {"_files": OrderedDict(), "_indexes": OrderedDict()}

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


def paths_of(shards: str | Sequence[str]) -> list[Path]:
    """The paths of local shards that patterns name, each once. Raises ValueError naming `shards`."""
    patterns = [shards] if isinstance(shards, str) else list(shards)
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ValueError(f"shards: found {shards!r}, expected paths such as data/train-{{00000..00127}}.tar")
    if remote := [pattern for pattern in patterns if REMOTE.match(pattern)]:
        raise ValueError(
            f"shards: found {remote[0]!r}, which cannot be read in any order; expected local files, or "
            "data=webdataset_stream, which samples with replacement"
        )
    try:
        found = [name for pattern in patterns for name in braces(pattern)]
    except ValueError as error:
        raise ValueError(f"shards: {error}") from error
    if len(set(found)) != len(found):
        twice = next(name for number, name in enumerate(found) if name in found[:number])
        raise ValueError(f"shards: found {twice} twice, expected each shard once")
    return [Path(name).expanduser() for name in found]


def _check(limit: Any, window: Any, broken: Any) -> None:
    for name, value in (("limit", limit), ("window", window)):
        if (value is not None or name == "window") and (type(value) is not int or value < 1):
            raise ValueError(f"{name}: found {value!r}, expected an integer of at least 1")
    if broken not in BROKEN:
        raise ValueError(f"broken: found {broken!r}, expected one of {list(BROKEN)}")


def _limited(counts: Sequence[int], limit: int | None) -> list[int]:
    """The samples of each shard that are used, without shards of none."""
    left, found = sum(counts) if limit is None else limit, []
    for count in counts:
        if left > 0:
            found.append(min(count, left))
            left -= found[-1]
    return found
