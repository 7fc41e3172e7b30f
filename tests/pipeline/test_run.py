"""Runs: plans, skipping, continuing after a kill, refusing changes, messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_support import checkpoint_of, has_checkpoint
from tests_support import SMALL, call_verb, kill_when, refusal, run_verb

SMOKE = ("recipe=instaflow", "profile=smoke", "name=run", *SMALL)


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "runs" / "run" / stage / "model.safetensors")


def test_the_end_says_where_everything_lies(finished):
    again = call_verb(finished, "train", *SMOKE, check=True)
    for name in ("report.md", "metrics.json", "grid.png", "export"):
        assert f"runs/run/{name}" in again.stdout
    assert again.stderr.count("already finished, skipped") == 7
    assert "[3/7] reflow" in again.stderr


def test_plan_runs_nothing(tmp_path):
    planned = call_verb(tmp_path, "train", "recipe=instaflow", "plan=true", "rounds=2", check=True).stdout
    assert "9 stages" in planned
    assert "reflow_round2" in planned
    assert "teacher=reflow_round2" in planned  # the last pairs come from the last round
    assert not list(tmp_path.iterdir())


def test_a_changed_option_is_refused_with_what_changed_and_the_ways_out(finished):
    refused = refusal(finished, "train", *SMOKE, "teacher.method.null_prob=0.3")
    assert "stages.teacher" in refused
    assert "\n  method.null_prob: 0.1 -> 0.3" in refused
    assert "redo=teacher" in refused
    assert "name=" in refused
    assert "typed as" not in refused
    planned = call_verb(
        finished, "train", *SMOKE, "teacher.method.null_prob=0.3", "plan=true", check=True
    ).stdout
    assert "Without plan=true this command fails:\nstages.teacher: " in planned
    assert "redo=teacher" in planned
    again = call_verb(
        finished, "train", *SMOKE, "teacher.method.null_prob=0.3", "plan=true", "redo=teacher", check=True
    )
    assert "this command fails" not in again.stdout


def test_execution_options_change_nothing(finished):
    options = ("trainer.threads=2", "trainer.log_every=1", "trainer.checkpoint_every=7")
    again = call_verb(finished, "train", *SMOKE, *options, check=True)
    assert again.stderr.count("already finished, skipped") == 7


@pytest.mark.slow
def test_redo_makes_a_stage_and_what_depends_on_it_again(finished):
    before = {stage: weights(finished, stage) for stage in ("teacher", "reflow", "distill")}
    again = run_verb(finished, "train", *SMOKE, "redo=reflow")
    assert again.stderr.count("already finished, skipped") == 2
    for stage, old in before.items():  # the same config makes the same weights
        assert all(torch.equal(old[k], v) for k, v in weights(finished, stage).items()), stage
    wrong = refusal(finished, "train", *SMOKE, "redo=refolw")
    assert "redo: found ['refolw'], expected stages of this recipe" in wrong


def test_a_flipped_byte_is_found(finished):
    path = finished / "runs" / "run" / "teacher" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    try:
        assert "teacher/model.safetensors: sha256" in refusal(finished, "train", *SMOKE)
    finally:
        path.write_bytes(data)


def test_killed_in_a_stage_and_continued_equals_not_stopping(tmp_path):
    options = (
        "recipe=toy_instaflow",
        "profile=smoke",
        "name=run",
        "profile.steps=60",
        "trainer.checkpoint_every=5",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run_verb(whole, "train", *options)
    for stage in ("reflow", "distill"):
        checkpoints = parts / "runs" / "run" / stage / "checkpoints"
        kill_when(parts, options, has_checkpoint(checkpoints))
        state = checkpoint_of(checkpoints)["progress"]
        assert 0 < state["step"] <= 60
    run_verb(parts, "train", *options)
    for stage in ("reflow", "distill", "export"):
        for name, value in weights(whole, stage).items():
            assert torch.equal(value, weights(parts, stage)[name]), f"{stage}: {name}"
    one, other = (json.loads((f / "runs" / "run" / "metrics.json").read_text()) for f in (whole, parts))
    timed = {"images_per_second", "train_seconds", "peak_memory_bytes"}
    for a, b in zip(one["rows"], other["rows"], strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {
            k: v for k, v in b.items() if k not in timed
        }
    steps = [
        json.loads(line)["step"]
        for line in (parts / "runs/run/reflow/logs/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(set(steps)), "log entries are neither lost nor twice"


def test_another_process_on_the_same_run_is_refused(finished):
    import fcntl

    with (finished / "runs" / "run" / ".lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert "the run is locked by process" in refusal(finished, "train", *SMOKE)


def test_a_teacher_of_another_run_replaces_the_stage(finished, tmp_path):
    path = finished / "runs" / "run" / "teacher"
    short = [f"~stages.{name}" for name in ("pairs2", "distill", "evaluate", "export")]
    run_verb(tmp_path, "train", *SMOKE, *short, f"teacher.path={path}")
    assert all(
        torch.equal(v, weights(finished, "teacher")[k]) for k, v in weights(tmp_path, "teacher").items()
    )
    assert not (tmp_path / "runs" / "run" / "teacher" / "checkpoints").exists()
    missing = refusal(tmp_path, "train", *SMOKE, "name=other", "teacher.path=nowhere")
    assert "nowhere: no such folder" in missing


def test_wrong_names_list_what_there_is(tmp_path):
    """In forks: what a shell sees of a refusal."""
    for arguments in (["recipe=nope"], [], ["--help"]):
        run = run_verb if arguments == ["recipe=nope"] else call_verb
        shown = run(tmp_path, "train", *arguments, check=False)
        assert "instaflow" in shown.stdout + shown.stderr, arguments
        assert (shown.returncode == 0) == (arguments == ["--help"])
        assert "Traceback" not in shown.stderr
    typo = run_verb(tmp_path, "sample", "model=x", "cuont=3", check=False)
    assert typo.returncode == 1
    assert "did you mean count?" in typo.stderr


@pytest.mark.slow
def test_the_full_recipe_passes_its_gates(tmp_path):
    run_verb(tmp_path, "train", "recipe=instaflow", timeout=1200)
    gates = json.loads((tmp_path / "runs" / "instaflow" / "metrics.json").read_text())["gates"]
    assert len(gates) == 9
    assert [gate["name"] for gate in gates if not gate["passed"]] == []
    assert call_verb(tmp_path, "doctor", "runs/instaflow").returncode == 0


@pytest.mark.slow
def test_the_doctor_names_a_fault_that_is_planted(tmp_path):
    small = (
        "teacher.steps=60",
        "eval.models.teacher.steps=[1]",
        "eval.grid=[]",
        "eval.gates=[]",
        "eval.count=100",
    )
    behind = ("stages.distill.optim.student.ema=0.9999", "stages.distill.optim.student.ema_ramp=false")
    run_verb(tmp_path, "train", "recipe=dmd", "stages.distill.steps=60", *small, *behind)
    ended = call_verb(tmp_path, "doctor", "runs/dmd", "json=true")
    assert ended.returncode == 1
    assert "EMA not caught up" in [finding["fault"] for finding in json.loads(ended.stdout)["findings"]]
