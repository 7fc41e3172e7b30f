"""Images a second of `data=webdataset` through the training loader, against the plain `webdataset` package.

    pip install 'distill[webdataset]'
    python scripts/bench/loader.py [--samples 2048] [--size 128] [--workers 0 2] [--rounds 5]

Both sides read the same shards of JPEG images with captions and classes, decode each image, and make batches of float32 in
[-1, 1] with their labels. The package reads shards from front to back without shuffling, which is its fastest way; ours is the
order of training: two levels of shuffling, exact epochs. Both have the same number of worker processes. Rounds take turns in
one process, after one of each that fills the page cache; the ratio is that of two neighbours, by the clock and by CPU seconds,
which other load on the machine changes less. The time of starting workers counts on both sides.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data.source import StepLoader
from distill.data.webdataset import Shards

SHARDS, BATCH = 8, 32


def write(folder: Path, samples: int, size: int) -> str:
    """Shards of smooth random JPEG images; returns their pattern."""
    draws = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for number in range(samples // SHARDS):
                small = draws.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
                image, out = (
                    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC),
                    io.BytesIO(),
                )
                image.save(out, "JPEG", quality=90)
                key = f"{shard:02d}{number:06d}"
                for name, content in (("jpg", out.getvalue()), ("txt", key.encode()), ("cls", b"1")):
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / f"s-{{0..{SHARDS - 1}}}.tar")


def ours(pattern: str, workers: int) -> Iterator[int]:
    """The sizes of the batches of one epoch."""
    data = Shards(pattern, label="cls", num_classes=2)
    steps = len(data) // BATCH
    for (batch,) in StepLoader(data, BATCH, 0, stream="bench", start=0, stop=steps, workers=workers):
        yield len(batch)


def _plain(sample: tuple[bytes, bytes]) -> tuple[torch.Tensor, int]:
    with Image.open(io.BytesIO(sample[0])) as image:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1), int(sample[1])


def _batch(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.stack([image for image, _ in samples]).to(torch.float32).div_(127.5).sub_(1.0)
    return images, torch.tensor([label for _, label in samples])


def theirs(pattern: str, workers: int) -> Iterator[int]:
    """The same of the package."""
    import webdataset

    data = (
        webdataset.WebDataset(pattern, shardshuffle=False)
        .to_tuple("jpg", "cls")
        .map(_plain)
        .batched(BATCH, collation_fn=_batch, partial=False)
    )
    for images, _ in webdataset.WebLoader(data, batch_size=None, num_workers=workers):
        yield len(images)


def cpu() -> float:
    """CPU seconds of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def seconds(read: Callable[[str, int], Iterator[int]], pattern: str, workers: int) -> tuple[float, float]:
    """(seconds, CPU seconds) a sample of one epoch."""
    start, before = time.perf_counter(), cpu()
    count = sum(read(pattern, workers))
    return (time.perf_counter() - start) / count, (cpu() - before) / count


def ratio(pairs: list[tuple[tuple[float, float], tuple[float, float]]], measure: int) -> str:
    """The median ratio of speeds, and its range."""
    found = [their[measure] / own[measure] for own, their in pairs]
    return f"{statistics.median(found):.2f} ({min(found):.2f} .. {max(found):.2f})"


def main() -> None:
    """Print one row for each number of workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("samples", 2048), ("size", 128), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        pattern = write(Path(folder), given.samples, given.size)
        Shards(pattern)  # makes the indexes
        print(
            "| workers | ours, images/s | webdataset, images/s | ours / webdataset | by CPU seconds |\n|---|---|---|---|---|"
        )
        for workers in given.workers:
            pairs = [
                (seconds(ours, pattern, workers), seconds(theirs, pattern, workers))
                for _ in range(given.rounds + 1)
            ][1:]
            own, their = (
                1 / statistics.median(side[0] for side in both) for both in zip(*pairs, strict=True)
            )
            print(
                f"| {workers} | {own:.0f} | {their:.0f} | {ratio(pairs, 0)} | {ratio(pairs, 1)} |", flush=True
            )


if __name__ == "__main__":
    main()
