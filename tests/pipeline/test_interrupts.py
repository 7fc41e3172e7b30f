"""Signals and kills: nothing is lost that was saved, nothing half written is accepted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests_support import ROOT, environment, refusal, run_verb, signal_when

OPTIONS = (
    "recipe=instaflow",
    "profile=smoke",
    "profile.steps=200",
    "name=run",
    "trainer.checkpoint_every=1000",
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_first(whole, tmp_path, number):
    stopped = stop_in_training(tmp_path, number)
    assert stopped.returncode == 128 + number
    assert "the same command continues" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    saved = torch.load(tmp_path / "runs/run/teacher/checkpoints/last.ckpt", weights_only=True)["progress"][
        "step"
    ]
    assert 2 <= saved < 200
    run_verb(tmp_path, "train", *OPTIONS)
    assert all(torch.equal(v, weights(tmp_path)[k]) for k, v in weights(whole).items())


def test_a_signal_to_two_processes_saves_once_for_both(tmp_path):
    options = ("trainer.devices=2", "trainer.shard=world")
    stopped = stop_in_training(tmp_path, signal.SIGTERM, *options)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-2000:]
    state = torch.load(tmp_path / "runs/run/teacher/checkpoints/last.ckpt", weights_only=True)
    assert 0 < state["progress"]["step"] < 200
    assert state["networks"]["student"]["net.stem.weight"].shape == (16, 1, 3, 3)  # whole, not a shard


LATE = """
import os, signal
from distill.engine.fit import _Watch

def late(self, trainer, module, *rest):
    if trainer.global_step >= 0 and module.progress.iteration == {at}:
        os.kill(os.getpid(), signal.{name})

_Watch.{hook} = late
"""


@pytest.mark.parametrize(
    ("name", "hook", "at"),
    [
        ("SIGTERM", "on_train_batch_end", 7),
        ("SIGINT", "on_train_batch_end", 7),
        ("SIGTERM", "on_train_end", 200),
    ],
)
def test_signals_between_our_checks_are_not_lost(tmp_path, name, hook, at):
    """Lightning looks for SIGTERM itself after our callback, and would end with exit code 0, unsaved."""
    late = LATE.format(name=name, hook=hook, at=at)
    result = run_verb(tmp_path, "train", *OPTIONS, check=False, before=late)
    assert result.returncode == 128 + signal.Signals[name], result.stderr[-2000:]
    assert "the same command continues" in result.stderr
    state = torch.load(tmp_path / "runs/run/teacher/checkpoints/last.ckpt", weights_only=True)
    assert state["progress"]["step"] in (at, at + 1)
    assert not (tmp_path / "runs/run/pairs").exists()


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from worker import World, fit, make

method = make(World())
if len(sys.argv) > 2:
    fake_loss, at = method.fake_loss, int(sys.argv[2])

    def deadly(batch, step):
        if step.iteration == at:  # the student has stepped in this iteration, the fake net has not
            os.kill(os.getpid(), signal.SIGKILL)
        return fake_loss(batch, step)

    method.plan[1] = method.plan[1].__class__("fake", {{"fake": method.fake}}, deadly)
import torch
torch.save(fit(method, Path(sys.argv[1]) / "c", steps=10, checkpoint_every=2), Path(sys.argv[1]) / "end.pt")
"""


def test_killed_between_the_two_optimizer_steps_of_an_iteration(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests" / "distributed"), root=str(ROOT)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()

    def call(*arguments: object) -> int:
        command = [sys.executable, str(script), *map(str, arguments)]
        return subprocess.run(
            command, env=environment(), capture_output=True, timeout=120, check=False
        ).returncode

    assert call(whole) == 0
    for iteration in (4, 10, 16):
        assert call(parts, iteration) == -signal.SIGKILL
    assert (parts / "c" / "last.ckpt").exists()
    assert call(parts) == 0
    one, other = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, parts))
    compared = 0
    for name, value in one.items():
        if "/" not in name:  # logs of the last start alone
            assert torch.equal(value, other[name]), name
            compared += 1
    assert compared > 300


def test_what_a_killed_writer_left_is_swept_and_a_full_disk_leaves_the_old_file(whole, tmp_path):
    left = whole / "runs/run/teacher/.model.safetensors.part"
    left.write_bytes(b"half")
    run_verb(whole, "train", *OPTIONS)
    assert not left.exists()


LIMITED = """
import resource, signal, sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from distill.files import write_atomic, write_safetensors

path = Path(sys.argv[1])
write_safetensors(path, {{"a": torch.zeros(10)}})
old = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: write_safetensors(path, {{"a": torch.zeros(10_000)}}),
    lambda: write_atomic(path, lambda p: torch.save(torch.zeros(10_000), p)),
    lambda: write_atomic(path, lambda p: p.write_bytes(bytes(10_000))),
):
    try:
        write()
    except OSError as error:
        assert str(path) in str(error), error
    else:
        raise AssertionError("writing past the limit succeeded")
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]
print("ok")
"""


def test_no_space_left_keeps_the_old_file_and_names_it(tmp_path):
    """The limit on file sizes makes every writer fail half-way, as a full disk does, without needing a disk to fill."""
    script = tmp_path / "limited.py"
    script.write_text(LIMITED.format(root=str(ROOT)))
    target = tmp_path / "target"
    target.mkdir()
    result = subprocess.run(
        [sys.executable, str(script), str(target / "x.safetensors")],
        text=True,
        capture_output=True,
        timeout=120,
        env=environment(),
        check=False,
    )
    assert result.stdout.strip() == "ok", result.stderr[-3000:]


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
    refused = run_verb(
        tmp_path, "train", *OPTIONS, f"runs_dir={small_disk}", "trainer.checkpoint_every=5", check=False
    )
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
