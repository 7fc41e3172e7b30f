"""Several evaluations in one table and one plot: what is marked, what is merged, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.compare import main, parse
from distill.evaluation import comparison, curve

PROTOCOL = {
    "features": "digits64",
    "features_sha256": "c4" * 32,
    "count": 2000,
    "class_balanced": True,
    "reference": "digits, all images",
    "reference_count": 1797,
    "reference_digest": "31" * 32,
    "resolution": [1, 8, 8],
    "straightness_steps": 50,
    "floor": {"fd": 0.05, "kid": -0.003, "sliced_wasserstein": 0.04, "half": 898.0},
    "full_count": 2000,
}


def row(model: str, steps: int | None, fd: float, **more: Any) -> dict[str, Any]:
    """A row of metrics.json with the entries that these tests look at."""
    entries = {
        "nfe": steps,
        "fd": fd,
        "kid": fd / 100,
        "recall": 1 - fd,
        "class_std": 0.3,
        "straightness": None,
    }
    return (
        {"model": model, "steps": steps, "teacher_mse": 0.5 * fd, "images_per_second": 100.0} | entries | more
    )


TEACHER = [row("teacher", n, fd, straightness=6.3) for n, fd in ((50, 0.03), (4, 0.1), (1, 0.9))]


@pytest.fixture
def make(tmp_path):
    """Write a run's metrics.json; returns its folder."""

    def call(name: str, rows: list[dict[str, Any]], note: str = "", real: Any = None, **protocol: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        content = {
            "schema": 1,
            "note": note,
            "protocol": PROTOCOL | protocol,
            "real": real or {"class_std": 0.33, "heldout_nn": 2.1},
            "rows": rows,
        }
        (folder / "metrics.json").write_text(json.dumps(content))
        return str(folder)

    return call


def load(*folders: str) -> list[comparison.Run]:
    return comparison.read(comparison.find(folders)[0])


def test_the_table_has_every_row_and_marks_the_best_of_directed_columns(make):
    runs = load(make("a", [*TEACHER, row("student", 1, 0.06)]), make("b", [row("student", 1, 0.0297)]))
    lines = comparison.table(runs).splitlines()
    assert lines[0].startswith("| run | model | steps | nfe | fd_digits64 ↓ | kid_digits64·10³ ↓ |")
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| a", "teacher", "50"],
        ["| a", "teacher", "4"],
        ["| a", "teacher", "1"],
        ["| a", "student", "1"],
        ["| b", "student", "1"],
    ]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    column = {heading: [line[i] for line in cells[2:]] for i, heading in enumerate(cells[0])}
    # .0297 is the best, and .03 is printed like it.
    assert column["fd_digits64 ↓"] == ["**0.030**", "0.100", "0.900", "0.060", "**0.030**"]
    assert column["recall_digits64 ↑"] == ["**0.970**", "0.900", "0.100", "0.940", "**0.970**"]
    assert column["straightness ↓"] == ["**6.300**"] * 3 + ["-", "-"]
    for unmarked in ("nfe", "class std", "teacher mse ↓", "images/s ↑"):
        assert not any("*" in cell for cell in column[unmarked]), unmarked


def test_guidance_is_shown_where_there_is_some(make):
    guided = row("teacher", 1, 0.1, guidance_scale=1.5)
    text = comparison.table(load(make("a|b", [row("teacher", 1, 0.2, guidance_scale=1.0), guided])))
    assert text.splitlines()[0].startswith("| run | model | steps | guidance | nfe |")
    assert text.splitlines()[3].startswith("| a&#124;b | teacher | 1 | 1.5 | 1 | **0.100** |")
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert "guidance" not in comparison.table(load(make("plain", TEACHER)))


def test_columns_line_up_in_a_terminal(make):
    text = comparison.aligned(comparison.table(load(make("a", TEACHER)), mark="*{}"))
    lines = text.splitlines()
    assert len(lines) == 5
    ends = [re.search(r"\*?[\d.]+(?=  )", line[line.index("teacher") + 20 :]).end() for line in lines[2:]]
    assert len({line.index("teacher") for line in lines[2:]}) == 1
    assert len(set(ends)) == 1
    assert "*0.030" in lines[2]


def test_names_are_folders_with_as_many_parents_as_needed(make):
    same = [make("x/run", TEACHER), make("y/run", TEACHER), make("other", TEACHER)]
    assert [run.name for run in load(*same[:1], same[2])] == ["run", "other"]
    assert [run.name for run in load(*same)][:2] == ["x/run", "y/run"]


