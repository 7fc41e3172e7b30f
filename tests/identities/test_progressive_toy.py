"""Progressive distillation on data whose score is known exactly: 8 Gaussians on a ring.

T0 measures few steps of the exact denoiser, which nothing distilled; T1 trains a teacher and halves its 64 steps down to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import exact_bench
import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.data.points import Points
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.evaluation.metrics.energy import energy_distance, spread
from distill.methods.denoising import Denoising
from distill.methods.progressive import Progressive
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.process.vp import VPCosine

RING = {"count": 8, "radius": 1.5}
NOISES = 2000


def noises() -> Tensor:
    return torch.randn(NOISES, 2, generator=torch.Generator().manual_seed(12345))


@torch.no_grad()
def samples(model: Denoiser, steps: int) -> Tensor:
    return model.transport(noises(), Cond.nothing(NOISES), solver="ddim", steps=steps)[0]


def squared(x: Tensor, y: Tensor) -> float:
    """E |x - y|^2, summed over coordinates."""
    return float((x.double() - y.double()).square().sum(1).mean())


class Energy:
    """Energy distance to fresh data."""

    def __init__(self) -> None:
        self.data = Points(ring=RING, count=4096, stream="fresh").images
        self.spread = spread(self.data)

    def __call__(self, x: Tensor) -> float:
        return energy_distance(x, self.data, spread_of_y=self.spread)


def test_t0_the_exact_denoiser_in_few_steps() -> None:
    """DDIM against its own 64 steps, in the specification's numbers; 5 % leaves room for another order of the noises."""
    exact, energy = exact_denoiser(VPCosine()), Energy()
    final = samples(exact, 64)
    expected = {32: 1.0e-4, 16: 8.9e-4, 8: 6.4e-3, 4: 0.0471, 2: 0.422, 1: 2.246}
    for steps, drift in expected.items():
        assert squared(samples(exact, steps), final) == pytest.approx(drift, rel=0.06)
    found = {steps: energy(samples(exact, steps)) for steps in (1, 2, 4, 8, 64)}
    wanted = {1: 1.094, 2: 0.186, 4: 0.011, 8: 0.0005, 64: -0.001}
    assert found == pytest.approx(wanted, rel=0.03, abs=0.004)


@dataclass(frozen=True)
class Round:
    """A student of N steps: E |.|^2 to its teacher's 2N steps, of that teacher in N steps to the same, and to the first
    teacher's 64 steps; energy distance to the data."""

    match: float
    undistilled: float
    drift: float
    energy: float


def halvings(seed: int) -> tuple[float, dict[int, Round]]:
    """(energy of the teacher in 64 steps, rounds by N): a v-net of 3 x 64, 3000 steps of denoising, 6 rounds of 1500."""
    torch.manual_seed(seed)
    data, energy = Points(ring=RING, count=65536, seed=seed), Energy()
    train = partial(exact_bench.fit, source=data, batch=256, seed=seed)
    adam = partial(torch.optim.Adam, fused=True)
    net = Denoiser(MLP(width=64), VPCosine(), "v", (2,))
    teacher = train(
        Denoising(net, null_prob=0.0),
        steps=3000,
        optim=Optim(partial(adam, lr=2e-3), Linear(total=3000), ema=0.999),
    )
    first = final = samples(teacher, 64)
    print(f"teacher: energy {energy(first):.4f}")
    rounds, steps = {}, 64
    while steps > 1:
        steps //= 2
        method = Progressive(exact_bench.trainable(teacher), teacher, steps=steps)
        undistilled = squared(samples(teacher, steps), final)
        optim = Optim(partial(adam, lr=1e-3), Linear(total=1500), ema=None)
        teacher = train(method, steps=1500, optim=optim)
        made = samples(teacher, steps)
        rounds[steps] = Round(squared(made, final), undistilled, squared(made, first), energy(made))
        print(f"N = {steps}: {rounds[steps]}")
        final = made
    return energy(first), rounds


@pytest.mark.slow
def test_t1_64_steps_halved_down_to_1() -> None:
    energy, rounds = halvings(seed=0)
    assert list(rounds) == [32, 16, 8, 4, 2, 1]
    for steps in (16, 8, 4, 2, 1):
        assert rounds[steps].match < rounds[steps].undistilled / 5
    drifts = [found.drift for found in rounds.values()]
    assert drifts == sorted(drifts)
    assert drifts[-1] < 0.02
    # Students of the teacher's second x0, a known wrong target, drift by 2e-3 here, and by 0.0096 at N = 1.
    assert rounds[8].drift < 5e-4
    assert abs(rounds[1].energy - energy) < 0.01
    # The chain must not have started from a bad teacher, nor have been easy.
    assert energy < 0.02
    assert rounds[1].undistilled > 0.4
