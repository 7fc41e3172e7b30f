"""Prompts as data: inserts the stage that encodes them, before the first stage that reads them, and where a method reads
images, one that samples the teacher."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeGuard

from distill.stages.targets import resolve

PROMPTS = "distill.data.prompts.Prompts"
ENCODE, PRETRAINED = "distill.stages.encode.Encode", "distill.stages.pretrained.Pretrained"
GENERATE, TRAIN = "distill.stages.generate.Generate", "distill.stages.train.Train"
NAME, SAMPLES = "prompts", "samples"
SHARED = ("path", "negative", "resolution", "variant")  # options that the stage takes from the teacher
OWN = {"encoder_dtype": "dtype", "encoder_batch_size": "batch_size"}  # option of the prompts -> of the stage


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
        return changed
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
    options |= {OWN[key]: wanted.pop(key) for key in OWN if key in wanted}
    samples = wanted.pop(SAMPLES, None)
    changed = {NAME: {"_target_": ENCODE, **options, "prompts": wanted}, **changed}
    return sampled(changed, next(iter(teachers)), samples) if samples is not None else changed


def _are_prompts(config: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(config, Mapping) and config.get("_target_") == PROMPTS


def sampled(
    stages: Mapping[str, dict[str, Any]], teacher: str, options: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Let the training stages whose methods read images take samples of the teacher of the prompts; `options`: of the Generate
    stage that makes them."""
    changed = copy.deepcopy(dict(stages))
    reading = [
        name for name, config in changed.items() if config.get("data") == NAME and _reads(config, name)
    ]
    if not reading:
        return changed
    if SAMPLES in stages:
        raise ValueError(f"stages.{SAMPLES}: the stage that samples the teacher needs this name; rename it")
    for name in reading:
        changed[name]["data"] = SAMPLES
    stage = {"_target_": GENERATE, "teacher": teacher, "sampler": "teacher", "stream": SAMPLES, **options}
    return {**changed, SAMPLES: stage}


def _reads(config: Mapping[str, Any], name: str) -> bool:
    """Whether a stage trains a method that reads images, and no noise of a teacher's."""
    if config["_target_"] != TRAIN or not isinstance(method := config.get("method"), Mapping):
        return False
    needed = getattr(resolve(method, f"stages.{name}.method"), "needs", lambda options: ())(method)
    return "x0" in needed and "z" not in needed
