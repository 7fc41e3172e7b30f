"""Tar shards of small images, as the `webdataset` package writes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def picture(number: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """A noisy image [H,W,3] (or [H,W]) whose first pixel tells its number."""
    shape = (size, size, 3) if channels == 3 else (size, size)
    pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    pixels.reshape(-1)[:2] = number // 256, number % 256
    return pixels


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def members(number: int, size: int = 8, channels: int = 3) -> list[tuple[str, bytes]]:
    """The members of one sample: image, caption, class and JSON."""
    text = f"picture {number}"
    return [
        (f"{number:06d}.png", png(picture(number, size, channels))),
        (f"{number:06d}.txt", text.encode()),
        (f"{number:06d}.cls", str(number % 10).encode()),
        (f"{number:06d}.json", json.dumps({"text": text, "class": number % 10}).encode()),
    ]


def write_shards(
    folder: Path,
    counts: Sequence[int],
    size: int = 8,
    changed: Mapping[int, list] | None = None,
    channels: int = 3,
) -> str:
    """Shards of `counts` samples, numbered through; returns their pattern. `changed`: members of some samples."""
    number = 0
    for shard, count in enumerate(counts):
        found = [
            member
            for i in range(number, number + count)
            for member in ((changed or {}).get(i) or members(i, size, channels))
        ]
        write_tar(folder / f"s-{shard:03d}.tar", found)
        number += count
    return str(folder / f"s-{{000..{len(counts) - 1:03d}}}.tar")


def numbers(x0) -> list[int]:
    """The numbers of images [n,3,H,W] (or of one channel) that `picture` made."""
    pixels = ((x0 + 1) * 127.5).round().long()
    first = pixels[:, :2, 0, 0] if pixels.shape[1] == 3 else pixels[:, 0, 0, :2]
    return (first[:, 0] * 256 + first[:, 1]).tolist()
