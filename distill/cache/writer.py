"""Makes a pair cache from a teacher, shard by shard; a killed writer continues with the first shard that is
not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill.cache.pairs import HEADER, MANIFEST, Header, balanced_labels
from distill.data.cond import Cond
from distill.data.rng import sample_noise
from distill.files import read_json, sha256_file, write_json, write_safetensors
from distill.models.denoiser import Denoiser
from distill.world import World

SHARD_BYTES = 64 * 2**20


def shard_rows(sample_shape: tuple[int, ...], shard_bytes: int = SHARD_BYTES) -> int:
    """Pairs a shard: about `shard_bytes` of float32 samples with 12 bytes of id and label each."""
    return max(1, shard_bytes // (4 * math.prod(sample_shape) + 12))


@torch.inference_mode()
def make_pairs(
    teacher: Denoiser,
    header: Header,
    ids: Tensor,
    *,
    batch_size: int,
    device: torch.device,
    world: World,
    on_samples: Callable[[int], None],
) -> Tensor | None:
    """[n,*S] float32 endpoints of the teacher's transport for the samples `ids`, on the CPU of the main process;
    None elsewhere. Refuses non-finite ones. Batches are the same on any number of processes, which share them."""
    samples, chunks = {}, ids.split(batch_size)
    for number, part in world.share(chunks):
        z = sample_noise(header.seed, header.stream, part, header.sample_shape).to(device)
        cond = (
            Cond.of_labels(balanced_labels(part, header.num_classes))
            if header.num_classes
            else Cond.nothing(len(part))
        ).to(device)
        x0 = teacher.transport(
            z, cond, solver=header.solver, steps=header.steps, guidance_scale=header.guidance_scale
        )[0].cpu()
        if not bool(torch.isfinite(x0).all()):
            bad = part[~torch.isfinite(x0).flatten(1).all(dim=1)].tolist()
            raise FloatingPointError(
                f"teacher: non-finite samples for ids {bad[:8]} ({len(bad)} of {len(part)})"
            )
        samples[number] = x0
        on_samples(sum(len(chunk) for chunk in chunks[number : number + world.size]))
    return world.collect(samples)


def write_pairs(
    folder: Path,
    teacher: Denoiser,
    header: Header,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    world: World | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_samples: Callable[[int], None] = lambda count: None,
) -> None:
    """Write all shards that are missing, then the manifest. `on_samples(n)` is told of every n samples that
    are there.

    A folder that was begun with another header is refused. With several processes each makes a part of every
    shard and the main one writes."""
    device, world, teacher = torch.device(device), world or World(), teacher.to(device).eval()
    begun = folder / HEADER
    if begun.is_file() and (found := read_json(begun)) != header.to_dict():
        changed = sorted(key for key, value in header.to_dict().items() if found.get(key) != value)
        raise ValueError(f"{begun}: begun with other {changed}: found {[found.get(k) for k in changed]}")
    world.barrier()
    if world.main:
        write_json(begun, header.to_dict())
    shards = []
    pieces = torch.arange(header.count).split(shard_rows(header.sample_shape, shard_bytes))
    paths = [folder / f"pairs-{number:05d}.safetensors" for number in range(len(pieces))]
    missing = [not path.is_file() for path in paths]  # a shard has its name only when it is whole
    world.barrier()  # all have looked before anyone writes
    for path, ids, make in zip(paths, pieces, missing, strict=True):
        if make:
            x0 = make_pairs(
                teacher,
                header,
                ids,
                batch_size=batch_size,
                device=device,
                world=world,
                on_samples=on_samples,
            )
            if x0 is not None:
                labels = balanced_labels(ids, header.num_classes)
                write_safetensors(path, {"ids": ids, "label": labels, "x0": x0})
        else:
            on_samples(len(ids))
        if world.main:
            shards.append({"file": path.name, "count": len(ids), "sha256": sha256_file(path)})
    if world.main:
        write_json(folder / MANIFEST, {"header": header.to_dict(), "shards": shards})
        begun.unlink()
    world.barrier()
