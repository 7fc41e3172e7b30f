"""What a sample costs, where a student starts, and one assumption about the data: numbers that several places must agree on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.update import Step
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.denoising import Denoising
from distill.methods.families.score import StudentInput
from distill.methods.sid import SiD
from distill.models.analytic import exact_denoiser
from distill.models.boundary import Boundary
from distill.models.build import build_net
from distill.models.conditions import Labels
from distill.models.denoiser import SOLVERS, Denoiser
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.models.time_grid import TimeGrid
from distill.nets.mlp import MLP
from distill.nets.precond import EDMPrecond
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import GRIDS, grid
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear

MEANS = [[0.7, -0.4], [-0.3, 0.9], [0.1, 0.2]]
PROCESSES = [Flow(), EDM(), VPCosine(), VPLinear(), VPScaledLinear(), TrigFlow()]


class Counted(nn.Module):
    """A net that notes how many samples each call was for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, []

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.rows.append(len(x))
        return self.net(x, t, cond)


def counted(process: Process, kind: str = "x0") -> Denoiser:
    exact = exact_denoiser(process, MEANS, 0.3, labelled=True)

    class OfKind(nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return process.convert("x0", exact.net(x, t, cond), x, t, kind)

    net = Counted(exact.net if kind == "x0" else OfKind())
    return Denoiser(net, process, kind, (2,), conditions=Labels(3), guidable=True)


def z(count: int = 4) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def labels(count: int = 4) -> Cond:
    return Cond.of_labels(torch.arange(count) % 3)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
@pytest.mark.parametrize("kind", ["x0", "velocity"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_network_calls_are_those_that_are_made(process: Process, kind: str, solver: str) -> None:
    model = counted(process, kind)
    for steps in (1, 2, 8):
        for scale in (1.0, 2.0):
            model.net.rows.clear()
            spec = SamplerSpec(steps=steps, any_steps=True, solver=solver, guidance_scale=scale)
            generator = Generator(model, spec)
            told = generator.network_calls()
            assert told == model.calls(solver, steps, scale)
            if solver == "rk45":
                assert told is None  # the tolerance decides
                continue
            generator.generate(z(), labels())
            assert told == sum(model.net.rows) / 4, (steps, scale)


def test_the_calls_of_heun_under_edm() -> None:
    """EDM's 18 steps are its published 35 calls."""
    model = counted(EDM())
    assert [model.calls("heun", steps) for steps in (18, 4, 1)] == [35, 7, 1]
    assert [model.calls("heun", steps, 2.0) for steps in (18, 4, 1)] == [70, 14, 2]
    assert counted(Flow(), "velocity").calls("heun", 4) == 8


def test_network_calls_of_few_steps() -> None:
    model = counted(Flow())
    spec = SamplerSpec(steps=2, times={1: (1.0, 0.0), 2: (1.0, 0.4, 0.0)}, mode="sde")
    for steps in (1, 2):
        for scale in (1.0, 3.0):
            model.net.rows.clear()
            generator = Generator(model, spec)
            generator.generate(z(), labels(), steps, guidance_scale=scale, noise=torch.randn(2, 4, 2))
            assert generator.network_calls(steps, scale) == sum(model.net.rows) / 4


def sid_spec(process: Process, levels: list[float] | None, unit_noise: bool = False) -> SamplerSpec:
    return StudentInput(process, levels, unit_noise).spec(1.0, 1.0)


SPECS: list[tuple[str, Process, str, SamplerSpec]] = [
    ("sid 2.5", EDM(), "x0", sid_spec(EDM(), [2.5])),
    ("sid 2.5 flow", Flow(), "velocity", sid_spec(Flow(), [2.5])),
    ("sid 2.5 vp", VPScaledLinear(), "x0", sid_spec(VPScaledLinear(), [2.5])),
    ("sid two", EDM(), "x0", sid_spec(EDM(), [2.5, 0.5])),
    ("unit noise", VPScaledLinear(), "x0", sid_spec(VPScaledLinear(), [3.0], True)),
    ("whole", EDM(), "x0", sid_spec(EDM(), None)),
    ("lcm", VPScaledLinear(), "v", SamplerSpec(steps=2, times={2: (999.0, 499.0, 0.0)}, mode="sde")),
    *(
        (f"{type(process).__name__} {solver}", process, "x0", SamplerSpec(steps=4, any_steps=True, solver=solver))
        for process in PROCESSES
        for solver in SOLVERS
    ),
]  # fmt: skip


@pytest.mark.parametrize(("process", "kind", "spec"), [s[1:] for s in SPECS], ids=[s[0] for s in SPECS])
def test_one_step_is_generate_in_one_step(process: Process, kind: str, spec: SamplerSpec) -> None:
    generator = Generator(counted(process, kind), spec)
    one = generator.one_step(z(), labels())
    again = generator.generate(z(), labels(), 1, force=True)
    torch.testing.assert_close(one, again, atol=1e-6, rtol=1e-6)


def posterior_mean(x: Tensor, alpha: float, sigma: float, label: int) -> Tensor:
    """E[x0 | x] of one Gaussian N(m, 0.3^2 I): by hand."""
    mean = torch.tensor(MEANS[label], dtype=torch.float64)
    gain = alpha * 0.3**2 / (alpha**2 * 0.3**2 + sigma**2)
    return mean + gain * (x - alpha * mean)


@pytest.mark.parametrize("levels", [[2.5], [2.5, 0.5], None])
@pytest.mark.parametrize("process", [EDM(), Flow(), VPCosine()], ids=lambda process: type(process).__name__)
def test_one_step_starts_where_the_student_starts(process: Process, levels: list[float] | None) -> None:
    """SiD's student sees the noise alone, of its first level: sigma z at the time of that level, predicted x0 by hand."""
    generator = Generator(counted(process), sid_spec(process, levels))
    if levels is None:
        alpha, sigma = {"EDM": (1.0, 80.0), "Flow": (0.0, 1.0)}.get(
            type(process).__name__, (math.exp(-10), 1.0)
        )
    elif isinstance(process, EDM):
        alpha, sigma = 1.0, 2.5
    elif isinstance(process, Flow):
        alpha, sigma = 1 / 3.5, 2.5 / 3.5
    else:
        alpha, sigma = 1 / math.hypot(1, 2.5), 2.5 / math.hypot(1, 2.5)
    made = generator.one_step(z(), labels())
    for row, label in enumerate((0, 1, 2, 0)):
        wanted = posterior_mean(sigma * z()[row], alpha, sigma, label)
        torch.testing.assert_close(made[row], wanted, atol=2e-4, rtol=0)


def test_sid_at_2_5_has_the_size_of_its_data(tmp_path: Path) -> None:
    """The method's own spec, through a saved model: samples have the spread of the data, by one_step and by sample."""
    torch.manual_seed(0)
    teacher = exact_denoiser(EDM(), MEANS, 0.3)
    sampler = SiD(exact_denoiser(EDM(), MEANS, 0.3), teacher, sampling={"levels": [2.5]}).result().sampler
    save_model(tmp_path, teacher, sampler)
    generator = load_model(tmp_path)
    noise = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    spread = float(generator.one_step(noise, Cond.nothing(500)).std())
    assert spread == pytest.approx(float(generator.sample(500).std()), rel=0.1)
    assert 0.05 < spread < 1.0


@pytest.mark.parametrize(
    "process", [EDM(), Flow(), VPScaledLinear()], ids=lambda process: type(process).__name__
)
def test_forced_step_counts_start_where_the_student_starts(process: Process) -> None:
    spec = sid_spec(process, [2.5])
    forced = spec.grid(process, 4, force=True)
    assert float(forced[0]) == spec.times[1][0] < process.t_max
    assert float(forced[-1]) == process.t_min
    assert len(forced) == 5
    assert bool((forced.diff() < 0).all())


# ---- time grids ----


@pytest.mark.parametrize(
    ("process", "named"),
    [
        (Flow(), {"name": "shifted", "factor": 3.0}),
        (Flow(), {"name": "karras", "rho": 5.0}),
        (EDM(), {"name": "uniform"}),
        (EDM(), {"name": "karras", "sigma_max": 20.0, "rho": 3.0}),
        (VPScaledLinear(), {"name": "leading", "steps_offset": 1}),
        (VPScaledLinear(), {"name": "trailing"}),
        (VPScaledLinear(), {"name": "linspace"}),
        (VPScaledLinear(), {"name": "student"}),
    ],
)
def test_a_named_grid_samples_on_its_times(process: Process, named: dict[str, Any], tmp_path: Path) -> None:
    model = exact_denoiser(process, MEANS, 0.3)
    spec = SamplerSpec(steps=4, any_steps=True, solver="ddim", time_grid=TimeGrid.from_dict(named))
    options = {key: value for key, value in named.items() if key != "name"}
    times = grid(named["name"], process, 4, **options)
    assert torch.equal(spec.grid(process, 4), times)
    wanted = model.transport(z(), None, solver="ddim", grid=times)[0]
    save_model(tmp_path, model, spec)
    again = load_model(tmp_path)
    assert again.spec == spec
    assert torch.equal(again.generate(z(), Cond.nothing(4)), wanted)
    assert "time_grid" not in SamplerSpec(steps=4, any_steps=True).to_dict()


def test_shifted_times_by_hand() -> None:
    spec = SamplerSpec(
        steps=2, any_steps=True, time_grid=TimeGrid.from_dict({"name": "shifted", "factor": 3})
    )
    assert spec.grid(Flow(), 2).tolist() == pytest.approx([1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("karras", r"grid: found 'karras', expected a mapping with a name of \['karras', 'leading'"),
        (
            {},
            r"grid.name: found None, expected one of \['karras', 'leading', 'linspace', 'scheduler', 'shifted'",
        ),
        ({"name": "cosine"}, r"grid.name: found 'cosine', expected one of \['karras'"),
        ({"name": "karras", "rhoo": 7}, "grid.rhoo: no such key, did you mean grid.rho"),
        ({"name": "karras", "rho": "7"}, "grid.rho: found '7', expected float"),
        ({"name": "shifted", "factor": True}, "grid.factor: found True, expected float"),
        ({"name": "uniform", "device": "cuda"}, "grid.device: no such key"),
        ({"name": "uniform", "process": 1}, "grid.process: no such key"),
    ],
)
def test_wrong_grids(named: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeGrid.from_dict(named)


def test_a_grid_that_the_process_has_not() -> None:
    for named, process in (
        ({"name": "shifted"}, EDM()),
        ({"name": "leading"}, Flow()),
        ({"name": "karras", "rho": -1}, EDM()),
    ):
        with pytest.raises(ValueError, match=r"grid: \{'name': '"):
            TimeGrid.from_dict(named).make(process, 4)
    assert set(GRIDS) == {"uniform", "shifted", "karras", "leading", "trailing", "linspace", "student"}


# ---- sigma_data ----

PRECOND = {"_target_": "distill.nets.precond.EDMPrecond", "sigma_data": 0.25}
PRECOND |= {"net": {"_target_": "distill.nets.mlp.MLP", "shape": [2], "width": 8, "features": 4}}


def preconditioned(sigma_data: float = 0.25, **options: Any) -> Denoiser:
    return Denoiser(EDMPrecond(MLP(width=8, features=4), sigma_data), EDM(), "x0", (2,), **options)


def test_places_that_assume_another_sigma_data_are_refused() -> None:
    message = r"boundary.sigma_data: found 0.5, but the model's own sigma_data is 0.25"
    with pytest.raises(ValueError, match=message):
        preconditioned(boundary=Boundary("cm", sigma_data=0.5))
    model = preconditioned(boundary=Boundary("cm", sigma_data=0.25))
    with pytest.raises(ValueError, match=message):
        model.with_(boundary=Boundary("cm"))
    assert model.boundary == Boundary("cm", sigma_data=0.25)
    assert (model.sigma_data, exact_denoiser(Flow()).sigma_data) == (0.25, None)
    with pytest.raises(ValueError, match=r"sigma_data: found 0.25 of EDMPrecond and 0.5 of TrigFlow"):
        Denoiser(build_net(PRECOND), TrigFlow(0.5), "x0", (2,))
    with pytest.raises(ValueError, match=r"boundary.sigma_data: found 0.5, .* is 0.3"):
        Denoiser(MLP(), TrigFlow(0.3), "x0", (2,), boundary=Boundary("cm"))


def test_methods_take_the_sigma_data_of_the_model_or_refuse_another() -> None:
    for build in (
        lambda model: Consistency(model, preconditioned(), scales=4, sample_steps=(1,)),
        lambda model: ConsistencyTraining(model, curriculum="cm", total_steps=4, sample_steps=(1,)),
    ):
        assert build(preconditioned()).result().boundary.sigma_data == 0.25
        assert build(preconditioned(0.5)).result().boundary.sigma_data == 0.5
    with pytest.raises(ValueError, match=r"sigma_data: found 0.5, but the model's own sigma_data is 0.25"):
        SiD(preconditioned(), preconditioned())
    assert SiD(preconditioned(), preconditioned(), fake={"sigma_data": 0.25}).matching.sigma_data == 0.25
    SiD(preconditioned(), preconditioned(), fake={"weighting": "eps"})  # has no such number


def test_edm_weight_is_that_of_the_net() -> None:
    """1 / sigma^2 + 1 / sigma_data^2 on the error of x0, by hand."""
    torch.manual_seed(0)
    model = preconditioned()
    method = Denoising(model, weight="edm", times="lognormal")
    x0, ids = torch.randn(64, 2), torch.arange(64)
    step = Step(0, Draws(0, "train", 0, ids))
    batch = Batch(ids=ids, index=ids, cond=Cond.nothing(64), x0=x0, z=None)
    found = method.loss(batch, step).total
    eps, t = step.draws.normal("eps", (2,)), method.draw_times(step)
    x_t = x0 + t[:, None] * eps
    error = (model.net(x_t.float(), t.float(), Cond.nothing(64)) - x0).square().mean(1)
    torch.testing.assert_close(found, ((1 / t**2 + 1 / 0.25**2) * error).mean().to(found.dtype))
