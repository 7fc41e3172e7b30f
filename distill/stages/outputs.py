"""Where the verbs beside a run write: never over a file of a run or a model, nor over another's where nobody named it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from distill.evaluation.comparison import MARKING
from distill.stages.ownership import OF_A_RUN, has_record, is_run

SAMPLED = "distill.sample"  # what pictures of samples say drew them
PAGE_BEGINS = "# Comparison of "


def output_picture(given: str | None, default: str) -> Path:
    """Where a picture of samples goes: where the user says (`given`), or `default`; raises as `check_file` does."""
    path = Path(default if given is None else given).expanduser()
    if path.suffix != ".png":
        raise ValueError(f"out: found {given!r}, expected a .png file")
    check_file(path, asked=given is not None, software=SAMPLED)
    return path


def check_file(path: Path, *, asked: bool, software: str) -> None:
    """Raise ValueError unless the picture `path` may be written.

    asked: the user named this file, which may then be replaced, unless it lies in a run or a model folder. Pictures that
    `software` drew may always be."""
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    foreign = os.path.lexists(path) and not drawn_by(path, software)
    new = not os.path.lexists(path)  # in a stage or an export it would be taken for a part of it
    if (kept := _keeper(path)) and (foreign or path.name in OF_A_RUN or (new and not is_run(kept))):
        raise ValueError(f"out: {path} is a file of {kept}, expected another place, as in out=samples.png")
    if foreign and not asked:
        raise ValueError(f"out: {path}, the default, is there and is no picture of {software}; give out=FILE")


def check_comparison(page: Path, picture: Path, software: str) -> None:
    """Raise ValueError unless page and picture are new, or those of an earlier comparison."""
    if (kept := _keeper(page)) and not is_run(kept):
        raise ValueError(f"out: {page.parent} lies in {kept}, expected another folder, out=FOLDER")
    text = page.read_bytes() if page.is_file() else b""
    earlier = text.startswith(PAGE_BEGINS.encode()) and MARKING.encode() in text
    for path, fits in ((page, earlier), (picture, drawn_by(picture, software))):
        if os.path.lexists(path) and not fits:
            raise ValueError(
                f"out: {path} is there and is no comparison; expected another folder, out=FOLDER"
            )


def check_evaluation(out: Path, names: Sequence[str]) -> None:
    """Raise ValueError if `out` holds one of the files `names` without the metrics.json that an evaluation writes first."""
    there = [name for name in names if os.path.lexists(out / name)]
    if there and not (out / "metrics.json").is_file():
        raise ValueError(
            f"out: {out} holds {there[0]}, which is no part of an evaluation; expected a new folder"
        )


def drawn_by(path: Path, software: str) -> bool:
    """Whether a file is a PNG that `software` says it drew."""
    if not path.is_file():
        return False
    with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=("PNG",)) as image:
        return image.info.get("Software") == software
    return False


def _keeper(path: Path) -> Path | None:
    """The run, stage or model folder that a path lies in."""
    folders = [path.parent.resolve(), *path.parent.resolve().parents]
    if (folders[0] / "model.json").is_file():
        return folders[0]
    return next((folder for folder in folders if is_run(folder) or has_record(folder)), None)
