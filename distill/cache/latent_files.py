"""Encoded images in files: safetensors shards of latents with their conditions, and `latents.json`, which is written last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from distill.cache.pairs import Shard
from distill.data.batch import Batch
from distill.data.plain import plain_torch
from distill.data.rng import noise_checksum, sample_noise
from distill.data.source import Source, prefetched
from distill.files import (
    canonical_json,
    read_json,
    remove,
    sha256_file,
    sha256_kept,
    sha256_text,
    write_json,
    write_safetensors,
)
from distill.models.autoencoder import entry_of, read_decoder, write_weights
from distill.models.build import build_conditions
from distill.models.conditions import Conditions, Labels
from distill.models.decoder import Decoder
from distill.typed import check_keys, parse
from distill.world import World

SCHEMA = 1
MANIFEST = "latents.json"
SHARD_BYTES = 256 * 2**20
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LatentHeader:
    """How latents were made.

    Attributes:
        data: the fingerprint of the images. conditions, decoder: as in a pair cache.
        posterior: "mean", or "sample": mean + std * `sample_noise(seed, stream, i)` for image i.
        noise: `noise_checksum` with "sample", else empty. rows: images a shard.
    """

    sample_shape: tuple[int, ...]
    count: int
    rows: int
    data: str
    conditions: dict[str, Any]
    decoder: dict[str, Any]
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    posterior: Literal["mean", "sample"] = "mean"
    seed: int = 0
    stream: str = "latents"
    noise: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema: found {self.schema}, this version reads {SCHEMA}")
        if self.count < 1 or self.rows < 1 or not self.sample_shape or min(self.sample_shape) < 1:
            raise ValueError(
                f"count, rows, sample_shape: found {self.count}, {self.rows}, {list(self.sample_shape)}, expected positive"
            )

    @classmethod
    def of(
        cls,
        source: Source,
        conditions: Conditions,
        decoder: Decoder,
        sample_shape: tuple[int, ...],
        *,
        dtype: str,
        posterior: str,
        seed: int,
        stream: str,
        shard_bytes: int = SHARD_BYTES,
    ) -> LatentHeader:
        """The header of the latents of a source. Raises ValueError naming `dtype` or `posterior`."""
        if dtype not in TYPES:
            raise ValueError(f"dtype: found {dtype!r}, expected one of {list(TYPES)}")
        if posterior not in ("mean", "sample"):
            raise ValueError(f"posterior: found {posterior!r}, expected 'mean' or 'sample'")
        width = TYPES[dtype].itemsize * math.prod(sample_shape) + 16
        given = {
            "sample_shape": list(sample_shape),
            "count": len(source),
            "rows": max(1, shard_bytes // width),
            "data": source.fingerprint(),
            "conditions": conditions.config(),
            "decoder": entry_of(decoder),
            "dtype": dtype,
            "posterior": posterior,
            "seed": seed if posterior == "sample" else 0,
            "stream": stream,
            "noise": noise_checksum(seed, stream, sample_shape) if posterior == "sample" else "",
        }
        return parse(cls, given, "header")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self) | {"sample_shape": list(self.sample_shape)}

    @property
    def digest(self) -> str:
        """sha256 of all entries; where files of prompts lie does not matter."""
        content = self.to_dict()
        content["conditions"] = {key: value for key, value in self.conditions.items() if key != "folder"}
        return sha256_text(canonical_json(content))


def shard_name(number: int) -> str:
    """The file of a shard; beside it, while latents are made, stands a note of its sha256."""
    return f"latents-{number:05d}.safetensors"


@plain_torch()
@torch.inference_mode()
def write_latents(
    folder: Path,
    source: Source,
    conditions: Conditions,
    decoder: Decoder,
    header: LatentHeader,
    *,
    batch_size: int,
    device: torch.device,
    world: World,
    workers: int = 0,
    on_samples: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode all images of a source. Each process makes, writes and hashes whole shards, every `world.size`-th one, so files
    do not depend on the number of processes; shards that a killed run finished are kept.

    Raises FloatingPointError for latents that are not finite."""
    rows = torch.arange(header.count, device="cpu")
    for number, part in world.share(rows.split(header.rows)):
        path = folder / shard_name(number)
        if not _written(path, header):
            parts, pin = part.split(batch_size), device.type == "cuda"
            batches = prefetched(_Fetch(source), parts, source, workers=workers, prefetch=2, pin=pin)
            encoded = [_encoded(batch, conditions, decoder, header, device) for batch in batches]
            columns = {name: torch.cat([each[name] for each in encoded]) for name in encoded[0]}
            write_safetensors(path, {"ids": part, **columns})
            write_json(
                _note(path), {"header": header.digest, "count": len(part), "sha256": sha256_file(path)}
            )
        on_samples(len(part))
    world.barrier()
    if world.main:
        paths = [folder / shard_name(number) for number in range(-(-header.count // header.rows))]
        notes = [read_json(_note(path)) for path in paths]
        write_weights(folder, decoder)
        conditions.copy_to(folder)
        shards = [
            {"file": path.name, "count": note["count"], "sha256": note["sha256"]}
            for path, note in zip(paths, notes, strict=True)
        ]
        write_json(folder / MANIFEST, {"header": header.to_dict(), "shards": shards})
        for path in paths:
            remove(_note(path))
    world.barrier()


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _written(path: Path, header: LatentHeader) -> bool:
    """Whether a shard is there as a run with this header wrote it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = read_json(_note(path))
        return note["header"] == header.digest and note["sha256"] == sha256_file(path)
    return False


def _encoded(
    batch: Batch, conditions: Conditions, decoder: Decoder, header: LatentHeader, device: torch.device
) -> dict[str, Tensor]:
    """The columns of a batch of images: x0 and those of the conditions."""
    assert batch.x0 is not None
    images, rows = batch.x0.to(device), batch.index
    if header.posterior == "sample":
        noise = sample_noise(header.seed, header.stream, rows, header.sample_shape).to(device)
        x0 = decoder.encode_sample(images, noise)
    else:
        x0 = decoder.encode(images)
    x0 = x0.to(TYPES[header.dtype]).cpu()
    if not bool(x0.isfinite().all()):
        raise FloatingPointError(f"decoder: makes latents that are not finite, of images {rows.tolist()[:8]}")
    return {"x0": x0, **columns_of(conditions, batch)}


@dataclass(frozen=True)
class _Fetch:
    """Fetches rows of a source, which are the batch's `index`; goes to workers that are not forked."""

    source: Source

    def __call__(self, rows: Tensor) -> Batch:
        return self.source.fetch(rows, rows)


def columns_of(conditions: Conditions, batch: Batch) -> dict[str, Tensor]:
    """What is stored of the conditions of a batch: its labels, or the rows of its captions in the table of prompts."""
    if isinstance(conditions, Labels):
        label = batch.cond.get("label")
        if label is None:
            raise ValueError(f"data.label: found no classes, but the teacher has {conditions.words()}")
        return {"label": label.to(torch.int32)}
    return conditions.columns(batch.ids)  # image i has caption i


class LatentFiles:
    """Reads finished latents; a `Source` for training. Shards are memory-mapped, and hashed once."""

    name = "latents"

    @plain_torch()
    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        self.header, self.shards = read_latents(path)
        header = self.header
        self.conditions = build_conditions(header.conditions, f"{path}: header.conditions").beside(
            self.folder
        )
        self.decoder = read_decoder(self.folder, header.decoder, path)
        tables = [self._read_shard(shard) for shard in self.shards]
        self.ids = torch.cat([table["ids"] for table in tables])
        names = self.conditions.columns(torch.arange(0)).keys()
        self.columns = {name: torch.cat([table[name] for table in tables]) for name in names}
        self.conditions.check(self.columns)
        self.x0 = [table["x0"] for table in tables]
        self.sample_shape, self.num_classes = header.sample_shape, self.conditions.num_classes

    def _read_shard(self, shard: Shard) -> Mapping[str, Tensor]:
        path = self.folder / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {MANIFEST} expects it to hold {shard.count} latents")
        if (found := sha256_kept(path)) != shard.sha256:
            raise ValueError(f"{path}: sha256: found {found[:12]}, {MANIFEST} expects {shard.sha256[:12]}")
        table = safetensors.torch.load_file(path)
        if table["x0"].shape != (shard.count, *self.header.sample_shape):
            raise ValueError(f"{path}: x0: found shape {list(table['x0'].shape)}")
        return table

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Latents at `rows` in float32, with the conditions of their images."""
        shards = (rows // self.header.rows).tolist()
        places = (rows % self.header.rows).tolist()
        x0 = torch.stack([self.x0[shard][place] for shard, place in zip(shards, places, strict=True)])
        cond = self.conditions.stored({name: column[rows] for name, column in self.columns.items()})
        return Batch(ids=self.ids[rows], index=index, cond=cond, x0=x0.to(torch.float32))

    def fingerprint(self) -> str:
        """A digest of the header and of every shard."""
        return sha256_text(canonical_json([self.header.digest, [shard.sha256 for shard in self.shards]]))


def read_latents(path: Path) -> tuple[LatentHeader, list[Shard]]:
    """(header, shards) of finished latents. Raises FileNotFoundError, or ValueError naming the file and the entry."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {path.parent} holds no finished latents")
    value = read_json(path)
    check_keys(value, ("header", "shards"), f"{path}: ")
    header = parse(LatentHeader, value["header"], f"{path}: header")
    shards = parse(list[Shard], value["shards"], f"{path}: shards")
    names = [shard_name(number) for number in range(len(shards))]
    full = [header.rows] * (len(shards) - 1)
    if [shard.file for shard in shards] != names or [shard.count for shard in shards[:-1]] != full:
        raise ValueError(
            f"{path}: shards: found other files or counts than {names[0]} .. of {header.rows} latents"
        )
    if (count := sum(shard.count for shard in shards)) != header.count:
        raise ValueError(f"{path}: header.count: found {header.count}, but the shards hold {count} latents")
    return header, shards
