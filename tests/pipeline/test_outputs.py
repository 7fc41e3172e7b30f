"""What the verbs beside a run write over: their own earlier results, and files that the user named; nothing of a run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from test_ownership import go, snapshot

from distill import sample
from distill.evaluation.comparison import MARKING
from distill.stages.outputs import check_comparison, check_evaluation, drawn_by


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def x(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, tmp_path / "runs" / "x"))


def draw(x: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The message of `distill.sample`, or "" where it drew."""
    monkeypatch.setattr(sys, "argv", ["distill.sample", f"model={x / 'student'}", "count=2", *arguments])
    try:
        sample.main()
    except SystemExit as ended:
        return str(ended.code)
    return ""


def test_the_default_picture_replaces_only_pictures_of_the_verb(
    x: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draw(x, monkeypatch) == ""
    assert drawn_by(Path("grid.png"), "distill.sample")
    assert draw(x, monkeypatch, "seed=1") == ""
    Image.new("L", (2, 2)).save("grid.png")
    before = Path("grid.png").read_bytes()
    assert "out: grid.png, the default, exists and was not drawn by distill.sample" in draw(x, monkeypatch)
    assert Path("grid.png").read_bytes() == before
    assert draw(x, monkeypatch, "out=grid.png") == ""  # named by the user


def test_nothing_of_a_run_or_a_model_is_written_over(
    x: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (x / "student" / "curve.png").write_bytes(b"mine")
    model = tmp_path / "downloaded"
    model.mkdir()
    (model / "model.json").write_text("{}")
    (model / "card.png").write_bytes(b"its")
    before = snapshot(tmp_path)
    for out in (x / "grid.png", x / "student" / "curve.png", model / "card.png"):
        assert f"out: {out} is in {out.parent if out.parent == model else x}" in draw(
            x, monkeypatch, f"out={out}"
        )
    monkeypatch.chdir(x)
    assert f"out: grid.png is in {x}; expected a path elsewhere" in draw(x, monkeypatch)
    assert snapshot(tmp_path) == before
    for _ in range(2):
        assert draw(x, monkeypatch, "out=samples.png") == ""
    (x / "folder.png").mkdir()
    assert "is a folder, expected a file" in draw(x, monkeypatch, "out=folder.png")


def test_a_link_is_replaced_and_not_written_through(
    x: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out.png").symlink_to("mine")
    assert draw(x, monkeypatch, "out=out.png") == ""
    assert (tmp_path / "mine").read_text() == "mine"


def test_comparisons_replace_comparisons(tmp_path: Path) -> None:
    page, picture = tmp_path / "comparison.md", tmp_path / "comparison.png"
    check_comparison(page, picture, "distill.compare")
    picture.write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"comparison.png exists and is not a comparison; expected another folder"
    ):
        check_comparison(page, picture, "distill.compare")
    info = PngInfo()
    info.add_text("Software", "distill.compare")
    Image.new("L", (2, 2)).save(picture, pnginfo=info)
    page.write_text(f"# Comparison of a, b\n\n{MARKING}\n")
    check_comparison(page, picture, "distill.compare")
    page.write_text("# Comparison of a, b\n\nwritten by hand\n")
    with pytest.raises(ValueError, match=r"comparison.md exists and is not a comparison"):
        check_comparison(page, picture, "distill.compare")
    page.write_text("# My thesis\n")
    with pytest.raises(ValueError, match=r"comparison.md exists and is not a comparison"):
        check_comparison(page, picture, "distill.compare")
    page.unlink()
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(ValueError, match=r"comparison.png exists and is not"):
        check_comparison(page, picture, "distill.compare")


@pytest.mark.parametrize("name", ["grid.png", "report.md"])
def test_a_picture_or_report_of_the_users_is_no_evaluation(tmp_path: Path, name: str) -> None:
    check_evaluation(tmp_path, ("metrics.json", "report.md", "grid.png"))
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"contains {name}, which is not from an evaluation"):
        check_evaluation(tmp_path, ("metrics.json", "report.md", "grid.png"))
