"""Features from the middle of a denoiser's net, for discriminators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.denoiser import Denoiser


class BottleneckFeatures:
    """Runs a denoiser and returns the output of its net's bottleneck; gradients flow to the input and to the weights.

    A net names its bottleneck in an attribute `bottleneck` (UNet: the last block of the middle; MLP: its last layer), and may
    have a method `feature_map(output, x_t)` that makes features of the output of that module. The
    forward call is the whole net's, and the features are what it returns: sharding gathers a net's weights for a backward
    that comes in through its output, and through nothing else.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        named = [
            module
            for module in denoiser.net.modules()
            if isinstance(getattr(module, "bottleneck", None), str)
        ]
        if not named:
            raise ValueError(
                f"gan: the net {type(denoiser.net).__name__} has no attribute `bottleneck`, the name of the module whose "
                "output the discriminator reads"
            )
        self.denoiser, self.module = denoiser, named[0].get_submodule(str(named[0].bottleneck))
        self.feature_map = getattr(named[0], "feature_map", None)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Features [B, channels, ...] at (x_t [B,*S], t [B])."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
            kept.append(out if self.feature_map is None else self.feature_map(out, x_t))

        def instead(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            return kept.pop()

        handles = [
            self.module.register_forward_hook(keep),
            self.denoiser.net.register_forward_hook(instead, prepend=True),  # before that of sharding
        ]
        try:
            features: Tensor = self.denoiser(x_t, t, cond)
        finally:
            for handle in handles:
                handle.remove()
        return features

    @torch.no_grad()
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample's features."""
        device = next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))
        x = torch.zeros(1, *self.denoiser.sample_shape, device=device)
        cond = self.denoiser.conditions.of(torch.zeros(1, dtype=torch.int64)).to(device)
        t = torch.full((1,), self.denoiser.process.t_max, dtype=torch.float64, device=device)
        return tuple(self(x, t, cond).shape[1:])
