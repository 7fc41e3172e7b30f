"""What a sample is conditioned on. Methods carry it around and never look inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NULL_LABEL = -1


@dataclass(frozen=True)
class Cond:
    """A batch of conditions: a class label a sample ([B] int64, `NULL_LABEL` = no condition), or nothing at
    all (`size` rows)."""

    size: int
    label: Tensor | None = None

    @classmethod
    def of_labels(cls, label: Tensor) -> Cond:
        """Conditions from class labels [B] (integers; -1 is the null condition)."""
        if label.ndim != 1 or label.dtype.is_floating_point:
            raise ValueError(
                f"label: expected integers of shape [B], found {label.dtype} {tuple(label.shape)}"
            )
        return cls(len(label), label.to(torch.int64))

    @classmethod
    def nothing(cls, size: int) -> Cond:
        """`size` unconditional samples."""
        return cls(size)

    def __len__(self) -> int:
        return self.size

    def null(self) -> Cond:
        """The null conditions that guidance compares with."""
        return self if self.label is None else Cond(self.size, torch.full_like(self.label, NULL_LABEL))

    def drop(self, mask: Tensor) -> Cond:
        """The same conditions with the rows where `mask` ([B] bool) is true replaced by the null
        condition."""
        if self.label is None:
            return self
        return Cond(self.size, torch.where(mask, NULL_LABEL, self.label))

    def cat(self, other: Cond) -> Cond:
        """Rows of `self`, then rows of `other`."""
        if (self.label is None) != (other.label is None):
            raise ValueError("cannot join labelled with unlabelled conditions")
        if self.label is None or other.label is None:
            return Cond(self.size + other.size)
        return Cond(self.size + other.size, torch.cat([self.label, other.label]))

    def to(self, device: torch.device | str) -> Cond:
        """The same conditions on `device`."""
        return self if self.label is None else Cond(self.size, self.label.to(device, non_blocking=True))
