"""Every method's loss against values worked out by hand, with a net whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.data.batch import Batch
from distill.data.cond import NULL_LABEL, Cond
from distill.data.rng import Draws
from distill.engine.fit import Fit, train
from distill.engine.schedule import Linear
from distill.engine.update import Optim, Step
from distill.methods.flow_matching import FlowMatching
from distill.methods.one_step import OneStep
from distill.methods.reflow import Reflow
from distill.models.conditions import Labels
from distill.models.decoder import Points
from distill.models.denoiser import Denoiser
from distill.process.flow import Flow
from distill.process.vp import VPCosine
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness

B, D = 64, 3


class Known(nn.Module):
    """v = 2 x + 3 t + label, so every input can be told from the output."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, t, cond):
        return self.two * x + 3 * t[:, None].to(x.dtype) + cond.get("label")[:, None]


def student(coupling: str = "independent") -> Denoiser:
    return Denoiser(
        Known(), Flow(), "velocity", (D,), conditions=Labels(10), guidable=True, coupling=coupling
    )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(B, D, generator=generator), torch.randn(B, D, generator=generator)
    return Batch(torch.arange(B), torch.arange(B), Cond.of_labels(torch.arange(B) % 10), x0=x0, z=z)


def step(name: str = "s") -> Step:
    return Step(0, Draws(7, name, 0, torch.arange(B)))


def known(x, t, label):
    return 2 * x + 3 * t[:, None] + label[:, None]


def test_flow_matching_regresses_eps_minus_x0_on_fresh_noise():
    data, draws = batch(), step().draws
    eps, t, dropped = draws.normal("eps", (D,)), draws.uniform("t"), draws.uniform("null") < 0.25
    assert 4 < int(dropped.sum()) < 32
    label = torch.where(dropped, NULL_LABEL, data.cond.get("label"))
    expected = (
        (known((1 - t)[:, None] * data.x0 + t[:, None] * eps, t, label) - (eps - data.x0)).square().mean()
    )
    found = FlowMatching(student(), null_prob=0.25).loss(data, step()).total
    assert torch.isclose(found, expected, rtol=1e-5)


def test_reflow_regresses_the_stored_noise():
    data, draws = batch(), step().draws
    t, dropped = draws.uniform("t"), draws.uniform("null") < 0.25
    label = torch.where(dropped, NULL_LABEL, data.cond.get("label"))
    x_t = (1 - t)[:, None] * data.x0 + t[:, None] * data.z
    expected = (known(x_t, t, label) - (data.z - data.x0)).square().mean()
    assert torch.isclose(Reflow(student(), null_prob=0.25).loss(data, step()).total, expected, rtol=1e-5)


@pytest.mark.parametrize("t_eps", [0.0, 0.1])
def test_one_step_is_the_squared_distance_of_the_jump(t_eps):
    data, method = batch(), OneStep(student(), t_eps=t_eps)
    t = torch.full((B,), 1 - t_eps)
    x_t = t_eps * data.x0 + (1 - t_eps) * data.z
    expected = (known(x_t, t, data.cond.get("label")) - (data.z - data.x0)).square().mean()
    assert torch.isclose(method.loss(data, step()).total, expected, rtol=1e-5)
    assert method.result().sampler.times == {1: (1 - t_eps, 0.0)}
    if t_eps == 0:  # with G(z) = z - v(z, 1), the loss is |G(z) - x0|^2
        jump = data.z - known(data.z, t, data.cond.get("label"))
        assert torch.isclose(expected, (jump - data.x0).square().mean(), rtol=1e-5)


def test_k_step_students_are_trained_at_the_times_that_they_are_sampled_at():
    method, times = OneStep(student(), steps=4, t_eps=0.1), []
    original = method.student.velocity
    method.student.velocity = lambda x, t, cond: times.append(t) or original(x, t, cond)
    method.loss(batch(), step())
    trained = sorted({round(float(t), 6) for t in times[0]}, reverse=True)
    assert trained == [pytest.approx(t) for t in method.result().sampler.times[4][:-1]]


