"""Training stages that are made longer: known as such, and refused where it would not be training on."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_support import former_file, given

from distill.methods.denoising import Denoising
from distill.recipe.plan import plan
from distill.recipe.run import run

DATA = {"_target_": "distill.data.points.Points", "ring": {"count": 8, "radius": 1.5}, "count": 64}
OPTIM = {
    "student": {
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.003},
        "schedule": {"_target_": "distill.engine.schedule.Linear", "total": None},
        "ema": 0.5,
    }
}
BASE = {"_target_": "distill.stages.train.Train", "data": DATA, "batch_size": 8, "optim": OPTIM}
STAGES: dict[str, dict[str, Any]] = {
    "teacher": BASE
    | {
        "method": {"_target_": "distill.methods.denoising.Denoising"},
        "net": {
            "_target_": "distill.nets.mlp.MLP",
            "width": 16,
            "depth": 2,
            "features": 8,
            "zero_out": False,
        },
        "process": {"_target_": "distill.process.vp.VPCosine"},
        "kind": "v",
        "stream": "teacher",
    },
    "tuned": BASE
    | {
        "method": {
            "_target_": "distill.methods.consistency_training.ConsistencyTraining",
            "curriculum": "ect",
            "total_steps": None,
        },
        "init": "teacher",
        "stream": "tuned",
    },
}


def recipe(folder: Path, steps: int = 4, tuned: int = 4, **changes: Any) -> dict[str, Any]:
    """A teacher whose rate falls over its length, and a student of it."""
    base = {
        "stages": copy.deepcopy(STAGES),
        "seed": 0,
        "runs_dir": str(folder),
        "trainer": {"accelerator": "cpu", "checkpoint_every": 1, "log_every": 1, "threads": 1},
        "loggers": (),
        "plan": False,
        "redo": None,
    }
    base["stages"]["teacher"]["steps"], base["stages"]["tuned"]["steps"] = steps, tuned
    return base | changes


def go(folder: Path, *lengths: int, **changes: Any) -> Path:
    return run(recipe(folder, *lengths, **changes), name="r", recipe_name="toy")


def artifact(run_folder: Path, stage: str = "teacher") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_folder / stage / "artifact.json").read_text())
    return found


def weights(run_folder: Path, stage: str = "teacher") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run_folder / stage / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def states(folder: Path, *lengths: int, **changes: Any) -> dict[str, str]:
    return {e.name: e.state for e in plan(recipe(folder, *lengths, **changes), folder / "r", 0)}


class Stopped(BaseException):
    """What stops a run as a kill would."""


def stop_at(
    monkeypatch: pytest.MonkeyPatch, iteration: int, folder: Path, *lengths: int, **changes: Any
) -> None:
    original = Denoising.loss

    def dies(self: Denoising, batch: Any, step: Any) -> Any:
        if step.iteration == iteration:
            raise Stopped
        return original(self, batch, step)

    with monkeypatch.context() as patch:
        patch.setattr(Denoising, "loss", dies)
        with pytest.raises(Stopped):
            go(folder, *lengths, **changes)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("short"), 4)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("whole"), 8)


@pytest.fixture
def copied(short: Path, tmp_path: Path) -> Path:
    shutil.copytree(short.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_two_results_have_two_digests_and_so_has_what_follows(copied: Path, at_once: Path) -> None:
    assert states(copied, 8) == {"teacher": "extend", "tuned": "changed"}
    longer = go(copied, 8, redo="tuned")
    one, other = artifact(longer), artifact(at_once)
    assert not same(weights(longer), weights(at_once)), "the rate rose again; else the test shows nothing"
    assert one["identity"]["extended"] == [{"steps": 4, "reached": 4}]
    assert "extended" not in other["identity"]
    assert one["digest"] != other["digest"]
    assert artifact(longer, "tuned")["digest"] != artifact(at_once, "tuned")["digest"]
    # The same command again finds all of it finished; another length is another seam.
    assert set(states(copied, 8).values()) == {"finished"}
    again = go(copied, 9, redo="tuned")
    assert artifact(again)["identity"]["extended"] == [{"steps": 4, "reached": 4}, {"steps": 8, "reached": 8}]
    assert states(copied, 8)["teacher"] == "changed"
    assert states(copied, 4)["teacher"] == "changed"


def test_redoing_a_longer_stage_trains_it_at_once(copied: Path, at_once: Path) -> None:
    go(copied, 8, redo="tuned")
    go(copied, 8, redo="teacher")
    for stage in ("teacher", "tuned"):
        assert artifact(copied / "r", stage)["digest"] == artifact(at_once, stage)["digest"]
        assert same(weights(copied / "r", stage), weights(at_once, stage))
    assert set(states(copied, 8).values()) == {"finished"}


def test_a_longer_training_that_is_stopped_goes_on(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(copied, other, dirs_exist_ok=True)
    stop_at(monkeypatch, 6, copied, 8, redo="tuned")
    assert states(copied, 8)["teacher"] == "interrupted"
    parts, whole = go(copied, 8, redo="tuned"), go(other, 8, redo="tuned")
    for stage in ("teacher", "tuned"):
        assert artifact(parts, stage)["digest"] == artifact(whole, stage)["digest"]
        assert same(weights(parts, stage), weights(whole, stage))


def test_a_start_that_made_it_longer_and_trained_nothing_leaves_no_seam_of_its_own(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 4, copied, 6, redo="tuned")
    longer = go(copied, 8, redo="tuned")
    assert artifact(longer)["identity"]["extended"] == [{"steps": 4, "reached": 4}]


def test_an_interrupted_training_made_longer_has_a_seam_at_its_step(
    tmp_path: Path, at_once: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rate had fallen over the shorter length."""
    digests = set()
    for planned in (4, 5):
        folder = tmp_path / str(planned)
        stop_at(monkeypatch, 2, folder, planned)
        assert states(folder, 8) == {"teacher": "interrupted", "tuned": "new"}
        longer = go(folder, 8)
        assert artifact(longer)["identity"]["extended"] == [{"steps": planned, "reached": 2}]
        assert not same(weights(longer), weights(at_once))
        assert set(states(folder, 8).values()) == {"finished"}
        digests.add(artifact(longer)["digest"])
    assert len(digests | {artifact(at_once)["digest"]}) == 3


