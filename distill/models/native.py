"""Models as folders: `model.safetensors` (the net's weights) and `model.json` (what they mean), nothing else needed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from distill.data.plain import plain_torch
from distill.files import canonical_json, sha256_file, write_json, write_safetensors
from distill.models.build import REFUSALS, at_most, build_net, build_process
from distill.models.conditions import Nothing, classes, of_net
from distill.models.denoiser import Denoiser, embeds_guidance
from distill.models.description import DESCRIPTION, SCHEMA, WEIGHTS, Description
from distill.models.generator import Generator, value_range
from distill.models.spec import SamplerSpec
from distill.names import inside
from distill.process.base import Process

# Stored types of weights, and what they are called; others are no weights of a net.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def describe(denoiser: Denoiser, net: Mapping[str, Any], spec: SamplerSpec) -> dict[str, Any]:
    """The contents of `model.json` except the weights' digest; `net` is the config that `build_net` makes the net
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
        "num_classes": denoiser.conditions.num_classes,
        "value_range": value_range(denoiser.sample_shape),
        "sampler": spec.to_dict(),
    }


def save_model(folder: Path, state: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write weights (the net's state dict), then their description; both atomically."""
    write_safetensors(folder / WEIGHTS, state)
    weights = {"file": WEIGHTS, "sha256": sha256_file(folder / WEIGHTS)}
    write_json(folder / DESCRIPTION, dict(description) | {"weights": weights})


def read_weights(folder: Path | str) -> dict[str, Tensor]:
    """The net's weights of a model folder, on the CPU: those that the description names by their sha256, floating and
    finite.

    Raises FileNotFoundError or ValueError; the message names the file and the tensor."""
    folder = Path(folder)
    path = _weights_file(folder, Description.read(folder))
    _header(path)
    return _load(path)


@plain_torch()
def load_model(folder: Path | str, *, device: torch.device | str = "cpu") -> Generator:
    """Read a model folder into a `Generator` in eval mode.

    What the description asks for is compared with the names and shapes in the weights file before memory is taken for it;
    weights have the sha256 of the description, and are finite. Weights of another float type than the net's are converted,
    with a warning. The model is the same whatever torch's default device and type are.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    where = f"{folder / DESCRIPTION}: "
    path = _weights_file(folder, description)
    process = build_process(description.process, f"{where}process")
    _check_process(description, process, where)
    _check_net(description, path, where)
    net = build_net(description.net, f"{where}net")
    net.load_state_dict(_load(path))
    try:
        denoiser = _denoiser(description, net, process)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
    generator = Generator(denoiser.eval(), description.sampler)
    return generator.to(device)


def sketch_model(folder: Path | str) -> Generator:
    """A model folder as `load_model` reads it, with its net on the meta device: nothing is allocated and no weight is read,
    so neither their sha256 nor their values are checked.

    Raises FileNotFoundError or ValueError; the message names the file and the entry."""
    folder = Path(folder)
    description = Description.read(folder)
    where = f"{folder / DESCRIPTION}: "
    path = inside(folder, description.weights.file, f"{folder / DESCRIPTION}: weights.file")
    process = build_process(description.process, f"{where}process")
    _check_process(description, process, where)
    net = _check_net(description, path, where)
    return Generator(_denoiser(description, net, process).eval(), description.sampler)


def _denoiser(description: Description, net: nn.Module, process: Process) -> Denoiser:
    denoiser = Denoiser(
        net,
        process,
        description.kind,
        description.sample_shape,
        conditions=classes(description.num_classes),
        guidable=description.guidable,
        coupling=description.coupling,
        boundary=description.boundary,
    )
    denoiser.sampler = description.sampler
    return denoiser


def _weights_file(folder: Path, description: Description) -> Path:
    """The weights beside the description that names them, with the sha256 that it expects."""
    named = description.weights
    path = inside(folder, named.file, f"{folder / DESCRIPTION}: weights.file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {folder / DESCRIPTION} names it as the weights")
    if (found := sha256_file(path)) != named.sha256:
        raise ValueError(f"{path}: sha256: found {found}, {DESCRIPTION} expects {named.sha256}")
    return path


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, type) of the tensors of a weights file, without reading them."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    for name, (_, dtype) in found.items():
        if dtype not in FLOATS:
            raise ValueError(f"{path}: {name}: found the type {dtype}, expected one of {list(FLOATS)}")
    return found


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, all of them finite."""
    weights = safetensors.torch.load_file(path, device="cpu")
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{path}: {name}: found {count} of {tensor.numel()} numbers that are not finite, expected finite weights"
            )
    return weights


def _check_process(description: Description, process: Process, where: str) -> None:
    """The process is one from data to noise, and the kind and the sampler's times are its own."""
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    weights = torch.stack([process.alpha(ends), process.sigma(ends)])
    clean, noisy = process.log_ratio(ends).tolist()
    if not bool(weights.isfinite().all()) or not clean > noisy:
        raise ValueError(
            f"{where}process: found {process!r}, whose weights of data and noise at its ends are {weights.T.tolist()}; "
            "expected finite ones, from clean to noisy"
        )
    try:
        process.check_kind(description.kind)
    except ValueError as error:
        raise ValueError(f"{where}kind: {error}") from error
    try:
        description.sampler.check_process(process)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _check_net(description: Description, path: Path, where: str) -> nn.Module:
    """The net that the description asks for, on the meta device, where nothing is allocated: it has exactly the tensors of
    the weights file, and takes the samples."""
    stored = _header(path)
    with torch.device("meta"), at_most(len(stored)):
        net = build_net(description.net, f"{where}net").to("meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    wrong = [f"{name}: missing, expected {list(wanted[name])}" for name in wanted.keys() - stored.keys()]
    wrong += [f"{name}: unexpected" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        if (found := stored[name][0]) != wanted[name]:
            wrong.append(f"{name}: found shape {list(found)}, expected {list(wanted[name])}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path}: does not fit the net that {DESCRIPTION} describes: {'; '.join(sorted(wrong)[:3])}{more}"
        )
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in net.state_dict().items()}
    if cast := [name for name, (_, dtype) in stored.items() if FLOATS[dtype] != types[name]]:
        warnings.warn(
            f"{path}: {len(cast)} tensors are {FLOATS[stored[cast[0]][1]]} and are converted to {types[cast[0]]}",
            stacklevel=3,
        )
    _check_samples(description, net, where)
    return net


_calls: set[str] = set()  # of nets that take their samples: a run loads the same ones again and again


def _check_samples(description: Description, net: nn.Module, where: str) -> None:
    """A net on the meta device takes samples, classes and guidance as the description says."""
    conditions = of_net(net) or Nothing()
    if conditions.num_classes != description.num_classes:
        raise ValueError(
            f"{where}num_classes: found {description.num_classes}, but the net takes {conditions.num_classes}"
        )
    embeds, given = embeds_guidance(net), description.sampler.guidance_w
    if embeds != (given is not None):
        found = "takes" if embeds else "does not take"
        raise ValueError(
            f"{where}sampler.guidance_w: found {given}, but the net {found} the guidance as an input"
        )
    shape = description.sample_shape
    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    call = canonical_json(
        {"net": description.net, "shape": shape, "conditions": conditions.config(), "w": embeds}
    )
    if call in _calls:
        return
    cond = conditions.of(torch.zeros(1, dtype=torch.int64)).with_guidance(0.0 if embeds else None).to("meta")
    try:
        with torch.no_grad():
            made = tuple(net(x, t, cond).shape)
    except REFUSALS as error:
        raise ValueError(f"{where}sample_shape: the net does not take {list(shape)}: {error}") from error
    if made != (1, *shape):
        raise ValueError(
            f"{where}sample_shape: found {list(shape)}, but the net makes {list(made[1:])} of it"
        )
    _calls.add(call)
