"""Score distillation of a trained teacher in the plane: 8 Gaussians on a ring of radius 0.7, EDM.

Every method's student, after 1000 steps, has to stand at the thresholds of `Found.missed`, from a teacher whose own first
step has an energy distance of 0.35 and no sample near a mode. Rows as of seed 0, one step unless said otherwise:

=====================  ========  ======  ====  =====
student                energy    MMD     near  modes
=====================  ========  ======  ====  =====
the teacher, Heun, 18  .0008     .0011   .96   8
`sid`, alpha 1         .0014     .0039   .81   8
`sid`, alpha 0.5       .0015     .0042   .80   8
`sid`, alpha 1.2       .0027     .0060   .74   8
`dmd`                  .0014     .0045   .83   8
`dmd` with its GAN     .0018     .0052   .83   8
Diff-Instruct          .0018     .0047   .79   8
`disback`              .0036     .0119   .64   8
`sid`, two steps       .0021     .0044   .83   8
`dmd`, two steps       .0016     .0054   .86   8
=====================  ========  ======  ====  =====

They differ by about 30 % between seeds: nothing here says which method is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import certificates
import exact_bench
import pytest
import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.points import ring_means
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant, Linear
from distill.engine.update import Loss, Optim, Step, Update
from distill.evaluation.certificate import modes_found, share_near
from distill.evaluation.metrics.energy import energy_distance
from distill.evaluation.metrics.precision import squared_distances
from distill.methods.degrade import Degrade
from distill.methods.denoising import Denoising
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.families.score import ScoreDistillation
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.nets.precond import EDMPrecond
from distill.process.edm import EDM

pytestmark = pytest.mark.slow

RING, COUNT, BATCH, STEPS = exact_bench.NARROW, 4000, 256, 1000
MEANS = torch.tensor(ring_means(8, RING.radius))
LOGNORMAL = {"name": "lognormal", "mean": -1.2, "std": 1.2}


def mmd(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy (V-statistic), the mean over Gaussian kernels of five widths."""
    tables = [squared_distances(a.double(), b.double()) for a, b in ((x, x), (y, y), (x, y))]
    xx, yy, xy = (
        [(table / (-2 * h**2)).exp().mean() for h in (0.02, 0.05, 0.1, 0.2, 0.5)] for table in tables
    )
    return float(sum(a + b - 2 * c for a, b, c in zip(xx, yy, xy, strict=True))) / 5


class Found(NamedTuple):
    """Energy distance (V-statistic) and MMD to fresh data; share within 3 std of a mode; modes with 2 % of the samples."""

    energy: float
    mmd: float
    near: float
    modes: int

    def missed(self, energy: float = 0.01) -> list[str]:
        """What the specification asks for and these numbers are not."""
        asked = {
            "modes": self.modes == 8,
            "energy": self.energy <= energy,
            "mmd": self.mmd <= 0.025,
            "near": self.near >= 0.5,
        }
        return [name for name, kept in asked.items() if not kept]


class Watch:
    """Measures the student's average after the given steps: an `engine.fit.Evaluation`."""

    def __init__(self, measure: Callable[[Denoiser, SamplerSpec], Found], steps: tuple[int, ...]) -> None:
        self.measure, self.steps = measure, steps
        self.found: dict[int, Found] = {}

    def due(self, before: int, now: int) -> bool:
        return any(before < BATCH * step <= now for step in self.steps)

    def resume(self, step: int) -> None:
        """Nothing to go back to."""

    def __call__(self, module: DistillModule) -> dict[str, float]:
        student = module.best()
        assert isinstance(student, Denoiser)
        self.found[module.progress.step] = self.measure(student, module.result().sampler)
        return {}


