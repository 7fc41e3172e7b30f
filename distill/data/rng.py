"""Randomness without state: every draw is a function of what it is for.

Two kinds, both keyed by a 64-bit hash (`stream_key`):

* `Draws`: the draws of one training step, a function of (seed, stream, step, index of the sample in the
global batch).
  Counter-based (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so one
  process, two processes and any gradient accumulation draw the same numbers, and resuming needs
  no saved state.
* `sample_noise`: the noise of stored sample i, a function of (seed, stream, i), from a CPU float32
`torch.Generator`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.data.arguments import integer

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def stream_key(seed: int, *parts: str | int) -> int:
    """The documented 64-bit hash of a stream: the first 8 bytes, little-endian, of
    sha256("seed/part/part..."). Integers of numpy and of torch are integers; raises ValueError for floats and the rest."""
    numbered = [part if isinstance(part, str) else integer("part", part) for part in parts]
    text = "/".join(str(part) for part in (integer("seed", seed), *numbered))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def philox(counter: Sequence[Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four words of 32 random bits per counter (int64 tensors, or numpy arrays, that broadcast, of at
    least one dimension; values in [0, 2^32)).

    int64 products wrap, but their low 64 bits are those of the unsigned product, so shifting and masking
    gives its halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # After the first round c1 and c3 are whole products; their upper halves go with the mask.
        c0, c2 = (p1 >> 32) ^ c1, (p0 >> 32) ^ c3
        c0 ^= k0
        c2 ^= k1
        c0 &= _MASK
        c2 &= _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _blocks(rows: Any, columns: Any, key: int) -> tuple[Any, Any, Any, Any]:
    """Four words for each row [B,1] (a sample) and column [1,n] (a block of its elements)."""
    return philox((columns, rows & _MASK, rows >> 32, 0 * columns), key)


class Draws:
    """Named draws of one training step for the samples `index` ([B] int64, positions in the *global* batch).

    A draw is a function of (seed, stream, step, name, index, element) and of nothing else: neither the order
    of the calls nor the size of the batch matters. Uniforms carry 24 random bits and lie strictly inside (0,
    1); normals are Box-Muller pairs.
    """

    def __init__(self, seed: int, stream: str, step: int, index: Tensor) -> None:
        self.seed, self.stream, self.step, self.index = seed, stream, step, index

    def _uniforms(self, name: str, count: int) -> Tensor:
        """[B, count] float32 in (0, 1)."""
        key = stream_key(self.seed, self.stream, self.step, name)
        rows = self.index.to(torch.int64)[:, None]
        columns = torch.arange(-(-count // 4), device=rows.device)[None, :]
        if (
            rows.device.type == "cpu"
        ):  # what small batches pay for is the calls, and numpy's cost a third of torch's
            words = np.stack(_blocks(rows.numpy(), columns.numpy(), key), axis=-1)
            cells = torch.from_numpy((words >> 8).astype(np.float32))
        else:
            cells = (torch.stack(_blocks(rows, columns, key), dim=-1) >> 8).to(torch.float32)
        # The middle of one of 2^24 cells: never 0 or 1, so log and logit stay finite.
        return (cells + 0.5).mul_(2.0**-24).flatten(1)[:, :count]

    def named(self, name: str) -> Draws:
        """The draws of the same step under another stream, for a function that names its draws itself."""
        return Draws(self.seed, f"{self.stream}/{name}", self.step, self.index)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] float32 in (0, 1)."""
        return self._uniforms(name, math.prod(shape)).reshape(len(self.index), *shape)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] float32 standard normal."""
        count = math.prod(shape)
        half = -(-count // 2)
        radius, angle = self._uniforms(name, 2 * half).split(half, dim=1)
        radius, angle = (-2.0 * radius.log()).sqrt(), angle * (2.0 * math.pi)
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return values[:, :count].reshape(len(self.index), *shape)

    def integer(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """[B, *shape] int64 in [0, high), for high far below 2^24 (the bias is high / 2^24)."""
        return (self.uniform(name, shape) * high).to(torch.int64).clamp_(max=high - 1)


def sample_noise(seed: int, stream: str, ids: Tensor, shape: Sequence[int]) -> Tensor:
    """[n, *shape] float32 on the CPU: row i is the noise of stored sample `ids[i]` (contract *Randomness*).

    Independent of which ids are asked for together. Torch promises no equal streams between versions: stores
    keep `noise_checksum` and readers compare it.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids: found {ids!r}, expected integers of shape [n]")
    generator = torch.Generator(device="cpu")
    out = torch.empty(len(ids), *shape, dtype=torch.float32, device="cpu")
    for row, i in zip(out, ids.tolist(), strict=True):
        generator.manual_seed(stream_key(seed, stream, i))
        # randn takes another code path below 16 elements; both are functions of the seed and the shape alone.
        row.copy_(torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu"))
    return out


def noise_checksum(seed: int, stream: str, shape: Sequence[int]) -> str:
    """sha256 of the bytes of sample 0's noise: equal exactly where this torch draws the same stream."""
    noise = sample_noise(seed, stream, torch.tensor([0], device="cpu"), shape)
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()
