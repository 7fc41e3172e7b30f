"""report.html: self-contained, with the numbers of the run's files, and its controls work in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests_support import SMALL, copied_run, run_verb

from distill.files import read_json, write_json
from distill.stages.ownership import WEBPAGE
from distill.stages.webpage import POINTS, _thinned, webpage, write_webpage

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run(finished: Path) -> Path:
    return finished / "runs" / "run"


def data_of(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_of_a_run(run: Path) -> None:
    page = (run / WEBPAGE).read_text()
    assert page == webpage(run)
    loaded = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s)>]+)', page)
    assert loaded
    assert all(place.startswith(("data:", "$")) for place in loaded), "nothing is loaded from elsewhere"
    measured = read_json(run / "evaluate" / "metrics.json")
    data = data_of(page)
    assert [title.partition(" step")[0] for title in data["strips"]["titles"]] == [
        f"{row['model']}, {row['steps']}" for row in measured["rows"]
    ]
    assert (
        data["strips"]["height"] == data["strips"]["cell"] * len(measured["rows"]) + data["strips"]["border"]
    )
    stages = {stage["name"]: stage for stage in data["stages"]}
    assert list(stages) == ["teacher", "reflow", "distill"]
    lines = [json.loads(line) for line in (run / "reflow/logs/metrics.jsonl").read_text().splitlines()]
    assert dict(stages["reflow"]["main"])["student/loss"] == [
        [line["images"], pytest.approx(line["student/loss"], rel=1e-6)]
        for line in lines
        if "student/loss" in line
    ]
    for gate in measured["gates"]:
        assert f"<td>{gate['name']}</td>" in page.replace("&#x27;", "'")


def test_it_is_written_again_only_where_it_differs(run: Path, tmp_path: Path) -> None:
    folder = copied_run(run.parents[1], tmp_path) / "runs" / "run"
    before = (folder / WEBPAGE).stat().st_mtime_ns
    write_webpage(folder)
    assert (folder / WEBPAGE).stat().st_mtime_ns == before
    (folder / WEBPAGE).unlink()
    shutil.rmtree(folder / "evaluate")
    text = (folder / "reflow/logs/metrics.jsonl").read_text()
    (folder / "reflow/logs/metrics.jsonl").write_text(text + '{"images": 1, "cut')
    write_webpage(folder)
    page = (folder / WEBPAGE).read_text()
    assert "No evaluation is finished." in page
    assert "6 of 7 stages finished" in page
    assert data_of(page)["stages"] == data_of((run / WEBPAGE).read_text())["stages"]


def test_names_and_notes_are_text(run: Path, tmp_path: Path) -> None:
    folder = copied_run(run.parents[1], tmp_path) / "runs" / "run"
    hostile = "</script><img src=x onerror=alert(1)>\x1b[0m"
    for path, key in ((folder / "evaluate/metrics.json", "note"), (folder / "plan.json", "recipe")):
        write_json(path, read_json(path) | {key: hostile})
    metrics = read_json(folder / "evaluate/metrics.json")
    metrics["rows"][0]["model"] = hostile
    write_json(folder / "evaluate/metrics.json", metrics)
    page = webpage(folder)
    assert "<img src=x" not in page
    assert page.count("</script>") == 2
    assert "\x1b" not in page
    assert data_of(page)["strips"]["titles"][0].startswith("</script>")


def test_each_evaluation_has_a_table(run: Path, tmp_path: Path) -> None:
    """The last one has the samples."""
    folder = copied_run(run.parents[1], tmp_path) / "runs" / "run"
    plan = read_json(folder / "plan.json")
    plan["stages"] |= {"second": plan["stages"]["evaluate"]}
    write_json(folder / "plan.json", plan)
    shutil.copytree(folder / "evaluate", folder / "second")
    metrics = read_json(folder / "second/metrics.json")
    write_json(folder / "second/metrics.json", metrics | {"rows": metrics["rows"][-2:]})
    page = webpage(folder)
    assert page.count("<h2>Results of the stage evaluate</h2>") == 1
    shown, _, other = page.partition("<h2>Results of the stage evaluate</h2>")
    name = metrics["rows"][0]["model"]
    assert f"<td>{name}</td>" not in shown
    assert f"<td>{name}</td>" in other
    assert page.count('<table class="marked">') == 1
    assert len(data_of(page)["strips"]["titles"]) == 2


def test_long_curves_become_means_of_neighbours() -> None:
    points = [[float(i), float(i % 2)] for i in range(2 * POINTS)]
    assert _thinned(points) == [[2 * i + 0.5, 0.5] for i in range(POINTS)]
    assert _thinned(points[:3]) == points[:3]


def test_a_page_of_points(tmp_path: Path, shared) -> None:
    """Without pictures of rows: the evaluation's picture."""
    page = webpage(shared("toy_instaflow") / "runs" / "run")
    assert data_of(page)["strips"] is None
    assert '<img alt="samples" src="data:image/png;base64,' in page


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
def test_in_a_browser(run: Path, tmp_path: Path) -> None:
    """Charts are drawn, and the slider shows another row."""
    move = (
        "<script>slider.value = 2; slider.dispatchEvent(new Event('input'));"
        "document.querySelector('details').open = true;</script></body>"
    )
    (tmp_path / "page.html").write_text((run / WEBPAGE).read_text().replace("</body>", move))
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    )
    options += " --disable-component-update --disable-sync --virtual-time-budget=3000 --dump-dom"
    started = [
        CHROMIUM,
        *options.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{tmp_path / 'page.html'}",
    ]
    shown = subprocess.run(started, capture_output=True, text=True, timeout=120, check=True).stdout
    data = data_of((run / WEBPAGE).read_text())
    curves = sum(len(stage["main"]) for stage in data["stages"])
    assert shown.count('class="curve"') >= curves + len(data["stages"][0]["more"])
    title = data["strips"]["titles"][2]
    assert re.search(rf'id="chosen">{re.escape(title)}<', shown)
    top = data["strips"]["border"] + 2 * data["strips"]["cell"]
    assert re.search(rf'id="below" style="[^"]*background-position: 0px -{top}px', shown)
    assert shown.count('<tr class="chosen">') == 1


def test_a_finished_run_gets_its_page_again(run: Path, tmp_path: Path) -> None:
    folder = copied_run(run.parents[1], tmp_path)
    page = folder / "runs" / "run" / WEBPAGE
    page.unlink()
    run_verb(folder, "train", "recipe=instaflow", "profile=smoke", "name=run", *SMALL)
    assert page.read_text() == (run / WEBPAGE).read_text()
