"""The base of nets that model files can name."""

from __future__ import annotations

from torch import nn

from distill.typed import Configured


class Net(Configured, nn.Module):
    """A module that keeps its constructor's arguments: `config()` is what `models.build` makes it from."""
