"""Evaluation while training: when it runs, what it keeps, and that a kill changes neither."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests_support import SMALL, refusal, run_verb

OPTIONS = (
    "recipe=instaflow",
    "profile=smoke",
    "profile.steps=12",
    "profile.count=30",
    "monitor.every_images=64",  # every 4 steps of 16
    "which=best",
    "name=run",
    "trainer.checkpoint_every=5",
    *SMALL,
    "stages.distill.optim.student.optimizer.lr=0.3",  # high enough that the first evaluations are the best
)
STAGE = "runs/run/distill"


def evaluations(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / STAGE / "monitor/evaluations.jsonl").read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_verb(folder, "train", *OPTIONS)
    return folder


def test_evaluates_every_so_many_images_and_at_the_end(whole):
    found = evaluations(whole)
    assert [e["step"] for e in found] == [4, 8, 12]
    assert [e["images"] for e in found] == [64, 128, 192]
    assert {p.name for p in (whole / STAGE / "monitor").glob("*.png")} == {
        f"step_{n:07d}.png" for n in (4, 8, 12)
    }
    entries = [json.loads(line) for line in (whole / STAGE / "logs/metrics.jsonl").read_text().splitlines()]
    logged = {e["step"]: e["eval/fd"] for e in entries if "eval/fd" in e}
    assert logged == {e["step"]: e["fd"] for e in found}, "logged beside the losses"


def test_the_best_is_kept_evaluated_and_exported(whole):
    found = evaluations(whole)
    best = min(found, key=lambda e: e["fd"])
    summary = json.loads((whole / STAGE / "best.json").read_text())
    assert (summary["step"], summary["value"], summary["metric"]) == (best["step"], best["fd"], "fd")
    assert best["step"] < 12, "with this learning rate the end is not the best; else the test shows nothing"
    kept = safetensors.torch.load_file(whole / STAGE / "best/model.safetensors")
    last = safetensors.torch.load_file(whole / STAGE / "model.safetensors")
    exported = safetensors.torch.load_file(whole / "runs/run/export/model.safetensors")
    assert all(torch.equal(kept[name], exported[name]) for name in kept)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)
    described = json.loads((whole / STAGE / "best/model.json").read_text())
    assert described["coupling"] == "endpoint"


KILL = """
import os, signal
from distill.stages.monitor import Monitor

whole, calls = Monitor.__call__, []

def dying(self, module):
    found = whole(self, module)
    calls.append(module)
    if len(calls) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Monitor.__call__ = dying
"""


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2])  # before any checkpoint; after one at step 5
def test_a_kill_right_after_an_evaluation_changes_nothing(whole, tmp_path, after):
    killed = run_verb(tmp_path, "train", *OPTIONS, check=False, before=KILL.format(after=after))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(evaluations(tmp_path)) == after
    run_verb(tmp_path, "train", *OPTIONS)
    assert evaluations(tmp_path) == evaluations(whole)
    for name in ("model.safetensors", "best/model.safetensors", "best/model.json", "best.json"):
        assert (tmp_path / STAGE / name).read_bytes() == (whole / STAGE / name).read_bytes(), name


@pytest.mark.slow
def test_two_sharded_processes_measure_the_same(whole, tmp_path):
    run_verb(tmp_path, "train", *OPTIONS, "trainer.devices=2", "trainer.shard=world", "monitor.batch_size=25")
    for one, two in zip(evaluations(whole), evaluations(tmp_path), strict=True):
        assert two == pytest.approx(one, rel=2e-2, abs=2e-2)
    assert (tmp_path / STAGE / "best/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("which=newest",), "which: found 'newest', expected one of"),
        (
            ("stages.export.which=best",),
            "which: found 'best', but evaluate.models.student measures the last model",
        ),
        (
            ("stages.distill.monitor=null", "which=best"),
            "'distill' has no `monitor` to choose the best model",
        ),
        (("monitor.metric=recall",), "monitor.metric: found 'recall', expected one of"),
        (("monitor.every_images=0",), "monitor.every_images: expected at least 1, found 0"),
        (("monitor.count=3",), "monitor.count: expected at least k + 2 = 7, found 3"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(tmp_path, options, message):
    assert message in refusal(tmp_path, "train", "recipe=instaflow", "plan=true", *options)
