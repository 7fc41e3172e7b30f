"""The EvaluatePoints stage: what `Evaluate` is for images, for points whose distribution is known exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from torch import Tensor

from distill.data.cond import Cond
from distill.data.points import Points
from distill.data.rng import sample_noise
from distill.evaluation.gates import GateResult
from distill.evaluation.metrics.energy import energy_distance, spread
from distill.evaluation.metrics.sliced import quantile_distance, sorted_projections
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import gate_table, prose, table
from distill.evaluation.trajectories import Panel, save_trajectories
from distill.models.generator import Generator
from distill.samplers.straightness import straightness
from distill.stages.base import StageContext
from distill.stages.evaluate import METRICS, Evaluate

PROJECTIONS = 256
FULL_COUNT = 2000  # samples; below, `sliced_wasserstein` carries the count in its name
LEGEND = (
    "`energy`: energy distance to fresh data, unbiased, so a perfect model scores about 0 and may score below. "
    "`sliced_wasserstein`: sliced Wasserstein distance to them. `transport`: mean squared distance from noise to sample, "
    "summed over coordinates; reflow must not raise it. `straightness`: S, the mean squared difference between "
    "velocity and displacement along Euler's path, 0 for straight paths; `S / transport` is free of scale. "
    "`one-step gap`: mean squared distance between one Euler step and as many as straightness is measured with. "
    "`teacher mse`: mean squared difference of a coordinate from the followed model's sample of the same noise. "
    "`nfe`: network calls. `images/s`: samples a second, which depends on the machine and its load."
)


class Reference:
    """The real points [M, D] and what is computed of them once; the noise [N, D] that samples were made from."""

    def __init__(self, data: Tensor, noise: Tensor, name: str, digest: str, seed: int) -> None:
        self.data, self.noise, self.name, self.digest, self.seed = data, noise, name, digest, seed
        self.spread = spread(data)
        self.sorted = sorted_projections(data, PROJECTIONS, seed)

    def measure(self, samples: Tensor) -> dict[str, float | None]:
        """The entries of a row that follow from its samples [N, D]."""
        projected = sorted_projections(samples, PROJECTIONS, self.seed)
        moved = (samples.double() - self.noise.double()).square().sum(1)
        return {
            "energy": energy_distance(samples, self.data, spread_of_y=self.spread),
            "sliced_wasserstein": quantile_distance(projected, self.sorted),
            "transport_cost": float(moved.mean()),
        }

    def floor(self) -> dict[str, float]:
        """What one half of the real points scores against the other."""
        half = len(self.data) // 2
        a, b = self.data[:half], self.data[half : 2 * half]
        distance = quantile_distance(
            sorted_projections(a, PROJECTIONS, self.seed), sorted_projections(b, PROJECTIONS, self.seed)
        )
        return {"energy": energy_distance(a, b), "sliced_wasserstein": distance, "half": float(half)}

    def references(self, floor: Mapping[str, float]) -> dict[str, float]:
        """Values that gates may name: `floor_<metric>`."""
        return {f"floor_{name}": value for name, value in floor.items()}

    def protocol(
        self,
        count: int,
        description: str,
        class_balanced: bool,
        straightness_steps: int | None,
        floor: Mapping[str, float],
    ) -> Protocol:
        """The protocol of rows of `count` samples against these points; there are no features."""
        return Protocol(
            features="points",
            features_sha256=None,
            count=count,
            class_balanced=class_balanced,
            reference=description,
            reference_count=len(self.data),
            reference_digest=self.digest,
            resolution=tuple(self.data.shape[1:]),
            projections=PROJECTIONS,
            seed=self.seed,
            straightness_steps=straightness_steps,
            floor=floor,
            full_count=FULL_COUNT,
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

    MEASURED: ClassVar[tuple[str, ...]] = (
        *METRICS,
        "energy",
        "transport_cost",
        "straightness_norm",
        "one_step_gap",
    )

    OF_A_FLOW: ClassVar[tuple[str, ...]] = ("straightness", "straightness_norm", "one_step_gap")

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
        row: dict[str, float | None] = dict.fromkeys(METRICS)
        row |= {"energy": 1.0, "sliced_wasserstein": 1.0, "transport_cost": 1.0}
        return row, {"floor_energy": 1.0, "floor_sliced_wasserstein": 1.0, "floor_half": 1.0}

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
        return {name: None for name in METRICS if name not in _ROW} | bench.reference.measure(samples)

    def _flow(self, generator: Generator, context: StageContext) -> dict[str, float | None]:
        found = self._rollout(generator, context)
        if found is None:
            return dict.fromkeys(self.OF_A_FLOW)
        path, velocities = found
        one_step = path[0] - velocities[0]  # from t = 1 to t = 0 at once
        gap = (one_step - path[-1]).square().sum(1).mean()
        values = (*straightness(path, velocities), gap)
        return {name: float(value) for name, value in zip(self.OF_A_FLOW, values, strict=True)}

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
            labels = generator.labels(len(ids))
            cond = Cond.nothing(len(ids)) if labels is None else Cond.of_labels(labels)
            path = generator.generate(z, cond, steps, noise=fresh, return_path=True)
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
            LEGEND,
            "The real points themselves: " + ", ".join(f"{name} {v:.4g}" for name, v in real.items()) + ".",
        ]
        if gates:
            parts += ["## Gates", gate_table(gates)]
        return "\n\n".join(part for part in parts if part) + "\n"


# What `Evaluate` fills in for images and points alike.
_ROW = ("nfe", "teacher_mse", "straightness", "images_per_second", "train_seconds", "peak_memory_bytes")