def test_other_protocols_are_refused_and_told_by_run(make):
    a, b = make("a", TEACHER), make("b", TEACHER)
    c = make("c", TEACHER, count=500, seed=3)
    comparison.check_protocols(load(a, b))
    with pytest.raises(ValueError, match="the protocols differ") as raised:
        comparison.check_protocols(load(a, b, c))
    assert "  count: 2000 in a, b; 500 in c\n" in str(raised.value)
    assert "  seed: 0 in a, b; 3 in c\n" in str(raised.value)
    assert "features" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("features", "clip"),
        ("features_sha256", None),
        ("class_balanced", False),
        ("reference", "digits, resized"),
        ("reference_count", 1),
        ("reference_digest", "0"),
        ("resolution", [3, 8, 8]),
        ("k", 3),
        ("projections", 1),
        ("straightness_steps", 10),
        ("preprocessing", "resized"),
        ("full_count", 5000),
    ],
)
def test_every_entry_of_the_protocol_counts(make, key, value):
    with pytest.raises(ValueError, match=f"  {key}: "):
        comparison.check_protocols(load(make("a", TEACHER), make("b", TEACHER, **{key: value})))


def test_what_may_differ(make):
    """The floor; the straightness steps of a run that measured none; the full count of older files."""
    images = [row("photos", None, 0.2)]
    runs = load(
        make("a", TEACHER),
        make("b", TEACHER, floor={"fd": 0.06}),
        make("c", images, straightness_steps=None),
        make("d", TEACHER, full_count=None),
    )
    comparison.check_protocols(runs)
    assert comparison.protocol(runs[::-1]).full_count == 2000


def test_equal_lines_are_drawn_once(make):
    near = [r | {"fd": r["fd"] * (1 + 1e-6)} for r in TEACHER]  # another number of threads
    runs = load(
        make("a", [*TEACHER, row("student", 1, 0.06)]),
        make("b", [*near, row("student", 1, 0.05)]),
        make("c", [*TEACHER[:2], row("student", 1, 0.05), row("photos", None, 0.2)]),
    )
    lines = curve.lines(runs, "fd")
    found = {(line.model, line.runs): line.points for line in lines}
    assert set(found) == {
        ("teacher", ("a", "b")),
        ("teacher", ("c",)),
        ("student", ("a",)),
        ("student", ("b", "c")),
        ("photos", ("c",)),
    }
    assert found["teacher", ("a", "b")] == ((1, 0.9), (4, 0.1), (50, 0.03))
    assert found["photos", ("c",)] == ((None, 0.2),)
    # Another model with the same value of one metric is another model.
    other = load(make("d", [row("student", 1, 0.05)]), make("e", [row("student", 1, 0.05, kid=0.1)]))
    assert [line.runs for line in curve.lines(other, "fd")] == [("d",), ("e",)]
    labels = [curve.label(line, runs) for line in lines]
    assert labels[:2] == ["teacher: a, b", "student: b, c"]
    assert curve.label(curve.lines(runs[:2], "fd")[0], runs[:2]) == "teacher"
    assert curve.label(curve.lines(runs[:1], "fd")[1], runs[:1]) == "student"


def test_names_of_a_sweep_are_short_in_the_legend(make):
    runs = load(*(make(f"instaflow-smoke-seed-{n}", [row("student", 1, 0.1 + n)]) for n in (0, 1)))
    assert [curve.label(line, runs) for line in curve.lines(runs, "fd")] == ["student: …0", "student: …1"]
    assert "| instaflow-smoke-seed-0 |" in comparison.table(runs)


def test_the_plot_shows_lines_floor_and_images_without_calls(make):
    runs = load(
        make("a", [*TEACHER, row("photos", None, 0.2)]), make("b", [*TEACHER, row("student", 1, 0.06)])
    )
    axes = curve.draw(runs, "fd").axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    half = "real images: one half (898)\nagainst the other"
    assert set(drawn) == {"teacher", "photos: a", "student: b", half}
    assert list(drawn["teacher"].get_xdata()) == [1, 4, 50]
    assert list(drawn["teacher"].get_ydata()) == [0.9, 0.1, 0.03]
    assert drawn[half].get_linestyle() == "--"
    assert list(drawn[half].get_ydata()) == [0.05, 0.05]
    assert list(drawn["photos: a"].get_ydata()) == [0.2, 0.2]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_ylabel() == "fd_digits64 (lower is better)"
    kid = curve.draw(runs, "kid").axes[0]  # its floor is negative
    assert kid.get_yscale() == "linear"
    assert "·10³" in kid.get_ylabel()
    recall = curve.draw(runs, "recall").axes[0]  # no distance
    assert recall.get_yscale() == "linear"
    assert recall.get_ylabel() == "recall_digits64 (higher is better)"
    assert [v for v, _ in curve.floors(runs, "class_std")] == [0.33]
    assert curve.floors(runs, "recall") == []


