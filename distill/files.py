"""Writing files so that nobody ever sees half of one: a temporary name beside the target, flushed to disk,
then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

TEMPORARY_SUFFIX = ".part"
LARGEST_JSON = 64 * 2**20  # a manifest of a million shards is smaller

_UMASK = os.umask(0)
os.umask(_UMASK)

# What a failed write can be answered with.
_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.EPERM: "choose a folder that can be written",
    errno.ENAMETOOLONG: "use a shorter name",
}
_guards: list[Callable[[], None]] = []


class Lost(ValueError):
    """What was being written to belongs to this process no longer."""


@contextmanager
def guarded(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every write inside the block: what it raises (`Lost`) stops the writing."""
    _guards.append(check)
    try:
        yield
    finally:
        _guards.remove(check)


def _still_ours() -> None:
    for check in _guards:
        check()


@contextmanager
def writing(path: Path, size: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """An error of the file system inside the block becomes an OSError that names `path`, what was to be written and the
    bytes that are free.

    size: bytes to write, where they are known; temporary: where the bytes are written first."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Writers report a full disk each in their own way; the file and the space left say what happened.
        number = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        told = [] if size is None else [f"{size} bytes to write"]
        if size is None and temporary is not None and temporary.is_file():
            told = [f"stopped after {temporary.stat().st_size} bytes"]
        told.append(f"{_free(path)} bytes free")
        hint = f"; {_HINTS[number]}" if number in _HINTS else ""
        raise OSError(f"{path}: could not be written: {reason} ({', '.join(told)}){hint}") from error


def _free(path: Path) -> int | str:
    """Bytes free where `path` is or would be."""
    for place in path.absolute().parents:
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return "unknown"


def make_folder(path: Path) -> None:
    """Make a folder with its parents, where it is not there yet."""
    if not path.is_dir():
        _still_ours()
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object], size: int | None = None) -> None:
    """Call `write(temporary path)`, then rename the result to `path`; on an error nothing is left at either name.

    size: bytes that will be written, for the message of an error. A link at `path` is replaced, its target stays."""
    _still_ours()
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    if os.path.lexists(temporary):  # another's file, or a link: never written into
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with writing(path, size):
        temporary.open("xb").close()
    try:
        with writing(path, size, temporary):
            write(temporary)
            temporary.chmod(0o666 & ~_UMASK)  # some writers make files that only their owner can read
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        _still_ours()  # it may have taken long
        with writing(path, size):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make renames and deletions in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Atomically write `text` as UTF-8."""
    content = text.encode()
    write_atomic(path, lambda temporary: temporary.write_bytes(content), len(content))


def append_text(path: Path, text: str) -> None:
    """Append `text` as UTF-8 to a file (never through a link)."""
    _still_ours()
    content = text.encode()
    with writing(path, len(content)):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o666), "ab") as handle:
            handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Atomically write `value` as indented JSON; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Atomically write tensors, in sorted order and without metadata, so equal tensors give equal bytes."""
    ordered = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    size = sum(tensor.nbytes for tensor in ordered.values())
    write_atomic(path, lambda temporary: save_file(ordered, temporary), size)


def copy(source: Path, target: Path) -> None:
    """Atomically copy a file's content. The copy shares no storage with `source`, which may be a link."""
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary), source.stat().st_size)


def remove(path: Path) -> None:
    """Delete a file or a link (not what it leads to); nothing where there is none."""
    _still_ours()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path}: could not be deleted: {error.strerror}") from error


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
