"""Plain containers read into types: every wrong entry is named with its place, at every depth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from distill.files import read_json
from distill.names import check_name, inside
from distill.typed import parse, settle, within


@dataclass
class Leaf:
    stage: str
    steps: list[int]
    which: Literal["last", "best"] = "last"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"scale: found {self.scale}, expected at least 0")


@dataclass
class Tree:
    models: dict[str, Leaf]
    follows: tuple[str, int] | None = None
    plus: tuple[str, int] | float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def test_plain_containers_become_the_declared_types():
    tree = parse(
        Tree, {"models": {"a": {"stage": "t", "steps": [1, 2], "scale": 2}}, "follows": ["a", 2], "plus": 1}
    )
    assert tree == Tree({"a": Leaf("t", [1, 2], scale=2)}, ("a", 2), 1)
    built = Tree({"a": {"stage": "t", "steps": [1]}}, ["a", 1])
    settle(built)
    assert built.models["a"] == Leaf("t", [1])
    assert built.follows == ("a", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"models": {"a": {"stage": "t", "stpes": [1]}}},
            "at: models.a.stpes: no such key, did you mean models.a.steps?",
        ),
        ({"modles": {}}, "at: modles: no such key, did you mean models?"),
        ({"models": {"a": {"stage": "t"}}}, "at: models.a.steps: missing; expected a list of int"),
        (
            {"models": {"a": {"stage": "t", "steps": ["1"]}}},
            r"at: models.a.steps\[0\]: found '1', expected int",
        ),
        (
            {"models": {"a": {"stage": "t", "steps": [True]}}},
            r"at: models.a.steps\[0\]: found True, expected int",
        ),
        (
            {"models": {"a": {"stage": "t", "steps": [1], "which": "first"}}},
            "at: models.a.which: found 'first', expected one of 'last', 'best'",
        ),
        (
            {"models": {"a": {"stage": "t", "steps": [1], "scale": float("nan")}}},
            "at: models.a.scale: found nan, expected a finite number",
        ),
        (
            {"models": {"a": {"stage": "t", "steps": [1], "scale": -1}}},
            "at: models.a.scale: found -1, expected at least 0",
        ),
        ({"models": {"a": None}}, "at: models.a: found None, expected a mapping"),
        ({"models": {1: {}}}, "at: models: found the key 1, expected str"),
        ({"models": {}, "follows": ["a"]}, r"at: follows: found \['a'\], expected \[str, int\] or null"),
        ({"models": {}, "plus": "much"}, r"at: plus: found 'much', expected \[str, int\] or float"),
        ([], "at: found"),
    ],
)
def test_wrong_entries_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        parse(Tree, value, "at: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "'a' twice in an object"),
        ('{"a": NaN}', "found NaN"),
        ('{"a": 1e999}', "found 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_json_is_a_regular_file(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe\.json: not a regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".x",
        "a/b",
        "/a",
        "a\\b",
        "a\nb",
        "a\x1b[1m",
        " a",
        "a ",
        "x" * 201,
        3,
        None,
        "a\u202eb",
    ],
)
def test_names_are_one_component(tmp_path, name):
    with pytest.raises(ValueError, match="stage: found"):
        check_name(name, "stage")
    with pytest.raises(ValueError, match="file: found"):
        inside(tmp_path, name, "file")


def test_usual_names_are_taken(tmp_path):
    for name in ("teacher", "distill_16", "my run #2", "été", "1.10", "a=b"):
        assert check_name(name, "run") == name
    assert inside(tmp_path, "model.safetensors", "file") == tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="the run itself uses"):
        check_name("metrics.json", "stage", reserved=("metrics.json",))


def test_a_message_behind_a_place_suggests_a_whole_key() -> None:
    inner = "optim.studnt: no such key, did you mean optim.student?; expected student"
    assert within("stages.distill", inner, ": ") == (
        "stages.distill: optim.studnt: no such key, did you mean stages.distill.optim.student?; expected student"
    )
    again = "no such key, did you mean stages.a.c?"
    assert within("stages.a", f"b: {again}") == f"stages.a.b: {again}"
    assert within("stages.a", "metric: no such metric, did you mean fd?").endswith("did you mean fd?"), (
        "a value"
    )
