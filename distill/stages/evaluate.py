"""The Evaluate stage: every model at every step count from the same noise, in one table (contract
*metrics.json*)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from torch import Tensor

from distill.evaluation.gates import Gate, GateError, GateResult, check
from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import Reference, measure
from distill.evaluation.metric import metrics
from distill.evaluation.paths import euler_paths, has_paths
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import report
from distill.evaluation.rows import Row, Straightness, check_follows, check_row, unknown_metric
from distill.evaluation.samples import Sampled
from distill.files import copy, write_json, write_text
from distill.models.features import FeatureExtractor
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.names import check_name
from distill.stages.artifact import read_artifact
from distill.stages.base import ModelStage, Stage, StageContext, check_which
from distill.stages.made import Made
from distill.stages.monitor import model_folder
from distill.stages.ownership import PUBLISHED, patterns
from distill.stages.threads import use_threads
from distill.stages.trial import try_images
from distill.typed import settle

SCHEMA = 1


@dataclass(frozen=True)
class _Bench:
    extractor: FeatureExtractor
    reference: Reference
    description: str


@dataclass
class Evaluate(Stage):
    """Sample and measure.

    Attributes:
        models: row label -> the model and how it is sampled, see `evaluation.rows.Row`.
        follows: [label, steps] of the row that `teacher_mse` compares with.
        data: config of the real data that samples are compared with.
        features: config of the feature extractor.
        count: samples a row; labels go round the classes. batch_size: samples a network call.
        straightness: {steps, count} of the Euler run that measures flows, or None.
        grid: [label, steps] of the picture's rows; grid_columns: noises in it.
        k: neighbours of precision, recall, density and coverage.
        gates: see `evaluation.gates.Gate`.
        note: a sentence that stands above the numbers.
        seed: of the samples' noise, so that runs of several seeds are measured alike; None: the run's.
    """

    FILES: ClassVar[tuple[str, ...]] = patterns(*PUBLISHED)
    NEEDED: ClassVar[tuple[str, ...]] = ("metrics.json", "report.md")
    KIND: ClassVar[str] = "images"  # whose metrics rows hold

    models: dict[str, Row]
    data: dict[str, Any]
    features: dict[str, Any]
    follows: tuple[str, int] | None = None
    count: int = 2000
    batch_size: int = 500
    k: int = 5
    straightness: Straightness | None = None
    grid: list[tuple[str, int]] = field(default_factory=list)
    grid_columns: int = 10
    gates: list[Gate] = field(default_factory=list)
    stream: str = "evaluate"
    note: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        settle(self)
        self._run_seed: int | None = None  # set by `run`: the samples' seed may be another
        for name in ("k", "batch_size", "grid_columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if self.count < self.k + 2:
            raise ValueError(f"count: expected at least k + 2 = {self.k + 2} samples, found {self.count}")
        for label in self.models:
            check_name(label, "models: row label", reserved=PUBLISHED)
        rows = [(label, steps) for label, row in self.models.items() for steps in row.steps]
        for place, named in [
            ("follows", self.follows),
            *((f"grid[{i}]", row) for i, row in enumerate(self.grid)),
        ]:
            check_row(place, named, rows)
        for i, gate in enumerate(self.gates):
            for key in ("row", "times", "plus"):
                check_row(f"gates[{i}].{key}", getattr(gate, key), rows)
            if gate.metric not in (names := [known.name for known in metrics(self.KIND)]):
                raise ValueError(unknown_metric(f"gates[{i}].metric", gate.metric, names))

    def inputs(self) -> dict[str, str]:
        """Every evaluated model is an input, by its label."""
        return {label: row.stage for label, row in self.models.items()}

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Models come from stages that make models."""
        super().check(stages)
        for label, row in self.models.items():
            if not isinstance(stages[row.stage], ModelStage):
                raise ValueError(f"models.{label}.stage: {row.stage!r} makes no model")
            check_which(row.which, row.stage, stages)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The models take the step counts and the guidance of their rows, samples fit the data and the features, and
        every gate can be evaluated."""
        generators: dict[str, Generator] = {}
        for label, row in self.models.items():
            made = before[row.stage].model
            assert made is not None
            try:
                generators[label] = row.sampled(made.generator)
            except ValueError as error:
                raise ValueError(f"models.{label}.{error}") from error
        check_follows(generators, self.models, self.follows)
        shapes = {label: generator.denoiser.sample_shape for label, generator in generators.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"models: make samples of different shapes, which no table compares: {shapes}")
        if not generators:
            raise ValueError("models: found none, expected {label: {stage, steps}}")
        values, real = self._try(generators)
        rows = [
            {"model": label, "steps": steps} | values | self._defined(label, steps, generator, before)
            for label, generator in generators.items()
            for steps in self.models[label].steps
        ]
        try:
            check(self.gates, rows, real)
        except GateError as error:
            raise ValueError(
                f"gates: {error}: this model, data or feature space does not define it; leave the gate out, or "
                "eval.gates=[] for none"
            ) from error
        return Made()

    def _try(self, generators: Mapping[str, Generator]) -> tuple[dict[str, float | None], dict[str, float]]:
        """(a row, values of the real set) of a trial measurement: what is None there will be None."""
        generator = next(iter(generators.values()))
        return try_images(
            self.data,
            self.features,
            generator.denoiser.sample_shape,
            labels_of(generator, self.count),
            self.k,
        )

    def _defined(
        self, label: str, steps: int, generator: Generator, before: Mapping[str, Made]
    ) -> dict[str, float | None]:
        """The entries of a row that do not come from its samples, of a trial: None where they will be None."""
        row, nothing = self.models[label], torch.zeros(1, 1)
        path = (torch.zeros(3, 1, 1), torch.zeros(2, 1, 1))
        sampled = Sampled(
            generator,
            steps,
            count=1,
            seconds=1.0,
            samples=nothing,
            followed=nothing if self.follows is not None and row.follows_teacher else None,
            path=path if self.straightness is not None and has_paths(generator) else None,
            facts=dict.fromkeys(("train_seconds", "peak_memory_bytes"), 1.0)
            if before[row.stage].trained
            else {},
        )
        return self._rows(sampled)

    def _rows(self, sampled: Sampled) -> dict[str, float | None]:
        """The entries of a row that follow from how it was sampled."""
        return {known.name: known.measure(sampled) for known in metrics(self.KIND) if known.rows}

    def fingerprint(self) -> str:
        """The real data and the feature extractor."""
        features = instantiate(self.features)
        return f"{instantiate(self.data).fingerprint()} {features.name} {features.sha256}"

    def publish(self, context: StageContext) -> None:
        """Copies of the three files at the top of the run."""
        for name in PUBLISHED:
            source = context.folder / name
            if source.is_file():
                copy(source, context.run_folder / name)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write metrics.json, report.md and grid.png, here and at the top of the run. All processes sample; the
        main one measures."""
        self._run_seed = context.seed
        if self.seed is not None:
            context = replace(context, seed=self.seed)
        generators = self._generators(context)
        check_follows(generators, self.models, self.follows)
        threads = use_threads(context, max(_parameters(g) for g in generators.values()))
        jobs = [(label, steps) for label, row in self.models.items() for steps in row.steps]
        bench = self._bench(context) if context.world.main else None
        paths = {
            label: None if bench is None else self._rollout(generator, context)
            for label, generator in generators.items()
        }
        rows: list[dict[str, Any]] = []
        images: dict[tuple[str, int], Tensor] = {}
        with context.display.bar(len(jobs), unit="row") as bar, warnings.catch_warnings(record=True) as told:
            for label, steps in sorted(jobs, key=lambda job: job != self.follows):
                bar.set_postfix_str(f"{label} in {steps}", refresh=True)
                generator = generators[label]
                samples, seconds = self._sample(generator, steps, context)
                if bench is not None and samples is not None:
                    # Whole only where later rows are compared with it; else what the picture shows.
                    images[label, steps] = (
                        samples if (label, steps) == self.follows else samples[: self.grid_columns]
                    )
                    rows.append(
                        {"model": label, "steps": steps}
                        | dict.fromkeys(known.name for known in metrics("images"))
                        | self._rows(
                            Sampled(
                                generator,
                                steps,
                                self.count,
                                seconds,
                                samples,
                                followed=images[self.follows]
                                if self.follows is not None and self.models[label].follows_teacher
                                else None,
                                path=paths[label],
                                facts=(read_artifact(context.inputs[label]) or {"facts": {}})["facts"],
                            )
                        )
                        | self._measure(samples.to(context.device), generator, bench)
                    )
                bar.update()
        for text in sorted({str(warning.message) for warning in told}):
            context.display.line(text)
        if bench is None:
            return {}
        rows.sort(key=lambda row: jobs.index((row["model"], row["steps"])))
        self._draw(context, generators, images)
        passed = self._publish(context, rows, bench, self._balanced(generators))
        return {"rows": len(rows), "gates_passed": passed, "gates": len(self.gates), "threads": threads}

    def _generators(self, context: StageContext) -> dict[str, Generator]:
        """The evaluated models by label."""
        return {
            label: row.sampled(
                load_model(model_folder(context.inputs[label], row.which), device=context.device)
            )
            for label, row in self.models.items()
        }

    def _balanced(self, generators: Mapping[str, Generator]) -> bool:
        """Whether every class has equally many samples."""
        period = next(iter(generators.values())).conditions.period
        return period > 0 and self.count % period == 0

    def _bench(self, context: StageContext) -> Any:
        """What samples are measured with; its `reference` knows the real set's floor, values and protocol."""
        extractor: FeatureExtractor = instantiate(self.features, device=str(context.device))
        data = instantiate(self.data)
        images = data.images.to(context.device)
        names = getattr(data, "classes", None)
        reference = Reference(images, data.labels, extractor, k=self.k, seed=context.seed, classes=names)
        return _Bench(extractor, reference, f"{data.name}, all images")

    def _measure(self, samples: Tensor, generator: Generator, bench: Any) -> dict[str, float | None]:
        """The entries of a row that follow from its samples."""
        return measure(samples, labels_of(generator, self.count), bench.reference, bench.extractor)

    def _publish(
        self,
        context: StageContext,
        rows: Sequence[Mapping[str, Any]],
        bench: Any,
        balanced: bool,
    ) -> int:
        """Check the gates, write the files, tell of missed gates; returns how many passed."""
        floor = bench.reference.floor()
        protocol = bench.reference.protocol(
            self.count,
            bench.description,
            class_balanced=balanced,
            straightness_steps=None if self.straightness is None else self.straightness.steps,
            floor=floor,
        )
        real = bench.reference.references(floor)
        gates = check(self.gates, rows, real)
        self._write(context, rows, protocol, real, gates)
        for gate in gates:
            if not gate.passed:
                context.display.line(f"gate {gate.describe()}")
        return sum(gate.passed for gate in gates)

    def _sample(self, generator: Generator, steps: int, context: StageContext) -> tuple[Tensor | None, float]:
        """(images clamped to [-1, 1] on the CPU of the main process, seconds) of the samples 0 .. count - 1."""
        warm = torch.arange(min(self.count, self.batch_size))
        generator.sample_ids(warm, seed=context.seed, stream=self.stream, steps=1, force=True)
        start = time.perf_counter()
        parts = {
            number: generator.sample_ids(ids, seed=context.seed, stream=self.stream, steps=steps)
            for number, ids in context.world.share(torch.arange(self.count).split(self.batch_size))
        }
        return context.world.collect(parts), time.perf_counter() - start

    def _rollout(self, generator: Generator, context: StageContext) -> tuple[Tensor, Tensor] | None:
        """(path, velocities) of a flow over `straightness.steps` Euler steps; None where a model has no ODE."""
        if self.straightness is None or not has_paths(generator):
            return None
        ids = torch.arange(min(self.straightness.count, self.count))
        return euler_paths(generator, ids, context.seed, self.stream, self.straightness.steps)

    def _write(
        self,
        context: StageContext,
        rows: Sequence[Mapping[str, Any]],
        protocol: Protocol,
        real: Mapping[str, float],
        gates: Sequence[GateResult],
    ) -> None:
        """metrics.json and report.md."""
        metrics = {
            "schema": SCHEMA,
            "recipe": context.recipe,
            "digest": context.digest,
            "seed": context.seed if self._run_seed is None else self._run_seed,
            "note": self.note,
            "protocol": protocol.to_dict(),
            "real": dict(real),
            "rows": list(rows),
            "gates": [asdict(gate) for gate in gates],
        }
        write_json(context.folder / "metrics.json", metrics)
        write_text(context.folder / "report.md", self._page(context, rows, protocol, real, gates))

    def _draw(
        self,
        context: StageContext,
        generators: Mapping[str, Generator],
        images: Mapping[tuple[str, int], Tensor],
    ) -> None:
        """grid.png, where the recipe asks for one."""
        if self.grid:
            picture = [
                (f"{label}, {steps} step{'s' * (steps > 1)}", images[label, steps][: self.grid_columns])
                for label, steps in self.grid
            ]
            save_png(image_grid(picture), context.folder / "grid.png")

    def _page(
        self,
        context: StageContext,
        rows: Sequence[Mapping[str, Any]],
        protocol: Protocol,
        real: Mapping[str, float],
        gates: Sequence[GateResult],
    ) -> str:
        """The text of report.md."""
        return report(context.recipe, rows, protocol, real, gates, grid=bool(self.grid), note=self.note)


def labels_of(generator: Generator, count: int) -> Tensor | None:
    """[count] classes of the samples 0 .. count - 1; None for a model without classes."""
    return generator.conditions.ask(count=count).get("label")


def _parameters(generator: Generator) -> int:
    return sum(p.numel() for p in generator.denoiser.parameters())
