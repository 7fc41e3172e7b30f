"""A net whose activations are computed again in the backward pass, call by call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module):
    """The given net, shared and not copied, which keeps its inputs alone for the backward pass and runs again there, with the
    same dropout. A chain of S calls then holds the activations of one call, and S states."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any) -> Tensor:
        """What the net returns."""
        out: Tensor = checkpoint(self.net, *inputs, use_reentrant=False)
        return out
