"""Rectified flow end to end on data whose velocity is known exactly: 8 Gaussians on a ring.

T0 measures the exact field itself, T1 reflows it, T2 learns the whole chain (1-, 2- and 3-rectified flow and one-step
students), T3 shuffles the pairs of T1 and must fail every bound that T1 keeps.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import exact_bench
import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.data.points import Points
from distill.data.rng import sample_noise
from distill.data.source import Source
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.evaluation.metrics.energy import energy_distance
from distill.methods.flow_matching import FlowMatching
from distill.methods.one_step import OneStep
from distill.methods.reflow import Reflow
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.process.flow import Flow
from distill.process.times import uniform_grid
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness

RING = {"count": 8, "radius": 1.5}
STEPS, NOISES = 100, 2000


@dataclass(frozen=True)
class Found:
    """What is measured of a flow from `NOISES` noises; `energy` by the number of Euler steps."""

    straight: float
    straight_norm: float
    gap: float
    transport: float
    energy: dict[int, float]


def noises(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def samples(model: Denoiser, z: Tensor, steps: int) -> Tensor:
    return model.transport(z, Cond.nothing(len(z)), steps=steps)[0]


@torch.no_grad()
def measured(model: Denoiser, steps: tuple[int, ...] = (1,)) -> Found:
    z, nothing = noises(NOISES, 12345), Cond.nothing(NOISES)
    path, velocities = rollout(lambda x, t: model.velocity(x, t, nothing), z, uniform_grid(Flow(), STEPS))
    plain, norm = straightness(path, velocities)
    one = samples(model, z, 1)
    data = Points(ring=RING, count=4096, stream="fresh").images
    return Found(
        straight=float(plain),
        straight_norm=float(norm),
        gap=squared(one, path[-1]),
        transport=squared(z, path[-1]),
        energy={n: energy_distance(samples(model, z, n), data) for n in steps},
    )


def squared(x: Tensor, y: Tensor) -> float:
    """E |x - y|^2, summed over coordinates."""
    return float((x - y).square().sum(1).mean())


class Ends(exact_bench.Ends):
    """Pairs (z, x0): 8192 noises and where a model's 100 Euler steps take them; shuffled, x0 of another noise."""

    def __init__(self, model: Denoiser, stream: str, *, shuffled: bool = False) -> None:
        self.z = sample_noise(0, stream, torch.arange(8192), (2,))
        self.x0 = samples(model, self.z, STEPS)
        if shuffled:
            self.x0 = self.x0[torch.randperm(8192, generator=torch.Generator().manual_seed(0))]


