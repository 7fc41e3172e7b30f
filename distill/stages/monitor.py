"""Evaluation during training: quality often peaks before training ends, so the best average is kept."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.rng import Draws
from distill.data.source import Source
from distill.engine.logging import lines_of, read_entries
from distill.engine.module import STUDENT, DistillModule
from distill.engine.networks import modes_kept
from distill.evaluation.evaluation import labels_of
from distill.evaluation.grid import image_grid, save_png, tile
from distill.evaluation.meters.images import ImageMeter
from distill.evaluation.metric import metrics
from distill.files import make_folder, read_json, remove, sha256_file, write_json, write_text
from distill.models.description import DESCRIPTION
from distill.models.native import model_files
from distill.stages.base import StageContext, check_types
from distill.stages.trial import build_part
from distill.typed import parse

PICTURE = r"(step|diagnostics)_(\d{7,})\.png"  # no other picture is ours
STREAM = "monitor"  # of the samples' noise
FOLDER, BEST, RECORD, SUMMARY = "monitor", "best", "evaluations.jsonl", "best.json"
DIAGNOSED = 64  # samples of the data that a method's diagnostics are given


@dataclass(frozen=True)
class Options:
    """The option `monitor` of a training stage.

    Attributes:
        every_images: images of the student's updates between evaluations; there is always one at the end.
        count: samples an evaluation, always of the same noise and labels. batch_size: samples a network call.
        metric: the distance by which the best model is kept: fd, kid or sliced_wasserstein; None: nothing is measured and no
            model is kept.
        columns: samples a row of the picture, which shows as many rows.
        data, features: configs of the real data and of the feature extractor; None without a metric.
        k: neighbours of recall and coverage.
    """

    every_images: int
    data: dict[str, Any] | None
    features: dict[str, Any] | None
    count: int = 500
    batch_size: int = 500
    metric: str | None = "fd"
    columns: int = 10
    k: int = 5

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("every_images", "batch_size", "columns", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.metric is None:
            return
        if self.count < self.k + 2:
            raise ValueError(f"count: expected at least k + 2 = {self.k + 2}, found {self.count}")
        distances = [known.name for known in metrics("images") if known.monitored and known.better == "lower"]
        if self.metric not in distances:
            raise ValueError(f"metric: found {self.metric!r}, expected one of {distances}")

    def fingerprint(self) -> str:
        """The real data and the feature extractor; "" without a metric."""
        return "" if self.metric is None else self.meter().fingerprint()

    def meter(self, device: torch.device | str = "cpu") -> ImageMeter:
        """What samples are measured with, where there is a metric."""
        assert self.data is not None
        assert self.features is not None
        return ImageMeter(
            build_part(self.data, "data"), build_part(self.features, "features", device), self.k, self.columns
        )


def options_of(config: Mapping[str, Any] | None) -> Options | None:
    """The option `monitor` of a stage; without features (eval=prompts), it draws one row of samples and measures nothing.

    Raises ValueError naming the entry."""
    if config is None:
        return None
    options = parse(Options, config, "monitor")
    if options.features is not None:
        if options.data is None:
            raise ValueError(
                "monitor.data: found null, expected real images to measure with; prompts: type eval=prompts"
            )
        return options
    columns = min(options.columns, options.count)
    return replace(
        options, data=None, metric=None, count=columns, batch_size=min(options.batch_size, columns)
    )


def warn_of_judge(trained_in: Any, judge: Any) -> None:
    """Warn of a monitor that measures in the features that the loss compares distributions in."""
    if trained_in is not None and trained_in.sha256 == judge.sha256:
        warnings.warn(
            f"monitor.features: found {judge.name}, in whose features the loss compares samples and data: its numbers improve "
            "also where samples do not; expected another extractor, such as +features@monitor.features=random_conv",
            stacklevel=2,
        )


class Monitor:
    """Evaluates the student of a running method; called by every process after the same steps.

    Writes into the stage's folder: `monitor/step_<n>.png`, `monitor/evaluations.jsonl`, the method's diagnostics
    `monitor/diagnostics_<n>.png`, and the best model so far, `best/` (through `save`, which writes a model folder;
    called by every process) with `best.json`. All of it is a function of the weights: a resumed run gives the same."""

    def __init__(
        self, options: Options, context: StageContext, save: Callable[[Path], None], source: Source
    ) -> None:
        self.options, self.context, self.save, self.source = options, context, save, source
        self.folder = context.folder / FOLDER
        self._meter: ImageMeter | None = None
        self._best: tuple[int, float] | None = None  # step and value of the model in `best/`
        # The step of a best model that a killed run kept after its last checkpoint, in the place of an earlier one: it comes
        # again at that step.
        self._ahead: int | None = None

    def due(self, before: int, now: int) -> bool:
        """Whether an evaluation falls between two image counts."""
        return before // self.options.every_images != now // self.options.every_images

    def resume(self, step: int) -> None:
        """Remove evaluations after the checkpoint at `step`, which will be repeated. Raises ValueError where the record cannot
        be read, or the best model is not the recorded one."""
        self.context.world.decided(lambda: self._resume(step))

    def _resume(self, step: int) -> None:
        """`resume`, on the main process."""
        path = self.folder / RECORD
        kept = [e for e in _entries(path, self.options.metric) if e["step"] <= step]
        self._check_best(kept, step)
        make_folder(self.folder)
        write_text(path, lines_of(kept))
        for picture in self.folder.glob("*_*.png"):
            ours = re.fullmatch(PICTURE, picture.name)
            if ours is not None and int(ours[2]) > step:
                remove(picture)

    def _check_best(self, kept: list[dict[str, Any]], step: int) -> None:
        """Check that `best/` holds the model of `best.json`, and that no later evaluation was better."""
        path, values = self.context.folder / SUMMARY, self._values(kept)
        self._best, self._ahead = min(values.items(), key=lambda pair: pair[1], default=None), None
        again = f"redo={self.context.name} trains from the start"
        if not path.exists():
            if self._best is not None:
                raise ValueError(f"{path}: missing, but {self.folder / RECORD} has evaluations; {again}")
            return
        summary = parse(Summary, read_json(path), f"{path}: ")
        if summary.step > step:
            self._ahead = summary.step
            return
        better = [at for at, value in values.items() if at > summary.step and value < summary.value]
        if values.get(summary.step) != summary.value or summary.metric != self.options.metric or better:
            raise ValueError(
                f"{path}: found {summary.metric} {summary.value} of step {summary.step}, which does not fit "
                f"{self.folder / RECORD}; {again}"
            )
        files = summary.files or {}
        for name in files if DESCRIPTION in files else (DESCRIPTION,):
            file = self.context.folder / BEST / name
            if not file.is_file() or sha256_file(file) != files.get(name):
                raise ValueError(f"{file}: is not the file that {path} was written for; {again}")
        self._best = (summary.step, summary.value)

    def _values(self, entries: list[dict[str, Any]]) -> dict[int, float]:
        """step -> the metric, where there is one and it is finite."""
        if self.options.metric is None:
            return {}
        return {e["step"]: e[self.options.metric] for e in entries if e[self.options.metric] is not None}

    def __call__(self, module: DistillModule) -> dict[str, float]:
        """Evaluate now; returns what to log (on the main process)."""
        samples, extracted = self._sample(module)
        better = False
        found: dict[str, float] = {}
        if samples is not None:
            found = self._measure(module, samples, extracted)
            better = self._record(module, found)
            self.folder.mkdir(parents=True, exist_ok=True)
            columns = self.options.columns
            save_png(tile(samples[: columns * columns], columns), self._picture("step", module.progress.step))
        if self.context.world.any(better):
            self.save(self.context.folder / BEST)
            if self.context.world.main and self.options.metric is not None:
                self._summarize(module, found[self.options.metric], done=True)
        diagnosed = self._diagnose(module)
        return (
            {f"eval/{name}": value for name, value in found.items()} | diagnosed
            if samples is not None
            else {}
        )

    def _picture(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}_{step:07d}.png"

    @torch.no_grad()
    def _diagnose(self, module: DistillModule) -> dict[str, float]:
        """The method's diagnostics, on the same samples and draws each time."""
        rows = torch.arange(min(DIAGNOSED, len(self.source)))
        draws = Draws(self.context.seed, "diagnostics", 0, rows.to(module.device))
        networks = [*module.networks.values(), *module.ema.values()]
        with modes_kept(networks):
            for network in networks:
                network.eval()
            found = module.diagnostics(self.source.fetch(rows, rows).to(module.device), draws)
        if found.rows and self.context.world.main:
            decoder = module.student.decoder
            shown = [
                (label, decoder.clamp(decoder.decode(samples[: self.options.columns])))
                for label, samples in found.rows
            ]
            save_png(image_grid(shown), self._picture("diagnostics", module.progress.step))
        return {f"diagnostics/{name}": float(value) for name, value in found.scalars.items()}

    def _sample(self, module: DistillModule) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(samples 0 .. count - 1, what the meter extracts of them) on the main process. Every process makes the same number of
        network calls: the networks may be sharded over them."""
        model, world = module.best(STUDENT), self.context.world
        chunks = list(torch.arange(self.options.count).split(self.options.batch_size))
        parts: dict[int, Tensor] = {}
        with modes_kept([model]):
            model.eval()
            generator = module.as_generator()
            for number in range(world.rank, -(-len(chunks) // world.size) * world.size, world.size):
                ids = chunks[number] if number < len(chunks) else chunks[0]
                images = module.monitored(generator, self.source, ids, self.context.seed, STREAM)
                if number < len(chunks):
                    parts[number] = images
        if self.options.metric is None:
            return world.collect(parts), {}
        if self._meter is None:
            self._meter = self.options.meter(self.context.device)
            if world.main:  # the real half of the work
                self._meter.prepare(self.context.seed, STREAM, self.options.count, self.context.device)
        extracted = self._meter.extracted(parts, self.context.device, world)
        return world.collect(parts), extracted

    def _measure(
        self, module: DistillModule, samples: Tensor, extracted: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """The logged metrics of the samples."""
        if self._meter is None:
            return {}
        labels = labels_of(module.as_generator(), self.options.count)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a small count is chosen knowingly here, and named so
            row = self._meter.measure(samples, labels, extracted)
        logged = [known.name for known in metrics("images") if known.monitored]
        return {name: float(value) for name in logged if (value := row[name]) is not None}

    def _record(self, module: DistillModule, found: Mapping[str, float]) -> bool:
        """Record an evaluation; returns whether it is the best so far (of equals, the first; never a non-finite one)."""
        path, step, metric = self.folder / RECORD, module.progress.step, self.options.metric
        earlier = [e for e in _entries(path, self.options.metric) if e["step"] < step]
        entry = {"step": step, "images": module.progress.images, "count": self.options.count, **found}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, lines_of([*earlier, entry]))
        if metric is None:
            return False
        value, again = found[metric], self._ahead is not None and step >= self._ahead
        if not math.isfinite(value) or not (again or self._best is None or value < self._best[1]):
            return False
        self._best, self._ahead = (step, value), None
        self._summarize(module, value, done=False)
        return True

    def _summarize(self, module: DistillModule, value: float, *, done: bool) -> None:
        """Write `best.json`: without `files` before the model is replaced, so that a kill in between is noticed; then with."""
        best = self.context.folder / BEST
        files = {path.name: sha256_file(path) for path in model_files(best)} if done else None
        options = asdict(self.options)
        assert self.options.metric is not None
        summary = Summary(self.options.metric, value, module.progress.step, options, files)
        write_json(self.context.folder / SUMMARY, asdict(summary))

    def facts(self) -> dict[str, Any]:
        """Facts for the artifact: metric, value and step of the best model."""
        path = self.context.folder / SUMMARY
        if not path.is_file():
            return {}
        summary = parse(Summary, read_json(path), f"{path}: ")
        return {"metric": summary.metric, "value": summary.value, "step": summary.step}


@dataclass(frozen=True)
class Summary:
    """`best.json`: the best evaluation, and the sha256 of the model's files; null while they are written."""

    metric: str
    value: float
    step: int
    options: dict[str, Any]
    files: dict[str, str] | None = None


def _entries(path: Path, metric: str | None) -> list[dict[str, Any]]:
    """The recorded evaluations; a line that a kill cut off is dropped."""
    entries = read_entries(path)
    for entry in entries:
        if metric is not None and metric not in entry:
            raise ValueError(f"{path}: step {entry['step']}: {metric}: missing")
    return entries


def model_folder(folder: Path, which: str) -> Path:
    """Where the last or the best model of a training stage lies."""
    return folder / BEST if which == "best" else folder
