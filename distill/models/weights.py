"""Weights files: safetensors that are read strictly and compared with a described net."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# Stored types of weights, and what they are called; others are no weights of a net.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
Header = Mapping[str, tuple[tuple[int, ...], str]]
"""name -> (shape, type) of the tensors of a file."""


def stored_tensors(path: Path) -> Header:
    """The header of a safetensors file, without its tensors. Raises ValueError naming the file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from error


def read_header(path: Path) -> Header:
    """The header of a weights file. Raises ValueError naming the file and the tensor of another type."""
    found = stored_tensors(path)
    for name, (_, dtype) in found.items():
        if dtype not in FLOATS:
            raise ValueError(f"{path}: {name}: found the type {dtype}, expected one of {list(FLOATS)}")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file on the CPU. Raises ValueError naming the one that is not finite."""
    weights = safetensors.torch.load_file(path, device="cpu")
    check_finite(weights, path)
    return weights


def header_of(weights: Mapping[str, Tensor], path: Path) -> Header:
    """What the header of a weights file of these tensors would say. Raises ValueError naming `path` and the tensor of another
    type."""
    types = {dtype: name for name, dtype in FLOATS.items()}
    found = {}
    for name, tensor in weights.items():
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in types:
            raise ValueError(f"{path}: {name}: found the type {kind}, expected one of {list(types)}")
        found[name] = (tuple(tensor.shape), types[kind])
    return found


def check_finite(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError naming the tensor of a file that is not finite."""
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{path}: {name}: found {count} of {tensor.numel()} numbers that are not finite, expected finite weights"
            )


def check_tensors(
    tensors: Mapping[str, Tensor], stored: Header, path: Path, description: str, dtype: str | None = None
) -> None:
    """Raise ValueError unless a weights file holds exactly `tensors`, those of the net in the file `description`; warn about
    types that are converted, other than `dtype`."""
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [f"{name}: missing, expected {list(wanted[name])}" for name in wanted.keys() - stored.keys()]
    wrong += [f"{name}: unexpected" for name in stored.keys() - wanted.keys()]
    for name in wanted.keys() & stored.keys():
        if (found := stored[name][0]) != wanted[name]:
            wrong.append(f"{name}: found shape {list(found)}, expected {list(wanted[name])}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{path}: does not fit the net that {description} describes: {'; '.join(sorted(wrong)[:3])}{more}"
        )
    types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    if cast := [name for name, (_, kind) in stored.items() if FLOATS[kind] not in (types[name], dtype)]:
        warnings.warn(
            f"{path}: {len(cast)} tensors are {FLOATS[stored[cast[0]][1]]} and are converted to {types[cast[0]]}",
            stacklevel=4,
        )
