"""The native model format: a folder with `model.safetensors` (weights) and `model.json` (what they mean),
nothing else needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill.data.plain import plain_torch
from distill.files import read_json, sha256_file, write_json, write_safetensors
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator, value_range
from distill.models.spec import SamplerSpec

SCHEMA = 1
REQUIRED = (
    "net",
    "process",
    "kind",
    "sample_shape",
    "guidable",
    "coupling",
    "num_classes",
    "sampler",
    "weights",
)
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
BUILT_FROM = ("distill.nets.", "distill.process.", "distill.models.analytic.")


def build(config: Mapping[str, Any]) -> Any:
    """Call the class that `config["_target_"]` names with the other entries, those that are configs themselves built
    first. Only classes of this package are built: a model file is data, and must not choose code from elsewhere to
    run."""
    target = str(config.get("_target_", ""))
    if not target.startswith(BUILT_FROM):
        raise ValueError(f"_target_: found {target!r}, expected a class under {', '.join(BUILT_FROM)}")
    module, _, name = target.rpartition(".")
    arguments = {
        key: build(value) if isinstance(value, Mapping) and "_target_" in value else value
        for key, value in config.items()
        if key != "_target_"
    }
    return getattr(importlib.import_module(module), name)(**arguments)


def describe(denoiser: Denoiser, net: Mapping[str, Any], spec: SamplerSpec) -> dict[str, Any]:
    """The contents of `model.json` except the weights' digest; `net` is the config that `build` makes the net
    from."""
    return {
        "schema": SCHEMA,
        "net": dict(net),
        "process": denoiser.process.config(),
        "kind": denoiser.kind,
        "sample_shape": list(denoiser.sample_shape),
        "guidable": denoiser.guidable,
        "coupling": denoiser.coupling,
        "boundary": None if denoiser.boundary is None else denoiser.boundary.to_dict(),
        "num_classes": denoiser.num_classes,
        "value_range": value_range(denoiser.sample_shape),
        "sampler": spec.to_dict() | {"kind": denoiser.kind},
    }


def save_model(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write weights (the net's state dict), then their description; both atomically."""
    write_safetensors(folder / WEIGHTS, state)
    weights = {"file": WEIGHTS, "sha256": sha256_file(folder / WEIGHTS)}
    write_json(folder / DESCRIPTION, dict(description) | {"weights": weights})


def read_description(folder: Path) -> dict[str, Any]:
    """`model.json` of a model folder, with its schema checked."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a model folder with {WEIGHTS} and {DESCRIPTION}"
        )
    if not (folder / DESCRIPTION).is_file() and (folder / "export" / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder}: this is a run, not a model; did you mean {folder / 'export'}?")
    description = read_json(folder / DESCRIPTION)
    if not isinstance(description, dict) or description.get("schema") != SCHEMA:
        found = description.get("schema") if isinstance(description, dict) else type(description).__name__
        raise ValueError(f"{folder / DESCRIPTION}: schema: found {found!r}, this version reads {SCHEMA}")
    return description


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The net's weights of a model folder, on the CPU, after comparing their sha256 with the description's."""
    folder = Path(folder)
    named = read_description(folder).get("weights")
    if not isinstance(named, Mapping) or not {"file", "sha256"} <= set(named):
        raise ValueError(f"{folder / DESCRIPTION}: weights: found {named!r}, expected a file and its sha256")
    path = folder / str(named["file"])
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder / DESCRIPTION} names it as the weights")
    if (found := sha256_file(path)) != named["sha256"]:
        raise ValueError(f"{path}: sha256: found {found}, {DESCRIPTION} expects {named['sha256']}")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: does not fit the net that {DESCRIPTION} describes: {error}") from error


@plain_torch()
def load_model(folder: Path | str, *, device: torch.device | str = "cpu") -> Generator:
    """Read a model folder into a `Generator` in eval mode; checks the weights' sha256 and loads strictly."""
    folder = Path(folder)
    description = read_description(folder)
    missing = [key for key in REQUIRED if key not in description]
    if missing:
        raise ValueError(f"{folder / DESCRIPTION}: {missing[0]}: missing; expected {', '.join(REQUIRED)}")
    weights, net = read_weights(folder), build(description["net"])
    try:
        net.load_state_dict(weights)
    except RuntimeError as error:
        path = folder / description["weights"]["file"]
        raise ValueError(f"{path}: does not fit the net that {DESCRIPTION} describes: {error}") from error
    denoiser = Denoiser(
        net,
        build(description["process"]),
        description["kind"],
        description["sample_shape"],
        num_classes=description["num_classes"],
        guidable=description["guidable"],
        coupling=description["coupling"],
        boundary=Boundary.from_dict(boundary) if (boundary := description.get("boundary")) else None,
    )
    denoiser.sampler = spec = SamplerSpec.from_dict(description["sampler"])
    generator = Generator(denoiser.eval(), spec)
    return generator.to(device)
