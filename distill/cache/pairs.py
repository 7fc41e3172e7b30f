"""The pair cache (contract *Pair cache*): (noise, teacher sample, label), noise stored as seeds.

A folder of safetensors shards and a `manifest.json` that is written last. z is noise, x0 is data, always."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import noise_checksum, sample_noise
from distill.files import canonical_json, read_json, sha256_file, sha256_text

SCHEMA = 1
MANIFEST, HEADER = "manifest.json", "header.json"
NOISE_IN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class Header:
    """What the pairs are: everything about them but the shards.

    `teacher` is the digest of the teacher's weights; `noise` is "seed" (z of sample i is `sample_noise(seed,
    stream, i)`)."""

    sample_shape: tuple[int, ...]
    count: int
    seed: int
    stream: str
    noise_checksum: str
    teacher: str
    solver: str
    steps: int
    guidance_scale: float
    num_classes: int
    labels: str = "balanced"
    dtype: str = "float32"
    noise: str = "seed"
    latent_scaling: float = 1.0
    orientation: str = "z=noise, x0=data"
    torch: str = str(torch.__version__)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"sample_shape": list(self.sample_shape)}

    @classmethod
    def from_dict(cls, value: dict[str, Any], where: Path) -> Header:
        """Inverse of `to_dict`; the error names the file."""
        if value.get("schema") != SCHEMA:
            raise ValueError(f"{where}: schema: found {value.get('schema')!r}, this version reads {SCHEMA}")
        try:
            return cls(**(value | {"sample_shape": tuple(value["sample_shape"])}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"{where}: not a pair cache header: {error}") from error


def balanced_labels(ids: Tensor, num_classes: int) -> Tensor:
    """[n] int32: sample i has class i mod num_classes; -1 for an unconditional teacher."""
    return (ids % num_classes if num_classes else torch.full_like(ids, -1)).to(torch.int32)


class Pairs:
    """Reads a finished cache; a `Source` for training. Shards are memory-mapped by safetensors; noise is
    drawn from its seeds, once for all where it fits in memory."""

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing; {folder} is no finished pair cache (its writer continues it)"
            )
        manifest = read_json(path)
        self.header = header = Header.from_dict(manifest["header"], path)
        if header.orientation != Header.orientation:
            raise ValueError(
                f"{path}: orientation: found {header.orientation!r}, expected {Header.orientation!r}"
            )
        found = noise_checksum(header.seed, header.stream, header.sample_shape)
        if found != header.noise_checksum:
            raise ValueError(
                f"{path}: noise_checksum: this torch ({torch.__version__}) draws another noise stream than "
                "the torch that "
                f"wrote the pairs ({header.torch}): found {found[:12]}, expected {header.noise_checksum[:12]}"
            )
        self.shards = manifest["shards"]
        tables = [self._read_shard(shard) for shard in self.shards]
        self.ids = torch.cat([table["ids"] for table in tables])
        self.labels = torch.cat([table["label"] for table in tables]).to(torch.int64)
        self.x0 = [table["x0"] for table in tables]
        self.starts = torch.tensor([0, *(len(x0) for x0 in self.x0)]).cumsum(0)
        if len(self.ids) != header.count:
            raise ValueError(
                f"{path}: count: the shards hold {len(self.ids)} pairs, the header expects {header.count}"
            )
        self.sample_shape = header.sample_shape
        fits = header.count * math.prod(header.sample_shape) * 4 <= NOISE_IN_MEMORY_BYTES
        self._z = sample_noise(header.seed, header.stream, self.ids, header.sample_shape) if fits else None

    def _read_shard(self, shard: dict[str, Any]) -> dict[str, Tensor]:
        """One shard, checked against the manifest: present, untouched, of the right columns, rows and
        values."""
        path = self.folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {MANIFEST} expects it to hold {shard['count']} pairs")
        if (found := sha256_file(path)) != shard["sha256"]:
            raise ValueError(
                f"{path}: sha256: found {found[:12]} over {path.stat().st_size} bytes, {MANIFEST} expects "
                f"{shard['sha256'][:12]}: the shard of {shard['count']} pairs is truncated or changed"
            )
        try:
            table = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable shard: {error}") from error
        for column, shape in (("ids", ()), ("label", ()), ("x0", self.header.sample_shape)):
            if column not in table or tuple(table[column].shape) != (shard["count"], *shape):
                found_shape = tuple(table[column].shape) if column in table else "nothing"
                raise ValueError(
                    f"{path}: {column}: found {found_shape}, expected {(shard['count'], *shape)}"
                )
        return table

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Pairs at `rows`, with their noise."""
        ids = self.ids[rows]
        if len(self.x0) == 1:
            x0 = self.x0[0][rows]
        else:
            shard = torch.bucketize(rows, self.starts[1:], right=True)
            x0 = torch.stack(
                [self.x0[s][r - self.starts[s]] for s, r in zip(shard.tolist(), rows.tolist(), strict=True)]
            )
        z = (
            self._z[rows]
            if self._z is not None
            else sample_noise(self.header.seed, self.header.stream, ids, self.sample_shape)
        )
        cond = Cond.of_labels(self.labels[rows]) if self.header.num_classes else Cond.nothing(len(rows))
        return Batch(ids=ids, index=index, cond=cond, x0=x0, z=z)

    def fingerprint(self) -> str:
        """A digest of the header and of every shard."""
        return sha256_text(canonical_json([self.header.to_dict(), self.shards]))
