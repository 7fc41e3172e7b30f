"""Straightness is measured on the calls that sampling makes anyway, and equals that of whole paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.data.points import Points
from distill.evaluation.evaluation import Evaluation, Model
from distill.evaluation.meters.points import PointMeter
from distill.evaluation.paths import euler_path, samples_along, watched
from distill.evaluation.rows import Straightness
from distill.models.conditions import Labels
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness


class Curved(nn.Module):
    """A velocity that turns with time and with the class; -1 is the null class."""

    num_classes = 2
    calls = 0

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls += 1
        turned = torch.stack([-x[:, 1], x[:, 0]], 1)
        return torch.sin(3 * t)[:, None] * turned + 0.3 * cond.get("label")[:, None] + x


def generator(kind: str = "velocity", **spec: object) -> Generator:
    model = Denoiser(Curved(), Flow(), kind, (2,), conditions=Labels(2), guidable=True)
    return Generator(model, SamplerSpec(**{"steps": 20, "any_steps": True} | spec))


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
def test_sums_are_those_of_the_whole_path(kind: str, scale: float) -> None:
    made, ids, labels = generator(kind, guidance_scale=scale), torch.arange(30), torch.arange(30) % 2
    cond = Cond.of_labels(labels[:16])
    z, _ = made.noises(3, "s", ids[:16])
    grid = torch.linspace(1, 0, 21, dtype=torch.float64)
    path, velocities = rollout(lambda x, t: made.denoiser.velocity(x, t, cond, scale), z, grid)
    deviation, norm = (float(value) for value in straightness(path, velocities))
    gap = float((path[0] - velocities[0] - path[-1]).square().sum(1).mean())
    with watched(made, 16) as sums:
        made.sample_ids(ids, seed=3, stream="s", steps=20)
    for found in (sums.path(), euler_path(made, ids[:16], 3, "s", 20)):
        assert found.deviation == pytest.approx(deviation, rel=1e-5)
        assert found.deviation / found.chord == pytest.approx(norm, rel=1e-5)
        assert found.gap == pytest.approx(gap, rel=1e-5)


def test_which_rows_follow_the_path() -> None:
    assert samples_along(generator(), 20)
    assert not samples_along(generator(solver="heun"), 20)
    assert not samples_along(generator(times={20: tuple(torch.linspace(1, 0, 21).square().tolist())}), 20)


@pytest.mark.parametrize(("steps", "calls"), [([1, 8], 1 + 8 + 1), ([1, 4], 1 + 4 + 1 + 8)])
def test_no_path_is_solved_twice(steps: list[int], calls: int, tmp_path: Path) -> None:
    """Warm-up once a model, then the rows; the path on its own only where no row follows it."""
    made = generator()
    data = Points(ring={"count": 8, "radius": 1.5}, count=64)
    evaluation = Evaluation(PointMeter(data, paths=4), 32, straightness=Straightness(8, 16), seed=3)
    evaluation.draw = lambda shown, path: None  # type: ignore[method-assign]
    rows = evaluation.run({"a": Model(made, steps)}, tmp_path / "grid.png", Bar())
    assert made.denoiser.net.calls == calls
    assert [row["steps"] for row in rows] == steps
    expected = euler_path(made, torch.arange(16), 3, "evaluate", 8)
    for row in rows:
        assert row["straightness"] == pytest.approx(expected.deviation, rel=1e-5)
        assert row["one_step_gap"] == pytest.approx(expected.gap, rel=1e-5)


class Bar:
    """A progress bar that shows nothing."""

    def note(self, text: str) -> None: ...

    def update(self) -> None: ...
