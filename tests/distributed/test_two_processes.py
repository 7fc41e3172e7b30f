"""Two processes give what one gives: losses, gradients, weights, checkpoints, pairs, evaluation. Both on the CPU."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import worker
from checkpoint_support import has_checkpoint
from tests_support import copied_run, fork, kill_when, refusal, run_verb

from distill.launch import free_port


def work(folder: Path, log: Path, rank: int, world: dict[str, str], jobs: tuple[str, ...]) -> None:
    """Run jobs of `worker.py` as one process of a world."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    os.environ.update(world | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {}))
    worker.main(folder, jobs)


def start(folder: Path, size: int, *jobs: str) -> None:
    """Run jobs of `worker.py` on `size` processes, to the end."""
    world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    world |= {"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"log-{size}-{rank}.txt" for rank in range(size)]
    running = {
        fork(work, folder, log, rank, world if size > 1 else {}, jobs): log for rank, log in enumerate(logs)
    }
    deadline, failed = time.monotonic() + 600, ""
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and (log := running.pop(pid)) and status:
                failed = failed or f"{os.waitstatus_to_exitcode(status)}: {log.read_text()[-4000:]}"
        if failed or time.monotonic() > deadline:  # where one hangs or fails, all do
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            failed = failed or "took too long"
        time.sleep(0.02)
    assert not failed, failed


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder where both worlds have done all jobs."""
    folder = tmp_path_factory.mktemp("two")
    start(folder, 1, "train", "gradients", "poison")
    jobs = ("train", "gradients", "stale", "local", "mesh", "poison", "continue", "parts_worker.callbacks")
    start(folder, 2, *jobs)
    start(folder, 1, "continue")
    return folder


def load(folder: Path, name: str):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_close(one: dict, two: dict, tolerance: float = 1e-5) -> None:
    assert set(one) == set(two)
    for name, value in one.items():
        difference = float((two[name].double() - value.double()).abs().max())
        scale = max(1.0, float(value.double().abs().max()))
        assert difference <= tolerance * scale, f"{name}: differs by {difference}"


def test_gradients_equal(results):
    one, two = load(results, "gradients-1"), load(results, "gradients-2")
    assert len(one) == 2 * 71
    assert sum(float(g.abs().sum()) > 0 for g in one.values()) == len(one)
    assert_close(one, two)


@pytest.mark.parametrize("shard", ["none", "world"])
def test_losses_norms_weights_and_averages_equal_after_6_steps(results, shard):
    one, two = load(results, f"{shard}-1"), load(results, f"{shard}-2")
    assert len(one["student/loss"]) == 6
    assert len(one["fake/loss"]) == 11
    assert_close(one, two)


def test_gradients_of_each_micro_batch_are_held_in_shards(results):
    """With `reduce_each`, after the first of two; that the result is the same is seen in the next test."""
    one, two = load(results, "held-1"), load(results, "held-2")
    assert one["each"] == one["once"] == one["whole"] == two["whole"]
    assert two["once"] == 0, "whole gradients, which the networks keep to themselves"
    assert 0.4 * two["whole"] < two["each"] < 0.6 * two["whole"]


def test_checkpoints_of_two_continue_on_one_and_the_reverse(results):
    """From shards, half of the numbers in each, and from the one file of an earlier version."""
    whole = load(results, "world-1")
    shards = {
        path.parent.name: sorted(file.stat().st_size for file in path.parent.glob("shard_*"))
        for path in (results / "half-of-2").glob("*/MANIFEST.json")
    }
    first, last = (shards[f"step_{step:07d}"] for step in (3, 6))
    assert (len(first), len(last)) == (2, 1), "two processes saved step 3, and one step 6"
    assert first[1] < 0.65 * last[0]
    for name, size in itertools.product(("continued", "former"), (1, 2)):
        continued = load(results, f"{name}-on-{size}")
        weights = {k: v for k, v in whole.items() if "/" not in k}
        assert_close(weights, {k: v for k, v in continued.items() if "/" not in k})
        assert len(continued["student/loss"]) == 3


def test_root_weights_are_never_stale(results):
    errors = load(results, "stale")
    assert errors["ours"] < 1e-6
    assert errors["default"] > 1e-2, "torch's default no longer goes stale; the comment in parallel.py may go"


def test_averages_are_shard_local(results):
    found = load(results, "local")
    # Micro batches before the last one reduce nothing, also in an update whose networks are in eval mode.
    assert found.pop("synced") == 1
    assert found == {"width": 2, "all sharded": True, "same shards": True, "units": 3}


def test_callbacks_run_on_every_process_and_stop_together_and_the_main_one_alone_logs(results):
    found = load(results, "ranks")
    assert found["together"] == 2 * [
        [("of 0", "of 1", [True, False], [1.5, 3.0], [[0], [1]], value) for value in (11.0, 12.0, 13.0)]
    ]
    # Stops within an iteration are known after the next one.
    at = {"c": 3, "setup": 0, "on_fit_start": 0, "on_train_start": 0, "on_train_epoch_start": 0}
    stops = {hook: f"step {step} of 4" for hook, step in (at | {"on_train_batch_start": 2}).items()}
    assert [dict(told) for told in found["told"]] == [stops, stops]
    assert found["seen"] == [[(0, True, n, 1) for n in (1, 2, 3)], [(1, False, n, 0) for n in (1, 2, 3)]]
    assert found["logged"] == [1, 1, 2, 2, 3, 3]


def test_meshes_and_collecting(results):
    found = load(results, "mesh")
    assert found["cuts"] == {"none": (2, 1), "world": (2,), "node": (2,)}
    assert torch.equal(found["collected"], found["noise"])
    assert found["flags"] == (True, False)


@pytest.mark.parametrize("size", [1, 2])
def test_nonfinite_steps_are_skipped_together_counted_and_end_the_run(results, size):
    found = load(results, f"poison-{size}")
    assert {i for i, moved in found["moved"].items() if moved == 0} == {3, 4}
    assert set(found["moved"]) == set(range(7))
    assert all(counts == {"student": [0, 0, 0], "fake": [2, 0, 2]} for counts in found["counts"])
    assert len(found["messages"]) == size
    for message in found["messages"]:
        assert "update 'fake'" in message
        assert "3 steps in a row" in message
        assert f"step_000000{found['saved']} at step {found['saved']}" in message
    assert found["saved"] == 4


SMOKE = ("recipe=toy_instaflow", "profile=smoke", "name=run")


def test_a_run_on_two_processes_makes_the_same_pairs_and_numbers(shared, tmp_path):
    one, two = shared("toy_instaflow"), copied_run(shared("toy_instaflow"), tmp_path)
    # Two processes make the pairs and the evaluation again, from the same trained models.
    options = ("redo=[pairs2,evaluate]", "trainer.devices=2")
    done = run_verb(two, "train", *SMOKE, *options)
    assert done.stdout.count("runs/run: done.") == 1
    plan = json.loads((two / "runs/run/plan.json").read_text())["stages"]
    assert plan["pairs2"]["count"] > plan["pairs2"]["batch_size"], (
        "one batch alone would be made by one process"
    )
    shards = [f / "runs/run/pairs2/pairs-00000.safetensors" for f in (one, two)]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    rows = [json.loads((f / "runs/run/metrics.json").read_text())["rows"] for f in (one, two)]
    timed = {"images_per_second", "train_seconds", "peak_memory_bytes"}
    for a, b in zip(*rows, strict=True):
        if a["model"] != "student":  # trained again on two processes
            assert {k: v for k, v in a.items() if k not in timed} == {
                k: v for k, v in b.items() if k not in timed
            }


def test_two_processes_killed_and_continued_are_bit_equal(tmp_path):
    options = (
        *SMOKE,
        "profile.steps=16",
        "trainer.checkpoint_every=3",
        *(f"~stages.{name}" for name in ("evaluate", "export")),
        "trainer.devices=2",
        "trainer.shard=world",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run_verb(whole, "train", *options)
    kill_when(parts, options, has_checkpoint(parts / "runs/run/reflow/checkpoints"))
    run_verb(parts, "train", *options)
    for stage in ("reflow", "distill"):
        path = f"runs/run/{stage}/model.safetensors"
        one, other = (safetensors.torch.load_file(f / path) for f in (whole, parts))
        for name, value in one.items():
            assert torch.equal(value, other[name]), f"{stage}: {name}"


def test_a_batch_that_cannot_be_split_is_refused_before_there_are_two(tmp_path):
    options = ("recipe=instaflow", "profile=smoke", "trainer.devices=2", "teacher.batch_size=15")
    assert "batch_size: found 15, which cannot be split" in refusal(tmp_path, "train", *options)
