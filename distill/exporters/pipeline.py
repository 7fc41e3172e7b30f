"""A pipeline's folder of diffusers with the student as its network."""

from __future__ import annotations

import importlib.util
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.exporters import program, schedulers
from distill.exporters.usage import called
from distill.files import copy, make_folder, write_json, write_text
from distill.models.families import family_of
from distill.models.families.core import Core, plain
from distill.models.families.family import SCHEDULER
from distill.models.families.flux import Flux
from distill.models.families.sdxl import SDXL
from distill.models.generator import Generator
from distill.models.lora_files import network_in, part_of
from distill.models.pretrained import CONFIGS, DTYPES, INDEX, Folder, class_named
from distill.models.prompts import Prompts, Table

SCRIPT = "pipeline.py"
PARTS = r"(unet|transformer|vae|scheduler|safety_checker|feature_extractor|image_encoder|(text_encoder|tokenizer)(_\d)?)"
FILES = (r"model_index\.json", r"pipeline\.py", rf"{PARTS}/.+")  # as of stages: a pattern for each component
TEXT_FILES = (".json", ".txt", ".model", ".jinja")
TOLERANCE = 1e-3  # of images in [0, 1]
COUNT = 2  # of samples that are compared


def core_of(generator: Generator, format: str = "diffusers") -> Core:
    """The diffusers network in a model. Raises ValueError naming `format` for a net of this package."""
    _, core = network_in(generator.denoiser.net)
    if core is None:
        raise ValueError(
            f"format: found {format!r}, but the model's net is one of this package; expected native or lora"
        )
    return core


def write(
    folder: Path, generator: Generator, pipeline: Folder, *, dtype: str | None, file_bytes: int
) -> tuple[schedulers.Stock | None, dict[str, Any], float]:
    """Write the folder, load it with diffusers and compare images of the same noise. The model's weights become float32.

    generator: without an adapter. dtype: of the stored network; None: its own. file_bytes: the most in one file of its weights.

    Returns:
        (the stock scheduler in the folder, or None where `pipeline.py` is needed for the exact steps; arguments of the
        pipeline's call; the largest difference of the images in [0, 1]).

    Raises:
        ValueError: names `pipeline`: another network, a part that is not known, or the sampler.
        RuntimeError: the images differ by more than `TOLERANCE`.
    """
    core = core_of(generator)
    part = part_of(core)
    check_network(pipeline, core)
    stock, call = sampling(generator, pipeline)
    exact = program.program(generator) if stock is None else None
    if stock is None and exact is None:
        raise ValueError(
            "sampler: found the solver rk45, whose steps are no list; expected another, such as heun"
        )
    for name in [name for name in pipeline.index if name in pipeline and name not in (part, SCHEDULER)]:
        _copy_part(pipeline, name, folder)
    if dtype is not None:
        core.net.to(DTYPES[dtype])
    core.net.save_pretrained(
        folder / part, variant=pipeline.variant, safe_serialization=True, max_shard_size=file_bytes
    )
    _write_scheduler(folder, pipeline, stock)
    if exact is not None:
        write_text(folder / SCRIPT, program.script(exact, called(call, generator)))
    core.net.float()
    found = _difference(folder, generator, call, pipeline, exact=stock is None)
    if not found <= TOLERANCE:
        name = SCRIPT if stock is None else stock.name
        raise RuntimeError(
            f"{folder}: images of diffusers with {name} differ by {found:.2g} from the model's, expected at most {TOLERANCE:g}"
        )
    return stock, call, found


def sampling(generator: Generator, pipeline: Folder) -> tuple[schedulers.Stock | None, dict[str, Any]]:
    """(the stock scheduler of a model, arguments of the pipeline's call)."""
    arguments = _arguments(pipeline)
    stock = schedulers.stock_scheduler(generator, arguments)
    steps = {"num_inference_steps": generator.spec.steps} if stock is None else stock.call
    return stock, steps | _call(generator, core_of(generator), arguments)


def check_network(pipeline: Folder, core: Core) -> None:
    """Raise ValueError naming `pipeline` unless its network has the config of a model's; an input for the guidance may have
    been added."""
    part = part_of(core)
    found, own = plain(pipeline.config(part)), core.config()["config"]
    if found != own:
        key = next((key for key in {**found, **own} if found.get(key) != own.get(key)), "")
        raise ValueError(
            f"pipeline: {pipeline.path / part / CONFIGS[0]}: {key}: found {found.get(key)!r}, but the model has "
            f"{own.get(key)!r}: it was made from another pipeline"
        )


