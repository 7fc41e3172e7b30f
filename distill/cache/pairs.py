"""The pair cache (contract *Pair cache*): (noise, teacher sample, label), noise stored as seeds.

A folder of safetensors shards and a `manifest.json` that is written last. z is noise, x0 is data, always."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.cache.former import of_schema_1
from distill.data.batch import Batch
from distill.data.plain import plain_torch
from distill.data.rng import noise_checksum, sample_noise, sample_uniform
from distill.files import canonical_json, read_json, sha256_file, sha256_text
from distill.models.autoencoder import read_decoder
from distill.models.build import build_conditions
from distill.models.decoder import codebook_of, codes_of
from distill.models.model import LARGEST_SAMPLE
from distill.models.precision import check_precision
from distill.names import inside
from distill.samplers.solvers import CALLS
from distill.samplers.token_filters import Filters
from distill.typed import check_keys, parse

SCHEMA = 2
MANIFEST, HEADER = "manifest.json", "header.json"
LARGEST = 50.0  # |x0| above this is no image and no latent
NOISE_IN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Header:
    """The header of a pair cache: how the pairs were made.

    `guidance_learned` is the guidance that the teacher had learned from its own; `teacher` is the digest of the teacher's
    weights; `conditions` is the config of what the samples are conditioned on, `decoder` the entry of what they are
    (`models.autoencoder.entry_of`); `noise` is "seed" (z of sample i is
    `sample_noise(seed, stream, i)`) or "stored" (a column z); `grid` is the time grid of the transport, as a recipe names
    it, or None for the process's own; `times` are those of the states that are stored, from the noise to the data, or None;
    `guidance_range` is the range that guidance scales are drawn from (`guidance_of`), beside a `guidance_scale` of 1, or None
    for one scale of all; `precision` is that of the teacher's network."""

    sample_shape: tuple[int, ...]
    count: int
    seed: int
    stream: str
    noise_checksum: str
    teacher: str
    solver: str
    steps: int
    guidance_scale: float
    conditions: dict[str, Any]
    decoder: dict[str, Any]
    guidance_learned: float = 1.0
    dtype: Literal["float32"] = "float32"
    noise: Literal["seed", "stored"] = "seed"
    orientation: Literal["z=noise, x0=data"] = "z=noise, x0=data"
    torch: str = str(torch.__version__)
    schema: int = field(default=SCHEMA, compare=False)
    grid: dict[str, Any] | None = None
    column: Literal["x0", "tokens"] = "x0"
    settings: dict[str, Any] | None = None
    times: tuple[float, ...] | None = None
    guidance_range: tuple[float, float] | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        shape = self.sample_shape
        if not shape or min(shape) < 1 or math.prod(shape) > LARGEST_SAMPLE:
            raise ValueError(
                f"sample_shape: found {list(shape)}, expected positive sizes of at most {LARGEST_SAMPLE} numbers in all"
            )
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.solver not in CALLS:
            raise ValueError(f"solver: found {self.solver!r}, expected one of {list(CALLS)}")
        check_precision(self.precision)
        if self.times is not None and (
            len(self.times) < 2 or any(not a > b for a, b in pairwise(self.times))
        ):
            raise ValueError(f"times: found {list(self.times)}, expected at least 2 falling times")
        if (found := self.guidance_range) is not None and not (
            0 <= found[0] < found[1] and self.guidance == 1
        ):
            raise ValueError(
                f"guidance_range: found {list(found)} beside guidance {self.guidance:g}, expected two rising scales beside 1"
            )

    def guidance_of(self, ids: Tensor) -> Tensor | None:
        """Guidance scales [n] of samples `ids` [n], uniform in `guidance_range`, functions of (seed, stream, i); None where all
        have `guidance_scale`."""
        if self.guidance_range is None:
            return None
        low, high = self.guidance_range
        return low + (high - low) * sample_uniform(self.seed, f"{self.stream}/guidance", ids)

    @property
    def has(self) -> tuple[str, ...]:
        """Fields of batches beside the conditions."""
        return fields_of_pairs(self.column, self.times is not None, self.guidance_range)

    @property
    def guidance(self) -> float:
        """The guidance of the pairs: what the teacher had learned already, times the scale that it was sampled with."""
        return self.guidance_learned * self.guidance_scale

    @property
    def baked(self) -> str | None:
        """Guidance and filters of pairs of tokens in words, which a student of them cannot change; None for other pairs."""
        filters = (self.settings or {}).get("filters")
        return None if filters is None else parse(Filters, filters, "settings.filters").words(self.guidance)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        plain = asdict(self) | {"sample_shape": list(self.sample_shape)}
        # As in caches of older versions.
        later = {"grid": None, "column": "x0", "settings": None, "times": None, "guidance_range": None}
        later |= {"precision": "float32"}
        for name, default in later.items():
            if plain[name] == default:
                plain.pop(name)
            elif isinstance(plain[name], tuple):
                plain[name] = list(plain[name])
        if self.schema == 1:  # training on an old cache is continued: what it was known by stays
            count = plain.pop("conditions").get("num_classes", 0)
            plain |= {"num_classes": count, "labels": "balanced"}
            plain.pop("decoder")
        return plain

    @classmethod
    def from_dict(cls, value: Any, where: str) -> Header:
        """Inverse of `to_dict`. Caches of schema 1 have `num_classes` and `labels` in place of `conditions` and `decoder`;
        older ones a `latent_scaling`, of 1.

        Raises ValueError that starts with `where` and the entry."""
        found = value.get("schema") if isinstance(value, Mapping) else type(value).__name__
        if found not in (1, SCHEMA) or isinstance(found, bool):
            raise ValueError(f"{where}.schema: found {found!r}, this version reads {SCHEMA}")
        given = dict(value)
        if found == 1:
            given = of_schema_1(given, where)
        if (scaling := given.pop("latent_scaling", 1)) != 1 or isinstance(scaling, bool):
            raise ValueError(
                f"{where}.latent_scaling: found {scaling!r}, expected 1: samples are stored as they are"
            )
        return parse(cls, given, where)


