"""Wrong input to the recipes of few-step students ends in one message before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CASES = [
    (
        "progressive",
        ["halve.start=12", "halve.end=5"],
        "halve: found start 12 and end 5; halving gives [12, 6, 3]",
    ),
    ("progressive", ["halve.end=0"], "halve.end: expected an integer of at least 1, found 0"),
    (
        "progressive",
        ["halve.stage=other"],
        "halve.stage: found 'other', expected one of ['teacher', 'distill'",
    ),
    (
        "progressive",
        ["+halve.rounds.32.steps=1"],
        "halve.rounds: found [32], expected step counts among [16, 8, 4",
    ),
    ("progressive", ["halve.stats=1"], "halve.stats: no such key, did you mean halve.start?"),
    ("progressive", ["stages.distill.teacher=null"], "stages.distill_16.teacher: found None, but the method"),
    ("progressive", ["stages.distill.path=somewhere"], "halve.stage: 'distill' is a Load stage"),
    ("progressive", ["+stages.distill.method.n=1"], "stages.distill_16.method.n: no such key"),
    ("progressive", ["stages.distill.method.wieght=snr"], "did you mean stages.distill.method.weight?"),
    (
        "progressive",
        ["+halve.rounds.1.method={wieght: snr}"],
        "stages.distill_1.method.wieght: no such key, did you",
    ),
    ("progressive", ["eval.grid=[[student_3,3]]"], "stages.evaluate.grid[0]: names the row [student_3, 3]"),
    ("consistency", ["stages.distill.teacher=null"], "stages.distill.teacher: found None, but the method"),
    ("consistency", ["stages.distill.method.scale=9"], "did you mean stages.distill.method.scales?"),
    ("consistency_training", ["stages.distill.teacher=teacher"], "ConsistencyTraining takes no teacher"),
    (
        "consistency_training",
        ["stages.distill.init=null"],
        "stages.distill.init: without a stage to start from, both",
    ),
    (
        "lcm",
        ["+stages.distill.adapt.nett={}"],
        "stages.distill.adapt.nett: no such key, did you mean stages.distill.adapt.net?",
    ),
    (
        "lcm",
        ["+stages.distill.adapt.kind=noise"],
        "stages.distill.adapt.kind: found 'noise', expected one of",
    ),
    ("lcm", ["stages.distill.teacher=distill"], "circular reference"),
    *(
        (
            recipe,
            ["+stages.other=${stages.teacher}", "stages.pairs.teacher=other"],
            f"stages.distill.data: the pairs of 'pairs' are samples of 'other', but {role} is 'teacher'; expected pairs",
        )
        for recipe, role in (("hipa", "init"), ("agd", "teacher"))
    ),
]


@pytest.mark.parametrize(("recipe", "overrides", "expected"), CASES)
def test_overrides(
    recipe: str, overrides: list[str], expected: str, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    assert expected in refuse(f"recipe={recipe}", "plan=true", *overrides)
    assert not list(tmp_path.iterdir())
