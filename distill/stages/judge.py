"""An evaluation outside of a run: any model folder, or anyone's images, against a data set or a folder of images.

Models are sampled and measured by the Evaluate stage itself, so the same model, seed, count and reference give the
numbers of the run that made the model.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from torch import Tensor

from distill.data.folder import ImageFolder
from distill.data.listing import utf8_path
from distill.evaluation.comparison import aligned
from distill.evaluation.gates import GateResult
from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import measure
from distill.evaluation.metric import metrics
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import report, table
from distill.evaluation.rows import Row
from distill.files import copy, make_folder, read_json, sha256_file, write_json
from distill.models.description import WEIGHTS, read_description
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.models.spec import SamplerSpec
from distill.stages.artifact import digest_of
from distill.stages.base import Settings, StageContext
from distill.stages.display import Display
from distill.stages.evaluate import Evaluate, labels_of
from distill.stages.ownership import PUBLISHED, patterns, sweep
from distill.stages.request import (
    DEVICES,
    FOLDER,
    Request,
    build,
    check_classes,
    check_out,
    check_reference,
    is_model,
    label_of,
    place,
    recipe_of,
    reference_config,
    with_channels,
)

# Step counts below the default that a model valid for any number is measured at.
USUAL_STEPS = (1, 2, 4, 8)
PICTURE_WIDTH = 2560  # pixels that the picture of samples may have


@dataclass
class Judge(Evaluate):
    """The Evaluate stage of one model, or of one folder of images, that belongs to no run.

    Attributes:
        force: sample at step counts that the model is not valid for.
        guidance_scale, noise_scale: replace the model's own; None keeps it.
        title: of the report. suffix: what the protocol says after the reference's name.
        by_class: whether the samples' classes are the reference's; if not, they have no numbers by class.
    """

    force: bool = False
    guidance_scale: float | None = None
    noise_scale: float | None = None
    title: str = ""
    suffix: str = ""
    by_class: bool = True
    _real: Any = field(default=None, repr=False)  # the data of `data`, built

    def _generators(self, context: StageContext) -> dict[str, Generator]:
        """The model, with the options in its sampler."""
        generators = {
            label: load_model(context.inputs[label], device=context.device) for label in self.models
        }
        for label, generator in generators.items():
            generator.spec = sampler(
                generator, self.models[label].steps, self.guidance_scale, self.noise_scale, force=self.force
            )
        return generators

    def _bench(self, context: StageContext) -> Any:
        bench = super()._bench(context)
        return replace(bench, description=bench.description + self.suffix)

    def images(self, context: StageContext, samples: ImageFolder) -> None:
        """Measure a folder of images as `run` measures a model."""
        label = next(iter(context.inputs))
        bench, images = self._bench(context), samples.images
        labels = samples.labels if self.by_class else None
        row = {"model": label, "steps": None} | dict.fromkeys(known.name for known in metrics("images"))
        row |= measure(images.to(context.device), labels, bench.reference, bench.extractor)
        shown = images[showcase(labels, self.grid_columns, len(images))]
        self._picture(context, [(label, shown)])
        counts = () if labels is None else labels.bincount().tolist()
        self._publish(context, [row], bench, len(set(counts)) == 1)

    def _measure(self, samples: Tensor, generator: Generator, bench: Any) -> dict[str, float | None]:
        labels = labels_of(generator, self.count) if self.by_class else None
        return measure(samples, labels, bench.reference, bench.extractor)

    def _draw(
        self,
        context: StageContext,
        generators: Mapping[str, Generator],
        images: Mapping[tuple[str, int], Tensor],
    ) -> None:
        self._picture(
            context,
            [(f"{label}, {n} step{'s' * (n > 1)}", samples) for (label, n), samples in images.items()],
        )

    def _picture(self, context: StageContext, rows: Sequence[tuple[str, Tensor]]) -> None:
        """grid.png: the samples, and below them real images of the same classes."""
        columns = max(2, min(self.grid_columns, PICTURE_WIDTH // rows[0][1].shape[-1]))
        chosen = showcase(self._real.labels, columns, len(self._real))
        real = self._real.fetch(chosen, chosen).x0
        shown = [(label, images[:columns]) for label, images in [*rows, ("real", real)]]
        save_png(image_grid(shown), context.folder / "grid.png")

    def _page(
        self,
        context: StageContext,
        rows: Sequence[Mapping[str, Any]],
        protocol: Protocol,
        real: Mapping[str, float],
        gates: Sequence[GateResult],
    ) -> str:
        return report(self.title, printable(rows), protocol, real, gates, grid=True, note=self.note)


def showcase(labels: Tensor | None, columns: int, count: int) -> Tensor:
    """Up to `columns` rows of a set of `count` images: the first ones, or with labels a class a column in turn, as the
    labels of samples go round the classes."""
    if labels is None:
        return torch.arange(min(columns, count))
    classes = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    turns = [(classes[c % len(classes)], c // len(classes)) for c in range(columns)]
    return torch.stack([rows[turn % len(rows)] for rows, turn in turns])


def sampler(
    generator: Generator,
    steps: Iterable[int],
    guidance_scale: float | None,
    noise_scale: float | None,
    *,
    force: bool,
) -> SamplerSpec:
    """The model's sampler with another guidance scale and another scale of its fresh noise (None: its own) and, with
    `force`, with grids for `steps` that it is not valid for; without it, those raise ValueError."""
    spec, process = generator.spec.with_noise_scale(noise_scale), generator.denoiser.process
    grids = {n: tuple(spec.grid(process, n, force=force).tolist()) for n in steps}
    forced = {n: grid for n, grid in grids.items() if not spec.valid(n)}
    guidance = spec.guidance_scale if guidance_scale is None else guidance_scale
    return replace(spec, times=dict(spec.times) | forced, guidance_scale=float(guidance))


def valid_steps(spec: SamplerSpec) -> list[int]:
    """The step counts that a model is measured at unless others are asked for: those that its sampler lists; where
    any is valid, its default and the usual small ones below it too."""
    usual = [n for n in USUAL_STEPS if spec.any_steps and n < spec.steps]
    return sorted({*spec.times, spec.steps, *usual}, reverse=True)


def printable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose unknown step counts (images from elsewhere) print as a dash."""
    return [dict(row) | {"steps": "-" if row["steps"] is None else row["steps"]} for row in rows]


