"""Describes a training by everything that its weights depend on, as plain containers. Checkpoints record it, so that the
checkpoint of another training is refused."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.data.source import Source
from distill.engine.module import DistillModule
from distill.files import sha256_text
from distill.models.model import Model
from distill.models.weights import weights_digest, weights_path
from distill.process.base import Process

DEPTH = 8  # of nested objects that are looked into


def made_of(method: DistillModule, source: Source, batch_size: int, **settings: Any) -> dict[str, Any]:
    """Method and its options, initial networks, optimizers, seed, stream, data, batch size and `settings`.

    The method's part is computed once, when training begins, and stored in `method.begun`: weights change later."""
    if not method.begun:
        if not isinstance(method.given, dict):
            method.given = _options(method)  # drops references to the networks that were given
        method.begun = {
            "method": name_of(type(method)),
            "options": method.given,
            "start": {role: weights_of(network) for role, network in method.networks.items()},
            "frozen": {role: weights_of(network) for role, network in method.frozen.items()},
        }
    return {
        **method.begun,
        "optim": _optim(method),
        "seed": method.seed,
        "stream": method.stream,
        "data": data_of(source, batch_size),
        "batch_size": batch_size,
        **settings,
    }


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, found, wanted) of every difference between two plain containers."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in sorted({*found, *wanted}, key=str):
            place = f"{where}.{key}" if where else str(key)
            yield from differences(found.get(key, "(absent)"), wanted.get(key, "(absent)"), place)
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield where, found, wanted


def over_length(made: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same with `total` of schedules replaced by "steps" where it equals the length of training, so that a longer training
    compares equal."""

    def schedule(told: Any) -> Any:
        whole = isinstance(told, Mapping) and isinstance(told.get("fields"), Mapping)
        if not whole or told["fields"].get("total") != steps:
            return told
        return {**told, "fields": {**told["fields"], "total": "steps"}}

    optim = {name: {**told, "schedule": schedule(told["schedule"])} for name, told in made["optim"].items()}
    return {**made, "optim": optim}


def weights_of(network: nn.Module) -> str:
    """sha256 over parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} ".encode())
        feed(digest, value)
    return digest.hexdigest()


def feed(digest: Any, value: Tensor) -> None:
    """Update a hash with a tensor's dtype, shape and bytes."""
    plain = value.detach().cpu().contiguous()
    digest.update(f"{plain.dtype} {list(plain.shape)} ".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy())


def data_of(source: Source, batch_size: int) -> str:
    """The source's fingerprint; without one, sha256 over all samples, each fetched once."""
    if callable(fingerprint := getattr(source, "fingerprint", None)):
        return str(fingerprint())
    digest = hashlib.sha256(f"{len(source)} {list(source.sample_shape)} {source.num_classes}".encode())
    for rows in torch.arange(len(source)).split(batch_size):
        batch = source.fetch(rows, torch.arange(len(rows)))
        for name, value in sorted({**vars(batch), **vars(batch.cond)}.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name} ".encode())
                feed(digest, value)
    return digest.hexdigest()


def _options(method: DistillModule) -> dict[str, Any]:
    """Arguments of the constructor by name; model folders as the sha256 of their weights."""
    arguments, options = method.given
    given = inspect.signature(type(method).__init__).bind_partial(None, *arguments, **options).arguments
    # Weights of the method's own networks are in `start` and `frozen`.
    known = {
        id(tensor)
        for network in (*method.networks.values(), *method.frozen.values())
        for tensor in _tensors(network)
    }
    told: dict[str, Any] = {}
    for name, value in list(given.items())[1:]:
        if name in method.FOLDERS:
            told[name] = [weights_digest(weights_path(Path(folder))) for folder in value]
        elif isinstance(value, nn.Module) and {id(tensor) for tensor in _tensors(value)} - known:
            told[name] = {**describe(value), "weights": weights_of(value)}
        elif callable(fingerprint := getattr(value, "fingerprint", None)):
            told[name] = fingerprint()
        else:
            told[name] = describe(value)
    return told


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _optim(method: DistillModule) -> dict[str, Any]:
    """update -> the optimizer's class and groups, and the other settings."""
    told = {}
    for name, optimizer in method.new_optimizers().items():
        groups = [{k: describe(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        settings = method.optim[name]
        others = {
            f.name: describe(getattr(settings, f.name)) for f in fields(settings) if f.name != "optimizer"
        }
        told[name] = {"optimizer": name_of(type(optimizer)), "groups": groups, **others}
    return told


def name_of(kind: Any) -> str:
    """Module and name of a class or function."""
    return f"{kind.__module__}.{kind.__qualname__}"


def describe(value: Any, depth: int = 0) -> Any:
    """An object as plain containers; equal objects give equal containers, in another process too."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str | float):  # plain ones, also of a subclass: checkpoints hold no others
        plain = next(kind(value) for kind in (int, str, float) if isinstance(value, kind))
        return "nan" if plain != plain else plain
    if depth > DEPTH:
        return name_of(type(value))
    if isinstance(value, Tensor | np.ndarray | np.generic):
        digest = hashlib.sha256()
        feed(digest, torch.as_tensor(value))
        return digest.hexdigest()
    if isinstance(value, Mapping):
        return {str(key): describe(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((describe(entry, depth + 1) for entry in value), key=repr)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [describe(entry, depth + 1) for entry in value]
    return _describe_object(value, depth + 1)


def _describe_object(value: Any, depth: int) -> Any:
    if isinstance(value, nn.Module):
        return _describe_network(value, depth)
    if isinstance(value, Process):
        return describe(value.config(), depth)
    if isinstance(value, partial):
        whole = {"call": value.func, "args": value.args, "options": value.keywords}
        return {key: describe(entry, depth) for key, entry in whole.items()}
    if isinstance(value, MethodType):
        return {"call": describe(value.__func__, depth), "of": describe(value.__self__, depth)}
    if isinstance(value, FunctionType):
        return _describe_function(value, depth)
    if isinstance(value, type | BuiltinFunctionType):
        return name_of(value)
    if is_dataclass(value):
        told = {f.name: describe(getattr(value, f.name), depth) for f in fields(value)}
        return {"class": name_of(type(value)), "fields": told}
    if hasattr(value, "__dict__"):
        return {"class": name_of(type(value)), "fields": describe(vars(value), depth)}
    return _without_address(repr(value))


def _describe_network(network: nn.Module, depth: int) -> dict[str, Any]:
    """Structure without weights: layers with their `extra_repr`; of a denoiser also its process, kind and samples."""
    layers = [f"{name} {name_of(type(part))} {part.extra_repr()}" for name, part in network.named_modules()]
    told: dict[str, Any] = {"class": name_of(type(network))}
    told["layers"] = sha256_text(_without_address("\n".join(layers)))
    if isinstance(network, Model):
        told |= {"process": describe(network.process, depth), "kind": network.kind}
        told |= {"sample_shape": list(network.sample_shape), "num_classes": 0}
        told |= {k: v for k, v in network.conditions.config().items() if k != "_target_"}
    return told


def _describe_function(function: FunctionType, depth: int) -> dict[str, Any]:
    """Name, code, defaults and closure: the name does not distinguish lambdas."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return {
        "call": name_of(function),
        "code": sha256_text(_code(function.__code__)),
        "defaults": describe([function.__defaults__, function.__kwdefaults__], depth),
        "closure": describe(cells, depth),
    }


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code, code.co_names, constants))


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)
