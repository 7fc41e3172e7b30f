"""The EvaluatePoints stage: what `Evaluate` is for images, for points whose distribution is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from torch import Tensor

from distill.data.points import Points
from distill.data.rng import sample_noise
from distill.evaluation.gates import GateResult
from distill.evaluation.measure import RealSet
from distill.evaluation.metric import values
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import columns, gate_table, legend, prose, table
from distill.evaluation.samples import Options, Samples
from distill.evaluation.trajectories import Panel, save_trajectories
from distill.models.generator import Generator
from distill.stages.base import StageContext
from distill.stages.evaluate import Evaluate
from distill.stages.trial import TRIED

PROJECTIONS = 256
FULL_COUNT = 2000  # samples; below, `sliced_wasserstein` carries the count in its name


class Reference(RealSet):
    """The real points [M, D], and the noise [N, D] that samples were made from."""

    kind = "points"

    def __init__(self, data: Tensor, noise: Tensor, name: str, digest: str, seed: int) -> None:
        super().__init__("reference", data.double(), Options(projections=PROJECTIONS, seed=seed))
        self.start, self.title, self.digest = noise.double(), name, digest

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


@dataclass(frozen=True)
class _Bench:
    reference: Reference
    description: str


@dataclass
class EvaluatePoints(Evaluate):
    """Sample and measure points against fresh draws of their data.

    The attributes are those of `Evaluate`, without `features`, `k` and `grid_columns`: points are measured as they
    are. `data` is the config of a `data.points.Points`; as many points are drawn anew.

    Attributes:
        grid: [label, steps] of the picture's panels; empty: every model at its largest step count, then at its
            smallest.
        paths: noises in the picture, each with its path.
    """

    KIND: ClassVar[str] = "points"

    features: dict[str, Any] = field(init=False, default_factory=dict)
    k: int = field(init=False, default=1)
    grid_columns: int = field(init=False, default=1)
    paths: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths < 1:
            raise ValueError(f"paths: expected at least 1, found {self.paths}")

    def fingerprint(self) -> str:
        """The data, of which fresh ones are drawn."""
        return instantiate(self.data).fingerprint()

    def _try(self, generators: Mapping[str, Generator]) -> tuple[dict[str, float | None], dict[str, float]]:
        data = instantiate(self.data)
        shape = next(iter(generators.values())).denoiser.sample_shape
        if not isinstance(data, Points):
            raise ValueError(
                f"data: found {type(data).__name__}, expected points (data=ring); images have eval=digits64"
            )
        if tuple(data.sample_shape) != tuple(shape):
            raise ValueError(
                f"data: points of shape {list(data.sample_shape)}, but the models make {list(shape)}"
            )
        few = data.images[:TRIED]
        reference = Reference(few, few, data.name, "", 0)
        return reference.measure(few), reference.references(reference.floor())

    def _bench(self, context: StageContext) -> _Bench:
        data: Points = instantiate(self.data)
        fresh = data.fresh(context.seed, f"{self.stream}/data")
        noise = sample_noise(context.seed, self.stream, torch.arange(self.count), data.sample_shape)
        reference = Reference(
            fresh.images.to(context.device),
            noise.to(context.device),
            data.name,
            fresh.fingerprint(),
            context.seed,
        )
        return _Bench(reference, f"{data.name}, drawn anew")

    def _measure(self, samples: Tensor, generator: Generator, bench: _Bench) -> dict[str, float | None]:
        return bench.reference.measure(samples)

    @torch.inference_mode()
    def _draw(
        self,
        context: StageContext,
        generators: Mapping[str, Generator],
        images: Mapping[tuple[str, int], Tensor],
    ) -> None:
        """grid.png: the paths of the first noises under each model."""
        panels = []
        for label, steps in self.grid or self._largest_and_smallest():
            generator = generators[label]
            ids = torch.arange(min(self.paths, self.count))
            z, fresh = generator.noises(context.seed, self.stream, ids)
            path = generator.generate(z, generator.conditions.of(ids), steps, noise=fresh, return_path=True)
            panels.append(Panel(f"{label}, {steps} step{'s' * (steps > 1)}", path))
        data: Points = instantiate(self.data)
        save_trajectories(
            panels,
            data.fresh(context.seed, f"{self.stream}/data").images,
            context.folder / "grid.png",
            columns=4 if self.grid else len(self.models),
        )

    def _largest_and_smallest(self) -> list[tuple[str, int]]:
        """Every model at its largest step count, then those that have another at their smallest."""
        counts = {label: (max(row.steps), min(row.steps)) for label, row in self.models.items()}
        return [(label, most) for label, (most, _) in counts.items()] + [
            (label, least) for label, (most, least) in counts.items() if least < most
        ]

    def _page(
        self,
        context: StageContext,
        rows: Sequence[Mapping[str, Any]],
        protocol: Protocol,
        real: Mapping[str, float],
        gates: Sequence[GateResult],
    ) -> str:
        parts = [
            f"# {prose(context.recipe)}",
            f"**{prose(self.note)}**" if self.note else "",
            "![paths from noise to samples](grid.png)",
            table(rows, protocol.names()),
            f"Protocol: {prose(protocol.describe())}.",
            legend(protocol, columns(rows)),
            "The real points themselves: " + ", ".join(f"{name} {v:.4g}" for name, v in real.items()) + ".",
        ]
        if gates:
            parts += ["## Gates", gate_table(gates)]
        return "\n\n".join(part for part in parts if part) + "\n"
