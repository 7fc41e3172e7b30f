"""What a sample is conditioned on. Methods carry it around and never look inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.data.arguments import finite, integer, labels

NULL_LABEL = -1


@dataclass(frozen=True)
class Cond:
    """A batch of conditions: a class label a sample ([B] int64, `NULL_LABEL` = no condition), or nothing at
    all (`size` rows).

    `guidance_w` [B] float32 is another input, of nets that embed the guidance they imitate (latent consistency, guided
    distillation): w = guidance_scale - 1. The null condition keeps it."""

    size: int
    label: Tensor | None = None
    guidance_w: Tensor | None = None

    @classmethod
    def of_labels(cls, label: Tensor | Sequence[int], num_classes: int | None = None) -> Cond:
        """Conditions from class labels [B] (integers; -1 is the null condition). With `num_classes`, classes at or above it
        are refused here, and else by the net, which knows how many it has."""
        found = labels("label", label, num_classes, null=True)
        if found.ndim != 1:
            raise ValueError(
                f"label: expected integers of shape [B], found {found.dtype} {tuple(found.shape)}"
            )
        return cls(len(found), found)

    @classmethod
    def nothing(cls, size: int) -> Cond:
        """`size` unconditional samples."""
        return cls(size)

    def __post_init__(self) -> None:
        integer("size", self.size, at_least=0)
        for name, value, kinds in (
            ("label", self.label, (torch.int64,)),
            ("guidance_w", self.guidance_w, (torch.float32, torch.float64, torch.float16, torch.bfloat16)),
        ):
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dtype not in kinds or value.shape != (self.size,):
                found = (
                    f"{value.dtype} {list(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise ValueError(f"{name}: expected a tensor [{self.size}] of {kinds[0]}, found {found}")

    def __len__(self) -> int:
        return self.size

    def with_guidance(self, w: Tensor | float | None) -> Cond:
        """The same conditions with the guidance w [B] (or one number for all) as an input; None takes it away."""
        if w is not None and not isinstance(w, Tensor):
            w = finite("guidance_w", w)
            device = None if self.label is None else self.label.device
            w = torch.full((self.size,), float(w), dtype=torch.float32, device=device)
        if w is not None and w.shape != (self.size,):
            raise ValueError(f"guidance_w: expected [{self.size}] numbers, found shape {tuple(w.shape)}")
        return replace(self, guidance_w=w)

    def null(self) -> Cond:
        """The null conditions that guidance compares with."""
        return self if self.label is None else replace(self, label=torch.full_like(self.label, NULL_LABEL))

    def drop(self, mask: Tensor) -> Cond:
        """The same conditions with the rows where `mask` ([B] bool) is true replaced by the null
        condition."""
        if self.label is None:
            return self
        return replace(self, label=torch.where(mask, NULL_LABEL, self.label))

    def cat(self, other: Cond) -> Cond:
        """Rows of `self`, then rows of `other`."""
        joined: dict[str, Tensor | None] = {}
        for name, told in (("label", "labelled with unlabelled"), ("guidance_w", "guided with unguided")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"cannot join {told} conditions")
            joined[name] = None if mine is None else torch.cat([mine, theirs])
        return Cond(self.size + other.size, **joined)

    def to(self, device: torch.device | str) -> Cond:
        """The same conditions on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("label", "guidance_w")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved) if moved else self
