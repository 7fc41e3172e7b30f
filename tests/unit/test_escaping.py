"""Names from recipes, folders and files reach pages, pictures and terminals as text, never as markup."""

from __future__ import annotations

import html
import re

import pytest
import torch

from distill.evaluation.comparison import aligned
from distill.evaluation.drawing import label_text
from distill.evaluation.gates import GateResult
from distill.evaluation.grid import image_grid
from distill.evaluation.report import gate_table, prose, table
from distill.evaluation.trajectories import Panel, save_trajectories

HOSTILE = [
    "a|b",
    "a\nb",
    "<script>alert(1)</script>",
    "\x1b[31mred",
    "`x`",
    "*b*",
    "[l](http://x)",
    "_i_",
    "a\\",
    "~~s~~",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_cell_holds_a_name(name):
    """A reader of Markdown sees the name (control characters as escapes) in one cell of one line."""
    rows = [{"model": name, "steps": 1, "fd": 1.0}]
    gates = [GateResult(name, 1.0, 2.0, "<=", True)]
    for text in (table(rows, {}), gate_table(gates)):
        lines = text.split("\n")
        assert len(lines) == 3
        assert len({line.count("|") for line in lines}) == 1
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]|<script", text)
    cell = table(rows, {}).split("\n")[2].split("|")[1].strip()
    shown = html.unescape(re.sub(r"\\([\\`*\[\]~_])", r"\1", cell))
    assert shown == name.replace("\n", "\\n").replace("\x1b", "\\x1b")
    assert aligned(table(rows, {})).split("\n")[2].startswith(shown)


def test_plain_names_are_left_as_they_are():
    for name in (
        "student_16",
        "teacher fd",
        "far below the teacher's in 1 step",
        "(digits, all images)",
        "été",
    ):
        assert prose(name) == name


def test_labels_of_pictures_are_no_formulas(tmp_path):
    assert label_text("$\\frac") == "\\$\\frac"
    assert label_text("_hidden") == " _hidden"
    path = torch.zeros(2, 3, 2)
    save_trajectories([Panel("cost $5^{", path)], torch.rand(4, 2), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
    image_grid([("two\nlines", torch.zeros(1, 1, 4, 4))])