@pytest.fixture
def compare(monkeypatch, capsys, tmp_path):
    """Run the verb in this process; returns (what it printed, the message that it ended with or None)."""

    def call(*arguments: str) -> tuple[str, str | None]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["distill.compare", *arguments])
        message = None
        try:
            main()
        except SystemExit as ended:
            message = str(ended.code)
        return capsys.readouterr().out, message

    return call


def test_the_verb_writes_a_page_and_a_plot(make, compare, tmp_path):
    smoke = "The sizes of this run were limited by a profile: its numbers and images mean nothing."
    a, b = make("a", [*TEACHER, row("student", 1, 0.06)]), make("b", TEACHER, note=smoke)
    (tmp_path / "unfinished").mkdir()
    printed, error = compare(a, b, "unfinished", "out=into/here")
    assert error is None
    page = (tmp_path / "into/here/comparison.md").read_text()
    for text in (printed, page):
        assert f"b: {smoke}" in text
        assert "unfinished: left out, it has no metrics.json" in text
        assert "2000 class-balanced samples against 1797 real images" in text
    assert "![fd against network calls](comparison.png)" in page
    assert comparison.table(load(a, b)) in page
    with Image.open(tmp_path / "into/here/comparison.png") as picture:
        assert picture.format == "PNG"
        assert picture.size[0] > 1000
    first = (tmp_path / "into/here/comparison.png").read_bytes()
    compare(a, b, "unfinished", "out=into/here")
    assert (tmp_path / "into/here/comparison.png").read_bytes() == first
    compare(a, b, "unfinished", "out=into/here", "metric=recall")
    assert (tmp_path / "into/here/comparison.png").read_bytes() != first


def test_a_run_without_the_metric_is_told(make, compare):
    printed, error = compare(make("a", TEACHER), make("b", [row("student", 1, 0.1)]), "metric=straightness")
    assert error is None
    assert "b: no straightness in any row, so it is not in the plot" in printed


def test_refusals(make, compare, tmp_path):
    good = make("a", TEACHER)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def message(*arguments: str) -> str:
        printed, error = compare(*arguments)
        assert error is not None
        assert error.startswith("error: ")
        assert printed == ""
        assert not (tmp_path / "comparison").exists()
        return error

    assert "runs: none given" in message()
    assert "nowhere: no such file or folder" in message(good, "nowhere")
    assert "empty: no metrics.json in any of them" in message("empty")
    assert "metrics.json: given twice" in message(good, f"{good}/metrics.json")
    assert (
        "metric: found 'fdd', expected a metric of these runs: teacher_mse, images_per_second, fd, kid"
        in message(good, "metric=fdd")
    )
    assert "did you mean fd?" in message(good, "metric=fdd")
    assert "metric: found 'nfe'" in message(good, "metric=nfe")
    assert "metrik: no such key, did you mean metric?; expected metric, out, or a path" in message(
        good, "metrik=fd"
    )
    assert "--metric: expected key=value with a key among metric, out, or a path" in message(
        good, "--metric", "fd"
    )
    assert "out: file is a file, expected a folder" in message(good, "out=file")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2}, "metrics.json: schema: found 2, this version reads 1"),
        ({"rows": []}, "metrics.json: rows: empty"),
        ({"rows": None}, "metrics.json: rows: found NoneType, expected list"),
        ({"rows": [{"steps": 1}]}, "metrics.json: rows: model: missing"),
        ({"protocol": {"features": "x"}}, "metrics.json: protocol"),
        ({"protocol": PROTOCOL | {"colour": 1}}, "metrics.json: protocol.colour: no such key"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_never_skipped(make, compare, change, expected):
    good, bad = make("a", TEACHER), Path(make("b", TEACHER)) / "metrics.json"
    bad.write_text(json.dumps(json.loads(bad.read_text()) | change))
    _, error = compare(good, str(bad.parent))
    assert error is not None
    assert f"b/{expected}" in error
    bad.write_text("{")
    assert "b/metrics.json: not valid JSON" in (compare(good, str(bad.parent))[1] or "")


def test_a_path_may_hold_an_equals_sign(make):
    folder = make("seed=1", TEACHER)
    assert parse([folder, "metric=kid"]).paths == [folder]


def test_help(compare):
    printed, error = compare("--help")
    assert error is None
    assert "python -m distill.compare runs/*" in printed
    assert "metric:" in printed
