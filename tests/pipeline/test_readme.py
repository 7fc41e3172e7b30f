"""The README's marked commands as they stand: the first block runs (with `profile=smoke` where it trains), of the second the
plans are made."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

from PIL import Image
from tests_support import ROOT, SMALL, call_verb, package_of, run_verb

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def marked_commands() -> list[list[list[str]]]:
    """Lines of each code block that follows a `<!-- run -->`, split as a shell would."""
    blocks = re.findall(r"<!-- run -->\n```\n(.*?)```", README, flags=re.DOTALL)
    return [[shlex.split(line) for line in block.splitlines()] for block in blocks]


def test_marked_commands(tmp_path: Path):
    """Training is planned in the second block, whose commands differ from the first one's by their options alone."""
    blocks = marked_commands()
    assert [len(block) for block in blocks] == [2, 6]
    for number, block in enumerate(blocks):
        for command in block:
            assert command[:2] == ["python", "-m"], command
            package, _, verb = command[2].partition(".")
            assert package == "distill"
            arguments = command[3:]
            if verb == "train" and "--help" not in arguments:
                arguments = [a for a in arguments if not a.startswith("profile=")] + ["profile=smoke"]
                if not any(a.startswith("name=") for a in arguments):
                    arguments.append("name=instaflow")  # the folder that later commands read
                arguments += ["plan=true"] * number
            (call_verb if number else run_verb)(tmp_path, verb, *arguments, check=True)
    assert (tmp_path / "grid.png").exists()
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["instaflow"]


def test_the_examples_of_new_parts_run(tmp_path: Path):
    """The method of the README, the metric and the stage of docs/architecture.md run from a copy of the project."""
    blocks = re.findall(
        r"```(?:python|yaml)\n# ((?:distill|configs|recipes)/\S+\.(?:py|yaml)).*?\n(.*?)```",
        README + ARCHITECTURE,
        flags=re.DOTALL,
    )
    assert [name for name, _ in blocks] == [
        "distill/methods/regression.py",
        "configs/method/regression.yaml",
        "recipes/regression.yaml",
        "distill/evaluation/metrics/brightness.py",
        "distill/stages/montage.py",
    ]
    project = tmp_path / "project"
    for part in ("distill", "configs", "recipes"):
        shutil.copytree(ROOT / part, project / part)
    for name, text in blocks:
        (project / name).write_text(text)
    command = ["recipe=regression", "profile=smoke", *SMALL]
    command.append("+stages.pairs={_target_: distill.stages.generate.Generate, teacher: teacher, count: 20}")
    command.append("+stages.montage={_target_: distill.stages.montage.Montage, pairs: pairs}")
    run_verb(tmp_path, "train", *command, before=package_of(project))
    assert (tmp_path / "runs/regression-smoke/export/model.safetensors").is_file()
    told = json.loads((tmp_path / "runs/regression-smoke/export/model.json").read_text())
    assert (told["guidable"], told["coupling"], told["boundary"]) == (False, "independent", None)
    log = (tmp_path / "runs/regression-smoke/guided/logs/metrics.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["student/loss"] > 0
    rows = json.loads((tmp_path / "runs/regression-smoke/metrics.json").read_text())["rows"]
    assert all(-1 < row["brightness"] < 1 for row in rows)
    assert Image.open(tmp_path / "runs/regression-smoke/montage/montage.png").size[0] > 30


def test_the_picture_is_there():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
