"""Makes a pair cache from a teacher, shard by shard; a killed writer continues with the shards that are not there, or
not what it wrote."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.cache.pairs import HEADER, MANIFEST, Header, Pairs, differing, read_manifest, sample_column
from distill.data.plain import plain_torch
from distill.data.rng import sample_noise
from distill.files import read_json, remove, sha256_file, write_json, write_safetensors
from distill.models.autoencoder import write_weights
from distill.models.build import build_conditions
from distill.models.decoder import codebook_of, indices
from distill.models.model import Model
from distill.models.time_grid import TimeGrid
from distill.world import World

SHARD_BYTES = 64 * 2**20
WRITTEN = "shards.json"  # sha256 of the shards of an unfinished cache of an earlier version


def shard_rows(sample_shape: tuple[int, ...], shard_bytes: int = SHARD_BYTES, states: int = 0) -> int:
    """Pairs a shard: about `shard_bytes` of float32 samples, with `states` stored states and 12 bytes of id and label each."""
    return max(1, shard_bytes // (4 * math.prod(sample_shape) * (1 + states) + 12))


@plain_torch()
@torch.inference_mode()
def make_pairs(
    teacher: Model,
    header: Header,
    ids: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> Tensor:
    """[n,K,*S] float32 states of the teacher's transport at the header's times for the samples `ids`, or [n,1,*S] endpoints
    without times, on the CPU. Refuses non-finite ones. `on_batch(n)` is called after each batch, with its number."""
    samples, conditions = [], teacher.conditions
    named = None if header.grid is None else TimeGrid.from_dict(header.grid)
    grid = None if named is None else named.make(teacher.process, header.steps)
    for number, part in enumerate(ids.split(batch_size)):
        z = sample_noise(header.seed, header.stream, part, header.sample_shape).to(device)
        cond, drawn = conditions.of(part).to(device), header.guidance_of(part)
        # One a sample, of denoisers alone.
        scale: Any = header.guidance_scale if drawn is None else drawn.to(device)
        states = teacher.transport(
            z,
            cond,
            solver=header.solver,
            steps=header.steps,
            guidance_scale=scale,
            grid=grid,
            times=header.times,
        )
        x0 = states.transpose(0, 1).cpu()
        if not bool(torch.isfinite(x0).all()):
            bad = part[~torch.isfinite(x0).flatten(1).all(dim=1)].tolist()
            raise FloatingPointError(
                f"teacher: non-finite samples for ids {bad[:8]} ({len(bad)} of {len(part)})"
            )
        samples.append(x0)
        on_batch(number)
    return torch.cat(samples)


def _check_begun(path: Path, header: Header) -> None:
    """Raise ValueError if a cache was begun with another header."""
    if path.is_file() and (changed := differing(found := _begun(path), header)):
        raise ValueError(f"{path}: begun with other {changed}: found {[getattr(found, k) for k in changed]}")


def _begun(path: Path) -> Header:
    """The header that a cache was begun with."""
    return Header.from_dict(read_json(path), f"{path}: header")


@plain_torch()
def write_pairs(
    folder: Path,
    teacher: Model,
    header: Header,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    world: World | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_samples: Callable[[int], None] = lambda count: None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write all shards that are missing, or are not what was written by the note beside them, then the manifest.
    `on_samples(n)` is called for every n samples that exist, `tell(line)` for every shard that is written again, with the
    reason.

    Each process makes, writes and hashes whole shards, every `world.size`-th one, so files do not depend on the number of
    processes. A folder that was begun with another header is refused."""
    device, world, teacher = torch.device(device), world or World(), teacher.to(device).eval()
    known = world.decided(lambda: _begin(folder, teacher, header))
    vocabulary = len(codebook_of(teacher.decoder)) if header.column == "tokens" else 0
    stored_shape = next(iter(sample_column(header).values()))[0]
    pieces = torch.arange(header.count).split(shard_rows(stored_shape, shard_bytes, len(header.times or ())))

    def made() -> list[tuple[dict[str, Any], str]]:
        """(entry of the manifest, why it was written again) of this process's shards."""
        found = []
        for number, ids in world.share(pieces):
            path, around = folder / f"pairs-{number:05d}.safetensors", pieces[number : number + world.size]
            line = ""
            if reason := check_shard(path, header, ids, known.get(path.name), vocabulary):
                line = f"{path}: {reason}; made again" if path.is_file() else ""
                if line:
                    tell(line)

                def count(batch: int, around: Sequence[Tensor] = around) -> None:
                    """Of the other processes' shards, the same batch."""
                    at = batch * batch_size
                    on_samples(sum(len(ids[at : at + batch_size]) for ids in around))

                options: dict[str, Any] = {"batch_size": batch_size, "device": device, "on_batch": count}
                states = make_pairs(teacher, header, ids, **options)
                known[path.name] = _write(path, teacher, header, ids, states)
            else:
                on_samples(sum(map(len, around)))
            entry = {"file": path.name, "count": len(ids), "sha256": known[path.name]}
            found.append((entry, line))
        return found

    parts = world.together(made)
    if world.main:
        for _, line in (entry for part in parts[1:] for entry in part if entry[1]):
            tell(line)
        shards = sorted((entry for part in parts for entry, _ in part), key=lambda entry: entry["file"])
        write_json(folder / MANIFEST, {"header": header.to_dict(), "shards": shards})
        for name in (HEADER, WRITTEN, *(_note(folder / entry["file"]).name for entry in shards)):
            remove(folder / name)
    world.barrier()