class Toy:
    """The teacher, and everything measured with one noise against the same fresh data."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.points, self.data = RING.points(65536, "train", seed), RING.points(COUNT, "fresh", 99).images
        self.z = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(7))
        self.again = torch.randn(1, COUNT, 2, generator=torch.Generator().manual_seed(8))
        torch.manual_seed(seed)
        net = EDMPrecond(MLP(width=128, depth=3, features=32, time_scale=10.0))
        method = Denoising(Denoiser(net, EDM(), "x0", (2,)), null_prob=0.0, times="lognormal", weight="edm")
        adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
        optim = Optim(adam, Linear(total=3000, final=0.01), ema=0.995)
        self.teacher = exact_bench.fit(method, self.points, steps=3000, batch=512, optim=optim, seed=seed)

    def copy(self) -> Denoiser:
        """The teacher once more, to train or to ask."""
        return exact_bench.trainable(self.teacher)

    def measure(self, x: Tensor) -> Found:
        return Found(
            energy_distance(x, self.data, unbiased=False),
            mmd(x, self.data),
            share_near(x, MEANS, RING.std),
            modes_found(x, MEANS, RING.std),
        )

    @torch.no_grad()
    def of(self, model: Denoiser, spec: SamplerSpec) -> Found:
        noise = self.again if spec.mode == "sde" else None
        return self.measure(Generator(model, spec).generate(self.z, Cond.nothing(COUNT), noise=noise))

    def trained(
        self, method: DistillModule, steps: int = STEPS, at: tuple[int, ...] = (), **hooks: Any
    ) -> dict[int, Found]:
        """The numbers after the steps `at` and after the last, of training with the specification's settings: Adam without
        momentum, a constant 2e-4, an average that forgets half in 128,000 images."""
        adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.0, 0.999), fused=True)
        optim, watch = Optim(adam, Constant(), clip=None, ema_halflife=128_000.0), Watch(self.of, at)
        exact_bench.fit(
            method,
            self.points,
            steps=steps,
            batch=BATCH,
            optim=optim,
            seed=self.seed,
            evaluation=watch,
            **hooks,
        )
        print(type(method).__name__, *watch.found.items(), sep="\n  ")
        return watch.found

    def recorded(self, folder: Path) -> list[Path]:
        """The teacher and its four nodes: 200 steps, a node every 50."""
        record = Degrade(self.copy(), self.copy(), total_steps=200, node_every=50, sampling={"levels": [2.5]})
        self.trained(record, 200, snapshot=certificates.node_saver(record, folder))
        return [folder / str(step) for step in (0, *record.snapshots())]

    def disback(self, folder: Path) -> DisBack:
        return DisBack(
            self.copy(),
            self.copy(),
            self.recorded(folder),
            sampling={"levels": [2.5]},
            updates={"fake_per_student": 1},
        )


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def start(toy: Toy) -> Found:
    """The teacher read as the one-step student that every method starts from."""
    return toy.of(toy.teacher, matching(toy).result().sampler)


def sid(toy: Toy, **options: Any) -> SiD:
    return SiD(toy.copy(), toy.copy(), **{"sampling": {"levels": [2.5]}} | options)


def matching(toy: Toy, kind: type[DMD] = DMD, **options: Any) -> DMD:
    """Distribution matching with one fake update for each of the student."""
    return kind(
        toy.copy(),
        toy.copy(),
        **{"sampling": {"levels": [2.5]}, "updates": {"fake_per_student": 1}} | options,
    )


def test_the_start_and_the_goal(toy: Toy, start: Found) -> None:
    """The specification's .353 and .381 of the undistilled teacher, its floors, and what the teacher itself can do."""
    print("start", start)
    assert start.energy == pytest.approx(0.353, abs=0.03)
    assert start.mmd == pytest.approx(0.381, abs=0.03)
    assert (start.near, start.modes) == (0, 0)
    floor = toy.measure(RING.points(COUNT, "other", 98).images)
    assert floor.energy < 5e-4
    assert floor.mmd < 1e-3
    assert floor.near == pytest.approx(0.989, abs=0.005)
    assert toy.teacher.sampler is not None
    best = toy.of(toy.teacher, toy.teacher.sampler)
    print("teacher", best)
    assert best.energy < 0.0015
    assert best.near > 0.93


STUDENTS: dict[str, Callable[[Toy], ScoreDistillation]] = {
    "sid": sid,
    "sid, alpha 0.5": partial(sid, alpha=0.5),
    "sid, alpha 1.2": partial(sid, alpha=1.2),
    "dmd with its gan": partial(matching, gan={}),
    "diff-instruct": partial(
        matching, normalise=False, reduction="sum", generator_times=LOGNORMAL, fake={"times": LOGNORMAL}
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_is_accepted(name: str, toy: Toy, start: Found) -> None:
    found = toy.trained(STUDENTS[name](toy))[STEPS]
    assert found.missed() == []
    assert found.energy < start.energy / 30


@pytest.mark.parametrize("make", [sid, matching], ids=["sid", "dmd"])
def test_a_student_of_two_steps_is_accepted(
    make: Callable[..., ScoreDistillation], toy: Toy, start: Found
) -> None:
    """Both of its outputs: what is trained is their even mixture."""
    method = make(toy, sampling={"levels": [2.5, 0.5]})
    found, spec = toy.trained(method)[STEPS], method.result().sampler
    assert found.missed() == []
    first = toy.of(method.best(), replace(spec, steps=1, times={1: (spec.times[2][0], spec.times[2][-1])}))
    print("first output", first)
    assert first.missed() == []
    assert max(found.energy, first.energy) < start.energy / 30


def test_dmd_is_accepted_and_disback_follows_its_way(toy: Toy, start: Found, tmp_path: Path) -> None:
    """After 250 steps DisBack is still at the last of its degraded targets (100 steps each), far behind DMD."""
    dmd = toy.trained(matching(toy), at=(250,))
    assert dmd[STEPS].missed() == []
    assert dmd[STEPS].energy < start.energy / 30
    disback = toy.trained(toy.disback(tmp_path), at=(250,))
    assert disback[STEPS].missed(energy=0.02) == []
    assert disback[250].energy > 5 * dmd[250].energy


class Uphill(DMD):
    """Against the direction."""

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        return Loss(-super().student_loss(batch, step).total)


class Stale(DMD):
    """The fake score stays the teacher."""

    def updates(self) -> list[Update]:
        return [update for update in super().updates() if update.name == "student"]


class Blind(SiD):
    """Without the gradient through the teacher's input: plausible, and wrong."""

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        kept, self.teacher.x0 = self.teacher.x0, lambda *a: kept(*a).detach()  # type: ignore[method-assign]
        try:
            return super().student_loss(batch, step)
        finally:
            del self.teacher.x0


def test_broken_methods_are_not_accepted(toy: Toy, start: Found) -> None:
    assert "energy" in toy.trained(matching(toy, Uphill), 60)[60].missed()
    stale = toy.trained(matching(toy, Stale), 60)[60]
    assert stale == start  # where F is T the direction is exactly 0
    blind = toy.trained(Blind(toy.copy(), toy.copy(), sampling={"levels": [2.5]}), 500)[500]
    assert {"energy", "near", "modes"} <= set(blind.missed())
