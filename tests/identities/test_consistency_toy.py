"""Consistency models of a teacher whose flow map is known exactly: 8 Gaussians on a ring of radius 0.7, EDM.

The student is a small preconditioned MLP. One step of an untrained one gives the mean of the data, whose numbers are those of
`test_the_naive_step`: 0.49 in sliced W2, 0.70 in trajectory, no sample near a mode.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import exact_bench
import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.evaluation.certificate import flow_map, share_near, trajectory_error
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.denoising import Denoising
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.nets.mlp import MLP
from distill.nets.precond import EDMPrecond
from distill.process.edm import EDM

RING, PROCESS = exact_bench.NARROW, EDM()
COUNT = 10_000


class Found(NamedTuple):
    """Sliced W2 to fresh data, RMS distance to the exact ends from the same noise, share within 3 std of a mode."""

    sliced: float
    trajectory: float
    near: float


class Measure:
    """The same noise, exact ends and fresh data for all; `floor` is what the exact ends score."""

    def __init__(self) -> None:
        exact = RING.teacher(PROCESS)
        self.exact, self.means = exact, exact.net.means
        self.z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(12345))
        self.again = torch.randn(4, COUNT, 2, generator=torch.Generator().manual_seed(1))
        self.data = RING.points(COUNT, "fresh").images
        self.ends = flow_map(exact, self.z, Cond.nothing(COUNT))
        self.floor = self(self.ends)

    def __call__(self, x: Tensor) -> Found:
        return Found(
            sliced_wasserstein(x, self.data),
            trajectory_error(x, self.ends),
            share_near(x, self.means, RING.std),
        )

    @torch.no_grad()
    def student(self, student: Denoiser, method: DistillModule) -> dict[int, Found]:
        """By the number of steps; of more than one, fresh noise decides where a sample ends, and `trajectory` says nothing."""
        generator = Generator(student, method.result().sampler)
        found = {
            n: self(generator.generate(self.z, Cond.nothing(COUNT), n, noise=self.again)) for n in (1, 2, 4)
        }
        print(f"{type(method).__name__}\n" + "\n".join(f"{n}: {numbers}" for n, numbers in found.items()))
        return found


@pytest.fixture(scope="module")
def toy() -> Measure:
    return Measure()


def fresh(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(EDMPrecond(MLP(width=96, time_scale=10.0)), PROCESS, "x0", (2,))


def trained(method: DistillModule, steps: int, seed: int) -> Denoiser:
    """RAdam of 1e-3 that falls over the last 30 %, batch 512, an average of 0.999."""
    optim = Optim(partial(torch.optim.RAdam, lr=1e-3), exact_bench.falls_late(steps), ema=0.999)
    data = RING.points(65536, "train", seed)
    return exact_bench.fit(method, data, steps=steps, batch=512, optim=optim, seed=seed)


@pytest.mark.slow
def test_the_naive_step(toy: Measure) -> None:
    """What the specification measured of the teacher alone; a one-step student has to be far from it."""
    nothing = Cond.nothing(COUNT)
    naive = toy(toy.exact.transport(toy.z, nothing, solver="heun", steps=1)[0])
    assert naive.sliced == pytest.approx(0.495, abs=0.02)
    assert naive.trajectory == pytest.approx(0.70, abs=0.02)
    assert naive.near == 0
    for steps, sliced, trajectory, near in ((18, 0.027, 0.014, 0.978), (8, 0.141, 0.197, 0.185)):
        found = toy(toy.exact.transport(toy.z, nothing, solver="heun", steps=steps)[0])
        assert found.sliced == pytest.approx(sliced, abs=0.02)
        assert found.trajectory == pytest.approx(trajectory, rel=0.1)
        assert found.near == pytest.approx(near, abs=0.02)
    assert toy.floor.near == pytest.approx(0.989, abs=0.005)
    assert toy.floor.sliced < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_consistency_distillation(seed: int, toy: Measure) -> None:
    """18 levels, Heun, target network of decay 0.95, squared distance; 4000 steps from scratch."""
    method = Consistency(fresh(seed), toy.exact, scales=18, loss="l2", target_decay=0.95)
    student = trained(method, 4000, seed)
    found = toy.student(student, method)
    assert found[1].sliced < 0.08
    assert found[1].trajectory < 0.15
    assert found[1].near > 0.5
    x = 0.7 * toy.z
    end = torch.full((COUNT,), PROCESS.sigma_min, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(student.x0(x, end, Cond.nothing(COUNT)), x)
        assert not torch.equal(student.x0(x, 2 * end, Cond.nothing(COUNT)), x)


def test_tuning_starts_from_the_identity_at_no_noise() -> None:
    """Tuning draws levels t far below the grid's last, and weighs them by 1 / (t - r): f(x, t) - x has to fall with t
    there. A boundary at sigma_min leaves it at sigma_min, and the weight makes that explode."""
    student = fresh(0)
    torch.nn.init.normal_(student.net.net.out.weight, std=0.1)
    student = ConsistencyTraining(student, curriculum="ect", total_steps=10).student
    x = 0.7 * torch.randn(256, 2, generator=torch.Generator().manual_seed(2))
    for level in (1e-2, 1e-3, 1e-4, 1e-5):
        t = torch.full((256,), level, dtype=torch.float64)
        with torch.no_grad():
            moved = (student.x0(x, t, Cond.nothing(256)).double() - x).norm(dim=1) / level
        assert 0.1 < moved.mean() < 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", ["scratch", "trained"])
def test_easy_consistency_tuning(start: str, seed: int, toy: Measure) -> None:
    """q = 2 in 8 stages, 2500 steps, no teacher: from scratch as the specification measured it, and from a denoiser."""
    student = fresh(seed)
    if start == "trained":
        optim = Optim(partial(torch.optim.Adam, lr=2e-3, fused=True), Linear(total=2000), ema=0.999)
        denoising = Denoising(student, null_prob=0.0, times="lognormal", weight="edm")
        data = RING.points(65536, "train", seed)
        found = exact_bench.fit(denoising, data, steps=2000, batch=256, optim=optim, seed=seed)
        student = exact_bench.trainable(found)
    method = ConsistencyTraining(student, curriculum="ect", total_steps=2500, q=2.0, stages=8)
    found = toy.student(trained(method, 2500, seed), method)
    # Over the worst of both starts and seeds by a third to two thirds; the specification asks for 0.35 in sliced W2.
    assert found[1].sliced < 0.09
    assert found[1].trajectory < 0.19
    assert found[1].near > 0.5
    for steps in (2, 4):
        assert found[steps].sliced < 0.09
