"""Sampling and measuring: every model at every step count from the same noise, in one table (contract *metrics.json*)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.gates import Gate, GateResult, check
from distill.evaluation.meters.meter import Meter, Shown
from distill.evaluation.metric import metrics
from distill.evaluation.paths import EulerPath, euler_path, has_paths, samples_along, watched
from distill.evaluation.report import report
from distill.evaluation.rows import Straightness
from distill.evaluation.samples import Sampled
from distill.files import write_json, write_text
from distill.models.generator import Generator
from distill.world import World

SCHEMA = 1
METRICS, PAGE, PICTURE, STRIPS = "metrics.json", "report.md", "grid.png", "rows.png"


@dataclass(frozen=True)
class Model:
    """A model to measure at some step counts; `follows`: it is compared with the samples of the row `Evaluation.follows`;
    `facts`: what the stage that trained it recorded."""

    generator: Generator
    steps: Sequence[int]
    follows: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def row(self, steps: int, evaluation: Evaluation) -> dict[str, float | None]:
        """The entries of a row that follow from how it is sampled, of a trial: None where they will be None."""
        has_path = evaluation.straightness is not None and has_paths(self.generator)
        nothing = torch.zeros(1, 1)
        sampled = Sampled(
            self.generator,
            steps,
            count=1,
            seconds=1.0,
            samples=nothing,
            followed=nothing if self.follows and evaluation.follows else None,
            path=EulerPath(1.0, 1.0, 1.0) if has_path else None,
            facts=self.facts,
            clip=None if evaluation.meter.clip_score is None else lambda samples, generator: 0.0,
        )
        return evaluation.of_row(sampled)


@dataclass(frozen=True)
class Made:
    """The samples of a row, on the CPU of the main process.

    Attributes:
        samples: [N,*S] clamped to [-1, 1]; None on the other processes. latents: the same before decoding, where the meter asks
            for it. extracted: see `Meter.extracted`.
        seconds: that sampling took. path: that it followed, if it is known.
    """

    samples: Tensor | None
    latents: Tensor | None
    extracted: Mapping[str, Tensor]
    seconds: float
    path: EulerPath | None


@dataclass
class Evaluation:
    """Samples models, measures them, and writes metrics.json, report.md and grid.png.

    Attributes:
        meter: the real set and its metrics.
        count: samples a row; labels go round the classes. batch_size: samples a network call.
        seed, stream: of the samples' noise.
        straightness, follows, grid: see `stages.evaluate.Evaluate`. by_class: whether labels are the real set's classes.
        world, device: all processes sample and extract features, the main one measures. Models are on the device one at a
            time. say: prints a line.
    """

    meter: Meter
    count: int
    batch_size: int = 500
    seed: int = 0
    stream: str = "evaluate"
    straightness: Straightness | None = None
    follows: tuple[str, int] | None = None
    grid: Sequence[tuple[str, int]] = ()
    by_class: bool = True
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    say: Callable[[str], None] = print

    def run(
        self, models: Mapping[str, Model], picture: Path, bar: Any, strips: Path | None = None
    ) -> list[dict[str, Any]]:
        """The rows of all models in their order, and the picture; [] and no picture on other processes than the main one.
        bar: a `stages.display.Bar` over the rows. strips: a picture of samples of every row, without words."""
        jobs = [(label, steps) for label, model in models.items() for steps in model.steps]
        self.prepare()
        rows: dict[tuple[str, int], dict[str, Any]] = {}
        kept: dict[tuple[str, int], Tensor] = {}  # what the picture shows
        whole: Made | None = None  # the row that others follow
        with warnings.catch_warnings(record=True) as caught:
            for label, group in groupby(self._order(jobs, models), key=lambda job: job[0]):
                model, path = models[label], None
                model.generator.to(self.device)  # one model at a time
                for number, (_, steps) in enumerate(group):
                    bar.note(f"{label} in {steps}")
                    if number == 0:
                        self._warm_up(model.generator)
                    made = self._sample(model, steps)
                    bar.update()
                    if number == 0:
                        path = made.path or self._path(model.generator)
                    if made.samples is None:
                        continue
                    whole = made if (label, steps) == self.follows else whole
                    kept[label, steps] = made.samples[: self.meter.shown].clone()
                    followed = whole if model.follows else None
                    rows[label, steps] = self._row(label, steps, model, replace(made, path=path), followed)
                model.generator.to("cpu")
        for text in sorted({str(warning.message) for warning in caught}):
            self.say(text)
        if rows:
            self._draw_rows(models, kept, picture, strips)
        return [rows[job] for job in jobs] if rows else []

    def _order(self, jobs: Sequence[tuple[str, int]], models: Mapping[str, Model]) -> list[tuple[str, int]]:
        """Rows by model: that of the row that others follow first, with this row first. Of the others, a row whose samples
        follow the path that straightness is measured on comes first of its model."""
        first, place = self.follows and self.follows[0], list(models)
        return sorted(
            jobs,
            key=lambda job: (
                job[0] != first,
                place.index(job[0]),
                job != self.follows,
                not self._along(models[job[0]], job[1]),
            ),
        )

    def _row(self, label: str, steps: int, model: Model, made: Made, followed: Made | None) -> dict[str, Any]:
        """A row of the table, on the main process."""
        assert made.samples is not None
        sampled = Sampled(
            model.generator,
            steps,
            self.count,
            made.seconds,
            made.samples,
            None if followed is None else followed.samples,
            made.path,
            model.facts,
            made.latents,
            None if followed is None else followed.latents,
            self.meter.clip_score,
        )
        labels = labels_of(model.generator, self.count) if self.by_class else None
        row = self.row(label, steps) | self.of_row(sampled)
        return row | self.meter.measure(made.samples, labels, made.extracted)

    def _draw_rows(
        self,
        models: Mapping[str, Model],
        kept: Mapping[tuple[str, int], Tensor],
        picture: Path,
        strips: Path | None,
    ) -> None:
        """The pictures of `run`, from the samples kept of every row."""
        shown = self.grid or self.meter.panels({label: model.steps for label, model in models.items()})
        panels = [
            Shown(_title(*key), kept[key][: self.meter.shown], models[key[0]].generator, key[1])
            for key in shown
        ]
        self.draw(panels, picture)
        if strips is not None:
            jobs = [(label, steps) for label, model in models.items() for steps in model.steps]
            self.meter.draw_strips([kept[job][: self.meter.shown] for job in jobs], strips)

    def prepare(self) -> None:
        """Do the real half of the work, on the main process."""
        if self.world.main:
            self.meter.prepare(self.seed, self.stream, self.count, self.device)

    def row(self, label: str, steps: int | None) -> dict[str, Any]:
        """A row with null for every metric of the contract."""
        contract = [known.name for known in metrics() if known.of in ("images", "both")]
        return {"model": label, "steps": steps} | dict.fromkeys(contract)

    def of_row(self, sampled: Sampled) -> dict[str, float | None]:
        """The entries of a row that follow from how its samples were made."""
        return {known.name: known.measure(sampled) for known in metrics(self.meter.kind) if known.rows}

    def draw(self, shown: Sequence[Shown], path: Path) -> None:
        """grid.png, where there is something to show."""
        if shown:
            self.meter.draw(shown, path, self.seed, self.stream)

    def write(
        self,
        folder: Path,
        title: str,
        rows: Sequence[Mapping[str, Any]],
        gates: Sequence[Gate],
        header: Mapping[str, Any],
        *,
        balanced: bool,
        suffix: str = "",
    ) -> list[GateResult]:
        """Check the gates and write metrics.json (`header`: its entries besides protocol, real, rows and gates) and report.md.

        balanced: every class has equally many samples. suffix: what the protocol says after the real set."""
        real_set = self.meter.real
        floor = real_set.floor()
        protocol = real_set.protocol(
            self.count,
            self.meter.description + suffix,
            class_balanced=balanced,
            straightness_steps=None if self.straightness is None else self.straightness.steps,
            floor=floor,
        )
        real = real_set.references(floor)
        results = check(gates, rows, real)
        content = {"schema": SCHEMA, **header, "protocol": protocol.to_dict(), "real": real}
        content |= {"rows": list(rows), "gates": [asdict(result) for result in results]}
        write_json(folder / METRICS, content)
        caption = self.meter.caption if (folder / PICTURE).is_file() else ""
        page = report(title, rows, protocol, real, results, caption=caption, note=header.get("note", ""))
        write_text(folder / PAGE, page)
        for result in results:
            if not result.passed:
                self.say(f"gate {result.describe()}")
        return results

    def balanced(self, models: Mapping[str, Model]) -> bool:
        """Whether every class has equally many samples."""
        classes = next(iter(models.values())).generator.conditions.num_classes
        return classes > 0 and self.count % classes == 0

    def _warm_up(self, generator: Generator) -> None:
        """One step of a first batch, so that the times of rows are alike."""
        ids = torch.arange(min(self.count, self.batch_size))
        generator.sample_ids(ids, seed=self.seed, stream=self.stream, steps=1, force=True)

    def _sample(self, model: Model, steps: int) -> Made:
        """The samples 0 .. count - 1. Each process extracts of those that it makes what the meter reads."""
        generator, path, parts, latents = model.generator, None, {}, {}
        along = self._along(model, steps)
        start = time.perf_counter()
        for number, ids in self.world.share(torch.arange(self.count).split(self.batch_size)):
            with watched(generator, self._paths) if along and number == 0 else nullcontext() as sums:
                made = generator.sample_ids(
                    ids, seed=self.seed, stream=self.stream, steps=steps, decode=not self.meter.latents
                )
            if self.meter.latents:
                latents[number], made = made, generator.decoded(made)
            parts[number] = made
            path = path if sums is None else sums.path()
        seconds = time.perf_counter() - start
        extracted = self.meter.extracted(parts, self.device, self.world)
        raw = self.world.collect(latents) if self.meter.latents else None
        return Made(self.world.collect(parts), raw, extracted, seconds, path)

    @property
    def _paths(self) -> int:
        """Samples that straightness is measured on."""
        return 0 if self.straightness is None else min(self.straightness.count, self.count)

    def _along(self, model: Model, steps: int) -> bool:
        """Whether a row's first batch follows the path that straightness is measured on."""
        wanted = self.straightness is not None and self.straightness.steps == steps
        return wanted and self._paths <= self.batch_size and samples_along(model.generator, steps)

    def _path(self, generator: Generator) -> EulerPath | None:
        """The path of a flow over `straightness.steps` Euler steps, on the main process; None where a model has no ODE."""
        if self.straightness is None or not has_paths(generator) or not self.world.main:
            return None
        return euler_path(
            generator, torch.arange(self._paths), self.seed, self.stream, self.straightness.steps
        )


def labels_of(generator: Generator, count: int) -> Tensor | None:
    """[count] classes of the samples 0 .. count - 1; None for a model without classes."""
    if not generator.conditions.num_classes:  # all prompts of an evaluation take gigabytes
        return None
    return generator.conditions.ask(count=count).get("label")


def _title(label: str, steps: int) -> str:
    return f"{label}, {steps} step{'s' * (steps > 1)}"
