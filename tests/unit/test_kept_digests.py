"""Digests of large files that are kept between commands."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distill import files


def test_digests_are_read_again_when_a_file_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "KEPT_ABOVE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept, path = tmp_path / "cache" / "distill" / "digests.json", tmp_path / "weights"
    path.write_bytes(b"a")
    digest = files.sha256_kept(path)
    assert not kept.exists(), "a file this young may still be changed without another time"
    monkeypatch.setattr(files, "KEPT_AFTER", 0)
    assert files.sha256_kept(path) == digest
    monkeypatch.setattr(files, "sha256_file", lambda path: "read")
    assert files.sha256_kept(path) == digest
    before = path.stat()
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_bytes(b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.sha256_kept(path) == "read", "same size and time of modification"
    for broken in ("[1]", "{", "7"):
        kept.write_text(broken)
        assert files.sha256_kept(path) == "read"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert files.sha256_kept(path) == "read"
