"""One (micro) batch of training samples."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.data.cond import Cond


@dataclass(frozen=True)
class Batch:
    """`ids` [B] sample identities; `index` [B] positions in the global batch of this step (they key the
    random draws); `cond`; `x0` data or teacher endpoint [B,*S]; `z` the noise that the teacher mapped to `x0`
    [B,*S]; `path` states between the two [B,K,*S] with `times` [K] descending to 0. What a source does not
    have is None."""

    ids: Tensor
    index: Tensor
    cond: Cond
    x0: Tensor | None = None
    z: Tensor | None = None
    path: Tensor | None = None
    times: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("ids", "index", "x0", "z", "path", "times")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, cond=self.cond.to(device), **moved)
