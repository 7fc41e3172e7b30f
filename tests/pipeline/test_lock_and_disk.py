"""A run that lost its folder stops; a disk that cannot be written is told by file, bytes and what to do; a kill between any two
operations leaves what the same command continues."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from test_ownership import STAGES, go, snapshot

from distill import files
from distill.files import Lost
from distill.stages import train as stages
from distill.stages.artifact import read_artifact, verify_files
from distill.stages.lock import lock


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("runs"))


def models(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name / "model.safetensors").read_bytes() for name in ("teacher", "student")}


# ---- the lock ----


def remove_lock(run: Path) -> None:
    (run / ".lock").unlink()


def replace_lock(run: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lock").touch()


def move_run(run: Path) -> None:
    run.rename(run.with_name("moved"))


def remove_run(run: Path) -> None:
    shutil.rmtree(run)


def replace_run(run: Path) -> None:
    shutil.copytree(run, run.with_name("copy"))
    shutil.rmtree(run)
    run.with_name("copy").rename(run)


def replace_stage(run: Path) -> None:
    shutil.copytree(run / "student", run / "copy")
    shutil.rmtree(run / "student")
    (run / "copy").rename(run / "student")


def remove_stage(run: Path) -> None:
    shutil.rmtree(run / "student")


@pytest.mark.parametrize(
    "lose", [remove_lock, replace_lock, move_run, remove_run, replace_run, replace_stage, remove_stage]
)
def test_a_run_that_lost_its_folder_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lose: Callable[[Path], None]
) -> None:
    after: dict[str, Any] = {}
    train = stages.train

    def losing(*args: Any, **options: Any) -> None:
        lose(tmp_path / "runs" / "x")
        after.update(snapshot(tmp_path))
        train(*args, **options)

    monkeypatch.setattr(stages, "train", losing)
    with pytest.raises(
        ValueError,
        match=r"stages.student: .*(removed|replaced) during the run.*stops without writing",
    ):
        go(tmp_path / "runs")
    assert snapshot(tmp_path) == after


@pytest.mark.parametrize("content", [b"garbage", b"5", b"[]", b"\xff\xfe", b"{}", b'{"pid": 1}', b""])
def test_a_lock_that_says_nothing(tmp_path: Path, content: bytes) -> None:
    with lock(tmp_path / "x"):
        pass
    (tmp_path / "x" / ".lock").write_bytes(content)
    with (tmp_path / "x" / ".lock").open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"\.lock: the run is locked by another process; wait for it"):
            go(tmp_path)
        assert (tmp_path / "x" / ".lock").read_bytes() == content
    with lock(tmp_path / "x"):
        assert str(os.getpid()) in (tmp_path / "x" / ".lock").read_text()


def test_a_lock_that_is_no_file(tmp_path: Path) -> None:
    with lock(tmp_path / "x"):
        pass
    for make in (Path.mkdir, os.mkfifo):
        (tmp_path / "x" / ".lock").unlink()
        make(tmp_path / "x" / ".lock")
        with pytest.raises(ValueError, match=r"\.lock: is not a regular file"):
            go(tmp_path)
        if make is Path.mkdir:
            (tmp_path / "x" / ".lock").rmdir()
            (tmp_path / "x" / ".lock").touch()


def test_a_lock_with_a_second_name_is_not_written_into(tmp_path: Path) -> None:
    with lock(tmp_path / "x"):
        pass
    os.link(tmp_path / "x" / ".lock", tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    with lock(tmp_path / "x"):
        assert (tmp_path / "backup").read_bytes() == before


# ---- disks ----

FULL = (
    r"x/\.distill: could not be written: No space left on device \(68 bytes to write, \d+ bytes free\); free"
)
OPERATIONS = ("mkdir", "open", "replace", "write_bytes")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_errors_of_the_disk_name_file_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    def fail(path: Path, *args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, operation, fail)
    with pytest.raises(OSError, match="could not be written") as told:
        files.write_text(tmp_path / "new" / "a.json", "12345") if operation == "mkdir" else files.write_text(
            tmp_path / "a.json", "12345"
        )
    message = str(told.value)
    assert str(tmp_path) in message
    assert os.strerror(number) in message
    assert "bytes free" in message
    assert operation == "mkdir" or "5 bytes to write" in message or "stopped after" in message
    assert "Errno" not in message
    assert not list(tmp_path.glob("*.json"))


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole run: no bare error of the system, whichever file comes first."""

    def fail(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(
        OSError,
        match=FULL,
    ):
        go(tmp_path)


def test_names_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"could not be written: File name too long .*; use a shorter name"):
        files.write_text(tmp_path / ("a" * 300), "x")
    with pytest.raises(OSError, match="a/x: cannot be a run folder: File name too long; use another"):
        go(tmp_path / ("a" * 300))


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file/x: could not be written: Not a directory"):
        go(tmp_path / "file")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OSError, match=r"folder.json: could not be written: Is a directory"):
        files.write_text(tmp_path / "folder.json", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.json"]


# ---- kills ----


class Killed(BaseException):
    """Nothing is cleaned up after it: every later operation raises it too."""


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """From operation number `after` on the process is dead; the operations before it."""
    done: list[str] = []

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def operation(path: Any, *args: Any, **options: Any) -> Any:
            if len(done) >= after:
                raise Killed
            done.append(f"{name} {path}")
            return real(path, *args, **options)

        monkeypatch.setattr(owner, name, operation)

    for name in ("replace", "unlink", "rmdir", "write_bytes"):
        wrap(Path, name)
    wrap(safetensors.torch, "save_file")
    wrap(files, "append_text")
    return done


@pytest.mark.parametrize(
    "command",
    [{}, *(pytest.param({"redo": stage}, marks=pytest.mark.slow) for stage in ("pairs", "teacher"))],
)
def test_a_kill_between_any_two_operations_is_continued(
    whole: Path, tmp_path: Path, command: dict[str, Any]
) -> None:
    def start(name: str) -> None:
        if command:
            shutil.copytree(whole, tmp_path / name)

    start("count")
    with pytest.MonkeyPatch.context() as patched:
        done = dying(patched, 10**9)
        go(tmp_path, "count", **command)
        total = len(done)
    assert total > 20
    for number in range(len(command), total, 13):
        start(str(number))
        with pytest.MonkeyPatch.context() as patched:
            dying(patched, number)
            with pytest.raises(Killed):
                go(tmp_path, str(number), **command)
        folder = go(tmp_path, str(number), **command)
        assert models(folder) == models(whole), number
        assert not list(folder.rglob("*.part")), number
        for name in STAGES:
            record = read_artifact(folder / name)
            assert record is not None
            verify_files(folder / name, record)


def test_a_redo_that_was_cut_short_is_finished_without_it_too(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "x")
    for number in range(2, 14, 3):
        with pytest.MonkeyPatch.context() as patched:
            dying(patched, number)
            with pytest.raises(Killed):
                go(tmp_path, redo="teacher")
        assert models(go(tmp_path)) == models(whole)


def test_a_refused_write_is_lost(tmp_path: Path) -> None:
    with lock(tmp_path / "x"):
        (tmp_path / "x" / ".lock").unlink()
        with pytest.raises(Lost, match="was removed"):
            files.write_text(tmp_path / "x" / "plan.json", "{}")
        with pytest.raises(Lost, match="was removed"):
            files.append_text(tmp_path / "x" / "log", "{}")
    assert os.listdir(tmp_path / "x") == [".distill"]
