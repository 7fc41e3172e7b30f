"""Weights in files: safetensors, one file or several with an index, that are read strictly and compared with a described net.

An index, `model.safetensors.index.json`, is that of transformers and diffusers: `weight_map` says in which file each tensor is.
Its `metadata` have the sha256 of the files too, so that the sha256 of the index stands for all weights.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill.files import read_json, remove, sha256_file, write_json, write_safetensors
from distill.names import inside
from distill.typed import parse

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = r"model-\d{5}-of-\d{5}\.safetensors"
FILE_BYTES = 5 * 10**9  # of tensors in one file
# Stored types of weights, and what they are called; others are no weights of a net.
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
Header = Mapping[str, tuple[tuple[int, ...], str]]
"""name -> (shape, type) of the tensors of a file."""


@dataclass(frozen=True)
class Parts:
    """`metadata` of an index: bytes of all tensors, and the sha256 of each file."""

    total_size: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class Index:
    """The contents of an index. `weight_map`: name of a tensor -> name of the file beside the index that holds it."""

    metadata: Parts
    weight_map: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Index:
        """Raises ValueError naming the file and the entry."""
        found = parse(cls, read_json(path), f"{path}: ")
        if wrong := sorted(set(found.weight_map.values()) ^ set(found.metadata.sha256)):
            raise ValueError(
                f"{path}: {wrong[0]}: found in one of weight_map and metadata.sha256, expected in both"
            )
        for name in found.metadata.sha256:
            inside(path.parent, name, f"{path}: weight_map")
        return found


def weights_path(folder: Path) -> Path:
    """The weights of a model folder: its index where there is no single file."""
    index = folder / INDEX
    return index if index.is_file() and not (folder / WEIGHTS).is_file() else folder / WEIGHTS


def files_of(path: Path) -> list[Path]:
    """All files of the weights: the one at `path`, and of an index its parts."""
    if path.name != INDEX:
        return [path]
    return [path, *(path.parent / name for name in sorted(Index.read(path).metadata.sha256))]


def weights_digest(path: Path) -> str:
    """sha256 of the weights at `path`: of the file, or of an index whose parts have the digests that it lists.

    Raises FileNotFoundError or ValueError naming the part that is missing or differs."""
    if path.name == INDEX:
        for name, expected in Index.read(path).metadata.sha256.items():
            if not (part := path.parent / name).is_file():
                raise FileNotFoundError(f"{part}: missing; {path} lists it")
            if (found := sha256_file(part)) != expected:
                raise ValueError(f"{part}: sha256: found {found}, {path.name} expects {expected}")
    return sha256_file(path)


def write_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    file_bytes: int = FILE_BYTES,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Path:
    """Write the weights of a model folder: one file, or above `file_bytes` files of at most so many (a larger tensor has one of
    its own) and their index. Returns the path of the file or the index.

    whole: gathers sharded tensors; called once for each in the order of names. Its results are dropped with each file."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if parts[-1] and size + tensors[name].nbytes > file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensors[name].nbytes
    if len(parts) == 1:
        write_safetensors(folder / WEIGHTS, {name: whole(tensors[name]) for name in parts[0]})
        return folder / WEIGHTS
    weight_map, digests = dict[str, str](), dict[str, str]()
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file, {name: whole(tensors[name]) for name in names})
        weight_map |= dict.fromkeys(names, file)
        digests[file] = sha256_file(folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, asdict(Index(Parts(total, digests), weight_map)))
    return folder / INDEX


def remove_others(kept: Path) -> None:
    """Delete weights of a model folder that are not those at `kept`."""
    names = {path.name for path in files_of(kept)}
    for path in kept.parent.iterdir():
        if path.name not in names and re.fullmatch(
            rf"{re.escape(WEIGHTS)}|{re.escape(INDEX)}|{PART}", path.name
        ):
            remove(path)


def stored_tensors(path: Path) -> Header:
    """The header of a safetensors file, or those of an index together, without the tensors. Raises ValueError naming the file,
    and of an index the tensor that is missing, unexpected or in two files."""
    if path.name == INDEX:
        index, found = Index.read(path), dict[str, tuple[tuple[int, ...], str]]()
        for part in sorted(index.metadata.sha256):
            own = _header(path.parent / part)
            _check_part(path, index, part, own)
            found |= own
        return found
    return _header(path)


def _check_part(path: Path, index: Index, part: str, found: Iterable[str]) -> None:
    """Raise ValueError unless a file holds exactly the tensors that the index expects in it."""
    expected = {name for name, file in index.weight_map.items() if file == part}
    for name in sorted(expected ^ set(found)):
        if name in expected:
            raise ValueError(f"{path.parent / part}: {name}: missing; {path.name} expects it there")
        other = index.weight_map.get(name)
        told = "does not list it" if other is None else f"expects it in {other}: it is stored twice"
        raise ValueError(f"{path.parent / part}: {name}: unexpected; {path.name} {told}")


def _header(path: Path) -> Header:
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
    """The tensors of a weights file, or of the files of an index, on the CPU. Raises ValueError naming the one that is not
    finite."""
    weights = tensors_of(path)
    check_finite(weights, path)
    return weights


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file, or of the files of an index, as they are. They lie in the files' pages."""
    weights: dict[str, Tensor] = {}
    for file in files_of(path):
        if file.name != INDEX:
            weights |= safetensors.torch.load_file(file, device="cpu")
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
