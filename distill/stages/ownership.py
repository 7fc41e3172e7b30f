"""Ownership of files: a run deletes and overwrites only its own files.

A run folder is identified by the file `.distill` (in early versions: by `plan.json`), a stage folder by a record of a stage. In
both, only files that match known names are deleted. Links are never followed for deleting or writing.
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

MARK, LOCK, PLAN, REDO, STOPPED = ".distill", ".lock", "plan.json", "redo.json", "stopped.json"
JOBS = "jobs"  # folder of the jobs of a cluster that ran this run (`distill.submit`)
MARK_TEXT = "A run of distill: its stages write and delete files in this folder.\n"
PUBLISHED = ("metrics.json", "report.md", "grid.png")
WEBPAGE = "report.html"
ARTIFACT, IDENTITY, CONFIG, EXECUTION = "artifact.json", "identity.json", "config.yaml", "execution.json"
RECORDS = (ARTIFACT, IDENTITY, CONFIG, EXECUTION)
# Files at the top of a run folder.
OF_A_RUN = (MARK, LOCK, PLAN, REDO, STOPPED, WEBPAGE, *PUBLISHED)
# Key in identity.json of a stage whose files are being deleted, so that a killed deletion is not continued as training.
EMPTIED = "emptied"


def patterns(*names: str) -> tuple[str, ...]:
    """Convert file names to patterns, as in `Stage.FILES`."""
    return tuple(re.escape(name) for name in names)


def check_names(names: Sequence[object]) -> None:
    """Raise ValueError unless every stage's name is a valid path component, not used by the run itself, and differs from the
    others by more than case."""
    seen: dict[str, object] = {}
    for name in names:
        where = f"stages.{name}"
        plain = _plain(check_name(name, where))
        if plain in {_plain(taken) for taken in (*OF_A_RUN, *RECORDS, JOBS)}:
            raise ValueError(f"{where}: this name is used by the run itself; expected another name")
        if plain in seen:
            raise ValueError(
                f"{where}: this name differs from {seen[plain]!r} only in case, so both are the same folder on some file "
                "systems; expected another name"
            )
        seen[plain] = name


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def is_run(folder: Path) -> bool:
    """Return whether a folder has the mark or the plan of a run."""
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
    """Raise ValueError unless `folder` is a run folder, empty or new, and not inside another run. Writes nothing."""
    advice = "use another name= or runs_dir="
    try:
        folder.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OSError(f"{folder}: cannot be a run folder: {error.strerror}; {advice}") from error
    if folder.is_symlink():
        there = folder.resolve()
        raise ValueError(
            f"{folder}: is a link to {there}, expected a folder: a run does not write through links; "
            f"type runs_dir={there.parent} name={there.name}, or another name="
        )
    outer = next((place for place in folder.resolve().parents if is_run(place)), None)
    if outer is not None:
        raise ValueError(f"{folder}: is inside the run {outer}; {advice}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder; {advice}")
    for name in sorted(os.listdir(folder.parent)):
        alike = name != folder.name and name.casefold() == folder.name.casefold()
        if alike and (folder.parent / name).samefile(folder):
            raise ValueError(
                f"{folder}: is the run {name!r}, because this file system ignores case; {advice}"
            )
    if not is_run(folder) and (foreign := _foreign(folder, (MARK, PLAN))):
        raise ValueError(
            f"{folder}: is not empty and was not made by a run (found {', '.join(foreign[:3])}); {advice}"
        )


def take_run_folder(folder: Path) -> None:
    """Make the run folder if it does not exist, and mark it. Raises as `check_run_folder`."""
    check_run_folder(folder)
    make_folder(folder)
    if not (_regular(folder / MARK) and is_run(folder)):
        write_text(folder / MARK, MARK_TEXT)


def check_stage_folder(folder: Path, made: Sequence[str]) -> None:
    """Raise ValueError unless a stage may write to `folder`. Writes nothing.

    The folder must be new, empty or have a record of a stage; neither it nor its subfolders may be links.

    Args:
        folder: of the stage.
        made: patterns of its files.
    """
    advice = "move it away, or use another name="
    if folder.is_symlink():
        raise ValueError(
            f"{folder}: is a link to {folder.resolve()}, expected a folder: a stage does not write through links; {advice}"
        )
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected the folder of a stage; {advice}")
    if not has_record(folder) and (foreign := _foreign(folder, (IDENTITY,))):
        raise ValueError(
            f"{folder}: is not empty and was not made by a stage (found {', '.join(foreign[:3])}); {advice}"
        )
    for path, leads, fits in _matching(folder, made):
        if leads and (path.is_symlink() or not path.is_dir()):
            what = f"a link to {path.resolve()}" if path.is_symlink() else "a file"
            raise ValueError(f"{path}: is {what}, expected a folder of the stage; {advice}")
        if fits and path.is_dir() and not path.is_symlink():
            raise ValueError(f"{path}: is a folder, expected a file of the stage; {advice}")


def has_record(folder: Path) -> bool:
    """Return whether a folder has the record of a finished or interrupted stage."""
    for name, keys in (
        (IDENTITY, ("config", "inputs", "seed", "fingerprint")),
        (ARTIFACT, ("digest", "identity")),
    ):
        found = read_object(folder / name)
        if set(keys) <= set(found) or EMPTIED in found:
            return True
    return False


def recorded_identity(folder: Path) -> Mapping[str, Any]:
    """Return the recorded identity of the stage in `folder`; empty if there is none."""
    found = read_object(folder / IDENTITY)
    inner = found.get(EMPTIED, found)
    return inner if isinstance(inner, dict) else {}


def needed(path: Path, what: str) -> Path:
    """Return `path` if it is a file; otherwise raise FileNotFoundError, which names `what` was expected."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; expected {what}")
    return path


