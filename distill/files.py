"""Atomic file writes (a temporary file beside the target, flushed to disk, then renamed), strict JSON, checksums."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_SUFFIX = ".part"
LARGEST_JSON = 64 * 2**20  # bytes; a manifest of a million shards is smaller

_UMASK = os.umask(0)
os.umask(_UMASK)

# Advice for failed writes.
_HINTS = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some of your quota, or choose a folder on another disk",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "choose a writable folder",
    errno.EPERM: "choose a writable folder",
    errno.ENAMETOOLONG: "use a shorter name",
}
_guards: list[Callable[[], None]] = []


class Lost(ValueError):
    """The folder that this process writes to may belong to another process."""


@contextmanager
def guarded(check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before every write inside the block; it raises `Lost` to prevent the write."""
    _guards.append(check)
    try:
        yield
    finally:
        _guards.remove(check)


def _check_guards() -> None:
    for check in _guards:
        check()


@contextmanager
def writing(path: Path, size: int | None = None, temporary: Path | None = None) -> Iterator[None]:
    """Convert errors of the file system inside the block to an OSError with the path, the size and the free bytes.

    Args:
        path: the target.
        size: bytes to write, if known.
        temporary: path of the temporary file.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # Errors for a full disk differ between writers; path, size and free bytes are always reported.
        number = error.errno if isinstance(error, OSError) else None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        details = [] if size is None else [f"{size} bytes to write"]
        if size is None and temporary is not None and temporary.is_file():
            details = [f"stopped after {temporary.stat().st_size} bytes"]
        details.append(f"{_free(path)} bytes free")
        hint = f"; {_HINTS[number]}" if number in _HINTS else ""
        raise OSError(f"{path}: could not be written: {reason} ({', '.join(details)}){hint}") from error


def _free(path: Path) -> int | str:
    """Return the free bytes on the disk of `path`, which need not exist."""
    for place in path.absolute().parents:
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return "unknown"


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if they do not exist."""
    if not path.is_dir():
        _check_guards()
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object], size: int | None = None) -> None:
    """Call `write(temporary path)`, then rename the result to `path`. On an error, the temporary file is deleted.

    If `path` is a link, it is replaced and its target is not changed. `size`: bytes to write, for error messages."""
    _check_guards()
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    if os.path.lexists(temporary):  # never write to an existing file or link
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    with writing(path, size):
        temporary.open("xb").close()
    try:
        with writing(path, size, temporary):
            write(temporary)
            temporary.chmod(0o666 & ~_UMASK)  # some writers make files with mode 0600
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
        _check_guards()  # again, because writing may take long
        with writing(path, size):
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename a folder, whose files are flushed to disk already."""
    _check_guards()
    with writing(target):
        source.rename(target)
    sync(target.parent)


def sync(folder: Path) -> None:
    """Flush renames and deletions in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems do not support it
            os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically as UTF-8."""
    content = text.encode()
    write_atomic(path, lambda temporary: temporary.write_bytes(content), len(content))


def append_text(path: Path, text: str) -> None:
    """Append `text` as UTF-8 to a file; raise OSError if it is a link."""
    _check_guards()
    content = text.encode()
    with writing(path, len(content)):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(path, flags, 0o666), "ab") as handle:
            handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors atomically, sorted by name, without metadata or with sorted entries: equal contents give equal bytes."""
    from safetensors.torch import save, save_file  # verbs that only print need no torch

    ordered = {name: tensors[name].detach().to("cpu").contiguous() for name in sorted(tensors)}
    size = sum(tensor.nbytes for tensor in ordered.values())
    if metadata is None:
        write_atomic(path, lambda temporary: save_file(ordered, temporary), size)
        return
    content = save(ordered)
    start = 8 + int.from_bytes(content[:8], "little")
    # The writer's own metadata is in random order. Spaces keep the tensors at a multiple of 8 bytes.
    header = json.dumps(
        {"__metadata__": dict(sorted(metadata.items()))} | json.loads(content[8:start])
    ).encode()
    header += b" " * (-len(header) % 8)
    whole = len(header).to_bytes(8, "little") + header + content[start:]
    write_atomic(path, lambda temporary: temporary.write_bytes(whole), len(whole))


