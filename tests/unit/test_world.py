"""A process's place among others, from the variables of srun; signs of life of a run on another machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import environment

from distill.files import await_file, stamp
from distill.interrupt import Interrupted
from distill.recipe.stopped import Stops
from distill.stages import heartbeat
from distill.stages.lock import Held, lock
from distill.world import World, adopt_srun, device_number, first_node, tasks_per_node

TASK = {
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,1",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
}


def test_srun_tells_each_task_its_place():
    found = dict(TASK)
    adopt_srun(found)
    assert {name: value for name, value in found.items() if name not in TASK} == {
        "RANK": "4",
        "WORLD_SIZE": "5",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": str(20_000 + 16 * 1234 % 12_000),
    }
    second = TASK | {"SLURM_STEP_ID": "1"}
    adopt_srun(second)
    assert second["MASTER_PORT"] != found["MASTER_PORT"], "two steps of a job may run at once"


@pytest.mark.parametrize(
    "environment",
    [{}, TASK | {"WORLD_SIZE": "1"}, TASK | {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_JOB_ID": "3"}],
    ids=["no job", "given", "one task", "a batch script"],
)
def test_nothing_is_adopted_without_several_tasks(environment: dict[str, str]):
    found = dict(environment)
    adopt_srun(found)
    assert found == environment


def test_a_missing_variable_of_srun_is_named():
    with pytest.raises(ValueError, match="SLURM_NODEID: not set, but SLURM_STEP_NUM_TASKS is 5"):
        adopt_srun({name: value for name, value in TASK.items() if name != "SLURM_NODEID"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2],m3", "n1"),
        ("node[001,005-007]", "node001"),
        ("rack1-node[02-04]-ib,x", "rack1-node02-ib"),
        ("tux[0-1][2-3]", "tux02"),
    ],
)
def test_the_first_machine_is_the_master(nodes: str, first: str):
    assert first_node(nodes) == first


def test_tasks_of_each_machine():
    assert tasks_per_node("4(x2),1") == [4, 4, 1]
    with pytest.raises(ValueError, match="expected a form such as"):
        tasks_per_node("4(x")


def test_the_device_of_a_process():
    assert [device_number(3, 1), device_number(3, 4)] == [0, 3]
    with pytest.raises(ValueError, match="LOCAL_RANK: found 4, but this process sees 2 CUDA devices"):
        device_number(4, 2)


def test_the_main_process_decides_and_its_error_is_everybodys(monkeypatch: pytest.MonkeyPatch):
    sent: list[Any] = []

    def broadcast(self: World, value: object, source: int = 0) -> object:
        if self.main:
            sent.append(value)
        return sent[-1]

    monkeypatch.setattr(World, "broadcast", broadcast)
    assert [World(rank, 2).decided(lambda: 1 + rank) for rank in (0, 1)] == [1, 1]  # noqa: B023

    errors = {
        FileNotFoundError: lambda: Path("/missing/x").read_bytes(),
        ValueError: lambda: json.loads("{"),  # of a class that is not made from a message alone
        RuntimeError: lambda: torch.zeros(2).reshape(3),
    }
    for kind, fail in errors.items():
        for rank in (0, 1):
            with pytest.raises(kind) as found:
                World(rank, 2).decided(fail)
            assert str(found.value) == sent[-1][2], "the main process's message"


def written(path: Path, **owner: object) -> Path:
    """The lock of a process that ended, or runs on another machine."""
    with lock(path):
        pass
    content = {"pid": 7, "since": time.time(), "host": "elsewhere"} | owner
    (path / ".lock").write_text(json.dumps(content))
    return path / ".lock"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT", 0.1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_a_run_that_lives_on_another_machine_is_not_entered(tmp_path: Path):
    path = written(tmp_path / "x")
    with heartbeat.beating(path.open("ab+")):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=r"locked by process 7 on elsewhere for"), lock(tmp_path / "x"):
            pass
        assert path.read_bytes() == before


def test_it_is_entered_after_three_missed_beats_or_once_it_let_go(tmp_path: Path):
    path = written(tmp_path / "x")
    start = time.monotonic()
    with lock(tmp_path / "x"):
        assert time.monotonic() - start >= 0.3
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert json.loads(path.read_text())["released"]
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(heartbeat, "BEAT", 1000.0)
        for owner in ({"released": True}, {"host": socket.gethostname()}):
            written(tmp_path / "x", **owner)
            with lock(tmp_path / "x"):
                pass


@pytest.mark.parametrize(
    ("answer", "code", "found"),
    [("", 0, False), ("RUNNING", 0, True), ("PENDING", 0, False), ("", 1, True)],
)
def test_slurm_knows_whether_a_job_still_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, found: bool
):
    written(tmp_path / "x", job="12", restart="0")
    queue = tmp_path / "squeue"
    queue.write_text(f"#!/bin/sh\necho {answer}\nexit {code}\n")
    queue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    start = time.monotonic()
    with lock(tmp_path / "x"):
        pass
    assert (time.monotonic() - start >= 0.3) == found
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    written(tmp_path / "x", job="12", restart="0")
    with lock(tmp_path / "x"):  # the same job, requeued
        pass


def test_a_holder_whose_lock_was_taken_over_writes_nothing_more(tmp_path: Path):
    with lock(tmp_path / "x") as held:
        assert isinstance(held, Held)
        held.check()
        other = {"pid": 8, "host": "elsewhere", "since": time.time(), "job": "3"}
        (tmp_path / "x" / ".lock").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=r"process 8 on elsewhere \(job 3\).*took this process for dead"):
            held.check()
    assert json.loads((tmp_path / "x" / ".lock").read_text()) == other


EARLY = """
import signal, sys
from distill import interrupt
interrupt.expect()
signal.raise_signal(signal.SIGUSR1)  # while the command starts
with interrupt.watch():
    try:
        interrupt.check()
    except interrupt.Interrupted as stop:
        sys.exit(str(stop))
"""


def test_a_warning_that_comes_while_the_command_starts_is_kept() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", EARLY], capture_output=True, text=True, check=False, env=environment()
    )
    assert ended.stderr.strip() == "stopped by SIGUSR1"


class Stage:
    FILES = ("checkpoints/step_0000004/state[.]pt", "logs/metrics[.]jsonl")


def test_starts_without_progress_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_START", "5.1")
    checkpoint = tmp_path / "run/train/checkpoints/step_0000004/state.pt"
    log = tmp_path / "run/train/logs/metrics.jsonl"
    for file in (checkpoint, log):
        file.parent.mkdir(parents=True)
        file.touch()
    planned: Any = [SimpleNamespace(name="train", folder=tmp_path / "run/train", stage=Stage())]
    for idle, save in ((1, False), (2, False), (0, True), (1, False)):
        stops = Stops(tmp_path / "run", planned)
        assert not (tmp_path / "run/stopped.json").exists()
        os.utime(log, ns=(idle, idle + 7))
        if save:
            os.utime(checkpoint, ns=(1, 1))
        stops.note(Interrupted(signal.SIGUSR2))
        note = json.loads((tmp_path / "run/stopped.json").read_text())
        assert note == {"signal": "SIGUSR2", "start": "5.1", "stage": "train", "idle": idle}


def test_a_file_of_the_main_process_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(b"abc")
    await_file(path, stamp(path))
    wanted = stamp(path)
    path.write_bytes(b"abcd")
    with pytest.raises(
        FileNotFoundError, match=r"found another file after 0 s, but the main process sees one of 3 bytes"
    ):
        await_file(path, wanted, seconds=0.1)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="found no file"):
        await_file(path, wanted, seconds=0.1)