def test_what_cannot_be_trained_is_refused():
    for method in (FlowMatching, Reflow, OneStep):
        with pytest.raises(ValueError, match=r"process: found VPCosine.*, but this method trains flows"):
            method(Denoiser(Known(), VPCosine(), "v", (D,)))
    with pytest.raises(ValueError, match="reflow cannot start from a one-step student"):
        Reflow(student("endpoint"))
    for bad in (0, 1.5, "2"):
        with pytest.raises(ValueError, match="steps: expected an integer >= 1"):
            OneStep(student(), steps=bad)
    with pytest.raises(ValueError, match="t_eps: expected a time in"):
        OneStep(student(), t_eps=1.0)
    with pytest.raises(ValueError, match="null_prob: expected a probability"):
        Reflow(student(), null_prob=1.0)


class MLP(nn.Module):
    """A net for two dimensions."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(7, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)
        )

    def forward(self, x, t, cond):
        t = t[:, None].to(x.dtype)
        waves = [t, (3 * t).sin(), (3 * t).cos(), (9 * t).sin(), (9 * t).cos()]
        return self.layers(torch.cat([x, *waves], dim=1))


class Quarter:
    """Pairs (z, x0) of an exact map, a quarter turn and a shift: x0 = R z + m. Shuffled, they are independent."""

    sample_shape, num_classes = (2,), 0

    def __init__(self, shuffled: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        self.z = torch.randn(2048, 2, generator=generator)
        turned = torch.stack([self.z[:, 1], -self.z[:, 0]], dim=1) * 0.3 + torch.tensor([2.0, 0.0])
        self.x0 = turned[torch.randperm(2048, generator=generator)] if shuffled else turned

    def __len__(self):
        return 2048

    def fetch(self, rows, index):
        return Batch(rows, index, Cond.nothing(len(rows)), x0=self.x0[rows], z=self.z[rows])

    def fingerprint(self):
        return ""


def reflowed(folder: Path, shuffled: bool) -> tuple[float, float]:
    """(straightness, one-step error to the exact map) after a short reflow."""
    torch.manual_seed(0)
    method = Reflow(Denoiser(MLP(), Flow(), "velocity", (2,)))
    optim = Optim(partial(torch.optim.Adam, lr=3e-3), Linear(total=500), ema=None)
    method.prepare({"student": optim}, seed=0)
    train(method, Quarter(shuffled), Fit(steps=500, batch_size=128), folder=folder, config={})
    exact = Quarter(shuffled=False)
    with torch.no_grad():
        grid = torch.linspace(1, 0, 21, dtype=torch.float64)
        nothing = Cond.nothing(2048)
        path, velocities = rollout(lambda x, t: method.student.velocity(x, t, nothing), exact.z, grid)
        jump = method.student.x0(exact.z, torch.ones(2048), nothing)
    return float(straightness(path, velocities)[0]), float((jump - exact.x0).square().sum(1).mean())


@pytest.mark.slow
def test_reflow_straightens_true_pairs_and_not_shuffled_ones(tmp_path):
    """T3 of the specification in miniature: the test that catches a broken pair loader."""
    straight, error = reflowed(tmp_path / "true", shuffled=False)
    _, broken = reflowed(tmp_path / "shuffled", shuffled=True)
    assert straight < 0.05
    assert error < 0.05
    assert broken > 0.15  # blind to z, the best jump is the mean: E |R z 0.3|^2 = 0.18


def test_guidance_of_pairs_is_the_teachers(tmp_path):
    from distill.cache.pairs import Header, Pairs
    from distill.cache.writer import write_pairs
    from distill.data.rng import noise_checksum

    header = Header(
        sample_shape=(D,),
        count=20,
        seed=0,
        stream="p",
        noise_checksum=noise_checksum(0, "p", (D,)),
        teacher="t",
        solver="euler",
        steps=1,
        guidance_scale=3.0,
        conditions=Labels(10).config(),
        decoder=Points().config(),
    )
    write_pairs(tmp_path, student(), header)
    pairs = Pairs(tmp_path).fetch(torch.arange(20), torch.arange(20))
    one = torch.ones(20)
    u, c = known(pairs.z, one, torch.full((20,), NULL_LABEL)), known(pairs.z, one, pairs.cond.get("label"))
    assert torch.allclose(pairs.x0, pairs.z - (u + 3 * (c - u)), atol=1e-5)
    plain = replace(header, guidance_scale=1.0)
    write_pairs(tmp_path / "plain", student(), plain)
    assert torch.allclose(Pairs(tmp_path / "plain").x0[0], pairs.z - c, atol=1e-5)
