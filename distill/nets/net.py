"""The base of nets that model files can name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from distill.typed import Configured


@dataclass(frozen=True)
class Origin:
    """The model folder that weights were loaded from, and the sha256 of its weights file."""

    folder: Path
    sha256: str


class Net(Configured, nn.Module):
    """A module that keeps its constructor's arguments: `config()` is what `models.build` makes it from.

    Attributes:
        origin: where its weights (of an adapted net, its base's) were loaded from; None for others.
        mapped: the file that its weights lie in, see `models.mapped`; None for weights in memory.
    """

    origin: Origin | None = None
    mapped: Path | None = None
