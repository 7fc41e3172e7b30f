"""The lock of a run folder: only one run writes to it at a time."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from distill.files import Lost, guarded, read_json, writing
from distill.stages.heartbeat import alive, beating, owner
from distill.stages.ownership import LOCK, MARK, is_run, read_object, take_run_folder


class Held:
    """Files that must not be replaced while a run writes: its lock, and the identity of the current stage."""

    def __init__(self, lock: Path, inode: tuple[int, int], content: bytes) -> None:
        self.lock, self._expected, self._content = lock, {lock: inode}, content

    def check(self) -> None:
        """Raise `Lost` if one of the files was removed or replaced, or if a process of another machine has taken the lock."""
        for path, expected in self._expected.items():
            try:
                found = _inode(path.lstat())
            except OSError:
                found = None
            if found != expected:
                raise Lost(
                    f"{path}: was {'removed' if found is None else 'replaced'} during the run; another process may use the "
                    "folder, so this one stops without writing. The same command continues"
                )
        with suppress(OSError):
            if self.lock.read_bytes() != self._content:
                raise Lost(
                    f"{_holder(self.lock)}: it took this process for dead, so this one stops without writing"
                )

    @contextmanager
    def also(self, path: Path) -> Iterator[None]:
        """Also check `path` inside the block."""
        self._expected[path] = _inode(path.lstat())
        try:
            yield
        finally:
            del self._expected[path]


@contextmanager
def lock(run_folder: Path) -> Iterator[Held]:
    """Make or open a run folder (`take_run_folder`) and lock it inside the block.

    The kernel releases the lock when the process ends; the file records its process, and its time is renewed for other
    machines (`heartbeat`). If the lock is removed, replaced or taken over, further writes raise `Lost` (`files.guarded`).

    Raises:
        ValueError: if another process holds the lock, or as `take_run_folder`.
    """
    there, fresh = run_folder.exists(), not is_run(run_folder)
    take_run_folder(run_folder)
    path = run_folder / LOCK
    handle = _locked(path)
    with handle:
        if alive(path, read_object(path)):
            raise ValueError(_holder(path))
        mine = owner()
        content = _write(path, handle, mine)
        held = Held(path, _inode(os.fstat(handle.fileno())), content)
        try:
            with beating(handle), guarded(held.check):
                yield held
        except BaseException:
            if fresh:
                _withdraw(held, there)
            raise
        finally:
            with suppress(OSError, Lost):
                held.check()
                _write(path, handle, mine | {"released": True})


def _write(path: Path, handle: BinaryIO, owner: dict[str, object]) -> bytes:
    """Write the lock's content, in place; returns it."""
    content = json.dumps(owner).encode()
    with writing(path, len(content)):
        handle.truncate(0)
        handle.write(content)
        handle.flush()
    return content


def _withdraw(held: Held, there: bool) -> None:
    """Remove mark and lock of a run that failed before writing anything, and the folder unless it was `there` before."""
    run_folder = held.lock.parent
    with suppress(OSError, Lost):
        held.check()
        if set(os.listdir(run_folder)) == {MARK, LOCK}:
            (run_folder / MARK).unlink()
            held.lock.unlink()
            if not there:
                run_folder.rmdir()


def _locked(path: Path) -> BinaryIO:
    """Open and lock the lock file; returns its handle. Retries if the path was replaced in between."""
    while True:
        with writing(path):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError(f"{path}: is not a regular file, expected the lock of the run; delete it")
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            handle = os.fdopen(os.open(path, flags, 0o666), "ab+")
        try:
            with writing(path):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ValueError(_holder(path)) from None
            status = os.fstat(handle.fileno())
            with suppress(FileNotFoundError):
                if _inode(path.lstat()) == _inode(status):
                    if status.st_nlink == 1:
                        return handle
                    path.unlink()  # a copy of the run by hard links shares this file
        except BaseException:
            handle.close()
            raise
        handle.close()


def _holder(path: Path) -> str:
    """Return the message that names the process which holds the lock."""
    owner = {}
    with suppress(OSError, ValueError):
        owner = read_json(path)
    known = isinstance(owner, dict) and isinstance(owner.get("since"), int | float)
    job = f" (job {owner['job']})" if known and "job" in owner else ""
    who = (
        f"process {owner.get('pid')} on {owner.get('host')}{job} for {time.time() - owner['since']:.0f} s"
        if known
        else "another process"
    )
    return f"{path}: the run is locked by {who}; wait for it, stop it, or use another name=..."


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
