"""Kills its own process at a given file operation in a folder. `scripts/chaos.py` calls `from_environment` in forks; the
package is not changed.

An operation is (function, kind of file), such as `replace */model.safetensors`. `*` is the folder of a stage, `#` a number.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

# half: the file that is being flushed loses its second half, as in a power cut
WHEN = ("before", "half", "after")


def kind_of(path: str, root: str, stages: list[str]) -> str | None:
    """Return the kind of a file below `root`; None for other files."""
    inside = os.path.relpath(os.path.abspath(path), root)
    if inside.startswith(".."):
        return None
    first, _, rest = inside.partition(os.sep)
    named = "/".join(["*", *([rest] if rest else [])]) if first in stages else inside
    return re.sub(r"\d+|\.[0-9a-f]{8}(?=\.part)", "#", named)


# The path that a function works on, from its arguments.


def first(path: Any, *_: Any, **__: Any) -> Any:
    """Of `unlink`, `mkdir`, ..."""
    return path


def second(_: Any, target: Any, **__: Any) -> Any:
    """Of `replace`, `rename`, ..."""
    return target


def flushed(handle: Any) -> str:
    """Of `fsync`."""
    return os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")


def written(path: Any, mode: str = "r", *_: Any, **__: Any) -> Any:
    """Of `open`; None where it only reads."""
    return path if isinstance(mode, str) and set(mode) & set("wxa+") else None


def opened(path: Any, flags: int, *_: Any, **__: Any) -> Any:
    """Of `os.open`; None where it only reads."""
    return path if flags & (os.O_WRONLY | os.O_RDWR) else None


def install(spec: dict[str, Any]) -> None:
    """Patch the functions for file operations.

    Args:
        spec: `root` (the run folder), `stages`, and either `record` (a file to which every operation is appended) or `what`,
            `kind`, `when`, `number` (kill at its `number`-th occurrence) and `mark` (a file to create just before the kill).
    """
    root, stages, seen = spec["root"], spec["stages"], [0]
    unpatched = builtins.open

    def note(what: str, path: Any, when: str, handle: int | None = None) -> None:
        kind = None if not isinstance(path, (str, os.PathLike)) else kind_of(os.fspath(path), root, stages)
        if kind is None:
            return
        if "record" in spec:
            if when == "before":
                with unpatched(spec["record"], "a") as file:
                    file.write(json.dumps([what, kind]) + "\n")
            return
        if (what, kind) != (spec["what"], spec["kind"]) or when != (
            "after" if spec["when"] == "after" else "before"
        ):
            return
        seen[0] += 1
        if seen[0] == spec["number"]:
            if spec["when"] == "half":
                os.truncate(path, os.path.getsize(path) // 2)
            unpatched(spec["mark"], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner: Any, name: str, what: str, path_of: Callable[..., Any]) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            path = path_of(*arguments, **options)
            note(what, path, "before")
            result = original(*arguments, **options)
            note(what, path, "after")
            return result

        setattr(owner, name, call)

    for name in ("replace", "rename", "link", "symlink"):
        around(os, name, name, second)
    for name in ("unlink", "remove", "rmdir", "mkdir", "truncate"):
        around(os, name, name, first)
    around(os, "fsync", "fsync", flushed)
    around(os, "open", "open", opened)
    around(io, "open", "open", written)
    builtins.open = io.open


def from_environment() -> None:
    """Call `install` with the environment variable DISTURB, where it holds a description, in the process of rank 0."""
    spec = json.loads(os.environ.get("DISTURB", "null"))
    if spec and os.environ.get("RANK", "0") == "0":
        install(spec)
