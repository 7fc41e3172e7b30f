"""A trace of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from method_support import mlp, optim, trained

from distill.engine.profiling import Recording
from distill.methods.sid import SiD
from distill.process.flow import Flow
from distill.stages.base import TRAINED_FILES, Settings
from distill.stages.ownership import files_of
from distill.typed import parse


@pytest.mark.parametrize(("start", "steps", "name"), [(1, 2, "1-3"), (3, 9, "3-4"), (7, 1, None)])
def test_the_steps_of_the_window_are_written(
    tmp_path: Path, start: int, steps: int, name: str | None
) -> None:
    method = SiD(mlp(Flow(), classes=8), mlp(Flow(), classes=8, seed=1))
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    recording = Recording(start, steps, tmp_path / "logs", rank=0)
    trained(method, tmp_path / "checkpoints", 4, classes=8, callbacks=[recording])
    found = [] if not (tmp_path / "logs").exists() else files_of(tmp_path, TRAINED_FILES)
    traces = [file for file in found if "trace" in file]
    assert traces == ([] if name is None else [f"logs/trace_{name}_0.json"])
    if name is not None:
        events = json.loads((tmp_path / traces[0]).read_text())["traceEvents"]
        steps_seen = [event for event in events if "Optimizer.step" in event.get("name", "")]
        first, last = map(int, name.split("-"))
        assert len(steps_seen) == 2 * (last - first), "one of the student and one of the fake score a step"


def test_a_window_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer.profile.*start, steps: found 2, 0, expected"):
        parse(Settings, {"profile": {"start": 2, "steps": 0}}, "trainer")
    with pytest.raises(ValueError, match=r"trainer.profile.begin: no such key"):
        parse(Settings, {"profile": {"begin": 2}}, "trainer")
