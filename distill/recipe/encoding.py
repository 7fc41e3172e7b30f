"""Prompts, and images with captions, as data: inserts the stage that encodes the texts, before the first stage that reads them,
and where a method reads images, one that samples the teacher or encodes the images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from distill.stages.pretrained import has_autoencoder
from distill.stages.targets import resolve
from distill.typed import parse

PROMPTS = "distill.data.prompts.Prompts"
ENCODE, PRETRAINED = "distill.stages.encode.Encode", "distill.stages.pretrained.Pretrained"
ENCODE_IMAGES = "distill.stages.encode_images.EncodeImages"
IMAGES = (
    "distill.data.webdataset.Shards",
    "distill.data.folder.ImageFolder",
)  # with captions, if they are asked for
GENERATE, TRAIN = "distill.stages.generate.Generate", "distill.stages.train.Train"
NAME, SAMPLES, LATENTS = "prompts", "samples", "latents"
SHARED = ("path", "negative", "resolution", "variant")  # options that the stage takes from the teacher
OWN = {"encoder_dtype": "dtype", "encoder_batch_size": "batch_size"}  # option of the prompts -> of the stage
BLOCK = "encode"  # of images: {dtype, batch_size, latents: {...}}


def encode(stages: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replace configs of prompts in the fields `data` and `prompts` of stages by the name of a stage that encodes them with
    the text encoders of the recipe's pipeline. Teachers without prompts keep none.

    Raises:
        ValueError: names the stage: prompts without a pipeline that encodes them, or the stage's name is taken.
    """
    changed: dict[str, dict[str, Any]] = {}
    wanted: Any = None
    for name, config in stages.items():
        changed[name] = config = copy.deepcopy(config)
        monitor = config.get("monitor")
        if isinstance(monitor, Mapping) and _are_prompts(monitor.get("data")):
            config["monitor"] = {**monitor, "data": None}  # no real images
        for key in ("data", "prompts"):
            value = config.get(key)
            if _are_prompts(value):
                if wanted not in (None, value):
                    raise ValueError(
                        f"stages.{name}.{key}: found other prompts than before; expected one file"
                    )
                wanted, config[key] = dict(value), NAME
            elif key == "prompts" and config["_target_"] == PRETRAINED and isinstance(value, Mapping):
                config[key] = None  # other data, which only a teacher without prompts goes with
    if wanted is None:
        return _labelled(changed)
    changed = _without_block(changed)
    teachers = {name: config for name, config in changed.items() if config["_target_"] == PRETRAINED}
    if not teachers:
        raise ValueError(
            "data: found prompts, but no stage loads a pipeline with a text encoder; expected teacher=sd, or another one"
        )
    first = next(iter(teachers.values()))
    options = {key: first[key] for key in SHARED if key in first}
    if others := [
        name
        for name, config in teachers.items()
        if {key: config[key] for key in SHARED if key in config} != options
    ]:
        raise ValueError(f"stages.{others[0]}: other options of prompts than {next(iter(teachers))!r} has")
    if NAME in stages:
        raise ValueError(f"stages.{NAME}: the stage that encodes prompts needs this name; rename it")
    teacher = next(iter(teachers))
    if wanted["_target_"] in IMAGES:
        return _images(changed, teacher, wanted, options)
    options |= {OWN[key]: wanted.pop(key) for key in OWN if key in wanted}
    samples = wanted.pop(SAMPLES, None)
    changed = {NAME: {"_target_": ENCODE, **options, "prompts": wanted}, **changed}
    return sampled(changed, teacher, samples) if samples is not None else changed


