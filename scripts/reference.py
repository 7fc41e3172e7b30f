"""Make the reference band of a recipe from finished runs with three seeds or more:
python scripts/reference.py runs/sid0 runs/sid1 runs/sid2 [--commit HASH]

Writes `recipes/reference/RECIPE.json`, which `distill.doctor` reads. Where a run loaded its teacher from another run
(teacher=pretrained teacher.path=runs/instaflow1/teacher), the teacher's curves and rows are those of that run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import distill  # noqa: E402
from distill.evaluation.band import derive, write_band  # noqa: E402
from distill.evaluation.examined import Examined  # noqa: E402
from distill.files import make_folder, read_json  # noqa: E402
from distill.stages.examination import examine  # noqa: E402
from distill.stages.ownership import PLAN  # noqa: E402


def with_teacher(folder: Path) -> Examined:
    """A run, with the teacher of the run that it was loaded from."""
    run, teacher = examine(folder), read_json(folder / PLAN)["stages"]["teacher"]
    if teacher.get("path") is None:
        return run
    path = (
        Path(teacher["path"]) if Path(teacher["path"]).is_absolute() else folder.parents[1] / teacher["path"]
    )
    source = examine(path.parent)
    assert run.measured is not None
    assert source.measured is not None
    own = [(row["model"], row["steps"]) for row in run.measured.rows]
    more = [
        row
        for row in source.measured.rows
        if row["model"] == "teacher" and ("teacher", row["steps"]) not in own
    ]
    return replace(
        run,
        stages={"teacher": source.stages[path.name], **run.stages},
        measured=replace(run.measured, rows=[*more, *run.measured.rows]),
    )


def main() -> None:
    """Write the band of the runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs of one recipe")
    parser.add_argument("--commit", help="of the code that made them; default: of this checkout")
    parser.add_argument("--target", type=Path, default=ROOT / "recipes" / "reference")
    options = parser.parse_args()
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = options.commit or subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
    band = derive(
        [with_teacher(run.resolve()) for run in options.runs],
        {"commit": commit, "distill": distill.__version__},
    )
    make_folder(options.target)
    path = options.target / f"{band.recipe}.json"
    write_band(band, path)
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
