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
def marks_of(file: str) -> dict[str, str]:
    """Name of each test of a file -> what marks it: the module's mark, its decorators and those of its fixtures."""
    tree = ast.parse((ROOT / file).read_text())
    assigned = {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
    }
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

    def decorators(node: ast.FunctionDef) -> str:
        texts = [ast.unparse(decorator) for decorator in node.decorator_list]
        return "\n".join(assigned.get(text, text) for text in texts)

    found = {}
    for name, node in functions.items():
        if name.startswith("test_"):
            fixtures = [functions[a.arg] for a in node.args.args if a.arg in functions]
            marks = [assigned.get("pytestmark", ""), *map(decorators, [node, *fixtures])]
            found[name] = "\n".join(marks)
    return found


def slow(file: str, partly: bool = False) -> list[str]:
    """The slow tests of a file; with `partly`, also those of which some cases are slow."""
    whole = re.compile(r"^pytest\.mark\.slow$", flags=re.MULTILINE)
    return [name for name, m in marks_of(file).items() if whole.search(m) or (partly and "mark.slow" in m)]


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
        assert all(name for _, name in found), f"{promise}: which of the tests of a file?"
        assert any(name not in slow(file) for file, name in found), f"{promise}: slow tests alone hold it"


def test_every_slow_test_is_in_the_table() -> None:
    """By its name, or by that of its file."""
    (table,) = tables("CONTRIBUTING.md", "minutes")
    rows = [row[0].strip("`") for row in table]
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py"))
    there = {f"{file}::{name}" for file in files for name in slow(file, partly=True)}
    covered = {row: {name for name in there if row in (name, name.partition("::")[0])} for row in rows}
    assert not [row for row, names in covered.items() if not names], "rows of tests that are not slow"
    assert there == set().union(*covered.values())
    assert len(rows) == len(set(rows))
    assert all(proves and float(minutes) > 0 for _, proves, minutes in table)
