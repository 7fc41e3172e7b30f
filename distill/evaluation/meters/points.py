"""Points against fresh draws of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.data.points import Points
from distill.data.rng import sample_noise
from distill.evaluation.measure import RealSet
from distill.evaluation.meters.meter import Meter, Shown, at_least
from distill.evaluation.metric import values
from distill.evaluation.protocol import Protocol
from distill.evaluation.samples import Options, Samples

PROJECTIONS = 256
FULL_COUNT = 2000  # samples; below, `sliced_wasserstein` carries the count in its name
TRIED = 64  # points that a trial measures


class PointReference(RealSet):
    """The real points [M, D], and the noise [N, D] that samples were made from."""

    kind = "points"

    def __init__(self, data: Tensor, noise: Tensor, digest: str, seed: int) -> None:
        super().__init__("reference", data.double(), Options(projections=PROJECTIONS, seed=seed))
        self.start, self.digest = noise.double(), digest

    def measure(self, samples: Tensor) -> dict[str, float | None]:
        """The entries of a row that follow from its samples [N, D]."""
        made = Samples("generated", samples.double(), self.options, self, noise=self.start)
        return values(made, self.kind)

    def halves(self, splits: int) -> list[tuple[Tensor, Tensor]]:
        """The first half and the second: points are independent."""
        half = len(self) // 2
        return [(torch.arange(half), torch.arange(half, 2 * half))]

    def protocol(self, count: int, description: str, class_balanced: bool = True, **more: Any) -> Protocol:
        """As `RealSet.protocol`; there are no features."""
        return super().protocol(
            count,
            description,
            class_balanced,
            features="points",
            features_sha256=None,
            reference_digest=self.digest,
            resolution=tuple(self.values.shape[1:]),
            full_count=FULL_COUNT,
            **more,
        )


@dataclass
class PointMeter(Meter):
    """Attributes:
    data: a `data.points.Points`; as many points are drawn anew.
    paths: noises in the picture, each with its path.
    """

    kind: ClassVar[str] = "points"

    data: Any
    paths: int = 60

    def __post_init__(self) -> None:
        at_least(self, "paths")
        self.shown, self.caption = self.paths, "paths from noise to samples"

    def fingerprint(self) -> str:
        """Of the data, of which fresh ones are drawn."""
        found: str = self.data.fingerprint()
        return found

    def trial(
        self, sample_shape: Sequence[int], labels: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """Raises ValueError for data that are no points, or of another shape."""
        if not isinstance(self.data, Points):
            raise ValueError(
                f"data: found {type(self.data).__name__}, expected points (data=ring); images have eval=digits64"
            )
        if tuple(self.data.sample_shape) != tuple(sample_shape):
            raise ValueError(
                f"data: points of shape {list(self.data.sample_shape)}, but the models make {list(sample_shape)}"
            )
        few = self.data.images[:TRIED]
        reference = PointReference(few, few, "", 0)
        return reference.measure(few), reference.references(reference.floor())

    def prepare(self, seed: int, stream: str, count: int, device: torch.device) -> None:
        """Draw the fresh points, and the noise of the samples."""
        fresh = self.data.fresh(seed, f"{stream}/data")
        noise = sample_noise(seed, stream, torch.arange(count), self.data.sample_shape)
        self.real = PointReference(fresh.images.to(device), noise.to(device), fresh.fingerprint(), seed)
        self.device, self.description = device, f"{self.data.name}, drawn anew"

    def measure(
        self, samples: Tensor, labels: Tensor | None, extracted: Mapping[str, Tensor] | None = None
    ) -> dict[str, float | None]:
        """See `PointReference.measure`."""
        assert isinstance(self.real, PointReference)
        return self.real.measure(samples.to(self.device))

    def panels(self, models: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
        """Every model at its largest step count, then those that have another at their smallest."""
        counts = {label: (max(steps), min(steps)) for label, steps in models.items()}
        smallest = [(label, least) for label, (most, least) in counts.items() if least < most]
        return [(label, most) for label, (most, _) in counts.items()] + smallest

    def draw_strips(self, rows: Sequence[Tensor], path: Path) -> None:
        """Nothing: points are not images."""

    @torch.inference_mode()
    def draw(self, shown: Sequence[Shown], path: Path, seed: int, stream: str) -> None:
        """The paths of the first noises under each model."""
        from distill.evaluation.trajectories import Panel, save_trajectories  # matplotlib is slow to import

        panels = []
        for row in shown:
            assert row.generator is not None
            ids = torch.arange(len(row.samples))
            z, fresh = row.generator.noises(seed, stream, ids)
            cond = row.generator.conditions.of(ids)
            states = row.generator.generate(z, cond, row.steps, noise=fresh, return_path=True)
            panels.append(Panel(row.title, states))
        fresh_points = self.data.fresh(seed, f"{stream}/data").images
        models = len(dict.fromkeys(id(row.generator) for row in shown))
        save_trajectories(panels, fresh_points, path, columns=models)
