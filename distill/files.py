"""Writing files so that nobody ever sees half of one: a temporary name beside the target, flushed to disk,
then renamed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY_SUFFIX = ".part"
LARGEST_JSON = 64 * 2**20  # a manifest of a million shards is smaller

_UMASK = os.umask(0)
os.umask(_UMASK)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename the result to `path`; on an error nothing is left at either
    name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_UMASK)  # some writers make files that only their owner can read
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        # Writers report a full disk each in their own way; the file and the space left say what happened.
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path}: could not be written ({free} bytes free): {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself survives a power cut
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Atomically write `text` as UTF-8."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Atomically write `value` as indented JSON; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write tensors, in sorted order and without metadata, so equal tensors give equal bytes."""
    ordered = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    write_atomic(path, lambda temporary: save_file(ordered, temporary))


def link(source: Path, target: Path) -> None:
    """The same file under another name (a copy across file systems). Finished files are replaced and never
    rewritten, so sharing them is safe."""
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        write_atomic(target, lambda temporary: shutil.copyfile(source, temporary))


def read_json(path: Path) -> Any:
    """Read JSON, strictly: a regular file of at most `LARGEST_JSON` bytes, no key twice in an object, every number finite.

    Raises FileNotFoundError, or ValueError; the message names the file. `typed.parse` gives the value its types."""
    try:
        status = path.stat()  # never opened first: opening a pipe waits for its writer
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: not a regular file, expected a JSON file")
    if status.st_size > LARGEST_JSON:
        raise ValueError(f"{path}: has {status.st_size} bytes, expected JSON of at most {LARGEST_JSON}")
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path}: not valid JSON ({what})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"found {text}, expected a finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text}, expected a finite number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"found an integer of {len(text)} digits, expected 64 bits")
    return int(text)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises ValueError naming the entry whose number is not finite, which JSON has no form for."""
    if (place := _not_finite(value, "")) is not None:
        raise ValueError(f"{place}: found a number that is not finite, expected a finite one")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _not_finite(value: Any, place: str) -> str | None:
    """The dotted place of the first number that is nan or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return place
    entries: Any = ()
    if isinstance(value, Mapping):
        entries = value.items()
    elif isinstance(value, list | tuple):
        entries = enumerate(value)
    found = (_not_finite(entry, f"{place}.{key}".lstrip(".")) for key, entry in entries)
    return next((inner for inner in found if inner is not None), None)


def sha256_text(text: str) -> str:
    """sha256 of UTF-8 text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
