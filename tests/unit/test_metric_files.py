"""A metric is one file: what it declares appears in rows, gates, tables, reports, comparisons and monitors."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.data.digits import Digits
from distill.evaluation import metrics as package
from distill.evaluation.comparison import Run, table
from distill.evaluation.gates import Gate, check
from distill.evaluation.measure import Reference, measure
from distill.evaluation.metric import metrics
from distill.evaluation.report import report
from distill.models.features import load_digits64
from distill.stages.evaluate import Evaluate
from distill.stages.monitor import Options

FILE = """
from distill.evaluation.metric import Metric

def brightness(x):
    return float(x.values.mean())

BRIGHTNESS = Metric("brightness", order=45, measure=brightness, meaning="mean of all pixels", of="images", form=".1f",
    scale=100, unit=" %", better="lower", of_count=True, floor=True, monitored=True, real=brightness, real_name="brightness")
"""
DATA = {"_target_": "distill.data.digits.Digits"}
FEATURES = {"_target_": "distill.models.features.load_digits64"}
METER = {"_target_": "distill.evaluation.meters.images.ImageMeter", "data": DATA, "features": FEATURES}


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of another metric on the search path."""
    (tmp_path / "brightness.py").write_text(FILE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    metrics.cache_clear()
    yield tmp_path
    sys.modules.pop(f"{package.__name__}.brightness", None)
    metrics.cache_clear()


def stage(metric: str) -> Evaluate:
    gate: Any = {"name": "g", "row": ["student", 1], "metric": metric, "at_most": 1}
    models: Any = {"student": {"stage": "s", "steps": [1]}}
    return Evaluate(models=models, meter=METER, gates=[gate])


def test_one_file_adds_a_metric(added: Path) -> None:
    digits, extractor = Digits(), load_digits64()
    reference = Reference(digits.images[:200], digits.labels[:200], extractor)
    row: dict[str, Any] = measure(digits.images[200:300], None, reference, extractor)
    assert list(row).index("brightness") == 1
    assert row["brightness"] == pytest.approx(float(digits.images[200:300].mean()), rel=1e-6)
    floor = reference.floor(splits=1)
    real = reference.references(floor)
    assert real["brightness"] == pytest.approx(float(digits.images[:200].mean()), rel=1e-6)
    assert {"floor_brightness", "floor_fd"} <= set(real)
    row |= {"model": "student", "steps": 1}
    results = check(
        [Gate("dark", ("student", 1), "brightness", at_most=1.0, reference="brightness")], [row], real
    )
    assert results[0].value == row["brightness"]
    protocol = reference.protocol(100, "digits", floor=floor)
    page = report("toy", [row], protocol, real, results)
    assert "| fd_digits64@100 ↓ | brightness@100 % ↓ | kid_digits64@100" in page
    assert f"| {100 * row['brightness']:.1f} |" in page
    assert "`brightness@100`: mean of all pixels." in page
    run = Run("a", Path("a"), protocol, (row,), real)
    assert f"**{100 * row['brightness']:.1f}**" in table([run])
    assert stage("brightness").gates
    assert Options(1, DATA, FEATURES, metric="brightness").metric == "brightness"


def test_without_the_file_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"gates\[0\].metric: no such metric as 'brightness'"):
        stage("brightness")
    with pytest.raises(
        ValueError, match=r"metric: found 'brightness', expected one of \['fd', 'kid', 'sliced"
    ):
        Options(1, DATA, FEATURES, metric="brightness")


def test_two_files_of_one_name_are_refused(added: Path) -> None:
    (added / "bright.py").write_text(FILE)
    importlib.invalidate_caches()
    with pytest.raises(
        ValueError, match=r"brightness.py: declares 'brightness', which another metric is called"
    ):
        metrics()
    sys.modules.pop(f"{package.__name__}.bright", None)


def test_the_documentation_lists_every_metric() -> None:
    """With its direction, in the order of the columns."""
    text = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    section = text.partition("## Metrics and their names")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]*?) ?\|", section, re.MULTILINE))
    words = {"real": "near the real"}
    assert rows == {known.name: words.get(known.better, known.better) for known in metrics()}
    assert list(rows) == [known.name for known in metrics()]