def _images(
    stages: dict[str, dict[str, Any]], teacher: str, data: dict[str, Any], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Insert the stage that encodes captions, and where a method reads images, the one that encodes these."""
    block = parse(Block, data.pop(BLOCK, None) or {}, f"data.{BLOCK}")
    text = {"dtype": block.dtype, "batch_size": block.batch_size}
    changed = {NAME: {"_target_": ENCODE, **options, **text, "prompts": data}, **stages}
    stage = {"_target_": ENCODE_IMAGES, "teacher": teacher, "data": data, **(block.latents or {})}
    return _supplied(changed, LATENTS, stage, "encodes the images")


def _labelled(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Insert the stage that encodes images, for stages that train on images without captions and a pipeline on latents."""
    stage: dict[str, Any] | None = None
    for name, config in stages.items():
        data, model = config.get("data"), config.get("teacher") or config.get("init")
        if config["_target_"] != TRAIN or not isinstance(data, Mapping) or data.get("_target_") not in IMAGES:
            continue
        teacher = stages.get(str(model), {})
        if teacher.get("_target_") != PRETRAINED or not has_autoencoder(teacher):
            continue
        block = parse(Block, data.get(BLOCK) or {}, f"data.{BLOCK}")
        made = {"_target_": ENCODE_IMAGES, "teacher": model, "data": dict(data), **(block.latents or {})}
        if LATENTS in stages or stage not in (None, made):
            raise ValueError(
                f"stages.{LATENTS}: a stage encodes the images of {name!r} under this name; rename it"
            )
        stage, config["data"] = made, LATENTS
    return _without_block(stages if stage is None else {**stages, LATENTS: stage})


@dataclass(frozen=True)
class Block:
    """The block `encode` of images with captions: `dtype` of the text encoders' weights, `batch_size` prompts a call, and
    options of the stage that encodes the images."""

    dtype: str = "float32"
    batch_size: int = 64
    latents: dict[str, Any] | None = None


def _without_block(config: Any) -> Any:
    """Configs without the block `encode` of images, which is for the stages that encode them, and without a `caption` of null,
    which folders of older runs do not have in their digests."""
    if isinstance(config, Mapping):
        images = config.get("_target_") in IMAGES
        return {
            key: _without_block(value)
            for key, value in config.items()
            if not (images and (key == BLOCK or (key == "caption" and value is None)))
        }
    return [_without_block(value) for value in config] if isinstance(config, list | tuple) else config


def _are_prompts(config: Any) -> TypeGuard[Mapping[str, Any]]:
    """Or images with captions."""
    if not isinstance(config, Mapping):
        return False
    captioned = config.get("_target_") in IMAGES and config.get("caption") is not None
    return captioned or config.get("_target_") == PROMPTS


def sampled(
    stages: Mapping[str, dict[str, Any]], teacher: str, options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Let the training stages whose methods read images take samples of the teacher of the prompts; `options`: of the Generate
    stage that makes them."""
    stage = {"_target_": GENERATE, "teacher": teacher, "sampler": "teacher", "stream": SAMPLES, **options}
    return _supplied(stages, SAMPLES, stage, "samples the teacher")


def _supplied(
    stages: Mapping[str, dict[str, Any]], name: str, stage: dict[str, Any], what: str
) -> dict[str, dict[str, Any]]:
    """Let the training stages of prompts whose methods read images take those of a stage, which is inserted for them."""
    changed = copy.deepcopy(dict(stages))
    reading = [
        each for each, config in changed.items() if config.get("data") == NAME and _reads(config, each)
    ]
    if not reading:
        return changed
    if name in stages:
        raise ValueError(f"stages.{name}: the stage that {what} needs this name; rename it")
    for each in reading:
        changed[each]["data"] = name
    return {**changed, name: stage}


def _reads(config: Mapping[str, Any], name: str) -> bool:
    """Whether a stage trains a method that reads images, and no noise of a teacher's."""
    if config["_target_"] != TRAIN or not isinstance(method := config.get("method"), Mapping):
        return False
    needed = getattr(resolve(method, f"stages.{name}.method"), "needs", lambda options: ())(method)
    return "x0" in needed and "z" not in needed
