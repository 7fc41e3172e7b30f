"""One (micro) batch of training samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.data.cond import Cond

TENSORS = ("ids", "index", "x0", "z", "tokens", "path", "times", "guidance")


@dataclass(frozen=True)
class Batch:
    """A batch. Fields that a source does not have are None.

    Attributes:
        ids: sample identities [B].
        index: positions in the global batch of this step [B]; keys of the random draws.
        cond: conditions.
        x0: data, or samples of the teacher [B,*S].
        z: noise that the teacher mapped to `x0` [B,*S].
        tokens: indices [B,L] int64 of the codes that `x0` consists of.
        path: states from `z` to `x0` [B,K,*S]. times: their times [K], descending to 0.
        guidance: guidance scales that the samples were made with [B], where each has its own.
    """

    ids: Tensor
    index: Tensor
    cond: Cond
    x0: Tensor | None = None
    z: Tensor | None = None
    tokens: Tensor | None = None
    path: Tensor | None = None
    times: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in TENSORS
            if (value := getattr(self, name)) is not None
        }
        return replace(self, cond=self.cond.to(device), **moved)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU do not block. Called by torch's `DataLoader`."""
        pinned = {name: value.pin_memory() for name in TENSORS if (value := getattr(self, name)) is not None}
        return replace(self, cond=self.cond.pin_memory(), **pinned)
