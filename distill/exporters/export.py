"""Exports of a model: what the Export stage and `python -m distill.export` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.exporters import comfyui, lora, pipeline, usage
from distill.models.adapters import adapter_of, merged
from distill.models.description import DESCRIPTION
from distill.models.families import family_of
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.pretrained import DTYPES, Folder
from distill.models.pretrained import INDEX as PIPELINE
from distill.models.prompts import Prompts
from distill.models.weights import FILE_BYTES, INDEX, WEIGHTS

FORMATS = ("native", "diffusers", "lora", "comfyui")
NEEDED = {
    "native": (f"{WEIGHTS}|{INDEX}", DESCRIPTION),
    "lora": (lora.PEFT,),
    "diffusers": (PIPELINE,),
}  # format -> files that it always has; of those in "A|B" one
TOLERANCE = 1e-3  # of images in [-1, 1], where an export is not bit-equal


@dataclass(frozen=True)
class Options:
    """What to export.

    Attributes:
        format: one of `FORMATS`. merged: add an adapter's terms to the weights of its base first.
        pipeline: folder of the diffusers pipeline that the model was made from. variant: of the weights in it.
        export_dtype: the type that the network's parameters are stored in; None: their own. file_bytes: the most in one file of
            weights, see `models.weights.write_weights`.
    """

    format: str = "native"
    merged: bool = False
    pipeline: str | None = None
    variant: str | None = None
    export_dtype: str | None = None
    file_bytes: int = FILE_BYTES

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: found {self.format!r}, expected one of {', '.join(FORMATS)}")
        if self.merged and self.format == "lora":
            raise ValueError("merged: found true, but format=lora writes the adapter; expected false")
        if self.export_dtype not in (None, *DTYPES):
            raise ValueError(
                f"export_dtype: found {self.export_dtype!r}, expected one of {', '.join(DTYPES)}, or null"
            )
        if self.file_bytes < 1:
            raise ValueError(f"file_bytes: found {self.file_bytes}, expected at least 1")


@dataclass
class Exported:
    """What was written.

    Attributes:
        generator: the model. facts: numbers for the stage's record. use: the card's section on use; None: the native one.
    """

    generator: Generator
    facts: dict[str, Any] = field(default_factory=dict)
    use: str | None = None

    def lines(self) -> list[str]:
        """What was measured, for the terminal."""
        found: Mapping[str, float] = self.facts.get("differences", {})
        return [f"{file}: differs by {number:.2g} from the model" for file, number in found.items()]


def check(generator: Generator, options: Options) -> None:
    """Raise ValueError naming the option, or FileNotFoundError for the pipeline, where a model cannot be exported so. Of the
    model, only its description is read."""
    adapter = adapter_of(generator.denoiser.net)
    if options.merged and adapter is None:
        raise ValueError("merged: found true, but the model has no adapter; expected false")
    if (
        adapter is not None
        and adapter.guidance is not None
        and (options.merged or options.format != "native")
    ):
        option = "merged: found true" if options.merged else f"format: found {options.format!r}"
        raise ValueError(
            f"{option}, but the adapter takes the guidance w as an input, which only this package's model folders hold; "
            "expected format=native"
        )
    if options.export_dtype is not None and (
        options.format == "lora" or (options.format == "comfyui" and adapter and not options.merged)
    ):
        raise ValueError(
            f"export_dtype: found {options.export_dtype!r}, but format={options.format} writes the adapter, in float32; "
            "expected null"
        )
    if options.format in ("diffusers", "comfyui"):
        pipeline.core_of(generator, options.format)
    if options.format == "comfyui":
        comfyui.levels(generator)
    if options.format == "lora" and adapter is None:
        raise ValueError(
            "format: found 'lora', but the model has no adapter; expected native, diffusers or comfyui"
        )


def export(source: Path, folder: Path, options: Options, recipe: str) -> Exported:
    """Write a model folder in another format, and check what was written.

    Raises:
        ValueError, FileNotFoundError: see `check`.
        RuntimeError: what was written makes other samples.
    """
    generator = load_model(source)
    check(generator, options)
    return WRITERS[options.format](generator, folder, options, recipe)


def pipeline_of(generator: Generator, options: Options) -> Folder | None:
    """The folder of `pipeline`, or the one whose text encoders made the model's prompts; None without.

    Raises FileNotFoundError naming `pipeline` where it is gone."""
    path, variant, conditions = options.pipeline, options.variant, generator.conditions
    if path is None and isinstance(conditions, Prompts) and (made := conditions.table.source) is not None:
        path, variant = made.path, made.variant
    if path is None:
        return None
    try:
        folder = Folder(path, variant)
        family_of(folder)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"pipeline: {str(error).removeprefix('path: ')}") from error
    return folder


def facts_of(generator: Generator, recipe: str) -> dict[str, Any]:
    """What other tools should know of a student: how it was made and how it is sampled."""
    model, spec = generator.denoiser, generator.spec
    adapter = adapter_of(model.net)
    origin = None if adapter is None else adapter.origin
    return {
        "recipe": recipe,
        "base_sha256": None if origin is None else origin.sha256,
        "kind": model.kind,
        "process": type(model.process).__name__,
        "mode": spec.mode,
        "steps": spec.steps,
        "times": spec.grid(model.process).tolist(),
        "start_scale": spec.start_scale,
        "guidance_scale": spec.guidance_scale,
        "guidance_learned": spec.guidance_baked,
        "guidance_w": spec.guidance_w,
    }


def _native(generator: Generator, folder: Path, options: Options, recipe: str) -> Exported:
    model = generator.denoiser
    net = merged(model.net) if options.merged else model.net
    made, tolerance = model.with_(net=net, conditions=generator.conditions.exported(folder)), 0.0
    if options.export_dtype is not None:
        round_parameters(net, options.export_dtype)
        generator = Generator(model.with_(net=net, conditions=model.conditions), generator.spec)
    elif options.merged:
        tolerance = TOLERANCE
    save_model(folder, made, generator.spec, file_bytes=options.file_bytes, dtype=options.export_dtype)
    again, wanted = load_model(folder), generator.sample(4)
    found = float((again.sample(4) - wanted).abs().max())
    if found > tolerance:
        raise RuntimeError(
            f"{folder}: the export does not reproduce the samples of the model: they differ by {found:.2g}"
        )
    return Exported(generator, {"parameters": sum(p.numel() for p in again.denoiser.parameters())})


@torch.no_grad()
def round_parameters(net: nn.Module, dtype: str) -> None:
    """Round the parameters of a net to a type, in place; they keep their own.

    Raises ValueError naming `export_dtype` and the parameter that it cannot hold."""
    for name, parameter in net.named_parameters():
        rounded = parameter.to(DTYPES[dtype])
        if not bool(rounded.isfinite().all()):
            raise ValueError(
                f"export_dtype: found {dtype!r}, which cannot hold {name} with numbers up to "
                f"{float(parameter.abs().max()):.4g}; expected bfloat16 or float32"
            )
        parameter.copy_(rounded)


def _lora(generator: Generator, folder: Path, options: Options, recipe: str) -> Exported:
    found = pipeline_of(generator, options)
    differences = lora.write(folder, generator.denoiser, found, facts_of(generator, recipe))
    stock, call = (None, None) if found is None else pipeline.sampling(generator, found)
    return Exported(generator, {"differences": differences}, usage.of_lora(generator, lora.PEFT, call, stock))


def _diffusers(generator: Generator, folder: Path, options: Options, recipe: str) -> Exported:
    found, plain = _pipeline(generator, options), _whole(generator)
    if options.export_dtype is not None:
        round_parameters(plain.denoiser.net, options.export_dtype)
    stock, call, difference = pipeline.write(
        folder, plain, found, dtype=options.export_dtype, file_bytes=options.file_bytes
    )
    facts = {"scheduler": None if stock is None else stock.name, "differences": {"images": difference}}
    return Exported(plain, facts, usage.of_pipeline(plain, call, stock))


def _comfyui(generator: Generator, folder: Path, options: Options, recipe: str) -> Exported:
    made = _whole(generator) if options.merged else generator
    if options.export_dtype is not None:
        round_parameters(made.denoiser.net, options.export_dtype)
    facts = facts_of(made, recipe)
    found = comfyui.write(folder, made, _pipeline(made, options), facts, dtype=options.export_dtype)
    return Exported(
        made, {"differences": found}, usage.of_workflow(made, comfyui.LORA if found else comfyui.MODEL)
    )


def _pipeline(generator: Generator, options: Options) -> Folder:
    found = pipeline_of(generator, options)
    if found is None:
        raise ValueError(
            "pipeline: missing; expected the folder of the pipeline that the model was made from"
        )
    return found


def _whole(generator: Generator) -> Generator:
    """The model with an adapter's terms in its weights."""
    model = generator.denoiser
    if adapter_of(model.net) is None:
        return generator
    return Generator(model.with_(net=merged(model.net), conditions=model.conditions), generator.spec)


WRITERS: Mapping[str, Callable[[Generator, Path, Options, str], Exported]] = {
    "native": _native,
    "diffusers": _diffusers,
    "lora": _lora,
    "comfyui": _comfyui,
}
