"""Exponential moving averages of trained parameters: shard-local, one fused call, no communication."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.engine.parallel import local
from distill.engine.params import ParameterSet


def decay_at(step: int, decay: float, ramp: bool) -> float:
    """Decay used after optimizer step `step` (from 0); with `ramp`, min(decay, (1 + n) / (10 + n)) at n =
    step + 1."""
    return min(decay, (2 + step) / (11 + step)) if ramp else decay


class EmaUpdater:
    """Updates an average from the parameters that it follows. Tensors are looked up once, so make it after sharding, which
    replaces parameters. Buffers are looked up in each update, as a net may replace them."""

    def __init__(self, average: ParameterSet, followed: ParameterSet) -> None:
        self.kept: list[Tensor] = list(average.parameters())
        self.current: list[Tensor] = list(followed.parameters())
        if len(self.kept) != len(self.current):
            raise ValueError(
                f"average: found {len(self.kept)} parameters, the network that it follows has {len(self.current)}"
            )
        places = [
            (local(kept), local(current)) for kept, current in zip(self.kept, self.current, strict=True)
        ]
        if any(a.numel() and a.data_ptr() == b.data_ptr() for a, b in places):
            raise ValueError(
                "average: lies on the memory of the network that it follows: `prepare` was called with sharded=True, but the "
                "networks were not sharded; expected sharded=False"
            )
        pairs = zip(average.buffers(), followed.buffers(), strict=True)
        self.buffers = [(kept, current, name) for (_, kept, name), (_, current, _) in pairs]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * network for parameters; buffers are copied."""
        torch._foreach_lerp_(self.kept, self.current, 1.0 - decay)
        for kept, current, name in self.buffers:
            getattr(kept, name).copy_(getattr(current, name))


def halflife_decay(
    images_before: float, batch: int, halflife_images: float, ramp: float | None = 0.05
) -> float:
    """Decay of one update of `batch` images whose average forgets half in `halflife_images` (EDM, arXiv 2206.00364, F.5).

    0.5^(batch / h) with h = min(halflife_images, ramp * images_before): while training is short the half-life is the
    fraction `ramp` of it (None: no ramp-up). `images_before` counts the images seen BEFORE the update, so that the first
    gives 0, a plain copy. A half-life of 0 keeps no average. Unlike a fixed decay it means the same for every batch size.
    """
    if images_before < 0 or batch < 1 or halflife_images < 0 or (ramp is not None and ramp <= 0):
        raise ValueError(
            f"images_before, batch, halflife_images, ramp: found {images_before}, {batch}, {halflife_images}, {ramp}; "
            "expected at least 0, at least 1, at least 0, above 0 or None"
        )
    halflife = halflife_images if ramp is None else min(halflife_images, ramp * images_before)
    return 0.5 ** (batch / halflife) if halflife > 0 else 0.0
