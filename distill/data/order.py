"""The order of training samples: a function of (seed, position), so that training can resume at any position."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.rng import stream_key


class Order:
    """Shuffled epochs over `size` samples.

    The sample at position p, counted from the start of training over all processes, is
    `permutation(seed, p // size)[p % size]`. It does not depend on batch size or world size."""

    def __init__(self, size: int, seed: int, stream: str = "order") -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 sample, found {size}")
        self.size, self.seed, self.stream = size, seed, stream
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def _epoch_permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(stream_key(self.seed, self.stream, epoch))
            self._epoch, self._permutation = (
                epoch,
                torch.randperm(self.size, generator=generator, device="cpu"),
            )
        return self._permutation

    def at(self, start: int, count: int) -> Tensor:
        """Return the rows [count] int64 of the samples at positions start .. start + count - 1."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            piece = self._epoch_permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")
