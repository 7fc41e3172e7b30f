"""Which files are a run's own. Everything else is neither deleted nor written over.

A run folder is ours if it carries the mark (or the `plan.json` of a run made before there was one), a stage folder if it holds
a record of a stage. In both, only names that we know are deleted; a link is never followed to be emptied or written through.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill.files import TEMPORARY_SUFFIX, make_folder, read_json, remove, sync, write_json, write_text
from distill.names import check_name

MARK, LOCK, PLAN, REDO = ".distill", ".lock", "plan.json", "redo.json"
MARK_TEXT = "A run of distill: its stages write and delete files in this folder.\n"
PUBLISHED = ("metrics.json", "report.md", "grid.png")
ARTIFACT, IDENTITY, CONFIG, EXECUTION = "artifact.json", "identity.json", "config.yaml", "execution.json"
RECORDS = (ARTIFACT, IDENTITY, CONFIG, EXECUTION)
# What lies at the top of a run besides its stages.
OF_A_RUN = (MARK, LOCK, PLAN, REDO, *PUBLISHED)
# In place of the identity of a stage whose files are being deleted: what is left of them is no work to continue.
EMPTIED = "emptied"


def patterns(*names: str) -> tuple[str, ...]:
    """Plain file names as the patterns that `Stage.FILES` holds."""
    return tuple(re.escape(name) for name in names)


def check_names(names: Sequence[object]) -> None:
    """Raise ValueError unless every stage's name is one component of a path, none that the run itself uses, and no two are
    one name on a file system that ignores case."""
    seen: dict[str, object] = {}
    for name in names:
        where = f"stages.{name}"
        plain = _plain(check_name(name, where))
        if plain in {_plain(taken) for taken in (*OF_A_RUN, *RECORDS)}:
            raise ValueError(f"{where}: found a name that the run itself uses; expected another one")
        if plain in seen:
            raise ValueError(
                f"{where}: found a name that differs from {seen[plain]!r} in case alone; expected another one, since some "
                "file systems hold both in one folder"
            )
        seen[plain] = name


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def is_run(folder: Path) -> bool:
    """Whether a folder carries the mark of a run, or holds the plan of one."""
    mark = folder / MARK
    if _regular(mark):
        with suppress(OSError), mark.open("rb") as handle:
            return handle.read(len(MARK_TEXT)).startswith(b"A run of distill")
    found = read_object(folder / PLAN)
    stages = found.get("stages")
    if not isinstance(stages, dict) or not stages or not isinstance(found.get("recipe"), str):
        return False
    return all(isinstance(stage, dict) and "_target_" in stage for stage in stages.values())


def check_run_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` is a run's, or new or empty, and lies in no other run. Writes nothing."""
    ways = "use another name= or runs_dir="
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be a run folder: {error.strerror}; {ways}") from error
    if folder.is_symlink():
        there = folder.resolve()
        raise ValueError(
            f"{folder}: is a link to {there}, expected a folder: a run writes through no link; "
            f"give its place, as in runs_dir={there.parent} name={there.name}, or another name="
        )
    outer = next((place for place in folder.resolve().parents if is_run(place)), None)
    if outer is not None:
        raise ValueError(f"{folder}: lies in the run {outer}; {ways}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder; {ways}")
    for name in sorted(os.listdir(folder.parent)):
        alike = name != folder.name and name.casefold() == folder.name.casefold()
        if alike and (folder.parent / name).samefile(folder):
            raise ValueError(f"{folder}: is the run {name!r} on this file system, which ignores case; {ways}")
    if not is_run(folder) and (foreign := _foreign(folder, (MARK, PLAN))):
        raise ValueError(
            f"{folder}: is not empty and was not made by a run (found {', '.join(foreign[:3])}); {ways}"
        )


def take_run_folder(folder: Path) -> None:
    """Make the run folder, or take the one that is there, and mark it. Raises as `check_run_folder` does."""
    check_run_folder(folder)
    make_folder(folder)
    if not (_regular(folder / MARK) and is_run(folder)):
        write_text(folder / MARK, MARK_TEXT)


def check_stage_folder(folder: Path, made: Sequence[str]) -> None:
    """Raise ValueError unless a stage may write into `folder`: new, empty, or with a record of a stage; neither it nor a
    sub-folder that the stage writes to is a link. Writes nothing.

    made: the patterns of the files that the stage makes."""
    ways = "move it away, or use another name="
    if folder.is_symlink():
        raise ValueError(
            f"{folder}: is a link to {folder.resolve()}, expected a folder: a stage writes through no link; {ways}"
        )
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected the folder of a stage; {ways}")
    if not has_record(folder) and (foreign := _foreign(folder, (IDENTITY,))):
        raise ValueError(
            f"{folder}: is not empty and was not made by a stage (found {', '.join(foreign[:3])}); {ways}"
        )
    for path, leads, fits in _walk(folder, made):
        if leads and (path.is_symlink() or not path.is_dir()):
            what = f"a link to {path.resolve()}" if path.is_symlink() else "a file"
            raise ValueError(f"{path}: is {what}, expected a folder of the stage; {ways}")
        if fits and path.is_dir() and not path.is_symlink():
            raise ValueError(f"{path}: is a folder, expected a file of the stage; {ways}")


