"""What an evaluation measures with: a real set, the metrics of its kind, and the picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import RealSet
from distill.models.generator import Generator
from distill.world import World

STRIP = 160  # pixels


@dataclass(frozen=True)
class Shown:
    """A row or panel of the picture: `samples` under `title`, and the model and step count that made them, where known."""

    title: str
    samples: Tensor
    generator: Generator | None = None
    steps: int = 0


class Meter(ABC):
    """Measures sets of samples against one real set. A meter's constructor is its config schema.

    Errors of `trial` and of the constructor begin with the option: "data: ...", "features: ..."."""

    kind: ClassVar[str]  # whose metrics rows hold: "images" or "points"
    caption: str  # of the picture
    least: int = 3  # samples that a set needs
    latents: bool = False  # whether rows compare samples before decoding
    clip_score: Callable[[Tensor, Generator], float] | None = None  # of samples of a model's prompts
    shown: int  # samples of a row in the picture
    real: RealSet  # after `prepare`
    description: str  # the real set in words, after `prepare`

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the real set and the features."""

    @abstractmethod
    def trial(
        self, sample_shape: Sequence[int], labels: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """(a row, values of the real set) of a small measurement of samples `sample_shape` with `labels` [N]: what is None or
        missing there will be so in the evaluation. The numbers mean nothing. Raises ValueError for samples that the meter
        cannot measure."""

    @abstractmethod
    def prepare(self, seed: int, stream: str, count: int, device: torch.device) -> None:
        """Build `real`, for rows of `count` samples of the noise (seed, stream)."""

    def extract(self, samples: Tensor, device: torch.device) -> dict[str, Tensor]:
        """What `measure` computes of samples [n, *S] one by one, such as features, on `device`; nothing by default. Does not
        need `prepare`."""
        return {}

    def extracted(self, parts: Mapping[int, Tensor], device: torch.device, world: World) -> dict[str, Tensor]:
        """`extract` of the samples of all processes, on the CPU of the main one; each extracts of those that it made, which
        `parts` holds by their place. Collective."""
        places, found = sorted(parts), dict[str, Tensor]()
        if parts:
            found = self.extract(torch.cat([parts[place] for place in places]), device)
        sizes = [len(parts[place]) for place in places]
        own = {
            (name, place): part.cpu().clone()  # of a view, the whole tensor would be sent
            for name, rows in found.items()
            for place, part in zip(places, rows.split(sizes), strict=True)
        }
        merged = {key: rows for each in world.gather(own) or [] for key, rows in each.items()}
        names = dict.fromkeys(name for name, _ in merged)
        return {name: torch.cat([merged[key] for key in sorted(merged) if key[0] == name]) for name in names}

    @abstractmethod
    def measure(
        self, samples: Tensor, labels: Tensor | None, extracted: Mapping[str, Tensor] | None = None
    ) -> dict[str, float | None]:
        """The entries of a row that follow from its samples [N, *S] with labels [N]. `extracted`: of them, if it is known."""

    def panels(self, models: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
        """Rows of the picture where the recipe names none; models: label -> step counts."""
        return []

    @abstractmethod
    def draw(self, shown: Sequence[Shown], path: Path, seed: int, stream: str) -> None:
        """Write the picture; seed and stream: of the samples' noise."""

    def draw_strips(self, rows: Sequence[Tensor], path: Path) -> None:
        """Write a picture of samples [n, C, H, W] of every row, one below the other, without words and at most `STRIP` pixels
        high each; a meter of other samples than images writes none."""
        small = [
            row
            if row.shape[-2] <= STRIP
            else F.interpolate(row, scale_factor=STRIP / row.shape[-2], mode="bilinear", antialias=True)
            for row in rows
        ]
        save_png(image_grid([("", row) for row in small]), path)


def at_least(meter: Any, *names: str) -> None:
    """Raise ValueError for an option below 1."""
    for name in names:
        if getattr(meter, name) < 1:
            raise ValueError(f"{name}: found {getattr(meter, name)}, expected at least 1")
