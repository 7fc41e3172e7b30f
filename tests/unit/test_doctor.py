"""The doctor on excerpts of runs that were really trained, some with a planted fault: tests/unit/data/doctor."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tests_support import call_verb

from distill.data.digits import Digits
from distill.evaluation.band import derive, differing, read_band, write_band
from distill.evaluation.examined import Examined, Measured, Trained
from distill.evaluation.faults import diagnose
from distill.evaluation.look import Look
from distill.evaluation.protocol import Protocol
from distill.evaluation.verdict import compared
from distill.recipe.compose import CONFIGS, RECIPES, register_recipes
from distill.recipe.expand import expand
from distill.stages.examination import settings_of

DATA = Path(__file__).parent / "data" / "doctor"
GOOD = ("consistency", "dmd", "instaflow")
# excerpt -> (fault, where it shows) of what the doctor must say first
FAULTS = {
    "data_range": ("data range wrong", "teacher"),
    "collapse": ("collapse", "distill"),
    "ema": ("EMA not caught up", "distill"),
    "exploding": ("exploding gradients", "distill"),
    "lagging": ("fake score lagging", "distill"),
    "sampler": ("wrong sampler", "distill"),
    "teacher": ("teacher worse than its reference", "teacher, 50 steps"),
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
    vars(module)["Unit"] = Unit
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


def student_row(excerpt: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in excerpt["metrics"]["rows"] if row["model"] == "student")


def test_a_student_that_is_measured_otherwise_than_it_was_trained_is_sampled_wrongly(tmp_path):
    """A row far above what the monitor found of the same student."""
    excerpt = read("dmd")
    student_row(excerpt)["fd"] *= 20
    _, found = verdict(tmp_path, excerpt)
    (finding,) = [each for each in found["findings"] if each["fault"] == "wrong sampler"]
    assert finding["place"] == "student, 1 steps"
    assert "while training" in finding["evidence"][0]["what"]


@pytest.mark.parametrize(
    ("changes", "named"), [({}, []), ({"class_std": 0.5, "fd": 20}, ["class_std", "fd"])]
)
def test_samples_that_were_made_elsewhere_are_compared_with_the_run_s(tmp_path, changes, named):
    excerpt, other = read("dmd"), read("dmd")["metrics"]
    other["rows"] = [student_row({"metrics": other})]
    for name, factor in changes.items():
        other["rows"][0][name] *= factor
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "metrics.json").write_text(json.dumps(other))
    status, found = verdict(tmp_path, excerpt, "evaluation=mine")
    assert status == bool(named)
    assert [e["what"] for f in found["findings"] for e in f["evidence"]] == named
    assert {f["fault"] for f in found["findings"]} == ({"wrong sampler"} if named else set())


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


# --- reference bands


def run_of(seed: int, values: list[float], **more: Any) -> Examined:
    """A run with one curve: a value at the end of each twentieth of its steps."""
    curve = [((number + 1) / 20, value) for number, value in enumerate(values)]
    settings = {"method": {"name": "m"}, "steps": 100}
    stage = Trained(
        "distill", settings, {"student": {"optimizer": {"lr": 1e-3}}}, None, 100, 1.0, {"student/loss": curve}
    )
    return Examined(f"run{seed}", "mine", seed, {"distill": replace(stage, **more)}, measured=MEASURED[seed])


PROTOCOL = Protocol("digits64", "c4", 2000, True, "digits", 1797, "31", (1, 8, 8))
MEASURED = {
    seed: Measured(
        PROTOCOL, [{"model": "student", "steps": 1, "fd": fd, "recall": None}], {}, {"student": "distill"}
    )
    for seed, fd in enumerate((0.04, 0.05, 0.06, 0.05))
}
LEVELS = {0: 1.0, 1: 1.1, 2: 0.9, 3: 1.0}


def runs() -> list[Examined]:
    return [run_of(seed, [LEVELS[seed]] * 20) for seed in range(3)]


def test_the_limits_are_those_of_the_rule(tmp_path):
    band = derive(runs(), {"commit": "abc"})
    limits = band.stages["distill"].curves["student/loss"]
    assert limits.low == pytest.approx(
        [1 - 4 * 0.1] * 20
    )  # s = 0.1 in each bin, and four of it are more than 0.25
    assert limits.high == pytest.approx([1 + 4 * 0.1] * 20)
    assert band.rows == {"student, 1": {"fd": pytest.approx([0.01, 0.09])}}
    even = derive([replace(run, stages=runs()[0].stages) for run in runs()], {})
    assert even.stages["distill"].curves["student/loss"].high == pytest.approx([1.25] * 20)
    write_band(band, tmp_path / "mine.json")
    assert read_band(tmp_path / "mine.json") == band
    assert read_band(tmp_path / "none.json") is None


def test_a_band_holds_for_its_settings_alone():
    band, worse = derive(runs(), {}), run_of(3, [9.0] * 20)
    assert band.limits(worse.stages["distill"], "student/loss") == pytest.approx((0.6, 1.4))
    assert list(Look(worse, band).above(worse.stages["distill"], "student/loss"))
    faster = run_of(3, [9.0] * 20, optim={"student": {"optimizer": {"lr": 1e-2}}})
    assert [found.fault for found in diagnose(faster, band)] == ["learning rate too high"]
    assert (
        "its optimizers differ: student.optimizer.lr: found 0.01, reference 0.001"
        in compared(faster, band)[1]
    )
    other = run_of(3, [9.0] * 20, settings={"method": {"name": "m"}, "steps": 200})
    assert band.limits(other.stages["distill"], "student/loss") is None
    assert band.limits(replace(worse.stages["distill"], name="reflow"), "student/loss") is None
    assert diagnose(other, band) == []
    assert (
        "the band does not hold for it, its curves are compared with nothing: steps: found 200, reference 100"
        in (compared(other, band)[1])
    )


def test_rows_of_a_teacher_with_other_settings_are_compared_with_nothing():
    def with_teacher(seed: int, fd: float, **more: Any) -> Examined:
        run = run_of(seed, [1.0] * 20)
        teacher = replace(run.stages["distill"], name="teacher", **more)
        rows = [{"model": "teacher", "steps": 50, "fd": fd, "recall": None}]
        measured = Measured(PROTOCOL, rows, {}, {"teacher": "teacher"})
        return replace(run, stages={**run.stages, "teacher": teacher}, measured=measured)

    band = derive([with_teacher(seed, 0.05) for seed in range(3)], {})
    (finding,) = diagnose(with_teacher(3, 0.5), band)
    assert (finding.fault, finding.place) == ("teacher worse than its reference", "teacher, 50 steps")
    assert diagnose(with_teacher(3, 0.5, settings={"steps": 7}), band) == []


def test_half_a_run_is_compared_with_that_half_of_the_band():
    band = derive([run_of(seed, [LEVELS[seed] / (n + 1) for n in range(20)]) for seed in range(3)], {})
    early = run_of(3, [1 / (n + 1) for n in range(4)], at=0.2, optim={"student": {"optimizer": {"lr": 1e-2}}})
    assert diagnose(early, band) == []
    late = replace(
        early,
        stages={"distill": replace(early.stages["distill"], curves={"student/loss": [(1.0, 1.0)]}, at=1.0)},
    )
    assert [found.fault for found in diagnose(late, band)] == ["learning rate too high"]


def test_runs_that_make_no_band_are_refused():
    first, second, third = runs()
    for wrong, message in (
        ([first, second], r"runs: found the seeds \[0, 1\], expected at least 3"),
        ([first, second, replace(third, seed=1)], r"found the seeds \[0, 1, 1\]"),
        ([first, second, replace(third, recipe="other")], "is not a run of the same recipe"),
        ([first, second, run_of(2, [1.0] * 10, at=0.5)], "run2: distill: is not finished"),
        ([first, second, replace(third, measured=None)], "run2: has no evaluation"),
        ([first, second, run_of(2, [1.0] * 20, optim={})], "expected equal settings"),
    ):
        with pytest.raises(ValueError, match=message):
            derive(wrong, {})


@pytest.mark.parametrize("path", sorted((RECIPES / "reference").glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_band_is_of_the_recipe_as_it_is(path):
    """A recipe that changes needs new runs: scripts/reference.py."""
    register_recipes()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        plain = OmegaConf.to_container(compose("config", [f"recipe={path.stem}"]), resolve=True)
    stages, band = expand(plain), read_band(path)
    assert (band.recipe, len(band.seeds)) == (path.stem, 3)
    assert {"teacher", "distill"} <= set(band.stages)
    assert any(label.startswith("student, ") for label in band.rows)
    for name, stage in band.stages.items():
        assert differing(stage.settings, settings_of(stages[name])) == []
        assert differing(stage.optim, stages[name]["optim"]) == []
