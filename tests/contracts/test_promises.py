"""Every test that a page names exists, every promise of docs/reliability.md names one, CONTRIBUTING.md lists the slow ones."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
]
NAMED = re.compile(r"(tests/[\w/]+\.py)(?:::(\w+))?")


def tables(page: str, last_head: str) -> list[list[list[str]]]:
    """Tables of a page as rows of cells, where the last cell of the head reads so."""
    found = re.findall(r"(?:^\|.*\n)+", (ROOT / page).read_text(), flags=re.MULTILINE)
    cut = [[[c.strip() for c in line.strip("|").split(" | ")] for line in t.splitlines()] for t in found]
    return [table[2:] for table in cut if table[0][-1] == last_head]


@cache
def marks_of(file: str, partly: bool = False) -> dict[str, bool]:
    """Name of each test of a file -> whether it is slow; with `partly`, whether one of its cases is."""
    tree = ast.parse((ROOT / file).read_text())
    everything = any(
        isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node.targets[0]) and is_slow(node.value)
        for node in tree.body
    )
    return {
        node.name: everything or any(is_slow(decorator, partly) for decorator in node.decorator_list)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def is_slow(node: ast.expr, partly: bool = False) -> bool:
    text = ast.unparse(node)
    return text.endswith("mark.slow") or (partly and "mark.slow" in text)


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_a_page_names_exist(page: str) -> None:
    for file, name in NAMED.findall((ROOT / page).read_text()):
        assert (ROOT / file).is_file(), f"{page}: {file}: no such file"
        assert not name or name in marks_of(file), f"{page}: {file} has no {name}"


def test_every_promise_names_its_test() -> None:
    promises = [row for table in tables("docs/reliability.md", "tested by") for row in table]
    assert len(promises) > 30
    for *promise, held in promises:
        found = NAMED.findall(held)
        assert found, f"{promise}: names no test"
        for file, name in found:
            assert name, f"{promise}: {file}: which of its tests?"
            assert not marks_of(file)[name], f"{promise}: {name} is slow: not run with every change"


def test_every_slow_test_is_in_the_table() -> None:
    (table,) = tables("CONTRIBUTING.md", "minutes")
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    # `marks(...)` of the score methods is not seen here: the row names the file.
    slow = [
        f"{file}::{name}" for file in files for name, is_it in marks_of(file, partly=True).items() if is_it
    ]
    slow.append("tests/distributed/test_score_two_processes.py")
    assert sorted(row[0].strip("`") for row in table) == sorted(slow)
    assert all(proves and float(minutes) > 0 for _, proves, minutes in table)


def test_the_readers_of_tables_and_marks_work() -> None:
    """Else the tests above could not fail."""
    assert marks_of("tests/identities/test_score_toy.py")
    assert all(marks_of("tests/identities/test_score_toy.py").values()), "marked as a whole"
    found = marks_of("tests/pipeline/test_run.py")
    assert found["test_the_full_recipe_passes_its_gates"]
    assert not found["test_plan_runs_nothing"]
