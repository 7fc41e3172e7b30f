"""The protocol of training data, and the loader of training steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.order import Order


class Source(Protocol):
    """Samples that can be fetched by row number in any order.

    To build a fresh model of the samples, a source also needs `value_range`, (-1, 1) for images or None for samples without a
    range, or a `decoder` (`models.decoder`). Conditions other than labels are in the attribute `conditions`
    (`models.conditions`)."""

    sample_shape: tuple[int, ...]
    num_classes: int  # 0: no labels

    def __len__(self) -> int: ...

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """Return the samples at `rows` [B] (0 .. len-1); `index` [B] are their positions in the global batch."""

    def fingerprint(self) -> str:
        """Return a digest of everything that the samples depend on."""


def decoded(source: Any) -> Any:
    """Return the data to compare decoded samples with: for latents the encoded images (attribute `decoded`), else `source`."""
    return getattr(source, "decoded", source)


class StepLoader:
    """Yields this process's list of `accumulate` micro batches for each iteration in [`start`, `stop`).

    The global batch of iteration i has the positions [i * batch_size, (i + 1) * batch_size) of the order. It is split into
    `accumulate` micro batches, and each of these into `world` equal parts, so its samples do not depend on the split.

    Raises:
        ValueError: unless `batch_size` is a multiple of accumulate * world.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        *,
        stream: str,
        start: int,
        stop: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch_size % (accumulate * world):
            raise ValueError(
                f"batch_size: found {batch_size}, which cannot be split into accumulate={accumulate} "
                "micro batches "
                f"on {world} processes; expected a multiple of {accumulate * world}"
            )
        self.source, self.batch_size, self.order = (
            source,
            batch_size,
            Order(len(source), seed, f"{stream}/order"),
        )
        self.start, self.stop, self.accumulate, self.rank, self.world = start, stop, accumulate, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Batch]]:
        index = torch.arange(self.batch_size, device="cpu").view(self.accumulate, self.world, -1)[
            :, self.rank
        ]
        for iteration in range(self.start, self.stop):
            rows = self.order.at(iteration * self.batch_size, self.batch_size)
            yield [self.source.fetch(rows[part], part) for part in index]
