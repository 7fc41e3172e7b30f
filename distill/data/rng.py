"""Stateless randomness: every draw is a function of a key (`stream_key`, a 64-bit hash).

* `Draws`: the draws of a training step, a function of (seed, stream, step, index of the sample in the global batch).
  Counter-based (Philox4x32-10, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): they are the same for any
  number of processes and any gradient accumulation, and resuming needs no saved state.
* `sample_noise`: the noise of stored sample i, a function of (seed, stream, i), from a CPU float32 `torch.Generator`.
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
    """Return the 64-bit key of a stream: the first 8 bytes, little-endian, of sha256("seed/part/part...").

    Integers may be of numpy or torch. Raises ValueError for other types than integers and strings."""
    numbered = [part if isinstance(part, str) else integer("part", part) for part in parts]
    text = "/".join(str(part) for part in (integer("seed", seed), *numbered))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def philox(counter: Sequence[Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: return four words of 32 random bits per counter.

    `counter`: four int64 tensors or numpy arrays that broadcast, of at least one dimension, with values in [0, 2^32).
    int64 products wrap; their low 64 bits equal those of the unsigned product, so shifts and masks give its halves.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # After the first round c1 and c3 are 64-bit products; the mask removes their upper halves.
        c0, c2 = (p1 >> 32) ^ c1, (p0 >> 32) ^ c3
        c0 ^= k0
        c2 ^= k1
        c0 &= _MASK
        c2 &= _MASK
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _blocks(rows: Any, columns: Any, key: int) -> tuple[Any, Any, Any, Any]:
    """Return four words per row [B,1] (a sample) and column [1,n] (a block of its elements)."""
    return philox((columns, rows & _MASK, rows >> 32, 0 * columns), key)


class Draws:
    """Named draws of one training step for the samples `index` ([B] int64, positions in the *global* batch).

    A draw is a function of (seed, stream, step, name, index, element); it does not depend on the order of calls or the size
    of the batch. Uniforms have 24 random bits and are in the open interval (0, 1); normals are Box-Muller pairs.
    """

    def __init__(self, seed: int, stream: str, step: int, index: Tensor) -> None:
        self.seed, self.stream, self.step, self.index = seed, stream, step, index

    def _uniforms(self, name: str, count: int) -> Tensor:
        """Return [B, count] float32 in (0, 1)."""
        key = stream_key(self.seed, self.stream, self.step, name)
        rows = self.index.to(torch.int64)[:, None]
        columns = torch.arange(-(-count // 4), device=rows.device)[None, :]
        if rows.device.type == "cpu":  # small batches: calls of numpy cost a third of torch's
            words = np.stack(_blocks(rows.numpy(), columns.numpy(), key), axis=-1)
            cells = torch.from_numpy((words >> 8).astype(np.float32))
        else:
            cells = (torch.stack(_blocks(rows, columns, key), dim=-1) >> 8).to(torch.float32)
        # The centre of one of 2^24 cells: never 0 or 1, so log and logit are finite.
        return (cells + 0.5).mul_(2.0**-24).flatten(1)[:, :count]

    def named(self, name: str) -> Draws:
        """Return the draws of the same step in the stream `<stream>/<name>`."""
        return Draws(self.seed, f"{self.stream}/{name}", self.step, self.index)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw [B, *shape] float32 in (0, 1)."""
        return self._uniforms(name, math.prod(shape)).reshape(len(self.index), *shape)

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw [B, *shape] float32 standard normal."""
        count = math.prod(shape)
        half = -(-count // 2)
        radius, angle = self._uniforms(name, 2 * half).split(half, dim=1)
        radius, angle = (-2.0 * radius.log()).sqrt(), angle * (2.0 * math.pi)
        values = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return values[:, :count].reshape(len(self.index), *shape)

    def integer(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw [B, *shape] int64 in [0, high), for high much smaller than 2^24 (the bias is high / 2^24)."""
        return (self.uniform(name, shape) * high).to(torch.int64).clamp_(max=high - 1)


def sample_noise(seed: int, stream: str, ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Return noise [n, *shape] float32 on the CPU; row i is the noise of stored sample `ids[i]`.

    A row does not depend on the other ids. Torch does not guarantee equal streams between versions: stored pairs contain
    `noise_checksum`, and readers compare it.
    """
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"ids: found {ids!r}, expected integers of shape [n]")
    generator = torch.Generator(device="cpu")
    out = torch.empty(len(ids), *shape, dtype=torch.float32, device="cpu")
    for row, i in zip(out, ids.tolist(), strict=True):
        generator.manual_seed(stream_key(seed, stream, i))
        # randn uses another algorithm below 16 elements; both depend only on seed and shape.
        row.copy_(torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu"))
    return out


def sample_uniform(seed: int, stream: str, ids: Tensor) -> Tensor:
    """Return numbers [n] float32 in [0, 1) on the CPU, one for each stored sample `ids` [n]; functions of (seed, stream, i)."""
    draws = Draws(seed, stream, 0, ids.cpu())
    return draws.uniform("sample")


def noise_checksum(seed: int, stream: str, shape: Sequence[int]) -> str:
    """Return the sha256 of the noise of sample 0, to detect versions of torch with other streams."""
    noise = sample_noise(seed, stream, torch.tensor([0], device="cpu"), shape)
    return hashlib.sha256(noise.numpy().tobytes()).hexdigest()
