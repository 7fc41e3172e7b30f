"""The order of samples in shards, shuffled in two levels: a function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.rng import stream_key


class ShardOrder:
    """Shuffled epochs over shards of `counts` samples.

    In every epoch the shards are permuted, cut into windows of `window` shards, and the samples of each window are permuted:
    each sample comes once an epoch, a reader needs `window` shards at a time, and only the permutation of one window is in
    memory. The sample at a position, counted from the start of training over all processes, depends on neither batch size
    nor the number of processes or workers.

    Raises ValueError for shards without samples and a window below 1.
    """

    def __init__(self, counts: Sequence[int], seed: int, stream: str = "order", window: int = 4) -> None:
        if not counts or min(counts) < 1:
            raise ValueError(f"counts: found {list(counts)[:8]}, expected at least 1 sample a shard")
        if window < 1:
            raise ValueError(f"window: found {window}, expected at least 1 shard")
        self.seed, self.stream, self.window = seed, stream, window
        self._counts = torch.tensor(list(counts), dtype=torch.int64, device="cpu")
        self._starts = self._counts.cumsum(0) - self._counts  # the first row of each shard
        self.size = int(self._counts.sum())
        self._epoch, self._shards = -1, self._counts
        self._ends = self._counts  # positions in the epoch at which its windows end
        self._at: tuple[int, int] = (-1, -1)  # epoch and number of the window in memory
        self._rows = self._counts

    def _permutation(self, count: int, *parts: int | str) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(stream_key(self.seed, self.stream, *parts))
        return torch.randperm(count, generator=generator, device="cpu")

    def _begin(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._shards = self._permutation(len(self._counts), "shards", epoch)
        ends = self._counts[self._shards].cumsum(0)
        last = torch.arange(self.window - 1, len(ends) + self.window - 1, self.window).clamp(
            max=len(ends) - 1
        )
        self._epoch, self._ends = epoch, ends[last]

    def _window(self, epoch: int, number: int) -> Tensor:
        """The rows of a window in their order."""
        if (epoch, number) != self._at:
            shards = self._shards[number * self.window : (number + 1) * self.window].tolist()
            rows = torch.cat(
                [torch.arange(int(self._counts[s]), device="cpu") + self._starts[s] for s in shards]
            )
            self._rows = rows[self._permutation(len(rows), "rows", epoch, number)]
            self._at = epoch, number
        return self._rows

    def at(self, start: int, count: int) -> Tensor:
        """Return the rows [count] int64 of the samples at positions start .. start + count - 1."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, self.size)
            self._begin(epoch)
            number = int(torch.searchsorted(self._ends, offset, right=True))
            begin = int(self._ends[number - 1]) if number else 0
            piece = self._window(epoch, number)[offset - begin : offset - begin + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device="cpu")
