"""The doctor on excerpts of runs that were really trained, some with a planted fault: tests/unit/data/doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests_support import call_verb

from distill.data.digits import Digits

DATA = Path(__file__).parent / "data" / "doctor"
GOOD = ("consistency", "dmd", "instaflow")
# excerpt -> (fault, where it shows) of what the doctor must say first
FAULTS = {
    "data_range": ("data range wrong", "teacher"),
    "exploding": ("exploding gradients", "distill"),
    "lagging": ("fake score lagging", "distill"),
    "sampler": ("wrong sampler", "distill"),
    "rate_too_high": ("learning rate too high", "distill"),
    "rate_too_low": ("learning rate too low", "distill"),
}


class Unit(Digits):
    """Digits in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.images = (self.images + 1) / 2


@pytest.fixture
def planted(monkeypatch):
    """The user's module that one of the runs read its data from."""
    module = ModuleType("planted")
    module.Unit = Unit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted", module)


def write_run(folder: Path, excerpt: dict[str, Any]) -> Path:
    """A run folder with the files of an excerpt that the doctor reads."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(excerpt["plan"]))
    for stage, entries in excerpt["logs"].items():
        (folder / stage / "logs").mkdir(parents=True)
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / stage / "logs" / "metrics.jsonl").write_text(lines)
    if "metrics" in excerpt:
        (folder / "evaluate").mkdir()
        (folder / "evaluate" / "metrics.json").write_text(json.dumps(excerpt["metrics"]))
    return folder


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def verdict(tmp_path: Path, excerpt: dict[str, Any], *arguments: str) -> tuple[int, dict[str, Any]]:
    """(exit status, JSON) of the doctor."""
    write_run(tmp_path / "run", excerpt)
    ended = call_verb(tmp_path, "doctor", "run", "json=true", *arguments)
    assert ended.stderr == ""
    return ended.returncode, json.loads(ended.stdout)


@pytest.mark.parametrize("name", GOOD)
def test_no_alarm_in_a_good_run_and_in_each_part_of_it(tmp_path, name):
    excerpt = read(name)
    status, found = verdict(tmp_path, excerpt)
    assert (status, found["findings"]) == (0, [])
    for part in (0.25, 0.5, 0.75):
        cut = {
            stage: entries[: max(1, int(part * len(entries)))] for stage, entries in excerpt["logs"].items()
        }
        folder = tmp_path / f"{part}"
        folder.mkdir()
        status, found = verdict(folder, {"plan": excerpt["plan"], "logs": cut})
        assert (status, found["findings"]) == (0, []), part


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_first(tmp_path, planted, name):
    status, found = verdict(tmp_path, read(name))
    assert status == 1
    assert (found["findings"][0]["fault"], found["findings"][0]["place"]) == FAULTS[name]
    for finding in found["findings"]:
        assert finding["evidence"]
        assert finding["advice"]


def test_the_text_has_the_numbers_and_what_to_try(tmp_path):
    write_run(tmp_path / "run", read("rate_too_low"))
    ended = call_verb(tmp_path, "doctor", "run")
    assert ended.returncode == 1
    assert "OFF: learning rate too low (distill)\n  eval/fd at the end, 0.8398 at first: 0.79" in ended.stdout
    assert "try: multiply optim.student.optimizer.lr" in ended.stdout


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (("empty",), "empty: is no run, expected a folder of distill.train"),
        ((), "run: found 0 paths, expected one run folder"),
        (("empty", "jsn=true"), "jsn: no such key, did you mean json?"),
    ):
        ended = call_verb(tmp_path, "doctor", *arguments)
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"error: {message}")
    excerpt = read("dmd")
    write_run(tmp_path / "new", {"plan": excerpt["plan"], "logs": {}})
    ended = call_verb(tmp_path, "doctor", "new")
    assert ended.stderr.startswith("error: new: nothing has been logged yet")


def test_data_that_cannot_be_read_are_a_note(tmp_path):
    excerpt = read("consistency")
    excerpt["plan"]["stages"]["distill"]["data"] = {
        "_target_": "distill.data.folder.ImageFolder",
        "path": "gone",
    }
    status, found = verdict(tmp_path, excerpt)
    assert status == 0
    assert found["notes"][0].startswith(
        "the data could not be read, so their range is not checked (data: gone: "
    )