def copy(source: Path, target: Path) -> None:
    """Copy a file's content atomically. Links at `source` are followed; the copy is a separate file."""
    write_atomic(target, lambda temporary: shutil.copyfile(source, temporary), source.stat().st_size)


def remove(path: Path) -> None:
    """Delete a file or a link (not its target); does nothing if it does not exist."""
    _check_guards()
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{path}: could not be deleted: {error.strerror}") from error


APPEARS = 120.0  # seconds; network file systems show a file of another machine after at most about a minute


def stamp(path: Path) -> tuple[int, int]:
    """Size and time of modification of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def await_file(path: Path, wanted: tuple[int, int], seconds: float = APPEARS) -> None:
    """Wait until this machine sees a file as the main process does (`stamp`). Raises FileNotFoundError after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found = None
        with suppress(OSError), path.open("rb") as handle:  # opening asks the server
            status = os.fstat(handle.fileno())
            found = (status.st_size, status.st_mtime_ns)
        if found == wanted:
            return
        if time.monotonic() > deadline:
            seen = "no file" if found is None else "another file"
            raise FileNotFoundError(
                f"{path}: found {seen} after {seconds:.0f} s, but the main process sees one of {wanted[0]} bytes; expected one "
                "file system for all machines"
            )
        time.sleep(0.2)


def read_json(path: Path) -> Any:
    """Read JSON from a regular file of at most `LARGEST_JSON` bytes. `typed.parse` converts the value to types.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: names the file and what is wrong: not UTF-8 or JSON, a duplicate key, a number that is not finite, ...
    """
    try:
        status = path.stat()  # before opening: opening a pipe waits for its writer
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
        raise ValueError(f"found the key {twice!r} twice in an object")
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
    """Return JSON with sorted keys and no spaces: equal values give equal text.

    Raises ValueError naming the entry whose number is not finite."""
    if (place := _not_finite(value, "")) is not None:
        raise ValueError(f"{place}: found NaN or infinity, expected a finite number")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def _not_finite(value: Any, place: str) -> str | None:
    """Return the dotted place of the first number that is NaN or infinite, or None."""
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
    """Return the sha256 of `text` as UTF-8, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


KEPT_ABOVE = 64 * 2**20  # bytes; smaller files are read faster than a record of them
KEPT_AFTER = 2 * 10**9  # nanoseconds; a younger file may be changed again within one tick of its times


def sha256_kept(path: Path) -> str:
    """`sha256_file`, computed once for a large file: the digest is kept by path, size, inode and times of modification and of
    change, in `distill/digests.json` of the user's cache folder ($XDG_CACHE_HOME, or ~/.cache). A cache that cannot be read
    or written is not used."""
    if path.stat().st_size < KEPT_ABOVE:
        return sha256_file(path)
    key, stamp, known, kept = str(path.resolve()), _stamp(path), {}, _digests()
    with suppress(OSError, ValueError, TypeError):
        known = {} if kept is None else dict(read_json(kept))
    if isinstance(entry := known.get(key), list) and entry[:-1] == stamp and isinstance(entry[-1], str):
        return entry[-1]
    found = sha256_file(path)
    settled = time.time_ns() - max(stamp[1:3]) > KEPT_AFTER and stamp == _stamp(path)
    if kept is None or not settled:
        return found
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f".{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
        temporary.write_text(canonical_json(known | {key: [*stamp, found]}))
        temporary.replace(kept)
    return found


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _digests() -> Path | None:
    """The file of kept digests; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill" / "digests.json"
    except RuntimeError:
        return None