def judge(request: Request, configs: Mapping[str, Path]) -> Path:
    """Measure what `request` names and write metrics.json, report.md and grid.png; returns their folder.

    configs: name -> file of the data sets that `reference` may name. Raises ValueError or OSError naming the option
    or the file, before anything is sampled where that can be known.
    """
    path = Path(str(request.model)).expanduser()
    out, reference = place(request, path), reference_config(request, configs)
    with warnings.catch_warnings(record=True) as told:
        plan = plan_model if is_model(path) else plan_images
        stage, source, samples = plan(request, path, reference, build(reference, "reference"))
    for text in dict.fromkeys(str(warning.message) for warning in told):
        print(f"warning: {text}", file=sys.stderr)
    real = stage._real
    identity = {
        "source": {key: value for key, value in source.items() if key != "model"},  # wherever it lies
        "real": real.fingerprint(),
        "seed": request.seed,
        "features": request.features,
    }
    asked: dict[str, Any] = {k: getattr(stage, k) for k in ("count", "k", "stream", "guidance_scale")}
    asked["models"] = {name: {"stage": row.stage, "steps": row.steps} for name, row in stage.models.items()}
    asked["straightness"] = None if stage.straightness is None else asdict(stage.straightness)
    if stage.noise_scale is not None:
        asked["noise_scale"] = stage.noise_scale
    digest = digest_of(identity | asked)
    check_out(out, digest, [Path(data.path) for data in (samples, real) if isinstance(data, ImageFolder)])
    label = label_of(request, path)
    # The three files appear last; nothing else is left.
    with tempfile.TemporaryDirectory() as folder:
        context = StageContext(
            name="evaluate",
            folder=Path(folder),
            inputs={label: path},
            seed=request.seed,
            settings=Settings(accelerator=DEVICES[request.device]),
            loggers=(),
            display=Display("evaluate"),
            run_folder=Path(folder),
            recipe=recipe_of(path) or label,
            digest=digest,
        )
        with warnings.catch_warnings(record=True) as told:
            try:
                stage.run(context) if samples is None else stage.images(context, samples)
            except InstantiationException as error:
                raise ValueError(f"features: {error.__cause__ or error}") from error
        for text in sorted({str(warning.message) for warning in told}):
            context.display.line(text)
        metrics = read_json(context.folder / "metrics.json") | {"recipe": recipe_of(path), "source": source}
        make_folder(out)
        sweep(out, patterns(*PUBLISHED))
        write_json(out / "metrics.json", metrics)  # first: by it the others are known as ours
        for name in ("grid.png", "report.md"):
            copy(context.folder / name, out / name)
    return out