def fresh_student(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(MLP(width=64), Flow(), "velocity", (2,))


def trained(
    method: DistillModule, source: Source, folder: Path, optim: Optim, steps: int, seed: int
) -> Denoiser:
    """The student after training with the engine, batch 256: its average where there is one."""
    method.prepare({"student": optim}, seed=seed)
    train(method, source, Fit(steps=steps, batch_size=256), folder=folder, config={})
    return method.as_generator().denoiser.eval()


def adam(rate: float, steps: int) -> Optim:
    """T1's and T3's: Adam falling linearly to 0, no average, no clipping."""
    return Optim(partial(torch.optim.Adam, lr=rate, fused=True), Linear(total=steps), clip=None, ema=None)


@pytest.fixture(scope="module")
def exact() -> Denoiser:
    return exact_denoiser(Flow())


@pytest.fixture(scope="module")
def field(exact: Denoiser) -> Found:
    return measured(exact, (1, 2, 4, 8))


def test_t0_the_exact_field(exact: Denoiser, field: Found) -> None:
    """The specification's numbers; 5 % leaves room for another noise stream of the same seed."""
    assert field.straight == pytest.approx(1.1155, rel=0.05)
    assert field.straight_norm == pytest.approx(2.577, rel=0.05)
    assert field.transport == pytest.approx(0.4328, rel=0.05)
    assert field.gap == pytest.approx(2.252, rel=0.05)
    expected = {1: 1.094, 2: 0.186, 4: 0.0067, 8: 0.0004}
    assert field.energy == pytest.approx(expected, rel=0.03, abs=0.004)  # 4 standard errors of the sample
    z = noises(NOISES, 12345)
    ends = {n: samples(exact, z, n) for n in (2, 4, 8, STEPS)}
    for n, gap in ((2, 0.425), (4, 0.033), (8, 0.0044)):
        assert squared(ends[n], ends[STEPS]) == pytest.approx(gap, rel=0.05, abs=0.001)


@pytest.mark.slow
def test_t1_reflow_of_the_exact_field(exact: Denoiser, field: Found, tmp_path: Path) -> None:
    pairs = Ends(exact, "pairs")
    student = trained(Reflow(fresh_student(0)), pairs, tmp_path, adam(2e-3, 2000), 2000, seed=0)
    found = measured(student)
    assert found.straight_norm < 0.06
    assert found.gap < 0.08
    assert found.energy[1] < 0.02
    assert found.transport <= 1.05 * field.transport
    assert found.straight < field.straight / 40
    assert squared(samples(student, pairs.z, STEPS), pairs.x0) < 0.03


@pytest.mark.slow
def test_t3_shuffled_pairs_straighten_nothing(exact: Denoiser, field: Found, tmp_path: Path) -> None:
    """Pairs whose ends were swapped carry the independent coupling: what is learned is 1-rectified flow again, which
    breaks every bound of T1 (but that on transport, which belongs to the data and not to the pairs)."""
    pairs = Ends(exact, "pairs", shuffled=True)
    student = trained(Reflow(fresh_student(1)), pairs, tmp_path, adam(2e-3, 1200), 1200, seed=1)
    found = measured(student)
    assert found.straight_norm > 1
    assert found.straight == pytest.approx(field.straight, rel=0.2)
    assert found.gap > 1.5
    assert found.energy[1] > 0.5
    assert squared(samples(student, pairs.z, STEPS), pairs.x0) > 1


@pytest.mark.slow
def test_t3_direct_distillation_of_the_exact_field(exact: Denoiser, tmp_path: Path) -> None:
    """The same budget, without reflow: one step lands where the field's 100 steps do."""
    pairs = Ends(exact, "pairs")
    student = trained(OneStep(fresh_student(1)), pairs, tmp_path, adam(2e-3, 1200), 1200, seed=1)
    z, data = noises(NOISES, 12345), Points(ring=RING, count=4096, stream="fresh").images
    one = samples(student, z, 1)
    assert squared(one, samples(exact, z, STEPS)) < 0.06
    assert energy_distance(one, data) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_t2_the_learned_chain(seed: int, tmp_path: Path) -> None:
    """Flow matching on data, two reflows, and one-step students of the first and the second flow."""
    steps = 1500
    optim = Optim(
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, fused=True), Linear(total=steps, warmup=100)
    )

    def stage(name: str, method: DistillModule, source: Source) -> Denoiser:
        return trained(method, source, tmp_path / name, optim, steps, seed)

    data = Points(ring=RING, count=65536, seed=seed)
    flows = [stage("1-rf", FlowMatching(fresh_student(seed)), data)]
    students = []
    for number in (2, 3):
        pairs = Ends(flows[-1], f"pairs {number}")
        students.append(stage(f"{number - 1}-rf distilled", OneStep(copy(flows[-1])), pairs))
        flows.append(stage(f"{number}-rf", Reflow(copy(flows[-1])), pairs))
    first, second, third = (measured(flow, (1, STEPS)) for flow in flows)
    z = noises(NOISES, 12345)
    errors = [
        squared(samples(student, z, 1), samples(flow, z, STEPS))
        for student, flow in zip(students, flows[:2], strict=True)
    ]
    print(f"seed {seed}: 1-RF {first}\n2-RF {second}\n3-RF {third}\none-step errors {errors}")
    assert second.straight < first.straight / 10
    assert second.gap < first.gap / 8
    assert third.straight <= second.straight / 2
    assert second.energy[STEPS] <= first.energy[STEPS] + 0.01
    assert second.energy[1] <= second.energy[STEPS] + 0.01
    assert second.transport <= 1.05 * first.transport
    assert third.transport <= 1.05 * second.transport
    assert errors[1] < errors[0]


def copy(flow: Denoiser) -> Denoiser:
    """The same model again, to train on."""
    return deepcopy(flow).requires_grad_(True)
