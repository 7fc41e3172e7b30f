"""Jobs on data: reading shards, and encoding images; see `worker`. No test itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from method_support import pairs_header
from shard_support import numbers

from distill.cache.latent_files import LatentHeader, shard_name, write_latents
from distill.cache.writer import write_pairs
from distill.data.cond import Cond
from distill.data.source import StepLoader
from distill.data.webdataset import Shards
from distill.models.conditions import Labels
from distill.models.decoder import Autoencoder
from distill.models.denoiser import Denoiser
from distill.nets.autoencoder import ConvAutoencoder
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.world import World

CPU = torch.device("cpu")


class Variational(ConvAutoencoder):
    """With a posterior of standard deviation 0.5."""

    def encode_sample(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return self.encode(images) + 0.5 * noise


def shards(folder: Path) -> Shards:
    return Shards(str(folder / "s-{000..002}.tar"), label="cls", num_classes=10)


def read(world: World, folder: Path, start: int, stop: int, workers: int) -> None:
    options = {"rank": world.rank, "world": world.size, "workers": workers}
    loader = StepLoader(shards(folder), 8, 5, stream="t", start=start, stop=stop, **options)
    for iteration, (batch,) in enumerate(loader, start):
        path = folder / "read" / f"{world.size}-{iteration}-{world.rank}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(numbers(batch.x0)))


def job_read(world: World, folder: Path) -> None:
    """All of two epochs on one process; on two, up to iteration 7 of 10 with two workers each."""
    read(world, folder, 0, 10 if world.size == 1 else 7, workers=0 if world.size == 1 else 2)


def job_continue(world: World, folder: Path) -> None:
    """The rest, after a kill, with three workers each."""
    read(world, folder, 7, 10, workers=3)


def latents(world: World, folder: Path, source: Shards) -> None:
    torch.manual_seed(0)
    decoder = Autoencoder(Variational(channels=3, latent=2, width=4), scale=0.5)
    options = {"dtype": "bfloat16", "posterior": "sample", "seed": 1, "stream": "l", "shard_bytes": 700}
    header = LatentHeader.of(source, Labels(10), decoder, (2, 4, 4), **options)
    assert header.rows == 8
    options = {"batch_size": 3, "device": CPU, "world": world, "workers": world.size - 1}
    write_latents(folder, source, Labels(10), decoder, header, **options)


class Stopped(Shards):
    """Fails at row 20, in the third shard of latents."""

    def fetch(self, rows: torch.Tensor, index: torch.Tensor) -> object:
        if 20 in rows.tolist():
            raise KeyboardInterrupt
        return super().fetch(rows, index)


def job_latents(world: World, folder: Path) -> None:
    """Encode all images."""
    latents(world, folder / f"latents-{world.size}", shards(folder))


def job_stopped(world: World, folder: Path) -> None:
    """On one process: stopped in the third shard, then with another one broken, and continued."""
    source = Stopped(str(folder / "s-{000..002}.tar"), label="cls", num_classes=10)
    place = folder / "latents-stopped"
    try:
        latents(world, place, source)
    except KeyboardInterrupt:
        made = [shard_name(0), shard_name(1)]
        assert sorted(path.name for path in place.glob("*.safetensors")) == made
        kept = place / made[0]
        (place / made[1]).write_bytes(b"half")
    before = kept.stat().st_mtime_ns
    latents(world, place, shards(folder))
    assert kept.stat().st_mtime_ns == before


class Broken(Denoiser):
    """Makes numbers that are not finite, for the samples 4 .. 7."""

    def transport(self, z: torch.Tensor, cond: Cond, **options: object) -> torch.Tensor:
        bad = bool(cond.get("label")[0] == 4)
        return super().transport(z, cond, **options) * (math.nan if bad else 1.0)


def job_pairs(world: World, folder: Path) -> None:
    """Ten pairs in three shards; then a teacher that fails in the second, which the second of two processes makes."""
    place, header = folder / f"pairs-{world.size}", pairs_header()
    options = {"batch_size": 3, "world": world, "shard_bytes": 4 * 268}
    torch.manual_seed(0)
    net, counted = UNet(width=8, embedding=16, groups=4), []
    write_pairs(
        place, Denoiser(net, Flow(), "velocity", (1, 8, 8)), header, on_samples=counted.append, **options
    )
    assert sum(counted) == 10 or not world.main
    message = ""
    try:
        write_pairs(
            folder / f"broken-{world.size}", Broken(net, Flow(), "velocity", (1, 8, 8)), header, **options
        )
    except FloatingPointError as error:
        message = str(error)
    assert "non-finite samples for ids [4, 5, 6]" in message, message