def fields_of_pairs(column: str, states: bool, guidance_range: tuple[float, float] | None) -> tuple[str, ...]:
    """Fields of batches of pairs with samples in this column, stored `states`, or guidance scales drawn from a range."""
    more = (*(("path", "times") if states else ()), *(("guidance",) if guidance_range else ()))
    return tuple(dict.fromkeys(("x0", "z", column, *more)))


def sample_column(header: Header) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """name -> (shape of a row, type) of the column that holds the samples."""
    if header.column == "tokens":
        return {"tokens": (header.sample_shape[:1], torch.uint16)}
    return {"x0": (header.sample_shape, torch.float32)}


@dataclass(frozen=True)
class Shard:
    """An entry of the manifest: a file beside it, its pairs and its sha256."""

    file: str
    count: int
    sha256: str

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: found {self.count}, expected at least 1")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: found {self.sha256!r}, expected 64 hexadecimal digits")


def differing(a: Header, b: Header, but: Collection[str] = ()) -> list[str]:
    """Names of the entries in which two headers differ, in order; `but` are not compared. Conditions are equal wherever their
    files are."""
    names = (f.name for f in fields(Header) if f.compare and f.name not in but)
    found = sorted(name for name in names if getattr(a, name) != getattr(b, name))
    if "conditions" in found and build_conditions(a.conditions) == build_conditions(b.conditions):
        found.remove("conditions")
    return found