def _begin(folder: Path, teacher: Model, header: Header) -> dict[str, str]:
    """Write what lies beside the shards; returns `recorded`."""
    _check_begun(folder / HEADER, header)
    known = recorded(folder, header)
    write_json(folder / HEADER, header.to_dict())
    write_weights(folder, teacher.decoder)
    return known


def _write(path: Path, teacher: Model, header: Header, ids: Tensor, states: Tensor) -> str:
    """Write a shard, and its note; returns its sha256."""
    columns = {"ids": ids, **teacher.conditions.columns(ids)}
    write_safetensors(path, columns | stored(teacher, header, states))
    sha = sha256_file(path)
    write_json(_note(path), {"header": header.to_dict(), "sha256": sha})
    return sha


def _note(path: Path) -> Path:
    """The note of a shard's sha256, beside it until the manifest is written."""
    return path.with_suffix(".json")


def stored(teacher: Model, header: Header, states: Tensor) -> dict[str, Tensor]:
    """The columns of states [n,K,*S], of which the last are the samples. Raises ValueError for tokens of more codes than 16
    bits count."""
    x0 = states[:, -1].contiguous()
    if header.column == "x0":
        return {"x0": x0} if header.times is None else {"x0": x0, "path": states}
    if (codes := len(codebook_of(teacher.decoder))) > 2**16:
        raise ValueError(
            f"decoder: found {codes} codes, expected at most {2**16}: tokens are stored in 16 bits"
        )
    return {"tokens": indices(teacher.decoder, x0).to(torch.uint16)}


def recorded(folder: Path, header: Header) -> dict[str, str]:
    """sha256 of every shard by its name, as noted when it was written: by a manifest, or by writers that were killed."""
    with suppress(FileNotFoundError, ValueError):
        found, shards = read_manifest(folder / MANIFEST)
        if not differing(found, header):
            return {shard.file: shard.sha256 for shard in shards}
    known: dict[str, str] = {}
    for path in [folder / WRITTEN, *sorted(folder.glob("pairs-*.json"))]:
        with suppress(FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            noted = read_json(path)
            if not differing(Header.from_dict(noted["header"], path.name), header):
                sha = noted["sha256"]
                name = path.with_suffix(".safetensors").name
                known |= dict(sha) if path.name == WRITTEN else {name: str(sha)}
    return known


def check_shard(path: Path, header: Header, ids: Tensor, sha256: str | None, vocabulary: int = 0) -> str:
    """Why a shard is not the one that was written for `ids` (one sentence), or "" where it is."""
    if not path.is_file():
        return "missing"
    if sha256 is None:
        return "there is no record of it"
    if (found := sha256_file(path)) != sha256:
        return f"sha256: found {found[:12]}, expected {sha256[:12]}: changed after it was written"
    try:
        table = safetensors.torch.load_file(path)
        Pairs.check_values(path, table, header.column, vocabulary)
    except (SafetensorError, ValueError, KeyError) as error:
        return str(error)
    wanted = {"ids": ids, **build_conditions(header.conditions).columns(ids)}
    fits = all(name in table and torch.equal(table[name], column) for name, column in wanted.items())
    ((column, (row, _)),) = sample_column(header).items()
    same = column in table and tuple(table[column].shape) == (len(ids), *row)
    return "" if fits and same else "holds other pairs"
