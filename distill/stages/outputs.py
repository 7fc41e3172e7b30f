"""Checks of the output paths of `sample`, `compare` and `evaluate`: they never overwrite files of runs, models or users."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from distill.evaluation.comparison import MARKING
from distill.stages.ownership import OF_A_RUN, has_record, is_run

SAMPLED = "distill.sample"  # value of the PNG entry "Software"
PAGE_BEGINS = "# Comparison of "


def output_picture(given: str | None, default: str) -> Path:
    """Return the path of a picture of samples: `given`, or `default` if it is None. Raises as `check_file`."""
    path = Path(default if given is None else given).expanduser()
    if path.suffix != ".png":
        raise ValueError(f"out: found {given!r}, expected a .png file")
    check_file(path, asked=given is not None, software=SAMPLED)
    return path


def check_file(path: Path, *, asked: bool, software: str) -> None:
    """Raise ValueError unless the picture `path` may be written.

    Args:
        path: of the picture. Pictures drawn by `software` may be replaced.
        asked: whether the user named this file. If so, any file outside of run and model folders may be replaced.
        software: name in the PNG entry "Software".
    """
    if path.is_dir():
        raise ValueError(f"out: {path} is a folder, expected a file")
    foreign = os.path.lexists(path) and not drawn_by(path, software)
    new = not os.path.lexists(path)  # stages and exports must not get additional files
    if (kept := _owning_folder(path)) and (foreign or path.name in OF_A_RUN or (new and not is_run(kept))):
        raise ValueError(f"out: {path} is in {kept}; expected a path elsewhere, as in out=samples.png")
    if foreign and not asked:
        raise ValueError(f"out: {path}, the default, exists and was not drawn by {software}; type out=FILE")


def check_comparison(page: Path, picture: Path, software: str) -> None:
    """Raise ValueError unless page and picture are new or belong to an earlier comparison."""
    if (kept := _owning_folder(page)) and not is_run(kept):
        raise ValueError(f"out: {page.parent} is in {kept}; expected another folder, out=FOLDER")
    text = page.read_bytes() if page.is_file() else b""
    earlier = text.startswith(PAGE_BEGINS.encode()) and MARKING.encode() in text
    for path, fits in ((page, earlier), (picture, drawn_by(picture, software))):
        if os.path.lexists(path) and not fits:
            raise ValueError(
                f"out: {path} exists and is not a comparison; expected another folder, out=FOLDER"
            )


def check_evaluation(out: Path, names: Sequence[str]) -> None:
    """Raise ValueError if `out` contains one of the files `names` without the metrics.json of an evaluation."""
    there = [name for name in names if os.path.lexists(out / name)]
    if there and not (out / "metrics.json").is_file():
        raise ValueError(
            f"out: {out} contains {there[0]}, which is not from an evaluation; expected a new folder"
        )


def drawn_by(path: Path, software: str) -> bool:
    """Return whether a file is a PNG whose entry "Software" equals `software`."""
    if not path.is_file():
        return False
    with suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=("PNG",)) as image:
        return image.info.get("Software") == software
    return False


def _owning_folder(path: Path) -> Path | None:
    """Return the run, stage or model folder that contains a path, or None."""
    folders = [path.parent.resolve(), *path.parent.resolve().parents]
    if (folders[0] / "model.json").is_file():
        return folders[0]
    return next((folder for folder in folders if is_run(folder) or has_record(folder)), None)
