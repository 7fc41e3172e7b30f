"""Samples of prompts beside each other, where there is no real set to compare them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import RealSet
from distill.evaluation.meters.meter import Meter, Shown, at_least
from distill.evaluation.protocol import NO_FEATURES, Protocol

PICTURE_WIDTH = 1200  # pixels
QUOTED = 60  # characters of a prompt in the caption


class NoImages(RealSet):
    """In place of a real set: rows hold what follows from how samples are made, such as the distance to the teacher's."""

    kind = "prompts"

    def __init__(self) -> None:
        super().__init__("reference", torch.zeros(0, 1))
        self.resolution: tuple[int, ...] = ()

    def floor(self, splits: int = 5) -> dict[str, float]:
        """None."""
        return {}

    def references(self, floor: Mapping[str, float] | None = None) -> dict[str, float]:
        """None."""
        return {}

    def protocol(self, count: int, description: str, class_balanced: bool = True, **more: Any) -> Protocol:
        """As `RealSet.protocol`; prompts have no classes, and there are no features."""
        return super().protocol(
            count,
            description,
            class_balanced=False,
            features=NO_FEATURES,
            features_sha256=None,
            reference_digest="",
            resolution=self.resolution,
            **more,
        )


@dataclass
class PromptMeter(Meter):
    """A picture with a prompt a column, and the distance of students to their teacher; no metric needs real images.

    Attributes:
        columns: prompts in the picture.
    """

    kind: ClassVar[str] = "prompts"
    columns: int = 6

    def __post_init__(self) -> None:
        at_least(self, "columns")
        self.least, self.latents = 1, True
        self.shown, self.caption = self.columns, "a prompt a column"
        self.real = NoImages()

    def fingerprint(self) -> str:
        """Nothing is read."""
        return ""

    def trial(
        self, sample_shape: Sequence[int], labels: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """No metric of samples is measured."""
        return {}, {}

    def prepare(self, seed: int, stream: str, count: int, device: torch.device) -> None:
        """There is nothing to prepare."""
        self.description = "no real images"

    def measure(self, samples: Tensor, labels: Tensor | None) -> dict[str, float | None]:
        """None; `teacher_mse` compares with the teacher's samples."""
        assert isinstance(self.real, NoImages)
        self.real.resolution = tuple(samples.shape[1:])
        return {}

    def draw(self, shown: Sequence[Shown], path: Path, seed: int, stream: str) -> None:
        """A labelled row of images each; the caption lists the prompts."""
        columns = max(1, min(self.columns, PICTURE_WIDTH // shown[0].samples.shape[-1]))
        save_png(image_grid([(row.title, row.samples[:columns]) for row in shown]), path)
        generator = shown[0].generator
        table = None if generator is None else getattr(generator.conditions, "table", None)
        if table is not None:
            quoted = [
                f"{number + 1}. {table.prompts[number % len(table.prompts)][:QUOTED]}"
                for number in range(columns)
            ]
            self.caption = "columns: " + "; ".join(quoted)