def files_of(folder: Path, made: Sequence[str]) -> list[str]:
    """Return the files in `folder` that match the patterns `made`, sorted, relative to the folder."""
    found = [path for path, _, fits in _matching(folder, made) if fits and path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)


def empty(folder: Path, made: Sequence[str]) -> None:
    """Delete a stage's files and temporary files, and subfolders that are empty afterwards. Other files stay.

    The record is deleted first, and the identity is marked as `EMPTIED`: if the process is killed, the remaining files are
    not taken for a finished or interrupted stage."""
    if not has_record(folder):
        return
    identity = dict(recorded_identity(folder))
    remove(folder / ARTIFACT)
    sync(folder)
    write_json(folder / IDENTITY, {EMPTIED: identity})
    folders = []
    for path, leads, fits in _matching(folder, made):
        if leads and path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif fits and path != folder / IDENTITY:
            remove(path)
    sweep(folder, made)
    for path in reversed(folders):
        with suppress(OSError):  # not empty: contains files of the user
            path.rmdir()


def sweep(folder: Path, made: Sequence[str]) -> None:
    """Delete temporary files of killed processes that match the patterns `made`."""
    half = rf"\.({{}})(\.[0-9a-f]{{{{8}}}})?{re.escape(TEMPORARY_SUFFIX)}"
    wanted = []
    for pattern in made:
        place, _, name = pattern.rpartition("/")
        wanted.append(f"{place}/{half.format(name)}" if place else half.format(name))
    for path, _, fits in _matching(folder, wanted):
        if fits and _regular(path):
            remove(path)


def _matching(folder: Path, made: Sequence[str]) -> Iterator[tuple[Path, bool, bool]]:
    """Yield (path, whether a pattern continues below it, whether a pattern ends with it) for the paths that match.

    Folders come before their contents. Only folders that match a pattern are read; links are not followed."""

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
    """Return the names in a folder, except lock and temporary files of a start that was killed before writing `first`."""
    ours = {f".{name}{TEMPORARY_SUFFIX}" for name in first}
    return sorted(
        name
        for name in os.listdir(folder)
        if not (name in ours and _regular(folder / name)) and not (name == LOCK and _is_lock(folder / name))
    )


def _is_lock(path: Path) -> bool:
    return _regular(path) and (path.stat().st_size == 0 or {"pid", "since"} <= set(read_object(path)))


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a regular file; an empty one if it cannot be read."""
    with suppress(OSError, ValueError):
        found = read_json(path) if _regular(path) else None
        return found if isinstance(found, dict) else {}
    return {}


def _regular(path: Path) -> bool:
    """Return whether a path is a regular file and not a link."""
    return path.is_file() and not path.is_symlink()
