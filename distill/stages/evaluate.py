"""The Evaluate stage: measures the models of a run with one meter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from distill.evaluation.evaluation import STRIPS, Evaluation, Model, labels_of
from distill.evaluation.gates import Gate, GateError, check
from distill.evaluation.meters.meter import Meter
from distill.evaluation.metric import metrics
from distill.evaluation.rows import Row, Straightness, check_follows, check_row, unknown_metric
from distill.files import copy
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.models.precision import check_precision, in_precision
from distill.names import check_name
from distill.stages.artifact import read_artifact
from distill.stages.attached import log_evaluation
from distill.stages.base import ModelStage, Stage, StageContext, check_which
from distill.stages.made import Made
from distill.stages.monitor import model_folder
from distill.stages.ownership import PUBLISHED, patterns
from distill.stages.targets import resolve
from distill.stages.threads import use_threads
from distill.stages.trial import build_meter
from distill.typed import settle

GRID = "grid.png"


@dataclass
class Evaluate(Stage):
    """Sample and measure.

    Attributes:
        models: row label -> the model and how it is sampled, see `evaluation.rows.Row`.
        meter: config of an `evaluation.meters.meter.Meter`, with the real data.
        follows: [label, steps] of the row that `teacher_mse` compares with.
        count: samples a row; labels go round the classes. batch_size: samples a network call.
        straightness: {steps, count} of the Euler run that measures flows, or None.
        grid: [label, steps] of the picture's rows; empty: those that the meter chooses.
        gates: see `evaluation.gates.Gate`; null is none.
        note: a sentence that stands above the numbers.
        seed: of the samples' noise, so that runs of several seeds are measured alike; None: the run's.
        precision: of the models' networks, see `models.precision.in_precision`; samples and metrics are float32.
    """

    FILES: ClassVar[tuple[str, ...]] = patterns(*PUBLISHED, STRIPS, "logs/wandb_id")
    NEEDED: ClassVar[tuple[str, ...]] = ("metrics.json", "report.md")

    models: dict[str, Row]
    meter: dict[str, Any]
    follows: tuple[str, int] | None = None
    count: int = 2000
    batch_size: int = 500
    straightness: Straightness | None = None
    grid: list[tuple[str, int]] = field(default_factory=list)
    gates: list[Gate | None] = field(default_factory=list)
    stream: str = "evaluate"
    note: str = ""
    seed: int | None = None
    precision: str = "float32"

    def __post_init__(self) -> None:
        settle(self)
        check_precision(self.precision)
        kind = resolve(self.meter, "meter")
        if not (isinstance(kind, type) and issubclass(kind, Meter)):
            raise ValueError(f"meter._target_: found {self.meter['_target_']!r}, expected a meter")
        for name in ("batch_size", "count"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 1")
        if not self.models:
            raise ValueError("models: found none, expected {label: {stage, steps}}")
        for label in self.models:
            check_name(label, "models: row label", reserved=PUBLISHED)
        rows = [(label, steps) for label, row in self.models.items() for steps in row.steps]
        for place, named in [
            ("follows", self.follows),
            *((f"grid[{i}]", row) for i, row in enumerate(self.grid)),
        ]:
            check_row(place, named, rows)
        known = [metric.name for metric in metrics(kind.kind)]
        for i, gate in enumerate(self.gates):
            if gate is None:
                continue
            for key in ("row", "times", "plus"):
                check_row(f"gates[{i}].{key}", getattr(gate, key), rows)
            if gate.metric not in known:
                raise ValueError(unknown_metric(f"gates[{i}].metric", gate.metric, known))

    @property
    def _gates(self) -> list[Gate]:
        return [gate for gate in self.gates if gate is not None]

    @property
    def _note(self) -> str:
        """What stands above the numbers."""
        of_nets = "" if self.precision == "float32" else f" Networks computed in {self.precision}."
        return f"{self.note}{of_nets}".strip()

    def inputs(self) -> dict[str, str]:
        """Every evaluated model is an input, by its label."""
        return {label: row.stage for label, row in self.models.items()}

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Models come from stages that make models."""
        super().check(stages)
        for label, row in self.models.items():
            if not isinstance(stages[row.stage], ModelStage):
                raise ValueError(
                    f"models.{label}.stage: {row.stage!r} makes no model; expected a stage with a model"
                )
            check_which(row.which, row.stage, stages)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """The models take the step counts and the guidance of their rows, samples fit the data and the features, and
        every gate can be evaluated."""
        generators: dict[str, Generator] = {}
        for label, row in self.models.items():
            made = before[row.stage].model
            assert made is not None
            try:
                generators[label] = row.sampled(made)
            except ValueError as error:
                raise ValueError(f"models.{label}.{error}") from error
        check_follows(generators, self.models, self.follows)
        shapes = {label: generator.shape for label, generator in generators.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"models: make samples of different shapes, which no table compares: {shapes}")
        evaluation = self._evaluation()
        if self.count < evaluation.meter.least:
            raise ValueError(
                f"count: found {self.count}, expected at least {evaluation.meter.least} samples for this meter"
            )
        first = next(iter(generators.values()))
        try:
            values, real = evaluation.meter.trial(first.shape, labels_of(first, self.count))
        except ValueError as error:
            raise ValueError(f"meter.{error}") from error
        rows = []
        for label, row in self.models.items():
            facts = dict.fromkeys(("train_seconds", "peak_memory_bytes"), 1.0)
            model = Model(
                generators[label], row.steps, row.follows_teacher, facts if before[row.stage].trained else {}
            )
            rows += [evaluation.row(label, n) | values | model.row(n, evaluation) for n in row.steps]
        try:
            check(self._gates, rows, real)
        except GateError as error:
            raise ValueError(
                f"gates: {error}: this model, data or feature space does not define it; leave the gate out, or "
                "eval.gates=[] for none"
            ) from error
        return Made()

    def fingerprint(self) -> str:
        """The real data and the feature extractor."""
        return build_meter(self.meter).fingerprint()

    def publish(self, context: StageContext) -> None:
        """Copies of the three files at the top of the run."""
        for name in PUBLISHED:
            source = context.folder / name
            if source.is_file():
                copy(source, context.run_folder / name)

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write metrics.json, report.md and grid.png, here and at the top of the run."""
        models = {label: self._model(label, row, context) for label, row in self.models.items()}
        check_follows({label: model.generator for label, model in models.items()}, self.models, self.follows)
        sizes = [sum(p.numel() for p in model.generator.denoiser.parameters()) for model in models.values()]
        threads = use_threads(context, max(sizes))
        evaluation = self._evaluation(context)
        with context.display.bar(sum(len(model.steps) for model in models.values()), unit="row") as bar:
            rows = evaluation.run(models, context.folder / GRID, bar, context.folder / STRIPS)
        if not rows:
            return {}
        header = {
            "recipe": context.recipe,
            "digest": context.digest,
            "seed": context.seed,
            "note": self._note,
        }
        balanced = evaluation.balanced(models)
        gates = evaluation.write(context.folder, context.recipe, rows, self._gates, header, balanced=balanced)
        passed = sum(gate.passed for gate in gates)
        facts = {"rows": len(rows), "gates_passed": passed, "gates": len(gates), "threads": threads}
        log_evaluation(
            context, {"meter": self.meter, "count": self.count}, rows, context.folder / GRID, facts
        )
        return facts

    def _model(self, label: str, row: Row, context: StageContext) -> Model:
        """An evaluated model, from the folder of its stage."""
        folder = context.inputs[label]
        generator = row.sampled(load_model(model_folder(folder, row.which)))
        in_precision(generator.denoiser, self.precision)
        record = read_artifact(folder)
        return Model(generator, row.steps, row.follows_teacher, record["facts"] if record is not None else {})

    def _evaluation(self, context: StageContext | None = None) -> Evaluation:
        """What samples and measures: in a trial (no context), or in a run."""
        options: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("count", "batch_size", "stream", "straightness", "follows", "grid")
        }
        if context is None:
            return Evaluation(build_meter(self.meter), **options)
        return Evaluation(
            build_meter(self.meter, context.device),
            seed=context.seed if self.seed is None else self.seed,
            world=context.world,
            device=context.device,
            say=context.display.line,
            **options,
        )
