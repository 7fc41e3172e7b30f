"""Gates: every form of a bound, and that nothing missing passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from distill.evaluation.gates import Gate, GateError, check
from distill.recipe.compose import CONFIGS, register_recipes
from distill.stages.artifact import hashed_config

ROWS: list[dict[str, Any]] = [
    {"model": "teacher", "steps": 50, "fd": 0.04, "class_accuracy": 0.98, "kid": -0.002, "nn_train": 2.0},
    {"model": "teacher", "steps": 1, "fd": 0.8, "class_accuracy": 1.0, "kid": 0.02, "nn_train": 2.0},
    {"model": "student", "steps": 1, "fd": 0.1, "class_accuracy": 0.96, "kid": None, "nn_train": 1.95},
]
STUDENT, TEACHER, NAIVE = ("student", 1), ("teacher", 50), ("teacher", 1)


@pytest.mark.parametrize(
    ("limits", "metric", "bound", "passed"),
    [
        ({"at_most": 0.15}, "fd", 0.15, True),
        ({"at_most": 0.1}, "fd", 0.1, True),
        ({"at_least": 0.97}, "class_accuracy", 0.97, False),
        ({"at_most": 0.25, "times": NAIVE}, "fd", 0.2, True),
        ({"at_most": 2, "times": TEACHER}, "fd", 0.08, False),
        ({"at_most": 1.5, "times": TEACHER, "plus": 0.05}, "fd", 0.11, True),
        ({"at_most": 0.05, "plus": TEACHER}, "fd", 0.09, False),
        ({"at_least": -0.03, "plus": TEACHER}, "class_accuracy", 0.95, True),
        ({"at_least": 0.9, "reference": "heldout_nn"}, "nn_train", 1.935, True),
        ({"within": (0.9, 1.1), "times": TEACHER}, "nn_train", (1.8, 2.2), True),
        ({"within": (1.0, 1.1), "times": TEACHER}, "nn_train", (2.0, 2.2), False),
        ({"within": [0.05, 0.2]}, "fd", (0.05, 0.2), True),
    ],
)
def test_bounds(
    limits: dict[str, Any], metric: str, bound: float | tuple[float, float], passed: bool
) -> None:
    (result,) = check([Gate("g", STUDENT, metric, **limits)], ROWS, {"heldout_nn": 2.15})
    assert result.bound == pytest.approx(bound)
    assert result.passed is passed
    assert result.value == ROWS[2][metric]
    assert ("passed" if passed else "FAILED") in result.describe()


def test_yaml_lists_are_rows() -> None:
    gate = Gate(
        **{"name": "g", "row": ["student", 1], "metric": "fd", "at_most": 0.5, "times": ["teacher", 1]}
    )
    assert gate == Gate("g", STUDENT, "fd", at_most=0.5, times=NAIVE)


def test_a_negative_factor_turns_a_range_round() -> None:
    (result,) = check([Gate("g", TEACHER, "kid", within=(0.5, 2), times=TEACHER)], ROWS)
    assert result.bound == pytest.approx((-0.004, -0.001))
    assert result.passed


@pytest.mark.parametrize("limits", [{"at_most": 1}, {"at_least": 0}, {"within": (0, 9)}])
def test_nan_fails_on_either_side(limits: dict[str, Any]) -> None:
    rows = [{"model": "a", "steps": 1, "fd": math.nan}, {"model": "b", "steps": 1, "fd": 0.5}]
    gates = [Gate("value", ("a", 1), "fd", **limits), Gate("bound", ("b", 1), "fd", times=("a", 1), **limits)]
    assert [result.passed for result in check(gates, rows)] == [False, False]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate("g", ("student", 2), "fd", at_most=1), "'g': no row student@2; there are teacher@50"),
        (Gate("g", STUDENT, "fd", at_most=1, times=("x", 1)), "no row x@1"),
        (Gate("g", STUDENT, "recall", at_most=1), "'recall' of row student@1 is missing"),
        (Gate("g", STUDENT, "kid", at_most=1), "'kid' of row student@1 is null"),
        (Gate("g", STUDENT, "fd", at_most=1, reference="floor_fd"), "no reference 'floor_fd'"),
    ],
)
def test_what_is_missing_is_named(gate: Gate, message: str) -> None:
    with pytest.raises(GateError, match=message):
        check([gate], ROWS)


def test_a_row_that_occurs_twice_is_ambiguous() -> None:
    with pytest.raises(GateError, match="2 rows student@1"):
        check([Gate("g", STUDENT, "fd", at_most=1)], [*ROWS, ROWS[2]])


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"at_most": 1, "at_least": 0},
        {"within": (2, 1)},
        {"at_most": 1, "times": NAIVE, "reference": "x"},
        {"at_most": 1, "times": "teacher"},
    ],
)
def test_malformed_gates_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(GateError, match="'g'"):
        Gate("g", STUDENT, "fd", **limits)


def test_a_recipe_takes_a_set_and_changes_what_differs() -> None:
    """A gate that is left out is no part of the digest either."""

    def gates(*overrides: str) -> dict[str, Any]:
        register_recipes()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
            plain: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
        hashed = hashed_config(plain["stages"]["evaluate"], ())
        return {gate["name"]: gate for gate in hashed["gates"]}

    found = gates("recipe=progressive", "gates.recall=null", "gates.coverage.at_least=0.8")
    assert list(found)[:3] == [
        "teacher fd",
        "student fd far below the teacher's in one step",
        "student in 2 steps beats the teacher in 2",
    ]
    assert found["student in 4 steps beats the teacher in 4"]["row"] == ["student_4", 4]
    assert found["student coverage"]["at_least"] == 0.8
    assert not {"student fd", "student recall"} & set(found)
    assert gates("recipe=sid")["student fd"]["at_most"] == 0.10
    assert gates("recipe=sid", "eval.gates=[]") == {}
