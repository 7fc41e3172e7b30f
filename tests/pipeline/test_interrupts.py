"""Signals and kills: nothing is lost that was saved, nothing half written is accepted."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_support import checkpoint_of, has_checkpoint
from tests_support import ROOT, SMALL, forked, refusal, run_verb, signal_when

from distill.files import write_atomic, write_safetensors

sys.path.insert(0, str(ROOT / "tests" / "distributed"))
import worker

OPTIONS = (
    "recipe=instaflow",
    "profile=smoke",
    "profile.steps=60",
    *SMALL,
    "name=run",
    "trainer.checkpoint_every=1000",
    "stages.reflow.steps=1",
    *(f"~stages.{name}" for name in ("pairs2", "distill", "evaluate", "export")),
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "runs/run/teacher/model.safetensors")


def stop_in_training(folder: Path, number: signal.Signals, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a run and send the signal once the teacher has trained for a while; there is no checkpoint before."""
    log = folder / "runs/run/teacher/logs/metrics.jsonl"
    return signal_when(
        folder,
        number,
        (*OPTIONS, "trainer.log_every=1", *options),
        lambda: log.exists() and log.read_text().count("\n") >= 2,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_verb(folder, "train", *OPTIONS)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_first(whole, tmp_path, number):
    stopped = stop_in_training(tmp_path, number)
    assert stopped.returncode == 128 + number
    assert "the same command continues" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    saved = checkpoint_of(tmp_path / "runs/run/teacher/checkpoints")["progress"]["step"]
    assert 2 <= saved < 60
    note = json.loads((tmp_path / "runs/run/stopped.json").read_text())
    assert note == {"signal": signal.Signals(number).name, "start": None, "stage": "teacher", "idle": 0}
    if number == signal.SIGTERM:
        run_verb(tmp_path, "train", *OPTIONS)
        assert not (tmp_path / "runs/run/stopped.json").exists()
        assert all(torch.equal(v, weights(tmp_path)[k]) for k, v in weights(whole).items())


def test_a_signal_to_two_processes_saves_once_for_both(tmp_path):
    options = ("trainer.devices=2", "trainer.shard=world")
    stopped = stop_in_training(tmp_path, signal.SIGTERM, *options)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-2000:]
    assert json.loads((tmp_path / "runs/run/stopped.json").read_text())["signal"] == "SIGTERM"
    state = checkpoint_of(tmp_path / "runs/run/teacher/checkpoints")
    assert 0 < state["progress"]["step"] < 60
    assert state["networks"]["student"]["net.stem.weight"].shape == (8, 1, 3, 3)  # whole, not a shard


LATE = """
import os, signal
from distill.engine.callbacks import CheckpointCallback

plain = CheckpointCallback.{hook}

def late(self, trainer, module, *rest):
    plain(self, trainer, module, *rest)
    if trainer.global_step >= 0 and module.progress.iteration == {at}:
        os.kill(os.getpid(), signal.{name})

CheckpointCallback.{hook} = late
"""


@pytest.mark.parametrize(
    ("name", "hook", "at"),
    [
        ("SIGTERM", "on_train_batch_end", 7),
        ("SIGINT", "on_train_batch_end", 7),
        ("SIGTERM", "on_train_end", 60),
    ],
)
def test_signals_between_our_checks_are_not_lost(tmp_path, name, hook, at):
    """Lightning looks for SIGTERM itself after our callback, and would end with exit code 0, unsaved."""
    late = LATE.format(name=name, hook=hook, at=at)
    result = run_verb(tmp_path, "train", *OPTIONS, check=False, before=late)
    assert result.returncode == 128 + signal.Signals[name], result.stderr[-2000:]
    assert "the same command continues" in result.stderr
    state = checkpoint_of(tmp_path / "runs/run/teacher/checkpoints")
    assert state["progress"]["step"] in (at, at + 1)
    assert not (tmp_path / "runs/run/pairs").exists()


def train_and_die(folder: Path, at: int | None) -> None:
    """Train a student and a fake score, which is killed in iteration `at`; weights and averages in `end.pt`."""
    method = worker.make(worker.World())
    fake_loss = method.fake_loss

    def deadly(batch, step):
        if step.iteration == at:  # the student has stepped in this iteration, the fake net has not
            os.kill(os.getpid(), signal.SIGKILL)
        return fake_loss(batch, step)

    method.plan[1] = method.plan[1].__class__("fake", {"fake": method.fake}, deadly)
    torch.save(worker.fit(method, folder / "c", steps=10, checkpoint_every=2), folder / "end.pt")


@pytest.mark.slow
def test_killed_between_the_two_optimizer_steps_of_an_iteration(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert forked(train_and_die, whole, None) == 0
    for iteration in (4, 10, 16):
        assert forked(train_and_die, parts, iteration) == -signal.SIGKILL
    assert has_checkpoint(parts / "c")()
    assert forked(train_and_die, parts, None) == 0
    one, other = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, parts))
    compared = 0
    for name, value in one.items():
        if "/" not in name:  # logs of the last start alone
            assert torch.equal(value, other[name]), name
            compared += 1
    assert compared > 200


def test_what_a_killed_writer_left_is_swept_and_a_full_disk_leaves_the_old_file(whole, tmp_path):
    left = whole / "runs/run/teacher/.model.safetensors.part"
    left.write_bytes(b"half")
    run_verb(whole, "train", *OPTIONS)
    assert not left.exists()


def write_past_the_limit(path: Path) -> None:
    """Every writer, with a limit on the size of files."""
    write_safetensors(path, {"a": torch.zeros(10)})
    old = path.read_bytes()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for write in (
        partial(write_safetensors, path, {"a": torch.zeros(10_000)}),
        partial(write_atomic, path, partial(torch.save, torch.zeros(10_000))),
        partial(write_atomic, path, lambda temporary: temporary.write_bytes(bytes(10_000))),
    ):
        with pytest.raises(OSError, match=str(path)):
            write()
        assert path.read_bytes() == old
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_space_left_keeps_the_old_file_and_names_it(tmp_path):
    """The limit on file sizes makes every writer fail half-way, as a full disk does, without needing a disk to fill."""
    target = tmp_path / "target"
    target.mkdir()
    assert forked(write_past_the_limit, target / "x.safetensors") == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_full_disk_while_saving(small_disk, tmp_path):
    large = (
        "teacher.net.width=16",
        "teacher.net.multipliers=[1,2]",
    )  # two checkpoints are more than the disk holds
    options = (*OPTIONS, *large, f"runs_dir={small_disk}", "trainer.checkpoint_every=5")
    refused = run_verb(tmp_path, "train", *options, check=False)
    assert refused.returncode != 0
    assert str(small_disk) in refused.stderr
    assert "bytes free" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(small_disk.rglob("*.part"))


def test_a_read_only_run_folder(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = refusal(tmp_path, "train", *OPTIONS, f"runs_dir={small_disk}/runs")
    assert f"{small_disk}/runs" in refused
    assert "Read-only file system" in refused


def test_a_place_that_cannot_be_written(tmp_path):
    assert "/proc/runs" in refusal(tmp_path, "train", *OPTIONS, "runs_dir=/proc/runs")
    assert os.listdir(tmp_path) == []
