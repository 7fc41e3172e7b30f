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

SHARD_BYTES = 64 * 2**20


def shard_rows(sample_shape: tuple[int, ...], shard_bytes: int = SHARD_BYTES) -> int:
    """Pairs a shard: about `shard_bytes` of float32 samples with 12 bytes of id and label each."""
    return max(1, shard_bytes // (4 * math.prod(sample_shape) + 12))


@torch.inference_mode()
def make_pairs(
    teacher: Denoiser, header: Header, ids: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """[n,*S] float32 endpoints of the teacher's transport for the samples `ids`, on the CPU; refuses
    non-finite ones."""
    samples = []
    for part in ids.split(batch_size):
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
        samples.append(x0)
    return torch.cat(samples)


def write_pairs(
    folder: Path,
    teacher: Denoiser,
    header: Header,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    on_samples: Callable[[int], None] = lambda count: None,
) -> None:
    """Write all shards that are missing, then the manifest. `on_samples(n)` is told of every n samples that
    are there.

    A folder that was begun with another header is refused."""
    device, teacher = torch.device(device), teacher.to(device).eval()
    begun = folder / HEADER
    if begun.is_file():
        if (found := read_json(begun)) != header.to_dict():
            changed = sorted(key for key, value in header.to_dict().items() if found.get(key) != value)
            raise ValueError(f"{begun}: begun with other {changed}: found {[found.get(k) for k in changed]}")
    else:
        write_json(begun, header.to_dict())
    shards = []
    for number, ids in enumerate(
        torch.arange(header.count).split(shard_rows(header.sample_shape, shard_bytes))
    ):
        path = folder / f"pairs-{number:05d}.safetensors"
        if not path.is_file():  # a shard has its name only when it is whole
            x0 = make_pairs(teacher, header, ids, batch_size, device)
            write_safetensors(path, {"ids": ids, "label": balanced_labels(ids, header.num_classes), "x0": x0})
        shards.append({"file": path.name, "count": len(ids), "sha256": sha256_file(path)})
        on_samples(len(ids))
    write_json(folder / MANIFEST, {"header": header.to_dict(), "shards": shards})
    begun.unlink()
