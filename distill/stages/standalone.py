"""An evaluation outside of a run: any model folder, or any folder of images, against a data set or a folder of images.

Models are sampled and measured as in the Evaluate stage, so the same model, seed, count and reference give the
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

from distill.data.folder import ImageFolder
from distill.data.listing import utf8_path
from distill.evaluation.comparison import aligned
from distill.evaluation.evaluation import Evaluation, Model
from distill.evaluation.meters.images import ImageMeter, one_a_class
from distill.evaluation.meters.meter import Shown
from distill.evaluation.protocol import Protocol
from distill.evaluation.report import table
from distill.files import copy, make_folder, read_json, write_json
from distill.models.generator import Generator
from distill.models.native import load_model
from distill.models.shipped import model_folder
from distill.models.spec import SamplerSpec
from distill.models.weights import weights_digest, weights_path
from distill.stages.artifact import digest_of, read_artifact
from distill.stages.display import Display
from distill.stages.ownership import PUBLISHED, patterns, sweep
from distill.stages.request import (
    FOLDER,
    Request,
    check_classes,
    check_out,
    check_reference,
    fitted,
    is_model,
    label_of,
    place,
    recipe_of,
    reference_config,
)
from distill.stages.threads import table_threads
from distill.stages.trial import build_part

# Step counts below the default that a model valid for any number is measured at.
USUAL_STEPS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Job:
    """What is measured: a model at some step counts, or a folder of images.

    Attributes:
        real: the real images. count: samples a row. source: the entry of metrics.json.
        note: a sentence above the numbers. by_class: the samples' classes are those of the real images.
        facts: what the stage that trained the model recorded.
    """

    real: Any
    count: int
    source: dict[str, Any]
    note: str
    by_class: bool
    model: Generator | None = None
    steps: Sequence[int] = ()
    images: ImageFolder | None = None
    facts: dict[str, Any] = field(default_factory=dict)


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
    """The step counts that a model is measured at by default: those that its sampler lists; where
    any is valid, its default and the usual small ones below it too."""
    usual = [n for n in USUAL_STEPS if spec.any_steps and n < spec.steps]
    return sorted({*spec.times, spec.steps, *usual}, reverse=True)


def evaluate(request: Request, configs: Mapping[str, Path]) -> Path:
    """Measure what `request` names and write metrics.json, report.md and grid.png; returns their folder.

    configs: name -> file of the data sets that `reference` may name. Raises ValueError or OSError naming the option
    or the file, before anything is sampled where that can be known.
    """
    path = model_folder(str(request.model))
    out, reference = place(request, path), reference_config(request, configs)
    with warnings.catch_warnings(record=True) as caught:
        plan = plan_model if is_model(path) else plan_images
        job = plan(request, path, reference, build_part(reference, "reference"))
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"warning: {text}", file=sys.stderr)
    if job.count < request.k + 2:
        raise ValueError(f"count: expected at least k + 2 = {request.k + 2} samples, found {job.count}")
    label, digest = label_of(request, path), job_digest(request, job, label_of(request, path))
    check_out(
        out, digest, [Path(data.path) for data in (job.images, job.real) if isinstance(data, ImageFolder)]
    )
    # The three files appear last; nothing else is left.
    with tempfile.TemporaryDirectory() as folder:
        display = Display("evaluate")
        with warnings.catch_warnings(record=True) as caught:
            measure(request, job, label, digest, Path(folder), display)
        for text in sorted({str(warning.message) for warning in caught}):
            display.line(text)
        metrics = read_json(Path(folder) / "metrics.json") | {"recipe": recipe_of(path), "source": job.source}
        make_folder(out)
        sweep(out, patterns(*PUBLISHED))
        write_json(out / "metrics.json", metrics)  # first: by it the others are known as ours
        for name in ("grid.png", "report.md"):
            copy(Path(folder) / name, out / name)
    return out


def job_digest(request: Request, job: Job, label: str) -> str:
    """Digest of everything that the numbers depend on."""
    identity: dict[str, Any] = {
        "source": {key: value for key, value in job.source.items() if key != "model"},  # wherever it lies
        "real": job.real.fingerprint(),
        "seed": request.seed,
        "features": request.features,
        "count": job.count,
        "k": request.k,
    }
    of_model = job.model is not None
    identity["stream"] = request.stream if of_model else "evaluate"
    identity["guidance_scale"] = request.guidance_scale
    identity["models"] = {label: {"stage": label, "steps": list(job.steps)}} if of_model else {}
    straightness = request.straightness if of_model else None
    identity["straightness"] = None if straightness is None else asdict(straightness)
    if request.noise_scale is not None:
        identity["noise_scale"] = request.noise_scale
    return digest_of(identity)


def measure(request: Request, job: Job, label: str, digest: str, folder: Path, display: Display) -> None:
    """Sample and measure; write the three files into `folder`."""
    device, balanced = request.torch_device, False
    features = build_part(request.features, "features", device)
    meter = ImageMeter(job.real, features, request.k, real_row=True)
    evaluation = Evaluation(
        meter,
        job.count,
        request.batch_size,
        request.seed,
        request.stream if job.model is not None else "evaluate",
        request.straightness if job.model is not None else None,
        grid=[(label, n) for n in job.steps],
        by_class=job.by_class,
        device=device,
        say=display.line,
    )
    if job.model is not None:
        torch.set_num_threads(table_threads(sum(p.numel() for p in job.model.denoiser.parameters())))
        models = {label: Model(job.model.to(device), job.steps, facts=job.facts)}
        with display.bar(len(job.steps), unit="row") as bar:
            rows = evaluation.run(models, folder / "grid.png", bar)
        balanced = evaluation.balanced(models)
    else:
        assert job.images is not None
        evaluation.prepare()
        images = job.images.images
        labels = job.images.labels if job.by_class else None
        rows = [evaluation.row(label, None) | meter.measure(images, labels)]
        chosen = one_a_class(labels, meter.grid_columns, len(images))
        evaluation.draw([Shown(label, images[chosen])], folder / "grid.png")
        balanced = len(set(() if labels is None else labels.bincount().tolist())) == 1
    header = {"recipe": None, "digest": digest, "seed": request.seed, "note": job.note}
    title = f"Evaluation of {utf8_path(str(request.model))}"
    evaluation.write(folder, title, rows, (), header, balanced=balanced, suffix=resized(job.real, job.images))


def plan_model(request: Request, path: Path, reference: Mapping[str, Any], real: Any) -> Job:
    """The job of a model folder."""
    generator = load_model(path)
    if not generator.decoder.images:
        raise ValueError(
            f"model: {path} makes samples of shape {list(generator.shape)}, expected images [C,H,W]"
        )
    if request.resolution is not None and not isinstance(real, ImageFolder):
        raise ValueError(
            f"resolution: found {request.resolution}, but {request.reference} is no folder of images"
        )
    real = fitted(reference, real, generator.shape[0])
    check_reference(real, generator.shape, str(request.reference), request.resolution)
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
    return Job(
        real,
        2000 if request.count is None else request.count,
        {
            "model": utf8_path(str(request.model)),
            "sha256": weights_digest(weights_path(path)),
            "sampler": generator.spec.to_dict(),
        },
        " ".join([*notes, *remarks(real, None)]),
        by_class,
        Generator(generator.denoiser, spec),
        steps,
        facts=(read_artifact(path) or {"facts": {}})["facts"],
    )


def plan_images(request: Request, path: Path, reference: Mapping[str, Any], real: Any) -> Job:
    """The job of a folder of images."""
    for key in ("steps", "guidance_scale", "noise_scale"):
        if (found := getattr(request, key)) is not None:
            raise ValueError(f"{key}: found {found}, but {path} is a folder of images, sampled before")
    samples = ImageFolder(path, request.resolution)
    if real.value_range is not None:
        config = {"_target_": FOLDER, "path": str(path), "resolution": request.resolution}
        for channels in sorted({samples.sample_shape[0], real.sample_shape[0]}):  # grey where both can be
            if samples.sample_shape[0] != real.sample_shape[0]:
                samples, real = fitted(config, samples, channels), fitted(reference, real, channels)
    if request.count not in (None, len(samples)):
        raise ValueError(
            f"count: found {request.count}, but {path} holds {len(samples)} images; expected that"
        )
    check_reference(real, samples.sample_shape, str(request.reference), request.resolution)
    unlike = check_classes(samples, real)
    source = {"model": utf8_path(str(request.model)), "sha256": samples.fingerprint(), "sampler": None}
    notes = [*([unlike] if unlike else []), *remarks(real, samples)]
    return Job(real, len(samples), source, " ".join(notes), not unlike, images=samples)


def remarks(real: Any, samples: ImageFolder | None) -> list[str]:
    """Sentences about what was not read of the folders."""
    named = (("Samples", samples), ("Reference", real))
    return [
        f"{what}: {folder.remarks}."
        for what, folder in named
        if isinstance(folder, ImageFolder) and folder.remarks
    ]


def resized(real: Any, samples: ImageFolder | None) -> str:
    """What the protocol says of resized images."""
    of_real = f", {real.resized}" if isinstance(real, ImageFolder) and real.resized else ""
    return of_real + (f"; samples {samples.resized}" if samples is not None and samples.resized else "")


def summary(out: Path) -> str:
    """The table, the protocol and where the files lie, for the terminal."""
    metrics = read_json(out / "metrics.json")
    protocol = Protocol.from_dict(metrics["protocol"])
    lines = [aligned(table(metrics["rows"], protocol.names()))]
    lines += [f"\nnote: {metrics['note']}"] if metrics["note"] else []
    lines += [f"\nProtocol: {protocol.describe()}.", *(f"  {out / name}" for name in PUBLISHED)]
    return "\n".join(lines)