def has_record(folder: Path) -> bool:
    """Whether a folder holds the record of a stage, finished or begun."""
    for name, keys in (
        (IDENTITY, ("config", "inputs", "seed", "fingerprint")),
        (ARTIFACT, ("digest", "identity")),
    ):
        found = read_object(folder / name)
        if set(keys) <= set(found) or EMPTIED in found:
            return True
    return False


def recorded_identity(folder: Path) -> Mapping[str, Any]:
    """The identity of the stage that is being made, or was, in `folder`; empty where none can be read."""
    found = read_object(folder / IDENTITY)
    inner = found.get(EMPTIED, found)
    return inner if isinstance(inner, dict) else {}


def needed(path: Path, what: str) -> Path:
    """`path`, if it is a file. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected {what}")
    return path


def files_of(folder: Path, made: Sequence[str]) -> list[str]:
    """Files of a stage that are there, as paths relative to its folder, sorted: those whose name one of the patterns is."""
    found = [path for path, _, fits in _walk(folder, made) if fits and path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def empty(folder: Path, made: Sequence[str]) -> None:
    """Delete a stage's files and what killed writers left of them, and nothing else; sub-folders go where they are empty.

    First goes the record that the stage is finished, then that there is work to continue: a kill at any moment leaves nothing
    that would be taken for whole."""
    if not has_record(folder):
        return
    identity = dict(recorded_identity(folder))
    remove(folder / ARTIFACT)
    sync(folder)
    write_json(folder / IDENTITY, {EMPTIED: identity})
    folders = []
    for path, leads, fits in _walk(folder, made):
        if leads and path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif fits and path != folder / IDENTITY:
            remove(path)
    sweep(folder, made)
    for path in reversed(folders):
        with suppress(OSError):  # what is not empty holds something of the user's
            path.rmdir()


def sweep(folder: Path, made: Sequence[str]) -> None:
    """Delete what killed writers left of a stage's (or a run's) files."""
    half = rf"\.({{}})(\.[0-9a-f]{{{{8}}}})?{re.escape(TEMPORARY_SUFFIX)}"
    wanted = []
    for pattern in made:
        place, _, name = pattern.rpartition("/")
        wanted.append(f"{place}/{half.format(name)}" if place else half.format(name))
    for path, _, fits in _walk(folder, wanted):
        if fits and _regular(path):
            remove(path)


def _walk(folder: Path, made: Sequence[str]) -> Iterator[tuple[Path, bool, bool]]:
    """(path, whether a pattern leads on below it, whether a pattern is its whole name) of everything that a pattern speaks of,
    folders before what is in them. Only folders that a pattern leads into are opened, and no links."""

    def visit(place: Path, options: list[list[str]]) -> Iterator[tuple[Path, bool, bool]]:
        with os.scandir(place) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            fitting = [option for option in options if re.fullmatch(option[0], entry.name)]
            deeper = [option[1:] for option in fitting if len(option) > 1]
            if fitting:
                yield place / entry.name, bool(deeper), len(deeper) < len(fitting)
            if deeper and entry.is_dir(follow_symlinks=False):
                yield from visit(place / entry.name, deeper)

    if folder.is_dir() and not folder.is_symlink():
        yield from visit(folder, [pattern.split("/") for pattern in made])


def _foreign(folder: Path, first: Sequence[str]) -> list[str]:
    """Names in a folder that a start of ours, killed before it wrote the files `first`, did not leave."""
    ours = {f".{name}{TEMPORARY_SUFFIX}" for name in first}
    return sorted(
        name
        for name in os.listdir(folder)
        if not (name in ours and _regular(folder / name)) and not (name == LOCK and _is_lock(folder / name))
    )


def _is_lock(path: Path) -> bool:
    return _regular(path) and (path.stat().st_size == 0 or {"pid", "since"} <= set(read_object(path)))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; an empty one where there is none."""
    with suppress(OSError, ValueError):
        found = read_json(path) if _regular(path) else None
        return found if isinstance(found, dict) else {}
    return {}


def _regular(path: Path) -> bool:
    """Whether a path is a regular file, and no link to one."""
    return path.is_file() and not path.is_symlink()