def read_manifest(path: Path) -> tuple[Header, list[Shard]]:
    """(header, shards) of a finished cache, whose counts agree.

    Raises FileNotFoundError, or ValueError naming the file and the entry."""
    value = read_json(path)
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: found {type(value).__name__}, expected a mapping")
    check_keys(value, ("header", "shards"), f"{path}: ")
    if missing := [key for key in ("header", "shards") if key not in value]:
        raise ValueError(f"{path}: {missing[0]}: missing; expected header, shards")
    header = Header.from_dict(value["header"], f"{path}: header")
    shards = parse(list[Shard], value["shards"], f"{path}: shards")
    for number, shard in enumerate(shards):
        inside(path.parent, shard.file, f"{path}: shards[{number}].file")
    if (count := sum(shard.count for shard in shards)) != header.count:
        raise ValueError(
            f"{path}: header.count: the shards hold {count} pairs, the header expects {header.count}"
        )
    return header, shards


class Pairs:
    """Reads a finished cache; a `Source` for training. Shards are memory-mapped by safetensors; noise is
    drawn from its seeds, once for all where it fits in memory."""

    @plain_torch()
    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; {folder} is no finished pair cache (its writer continues it)"
            )
        self.header, self.shards = header, _ = read_manifest(path)
        self.conditions = build_conditions(header.conditions, f"{path}: header.conditions").beside(folder)
        self.decoder = read_decoder(folder, header.decoder, path)
        self._check_noise(path)
        tables = [self._read_shard(shard) for shard in self.shards]
        self.ids = torch.cat([table["ids"] for table in tables])
        self.columns = {
            name: torch.cat([table[name] for table in tables]) for name in self._condition_columns()
        }
        self.x0 = [table[header.column] for table in tables]
        self.stored = [table["z"] for table in tables] if header.noise == "stored" else None
        self.path = None if header.times is None else [table["path"] for table in tables]
        self.guidance, self.has = header.guidance_of(self.ids), header.has
        self.starts = torch.tensor([0, *(len(x0) for x0 in self.x0)]).cumsum(0)
        if int(self.ids.min()) < 0:
            raise ValueError(f"{path}: ids: found {int(self.ids.min())}, expected at least 0")
        if len(self.ids.unique()) != len(self.ids):
            raise ValueError(f"{path}: ids: found some twice in the shards, expected each once")
        try:
            self.conditions.check(self.columns)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.sample_shape, self.num_classes = header.sample_shape, self.conditions.num_classes
        if self.stored is not None:
            self._z: Tensor | None = None
            return
        fits = header.count * math.prod(header.sample_shape) * 4 <= NOISE_IN_MEMORY_BYTES
        self._z = sample_noise(header.seed, header.stream, self.ids, header.sample_shape) if fits else None

    @property
    def reads_files(self) -> bool:
        """Noise that does not fit in memory is drawn with every batch, which takes long."""
        return self.stored is None and self._z is None

    def _check_noise(self, path: Path) -> None:
        """This torch draws from the seeds what the writer's torch drew."""
        header = self.header
        if header.noise == "stored":
            return
        found = noise_checksum(header.seed, header.stream, header.sample_shape)
        if found != header.noise_checksum:
            raise ValueError(
                f"{path}: noise_checksum: this torch ({torch.__version__}) draws another noise stream than the one "
                f"that wrote the pairs ({header.torch}): found {found[:12]}, expected {header.noise_checksum[:12]}"
            )

    def _read_shard(self, shard: Shard) -> dict[str, Tensor]:
        """One shard, checked against the manifest: present, untouched, of the right columns, rows and
        values."""
        path = self.folder / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {MANIFEST} expects it to hold {shard.count} pairs")
        if (found := sha256_file(path)) != shard.sha256:
            raise ValueError(
                f"{path}: sha256: found {found[:12]} over {path.stat().st_size} bytes, {MANIFEST} expects "
                f"{shard.sha256[:12]}: the shard of {shard.count} pairs is truncated or changed"
            )
        try:
            table = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        sample = self.header.sample_shape
        columns: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "ids": ((), torch.int64),
            **self._condition_columns(),
            **sample_column(self.header),
        }
        if self.header.noise == "stored":
            columns["z"] = (sample, torch.float32)
        if self.header.times is not None:
            columns["path"] = ((len(self.header.times), *sample), torch.float32)
        if unknown := sorted(table.keys() - columns.keys()):
            raise ValueError(f"{path}: {unknown[0]}: unexpected column, expected {', '.join(columns)}")
        for column, (shape, dtype) in columns.items():
            expected = (shard.count, *shape)
            if column not in table or tuple(table[column].shape) != expected:
                found_shape = tuple(table[column].shape) if column in table else "nothing"
                raise ValueError(f"{path}: {column}: found {found_shape}, expected {expected}")
            if table[column].dtype != dtype:
                raise ValueError(f"{path}: {column}: found {table[column].dtype}, expected {dtype}")
        self.check_values(path, table, self.header.column, self._vocabulary)
        return table

    def _condition_columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """name -> (shape of a row, type) of the columns that hold conditions."""
        columns = self.conditions.columns(torch.arange(0))
        return {name: (tuple(column.shape[1:]), column.dtype) for name, column in columns.items()}

    @property
    def _vocabulary(self) -> int:
        """Codes of the codebook."""
        return len(codebook_of(self.decoder)) if self.header.column == "tokens" else 0

    @staticmethod
    def check_values(path: Path, table: dict[str, Tensor], column: str = "x0", vocabulary: int = 0) -> None:
        """Data are finite and of a size that data have, tokens indices of the codebook; stored noise has unit variance, else it
        was scaled."""
        if column == "tokens":
            most = int(table["tokens"].long().max())
            if most >= vocabulary:
                raise ValueError(f"{path}: tokens: found {most}, expected indices below {vocabulary}")
            return
        largest = float(table["x0"].abs().amax()) if table["x0"].isfinite().all() else math.nan
        if not largest <= LARGEST:
            raise ValueError(
                f"{path}: x0: found values up to {largest}, expected finite ones up to {LARGEST:g}"
            )
        if "path" in table and not bool(table["path"].isfinite().all()):
            raise ValueError(f"{path}: path: found states that are not finite")
        if "z" in table:
            std = float(table["z"].double().std())
            if not 0.9 <= std <= 1.1:
                raise ValueError(
                    f"{path}: z: standard deviation: found {std:.3f}, expected 0.9 .. 1.1: the stored noise "
                    "was scaled, or z and x0 are swapped"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Pairs at `rows`, with their noise."""
        ids = self.ids[rows]
        x0, tokens = self._rows(self.x0, rows), None
        if self.header.column == "tokens":
            tokens = x0.long()
            x0 = codes_of(self.decoder, tokens)
        if self.stored is not None:
            z = self._rows(self.stored, rows)
        elif self._z is not None:
            z = self._z[rows]
        else:
            z = sample_noise(self.header.seed, self.header.stream, ids, self.sample_shape)
        cond = self.conditions.stored({name: column[rows] for name, column in self.columns.items()})
        header, path, guidance = self.header, self.path, self.guidance
        return Batch(
            ids=ids,
            index=index,
            cond=cond,
            x0=x0,
            z=z,
            tokens=tokens,
            path=None if path is None else self._rows(path, rows),
            times=None if header.times is None else torch.tensor(header.times, dtype=torch.float64),
            guidance=None if guidance is None else guidance[rows],
        )

    def _rows(self, column: list[Tensor], rows: Tensor) -> Tensor:
        """Rows of a column that lies in one tensor a shard."""
        if len(column) == 1:
            return column[0][rows]
        shard = torch.bucketize(rows, self.starts[1:], right=True)
        return torch.stack(
            [column[s][r - self.starts[s]] for s, r in zip(shard.tolist(), rows.tolist(), strict=True)]
        )

    def fingerprint(self) -> str:
        """A digest of the header and of every shard."""
        return sha256_text(canonical_json([self.header.to_dict(), [asdict(shard) for shard in self.shards]]))