def plan_model(
    request: Request, path: Path, reference: Mapping[str, Any], real: Any
) -> tuple[Judge, dict[str, Any], None]:
    """(the stage, what is measured, None) of a model folder."""
    description = read_description(path)
    generator = load_model(path)
    if len(generator.denoiser.sample_shape) != 3:
        shape = list(generator.denoiser.sample_shape)
        raise ValueError(f"model: {path} makes samples of shape {shape}, expected images [C,H,W]")
    if request.resolution is not None and not isinstance(real, ImageFolder):
        raise ValueError(
            f"resolution: found {request.resolution}, but {request.reference} is no folder of images"
        )
    reference, real = fitted(reference, real, generator.denoiser.sample_shape[0])
    check_reference(real, generator.denoiser.sample_shape, str(request.reference), request.resolution)
    steps = request.step_list or valid_steps(generator.spec)
    spec = sampler(generator, steps, request.guidance_scale, request.noise_scale, force=request.force)
    forced = [n for n in steps if not generator.spec.valid(n)]
    if spec.guidance_scale != 1 and not generator.denoiser.guidable:
        raise ValueError(
            f"guidance_scale: found {spec.guidance_scale:g}, but this model was not trained with a null condition; "
            "expected 1"
        )
    notes, by_class = [], generator.conditions.num_classes in (0, real.num_classes)
    if not by_class:
        notes.append(
            f"No numbers by class: the model has {generator.conditions.words()}, the reference {real.num_classes}."
        )
    if forced:
        notes.append(
            f"Sampled by force at {', '.join(map(str, forced))} step(s), for which the model is not valid."
        )
    if request.noise_scale is not None:
        notes.append(f"Fresh noise between steps times {request.noise_scale:g}.")
    label = label_of(request, path)
    stage = Judge(
        models={label: Row(stage=label, steps=steps)},
        data=dict(reference),
        features=request.features,
        count=2000 if request.count is None else request.count,
        batch_size=request.batch_size,
        k=request.k,
        straightness=request.straightness,
        stream=request.stream,
        note=" ".join([*notes, *remarks(real, None)]),
        by_class=by_class,
        force=request.force,
        guidance_scale=request.guidance_scale,
        noise_scale=request.noise_scale,
        title=f"Evaluation of {utf8_path(str(request.model))}",
        suffix=suffix(real, None),
        _real=real,
    )
    digest = sha256_file(path / WEIGHTS)
    return (
        stage,
        {"model": utf8_path(str(request.model)), "sha256": digest, "sampler": description["sampler"]},
        None,
    )


def plan_images(
    request: Request, path: Path, reference: Mapping[str, Any], real: Any
) -> tuple[Judge, dict[str, Any], ImageFolder]:
    """(the stage, what is measured, the images) of a folder of images."""
    for key in ("steps", "guidance_scale", "noise_scale"):
        if (found := getattr(request, key)) is not None:
            raise ValueError(f"{key}: found {found}, but {path} is a folder of images, sampled before")
    samples = ImageFolder(path, request.resolution)
    if len(real.sample_shape) == 3:
        config = {"_target_": FOLDER, "path": str(path), "resolution": request.resolution}
        for channels in sorted({samples.sample_shape[0], real.sample_shape[0]}):  # grey where both can be
            if samples.sample_shape[0] != real.sample_shape[0]:
                _, samples = fitted(config, samples, channels)
                reference, real = fitted(reference, real, channels)
    if request.count not in (None, len(samples)):
        raise ValueError(
            f"count: found {request.count}, but {path} holds {len(samples)} images; expected that"
        )
    check_reference(real, samples.sample_shape, str(request.reference), request.resolution)
    unlike = check_classes(samples, real)
    stage = Judge(
        models={},
        data=dict(reference),
        features=request.features,
        count=len(samples),
        k=request.k,
        note=" ".join([*([unlike] if unlike else []), *remarks(real, samples)]),
        by_class=not unlike,
        title=f"Evaluation of {utf8_path(str(request.model))}",
        suffix=suffix(real, samples),
        _real=real,
    )
    source = {"model": utf8_path(str(request.model)), "sha256": samples.fingerprint(), "sampler": None}
    return stage, source, samples


def fitted(config: Mapping[str, Any], images: Any, channels: int) -> tuple[dict[str, Any], Any]:
    """(config, images) with so many channels, where the images are a folder that can be read so without loss."""
    if not isinstance(images, ImageFolder):
        return dict(config), images
    changed = with_channels(config, images, channels)
    return changed, images if changed == dict(config) else build(changed, "reference")


def remarks(real: Any, samples: ImageFolder | None) -> list[str]:
    """Sentences about what was not read of the folders."""
    named = (("Samples", samples), ("Reference", real))
    return [
        f"{what}: {folder.remarks}."
        for what, folder in named
        if isinstance(folder, ImageFolder) and folder.remarks
    ]


def suffix(real: Any, samples: ImageFolder | None) -> str:
    """What the protocol says of resized images."""
    told = [f", {real.resized}"] if isinstance(real, ImageFolder) and real.resized else []
    return "".join(
        told + ([f"; samples {samples.resized}"] if samples is not None and samples.resized else [])
    )


def summary(out: Path) -> str:
    """The table, the protocol and where the files lie, for the terminal."""
    metrics = read_json(out / "metrics.json")
    protocol = Protocol.from_dict(metrics["protocol"])
    lines = [aligned(table(printable(metrics["rows"]), protocol.names()))]
    lines += [f"\nnote: {metrics['note']}"] if metrics["note"] else []
    lines += [f"\nProtocol: {protocol.describe()}.", *(f"  {out / name}" for name in PUBLISHED)]
    return "\n".join(lines)
