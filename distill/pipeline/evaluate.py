"""The Evaluate stage: every model at every step count from the same noise, in one table (contract
*metrics.json*)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from distill.data.cond import Cond
from distill.data.rng import sample_noise
from distill.evaluation.gates import Gate, GateResult, check
from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import Reference, measure
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import report
from distill.files import write_json, write_text
from distill.models.features import FeatureExtractor
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.pipeline.stage import Room, Stage, read_artifact
from distill.pipeline.stages import Load, Train, use_threads
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness

SCHEMA = 1


@dataclass
class Evaluate(Stage):
    """Sample and measure.

    Attributes:
        models: row label -> {stage, steps: [..], follows_teacher: bool}; `follows_teacher` says that the
            model is meant to reproduce the trajectories of `follows`, so that `teacher_mse` has a meaning.
        follows: [label, steps] of the row that `teacher_mse` compares with.
        data: config of the real data that samples are compared with.
        features: config of the feature extractor.
        count: samples a row; labels go round the classes. batch_size: samples a network call.
        straightness: {steps, count} of the Euler run that measures flows, or None.
        grid: [label, steps] of the picture's rows; grid_columns: noises in it.
        gates: see `evaluation.gates.Gate`.
    """

    models: dict[str, dict[str, Any]]
    data: dict[str, Any]
    features: dict[str, Any]
    follows: tuple[str, int] | None = None
    count: int = 2000
    batch_size: int = 500
    k: int = 5
    straightness: dict[str, int] | None = None
    grid: list[tuple[str, int]] = field(default_factory=list)
    grid_columns: int = 10
    gates: list[dict[str, Any]] = field(default_factory=list)
    stream: str = "evaluate"

    def __post_init__(self) -> None:
        if self.count < self.k + 2:
            raise ValueError(f"count: expected at least k + 2 = {self.k + 2} samples, found {self.count}")
        rows = {(label, steps) for label, model in self.models.items() for steps in model["steps"]}
        named = [tuple(row) for row in self.grid] + ([tuple(self.follows)] if self.follows else [])
        if missing := [row for row in named if row not in rows]:
            raise ValueError(f"grid, follows: name {missing}, found only the rows {sorted(rows)}")
        if self.follows is not None:
            self.follows = (str(self.follows[0]), int(self.follows[1]))
        self._gates = [Gate(**gate) for gate in self.gates]

    def inputs(self) -> dict[str, str]:
        """Every evaluated model is an input, by its label."""
        return {label: model["stage"] for label, model in self.models.items()}

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Models come from stages that make models."""
        super().check(stages)
        for label, name in self.inputs().items():
            if not isinstance(stages[name], Train | Load):
                raise ValueError(f"models.{label}.stage: {name!r} makes no model")

    def fingerprint(self) -> str:
        """The real data."""
        return instantiate(self.data).fingerprint()

    def run(self, room: Room) -> dict[str, Any]:
        """Write metrics.json, report.md and grid.png, here and at the top of the run."""
        device = room.settings.device
        extractor: FeatureExtractor = instantiate(self.features, device=str(device))
        data = instantiate(self.data)
        reference = Reference(data.images.to(device), data.labels, extractor, k=self.k, seed=room.seed)
        floor = reference.floor()
        generators = {label: load_model(room.inputs[label], device=device) for label in self.models}
        threads = use_threads(room, max(_parameters(g) for g in generators.values()))
        jobs = [(label, steps) for label, model in self.models.items() for steps in model["steps"]]
        rows: list[dict[str, Any]] = []
        images: dict[tuple[str, int], Tensor] = {}
        with room.display.bar(len(jobs), unit="row") as bar:
            straight = {label: self._straightness(g, room) for label, g in generators.items()}
            for label, steps in sorted(jobs, key=lambda job: job != self.follows):
                bar.set_postfix_str(f"{label} in {steps}", refresh=True)
                samples, labels, seconds = self._sample(generators[label], steps, room)
                images[label, steps] = samples
                row = self._row(label, steps, seconds, generators[label], room) | {
                    "straightness": straight[label]
                }
                row |= measure(samples.to(device), labels, reference, extractor)
                if self.follows is not None and self.models[label].get("follows_teacher", False):
                    row["teacher_mse"] = float((samples - images[self.follows]).double().square().mean())
                rows.append(row)
                bar.update()
        rows.sort(key=lambda row: jobs.index((row["model"], row["steps"])))
        protocol = reference.protocol(
            self.count,
            f"{data.name}, all images",
            class_balanced=generators[jobs[0][0]].num_classes > 0,
            straightness_steps=(self.straightness or {}).get("steps"),
            floor=floor,
        )
        real = reference.references(floor)
        gates = check(self._gates, rows, real)
        self._write(room, rows, protocol, real, gates, images)
        for gate in gates:
            if not gate.passed:
                room.display.line(f"gate {gate.describe()}")
        return {
            "rows": len(rows),
            "gates_passed": sum(g.passed for g in gates),
            "gates": len(gates),
            "threads": threads,
        }

    @torch.inference_mode()
    def _sample(self, generator: Generator, steps: int, room: Room) -> tuple[Tensor, Tensor | None, float]:
        """(images clamped to [-1, 1] on the CPU, labels, seconds) of the samples 0 .. count - 1."""
        labels = generator.labels(self.count)
        start = time.perf_counter()
        images = generator.sample(
            self.count, labels, seed=room.seed, stream=self.stream, steps=steps, batch_size=self.batch_size
        )
        return images, labels, time.perf_counter() - start

    @torch.inference_mode()
    def _straightness(self, generator: Generator, room: Room) -> float | None:
        """S of a flow over `straightness.steps` Euler steps; None where a model has no ODE."""
        model = generator.denoiser
        if (
            self.straightness is None
            or model.coupling == "endpoint"
            or model.process.config()["_target_"].rpartition(".")[2] != "Flow"
        ):
            return None
        ids = torch.arange(min(self.straightness["count"], self.count))
        z = sample_noise(room.seed, self.stream, ids, model.sample_shape).to(generator.device)
        labels = generator.labels(len(ids))
        cond = (Cond.nothing(len(ids)) if labels is None else Cond.of_labels(labels)).to(generator.device)
        grid = torch.linspace(1.0, 0.0, self.straightness["steps"] + 1, dtype=torch.float64, device=z.device)
        path, velocities = rollout(lambda x, t: model.velocity(x, t, cond), z, grid)
        return float(straightness(path, velocities)[0])

    def _row(
        self, label: str, steps: int, seconds: float, generator: Generator, room: Room
    ) -> dict[str, Any]:
        """The entries of a row that do not come from its images."""
        record = read_artifact(room.inputs[label])
        facts = record["facts"] if record is not None else {}
        guidance, calls = generator.spec.guidance_scale, {"heun": 2}.get(generator.spec.solver, 1)
        return {
            "model": label,
            "steps": steps,
            "nfe": steps * calls * (1 if guidance == 1 else 2),
            "guidance_scale": guidance,
            "teacher_mse": None,
            "straightness": None,
            "images_per_second": self.count / seconds,
            "train_seconds": facts.get("train_seconds"),
            "peak_memory_bytes": facts.get("peak_memory_bytes"),
        }

    def _write(
        self,
        room: Room,
        rows: Sequence[Mapping[str, Any]],
        protocol: Protocol,
        real: Mapping[str, float],
        gates: Sequence[GateResult],
        images: Mapping[tuple[str, int], Tensor],
    ) -> None:
        """The three files, then their copies at the top of the run."""
        metrics = {
            "schema": SCHEMA,
            "recipe": room.recipe,
            "digest": room.digest,
            "seed": room.seed,
            "protocol": protocol.to_dict(),
            "real": dict(real),
            "rows": list(rows),
            "gates": [
                {
                    "name": g.name,
                    "value": g.value,
                    "relation": g.relation,
                    "bound": g.bound,
                    "passed": g.passed,
                }
                for g in gates
            ],
        }
        for folder in (room.folder, room.run_folder):
            if self.grid:
                picture = [
                    (f"{label}, {steps} step{'s' * (steps > 1)}", images[label, steps][: self.grid_columns])
                    for label, steps in self.grid
                ]
                save_png(image_grid(picture), folder / "grid.png")
            write_json(folder / "metrics.json", metrics)
            write_text(
                folder / "report.md", report(room.recipe, rows, protocol, real, gates, grid=bool(self.grid))
            )


def _parameters(generator: Generator) -> int:
    return sum(p.numel() for p in generator.denoiser.parameters())