def _call(generator: Generator, core: Core, arguments: list[str]) -> dict[str, Any]:
    """The guidance, the size and what else the pipeline must be given."""
    spec, (height, width) = generator.spec, generator.shape[-2:]
    scale = spec.guidance_scale if spec.guidance_w is None else spec.guidance_w + 1
    if isinstance(core, Flux):
        scale = core.guidance if core.guidance is not None else 0.0
    made: dict[str, Any] = {"guidance_scale": float(scale), "height": height, "width": width}
    made["use_resolution_binning"] = False
    if isinstance(core, SDXL) and core.time_ids != [height, width, 0, 0, height, width]:
        sizes = [tuple(int(number) for number in core.time_ids[i : i + 2]) for i in (0, 2, 4)]
        made |= dict(zip(("original_size", "crops_coords_top_left", "target_size"), sizes, strict=True))
    source = generator.conditions.table.source if isinstance(generator.conditions, Prompts) else None
    if source is not None and source.negative and scale != 1:
        made["negative_prompt"] = source.negative
    return {name: value for name, value in made.items() if name in arguments}


def _copy_part(pipeline: Folder, part: str, folder: Path) -> None:
    """Copy a part's files: configs, and the weights of the pipeline's variant."""
    if not re.fullmatch(PARTS, part):
        raise ValueError(
            f"pipeline: {pipeline.path / INDEX}: {part}: no part that this version knows; expected null"
        )
    place = pipeline.path / part
    has = any(path.suffix in (".safetensors", ".bin") for path in place.iterdir())
    weights = pipeline.weights(part) if has else []
    index = f".index.{pipeline.variant}.json" if pipeline.variant else ".index.json"
    for path in sorted(place.iterdir()):
        text = path.suffix in TEXT_FILES and (".index." not in path.name or path.name.endswith(index))
        if path.is_file() and (text or path in weights):
            copy(path, folder / part / path.name)


def _write_scheduler(folder: Path, pipeline: Folder, stock: schedulers.Stock | None) -> None:
    """The scheduler's config, that of the pipeline without a stock one, and model_index.json."""
    index = dict(pipeline.index)
    config = pipeline.config(SCHEDULER)
    if stock is not None:
        config = {"_class_name": stock.name} | stock.config
        index[SCHEDULER] = ["diffusers", stock.name]
        if family_of(pipeline)[1].network == "unet" and "prompt" not in _arguments(pipeline):
            # Pipelines of pixels: one of them makes every scheduler a DDIM.
            index["_class_name"] = "DDIMPipeline" if stock.name == "DDIMScheduler" else "DDPMPipeline"
    make_folder(folder / SCHEDULER)
    write_json(folder / SCHEDULER / CONFIGS[1], config)
    write_json(folder / INDEX, index)


def _arguments(pipeline: Folder) -> list[str]:
    kind = class_named("diffusers", pipeline.pipeline, str(pipeline.path / INDEX))
    return list(inspect.signature(kind.__call__).parameters)


@torch.no_grad()
def _difference(
    folder: Path, generator: Generator, call: dict[str, Any], pipeline: Folder, *, exact: bool
) -> float:
    """Between images that diffusers and the model make of the same random numbers."""
    made = Folder(folder, pipeline.variant)
    others: dict[str, Any] = {}  # what changes images after the sampler
    if made.pipeline == "StableDiffusionXLPipeline":
        others["add_watermarker"] = False
    if "safety_checker" in made.index:
        others["safety_checker"] = None
    pipe = made.assembled(**others)
    if exact:
        spec = importlib.util.spec_from_file_location("exact_pipeline", folder / SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        pipe.scheduler = module.ExactScheduler()
    given, cond = _conditions(generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torch.as_tensor(pipe(**given, **call, output_type="np").images).permute(0, 3, 1, 2)
        torch.manual_seed(0)
        z = torch.randn(COUNT, *generator.denoiser.sample_shape)
        samples = generator.generate(z, cond, noise=lambda step: _noise(generator))
    ours = generator.decoded(samples) / 2 + 0.5
    return float((ours - theirs).abs().max())


def _noise(generator: Generator) -> Tensor:
    """Fresh noise in the order in which the pipeline draws it: FLUX does in tokens of 2x2."""
    channels, height, width = shape = generator.denoiser.sample_shape
    _, core = network_in(generator.denoiser.net)
    if not isinstance(core, Flux):
        return torch.randn(COUNT, *shape)
    tokens = torch.randn(COUNT, height // 2 * (width // 2), 4 * channels)
    patches = tokens.reshape(COUNT, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(COUNT, *shape)


def _conditions(generator: Generator) -> tuple[dict[str, Any], Cond]:
    """Of the compared samples, for the pipeline and for the model, which gets the states of encoders in float32."""
    conditions, ids = generator.conditions, torch.arange(COUNT)
    if not isinstance(conditions, Prompts):
        cond = conditions.of(ids)
        labels = cond.get("label")
        return ({"batch_size": COUNT} if labels is None else {"class_labels": labels.tolist()}), cond
    table = conditions.table
    prompts = [table.prompts[int(i) % conditions.period] for i in ids]
    if table.source is not None and table.source.dtype != "float32":
        encoded = replace(table.source, dtype="float32").encode(prompts)
        again = Table(prompts, encoded.values, encoded.nulls, table.sample_shape)
        return {"prompt": prompts}, again.cond(ids)
    return {"prompt": prompts}, conditions.of(ids)
