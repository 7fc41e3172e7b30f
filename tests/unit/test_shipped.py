"""The students of the package: that they are what their records say, and that commands find them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import students
import torch
from tests_support import call_verb, refusal

import distill
from distill import demo
from distill.files import read_json, sha256_file
from distill.models.shipped import MADE, model_folder, shipped

STUDENTS = shipped()


def test_they_are_small_and_named_by_their_recipes() -> None:
    assert {"digits/instaflow", "digits/sid", "digits/dmd", "digits/consistency"} <= set(STUDENTS)
    sizes = [file.stat().st_size for folder in STUDENTS.values() for file in folder.iterdir()]
    assert sum(sizes) < 2_000_000
    for name, folder in STUDENTS.items():
        made = read_json(folder / MADE)
        assert name == f"digits/{made['recipe']}"
        assert made["digits64"] == read_json(folder.parents[1] / "digits64.json")["sha256"]
        assert (made["seed"], made["samples"]) == (0, 2000)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_loads_without_a_warning(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = distill.load(name)
    assert {p.dtype for p in student.denoiser.parameters()} == {torch.float32}
    assert student.sample(4).isfinite().all()
    folder = STUDENTS[name]
    assert read_json(folder / "model.json")["weights"]["sha256"] == sha256_file(folder / "model.safetensors")
    assert read_json(folder / MADE)["measured"]["fd"] < 0.1


def test_a_student_makes_what_was_measured() -> None:
    folder = STUDENTS["digits/dmd"]
    assert students.measured(folder) == pytest.approx(read_json(folder / MADE)["measured"], abs=0.005)


def test_commands_take_their_names(tmp_path: Path) -> None:
    call_verb(tmp_path, "sample", "model=digits/dmd", "count=10", "out=a.png", check=True)
    assert (tmp_path / "a.png").stat().st_size > 200
    (shown,) = demo.models(demo.Options(model="digits/dmd"))
    assert shown.description["default"] == 1
    found = refusal(tmp_path, "sample", "model=digits/instafow")
    assert "digits/instafow: no such folder, and no student of the package; expected one of digits/" in found
    # A folder of this name is the user's.
    own = tmp_path / "digits" / "sid"
    own.mkdir(parents=True)
    assert model_folder(own) == own
    assert model_folder("nowhere/else") == Path("nowhere/else")
