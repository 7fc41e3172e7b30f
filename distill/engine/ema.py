"""Exponential moving averages of weights: shard-local, one fused call, no communication."""

from __future__ import annotations

import copy

import torch
from torch import nn


def shadow(network: nn.Module) -> nn.Module:
    """A frozen copy in eval mode to hold the average; make it before the network is sharded."""
    return copy.deepcopy(network).requires_grad_(False).eval()


def decay_at(step: int, decay: float, ramp: bool) -> float:
    """Decay used after optimizer step `step` (from 0); with `ramp`, min(decay, (1 + n) / (10 + n)) at n =
    step + 1."""
    return min(decay, (2 + step) / (11 + step)) if ramp else decay


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * network for parameters; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], 1.0 - decay)
    for kept, current in zip(average.buffers(), network.buffers(), strict=True):
        kept.copy_(current)