def test_a_stage_goes_on_with_the_threads_of_its_checkpoint_whatever_its_folder_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"accelerator": "cpu", "checkpoint_every": 1, "log_every": 1}
    before = torch.get_num_threads()
    try:
        stop_at(monkeypatch, 2, tmp_path, 4, trainer=options | {"threads": 2})
        (tmp_path / "r" / "teacher" / "execution.json").write_text('{"threads": 1}')
        longer = go(tmp_path, 4, trainer=options)
    finally:
        torch.set_num_threads(before)
    assert artifact(longer)["facts"]["threads"] == 2
    assert artifact(longer, "tuned")["facts"]["threads"] == 1, "one of its own, by the size of the net"


def test_an_interrupted_stage_says_what_it_was_begun_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 2, tmp_path, 4)
    path = tmp_path / "r" / "teacher" / "identity.json"
    content = json.loads(path.read_text())
    for edited in ({k: v for k, v in content.items() if k != "input_files"}, content | {"input_files": None}):
        path.write_text(json.dumps(edited))
        with pytest.raises(ValueError, match=r"(?s)input_files: missing, .*redo=teacher"):
            go(tmp_path, 4)
    path.write_text(json.dumps(content))
    assert states(tmp_path, 4)["teacher"] == "interrupted"


def test_a_curriculum_over_the_steps_does_not_go_back(copied: Path) -> None:
    """It would start again at its wide levels; with its old length given it stays at its last ones."""
    refused = next(e for e in plan(recipe(copied, 4, 8), copied / "r", 0) if e.name == "tuned")
    assert refused.state == "changed"
    assert refused.changes[0].startswith(
        "config.method.total_steps: 4 -> 8 (computed from the stage's steps: set"
    )
    with pytest.raises(ValueError, match=r"stages.tuned: .*\n  method.total_steps: 4 -> 8"):
        go(copied, 4, 8)
    kept = recipe(copied, 4, 8)
    kept["stages"]["tuned"]["method"]["total_steps"] = 4
    run(kept, name="r", recipe_name="toy")
    log = (copied / "r/tuned/logs/metrics.jsonl").read_text().splitlines()
    levels = [json.loads(line)["student/levels"] for line in log]
    assert levels == [0.0, 2.0, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0]


def test_a_checkpoint_that_cannot_be_trained_on_leaves_the_finished_stage_alone(
    copied: Path, tmp_path: Path
) -> None:
    tuned = copied / "r/tuned/checkpoints"
    former_file(tuned, tmp_path / "former", schema=1)
    given(tmp_path / "former", tuned)
    kept = recipe(copied, 4, 8)
    kept["stages"]["tuned"]["method"]["total_steps"] = 4
    with pytest.raises(
        ValueError, match=r"stages.tuned: cannot be trained further: .*earlier version.*redo=tuned"
    ):
        run(kept, name="r", recipe_name="toy")
    assert set(states(copied, 4, 4).values()) == {"finished"}
    given(copied / "r/teacher/checkpoints", tuned)
    with pytest.raises(ValueError, match=r"stages.tuned: cannot be trained further: .*of another training"):
        run(kept, name="r", recipe_name="toy")
    assert set(states(copied, 4, 4).values()) == {"finished"}


def test_a_checkpoint_of_another_run_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed: found 1, expected 0"),
        ({}, "batch_size"),
    ]
    for number, (change, message) in enumerate(changes):
        mine, theirs = tmp_path / f"mine{number}", tmp_path / f"theirs{number}"
        stop_at(monkeypatch, 2, mine, 4)
        other = recipe(theirs, 4, **change)
        other["stages"]["teacher"]["batch_size"] = 8 if change else 16
        run(other, name="r", recipe_name="toy")
        given(theirs / "r/teacher/checkpoints", mine / "r/teacher/checkpoints")
        with pytest.raises(ValueError, match=rf"stages.teacher: .*step_0000004: .*{message}.*redo=teacher"):
            go(mine, 4)


def test_a_seam_that_nobody_could_have_written_is_refused(copied: Path) -> None:
    longer = go(copied, 8, redo="tuned")
    path = longer / "teacher" / "artifact.json"
    path.unlink()
    begun = longer / "teacher" / "identity.json"
    begun.write_text(begun.read_text().replace('"reached": 4', '"reached": 3'))
    with pytest.raises(
        ValueError, match=r"seams: found \[{'steps': 4, 'reached': 4}\], the stage was begun with"
    ):
        go(copied, 8, redo="tuned")
