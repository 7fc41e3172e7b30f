"""Identities of the multistep and adaptive solvers: their algorithms written out, their ends, gradients and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import SOLVERS, Denoiser
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import default_grid, uniform_grid
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.adaptive import rk45
from distill.samplers.integrate import check_times
from distill.samplers.multistep import dpmpp_2m, unipc
from distill.samplers.ode import ddim, euler, heun
from distill.samplers.solvers import CALLS, network_calls
from distill.samplers.stochastic import stochastic_ddim

PROCESSES = [Flow(), VPCosine(), VPLinear(), VPScaledLinear(), EDM()]
SOME = [Flow(), VPCosine(), EDM()]
MULTISTEP = {"dpmpp_2m": dpmpp_2m} | {
    f"unipc_{order}{'' if corrector else ' predictor'}": partial(unipc, order=order, corrector=corrector)
    for order in (1, 2, 3)
    for corrector in (True, False)
}


def noise(batch: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ring(process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    model = exact_denoiser(process)
    return lambda x, t: model(x, t, Cond.nothing(len(x)))


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A prediction of the data like no teacher's: the identities ask for nothing of it."""
    return 0.8 * torch.sin(2 * x) + 0.3 * expand(torch.cos(3 * t), x)


def inner(process: Process, steps: int) -> Tensor:
    """An uneven grid away from both ends."""
    ratios = torch.linspace(-2, 2.5, steps + 1, dtype=torch.float64) + 0.1 * torch.sin(
        2.0 * torch.arange(steps + 1)
    )
    return process.time_of(ratios)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_order_one_is_ddim(process: Process) -> None:
    """UniP-1, and the first step of DPM-Solver++(2M), on the whole range of every process."""
    times, x = default_grid(process, 7), process.prior(noise())
    for final in ("state", "x0"):
        expected = ddim(curved, process, x, times, return_path=True, final=final)
        alone = unipc(curved, process, x, times, order=1, corrector=False, return_path=True, final=final)
        torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(dpmpp_2m(curved, process, x, times, return_path=True)[1], expected[1])


@pytest.mark.parametrize("process", SOME, ids=repr)
@pytest.mark.parametrize("lower", [False, True])
def test_dpmpp_2m_step_by_step(process: Process, lower: bool) -> None:
    """Algorithm 2 of arXiv 2211.01095 as it is printed; UniP-2 with B(h) = e^h - 1 is the same method."""
    times, x = inner(process, 6), noise()
    alpha, sigma, ratio = process.alpha(times), process.sigma(times), process.log_ratio(times)
    expected, before = [x], x
    for i in range(1, 7):
        h, x0 = ratio[i] - ratio[i - 1], curved(expected[-1], times[i - 1].expand(5))
        direction = x0
        if i > 1 and not (lower and i == 6):
            r = (ratio[i - 1] - ratio[i - 2]) / h
            direction = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        expected.append(sigma[i] / sigma[i - 1] * expected[-1] - alpha[i] * (torch.exp(-h) - 1) * direction)
        before = x0
    options = {"return_path": True, "final": "state", "lower_order_final": lower}
    path = dpmpp_2m(curved, process, x, times, **options)
    torch.testing.assert_close(path, torch.stack(expected))
    torch.testing.assert_close(unipc(curved, process, x, times, corrector=False, **options), path)


@pytest.mark.parametrize("process", SOME, ids=repr)
def test_unipc_1_step_by_step(process: Process) -> None:
    """UniP-1 then UniC-1 with its weight 1/2 (arXiv 2302.04867): the corrected state, the prediction made before it."""
    times, x = inner(process, 4), noise()
    alpha, sigma, ratio = process.alpha(times), process.sigma(times), process.log_ratio(times)
    expected, x0 = [x], curved(x, times[0].expand(5))
    for i in range(1, 5):
        carried = sigma[i] / sigma[i - 1] * expected[-1]
        gain = alpha[i] * (1 - torch.exp(ratio[i - 1] - ratio[i]))
        ahead = carried + gain * x0
        if i < 4:
            newest = curved(ahead, times[i].expand(5))
            ahead, x0 = carried + gain * (x0 + newest) / 2, newest
        expected.append(ahead)
    path = unipc(curved, process, x, times, order=1, return_path=True, final="state")
    torch.testing.assert_close(path, torch.stack(expected))


@pytest.mark.parametrize(("order", "corrector", "degree"), [(3, False, 2), (2, True, 2), (3, True, 3)])
@pytest.mark.parametrize("process", SOME, ids=repr)
def test_unipc_integrates_polynomials_exactly(
    process: Process, order: int, corrector: bool, degree: int
) -> None:
    """Where x0 is a polynomial in log(alpha / sigma), a step of the full order is the exact integral, and one more is not."""
    times, x = inner(process, 8), noise()
    alpha, sigma, ratio = process.alpha(times), process.sigma(times), process.log_ratio(times)

    def error(power: int) -> float:
        path = unipc(
            lambda x, t: torch.ones_like(x) * expand(process.log_ratio(t) ** power, x),
            process,
            x,
            times,
            order=order,
            corrector=corrector,
            return_path=True,
            final="state",
            lower_order_final=False,
        )
        worst = 0.0
        for i in range(order - 1, 7):  # full order, and corrected
            h = ratio[i + 1] - ratio[i]
            u = h * torch.linspace(0, 1, 2001, dtype=torch.float64)
            integral = torch.trapezoid(torch.exp(u - h) * (ratio[i] + u) ** power, u)
            expected = sigma[i + 1] / sigma[i] * path[i] + alpha[i + 1] * integral
            worst = max(worst, (path[i + 1] - expected).abs().max().item())
        return worst

    assert max(error(power) for power in range(degree + 1)) < 1e-5  # the trapezoids' own error
    assert error(degree + 1) > 1e-3


@pytest.mark.parametrize("name", MULTISTEP)
def test_ends_are_handled_exactly(name: str) -> None:
    """From pure noise the first step lands as DDIM's does, into clean data on the prediction; nothing is cut or clamped."""
    solver, flow, z = MULTISTEP[name], Flow(), noise()
    for steps in (1, 2, 3, 8):
        times = uniform_grid(flow, steps)
        seen: list[Tensor] = []

        def recorded(x: Tensor, t: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(curved(x, t))
            return seen[-1]

        path = solver(recorded, flow, z, times, return_path=True, final="state", lower_order_final=False)
        assert path.isfinite().all()
        assert len(seen) == steps
        torch.testing.assert_close(path[-1], seen[-1])
        if steps > 1 and "predictor" in name:
            torch.testing.assert_close(path[1], flow.add_noise(seen[0], z, times[1].expand(5)))


@pytest.mark.parametrize("name", MULTISTEP)
def test_infinite_ends_are_limits(name: str) -> None:
    """Pure noise is the limit of a variance-exploding start, at the rate 1 / log(sigma_max) of a far node's weight; clean data
    is that of a vanishing noise level, where the order is lowered towards it."""
    solver, flow, z = MULTISTEP[name], Flow(), noise()
    times = uniform_grid(flow, 8)
    times[-1] = 1e-9
    expected = solver(ring(flow), flow, z, times, final="state")
    torch.testing.assert_close(
        solver(ring(flow), flow, z, uniform_grid(flow, 8), final="state"), expected, atol=1e-6, rtol=0
    )
    gaps = []
    for exponent in (15, 150):
        process = EDM(sigma_max=10.0**exponent)
        levels = torch.cat([process.prior(torch.ones(1).double()), process.matching_time(flow, times[1:])])
        found = solver(ring(process), process, process.prior(z), levels, final="state")
        gaps.append((found - expected / expand(1 - times[-1:], z[:1])).abs().max().item())
    assert gaps[1] < 2e-3
    if name.startswith("unipc_1"):
        assert max(gaps) < 1e-6  # no earlier nodes
    else:
        assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.2)


def samplers(process: Process, steps: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Every sampler as (x at times[0], times) -> sample; the noises of the stochastic ones are fixed."""
    predict = ring(process)
    noises = torch.randn(steps, 32, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("x0", predict(x, t), x, t, "velocity")

    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "euler": lambda x, times: euler(velocity, x, times),
        "heun": lambda x, times: heun(velocity, x, times, last_euler=True),
        "ddim": lambda x, times: ddim(predict, process, x, times),
        "eta": lambda x, times: stochastic_ddim(predict, process, x, times, noises[:, : len(x)], eta=0.7),
    }
    for name, solver in MULTISTEP.items():
        found[name] = lambda x, times, solver=solver: solver(predict, process, x, times)
    return found


@pytest.mark.parametrize("process", SOME, ids=repr)
def test_differentiable_in_the_initial_noise(process: Process) -> None:
    """Reverse mode against finite differences in float64, through the whole range of times."""
    times = default_grid(process, 5)
    for name, run in samplers(process, 5).items():
        z = noise(3).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, run=run: run(process.prior(z), times), z), name
        (gradient,) = torch.autograd.grad(run(process.prior(z), times).sum(), z)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3


def test_rk45_is_differentiable() -> None:
    """d x0 / d z of one Gaussian is its standard deviation; the choice of steps is no part of the graph."""
    model, z = exact_denoiser(Flow(), [[0.7, -0.4]], 0.5), noise(2)

    def sample(z: Tensor) -> Tensor:
        return rk45(
            lambda x, t: model(x, t, Cond.nothing(len(x))),
            Flow(),
            z,
            uniform_grid(Flow(), 1),
            rtol=1e-8,
            atol=1e-8,
        )[0]

    jacobian = torch.autograd.functional.jacobian(sample, z)
    torch.testing.assert_close(jacobian.reshape(4, 4), 0.5 * torch.eye(4).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("process", SOME, ids=repr)
def test_a_sample_does_not_depend_on_its_batch(process: Process) -> None:
    """Except for RK45, whose one error norm couples the batch: there it agrees to the tolerance only."""
    times, z = default_grid(process, 6), process.prior(noise(4))
    for name, run in samplers(process, 6).items():
        torch.testing.assert_close(run(z, times)[:2], run(z[:2], times), atol=1e-12, rtol=1e-12, msg=name)
    together, _ = rk45(ring(process), process, z, times)
    apart, _ = rk45(ring(process), process, z[:1], times)
    assert not torch.equal(together[:1], apart)
    torch.testing.assert_close(together[:1], apart, atol=2e-3, rtol=0)


def test_rk45_is_solve_ivp_on_the_flattened_batch() -> None:
    """The steps, the calls and the states in between are those of scipy's RK45, to rounding."""
    z, flow = noise(4), Flow()

    def field(x: Tensor, t: Tensor) -> Tensor:
        return 2 * torch.sin(3 * x + 5 * expand(t, x)) - x.flip(1)

    def flat(t: float, y: object) -> object:
        x = torch.as_tensor(y).reshape(4, 2)
        return field(x, torch.full((4,), float(t), dtype=torch.float64)).flatten().numpy()

    for tolerance in (1e-3, 1e-5, 1e-8):
        for times in (uniform_grid(flow, 6), uniform_grid(flow, 6).flip(0)):
            path, calls = rk45(
                field, flow, z, times, kind="velocity", rtol=tolerance, atol=tolerance, return_path=True
            )
            expected = solve_ivp(
                flat,
                (float(times[0]), float(times[-1])),
                z.flatten().numpy(),
                t_eval=times.numpy(),
                rtol=tolerance,
                atol=tolerance,
            )
            assert calls == expected.nfev
            torch.testing.assert_close(path.reshape(7, 8), torch.tensor(expected.y.T), atol=1e-11, rtol=1e-11)


def test_rk45_grids_callbacks_and_precision() -> None:
    """`times` says where states are wanted, no more; float32 stays float32."""
    process, z = VPLinear(), noise()
    seen: list[tuple[int, Tensor]] = []
    path, calls = rk45(
        ring(process),
        process,
        z,
        uniform_grid(process, 9),
        on_state=lambda i, x: seen.append((i, x)),
        return_path=True,
    )
    assert [i for i, _ in seen] == list(range(10))
    assert torch.equal(torch.stack([x for _, x in seen]), path)
    torch.testing.assert_close(path[0], z)
    final, fewer = rk45(ring(process), process, z, uniform_grid(process, 1))
    assert fewer == calls
    torch.testing.assert_close(final, path[-1])
    single, _ = rk45(ring(process), process, z.float(), uniform_grid(process, 1))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), final, atol=1e-3, rtol=0)


def test_rk45_refusals() -> None:
    flow, z, times = Flow(), noise(), uniform_grid(Flow(), 2)
    with pytest.raises(ValueError, match="rtol: found 0, expected a positive"):
        rk45(curved, flow, z, times, rtol=0)
    with pytest.raises(ValueError, match="atol: found nan"):
        rk45(curved, flow, z, times, atol=math.nan)
    with pytest.raises(ValueError, match="times"):
        rk45(curved, flow, z, times[:1])
    with pytest.raises(ValueError, match="times: expected times in one direction"):
        rk45(curved, flow, z, times[[0, 2, 1]])
    with pytest.raises(RuntimeError, match=r"rk45: no step from tau = 1\.0"):
        rk45(lambda x, t: x * math.nan, flow, z, times, kind="velocity")
    with pytest.raises(RuntimeError, match=r"rk45: no step from tau = 0\.50"):
        rk45(lambda x, t: torch.where(expand(t, x) > 0.5, x, math.nan), flow, z, times, kind="velocity")
    with pytest.raises(
        RuntimeError, match=r"rk45: max_calls = 30 calls ended at tau = 0\.\d+, short of 0\.0"
    ):
        rk45(lambda x, t: 1e4 * x, flow, z, times, kind="velocity", max_calls=30)


def test_refusals() -> None:
    flow, z, times = Flow(), noise(), uniform_grid(Flow(), 3)
    with pytest.raises(ValueError, match="order: found 4, expected 1, 2 or 3"):
        unipc(curved, flow, z, times, order=4)
    for solver in (dpmpp_2m, unipc):
        with pytest.raises(ValueError, match="final must be 'x0' or 'state', got 'x'"):
            solver(curved, flow, z, times, final="x")
        with pytest.raises(ValueError, match="times: expected strictly descending"):
            solver(curved, flow, z, times.flip(0))
        with pytest.raises(ValueError, match="times must be 1-D"):
            solver(curved, flow, z, times[None])
        with pytest.raises(ValueError, match="Flow"):
            solver(curved, flow, z, times, kind="v")
    with pytest.raises(ValueError, match=r"solver: found 'rk9', expected one of \['euler', 'heun'"):
        network_calls("rk9", 3)
    assert check_times(times) == 3


def test_nothing_waits_for_the_device() -> None:
    """Meta tensors have no values: anything that reads one on the host fails. Times are on the device, too."""
    for process in PROCESSES:
        for times in (default_grid(process, 4), default_grid(process, 4).to("meta")):
            z = torch.empty(3, 2, device="meta")
            noises = torch.empty(4, 3, 2, device="meta")
            for solver in (dpmpp_2m, partial(unipc, order=3), ddim):
                assert solver(curved, process, z, times).shape == (3, 2)
            assert stochastic_ddim(curved, process, z, times, noises).shape == (3, 2)
            for sampler in (euler, heun):
                assert sampler(curved, z, times).shape == (3, 2)
        with pytest.raises((RuntimeError, NotImplementedError)):
            rk45(curved, process, z, default_grid(process, 4))  # documented: it waits


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_transport_knows_every_solver(process: Process) -> None:
    """All agree on the sample, count the calls that the table says, and reach it in float32 as well."""
    asked: list[Tensor] = []

    class Counted(Denoiser):
        def forward(self, x_t: Tensor, t: Tensor, cond: Cond, guidance_scale: float | Tensor = 1.0) -> Tensor:
            asked.append(t)
            return super().forward(x_t, t, cond, guidance_scale)

    exact = exact_denoiser(process, [[0.7, -0.4], [-0.3, 0.9]], 0.4)
    model = Counted(exact.net, process, "x0", (2,))
    z, cond, steps = noise(6), Cond.nothing(6), 80
    expected = model.transport(z, cond, solver="rk45", steps=1)[0]
    assert set(SOLVERS) == set(CALLS) == {"euler", "heun", "ddim", "dpmpp_2m", "unipc", "rk45"}
    for solver in SOLVERS:
        asked.clear()
        sample = model.transport(z, cond, solver=solver, steps=steps)
        assert sample.shape == (1, 6, 2)
        tolerance = 0.2 if solver in ("euler", "ddim") else 0.06
        torch.testing.assert_close(sample[0], expected, atol=tolerance, rtol=0, msg=f"{solver}")
        if (calls := model.calls(solver, steps)) is not None:
            assert len(asked) == calls
        single = model.transport(z.float(), cond, solver=solver, steps=steps)[0]
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), sample[0], atol=2e-3, rtol=0)


def test_transport_by_rk45_ignores_the_grid() -> None:
    model, z, cond = exact_denoiser(EDM()), noise(), Cond.nothing(5)
    one = model.transport(z, cond, solver="rk45", steps=1)
    torch.testing.assert_close(model.transport(z, cond, solver="rk45", steps=30), one)
    grid = default_grid(EDM(), 30)
    middle = float(grid[11])
    states = model.transport(z, cond, solver="rk45", steps=30, times=[80.0, middle, 0.0])
    torch.testing.assert_close(states[0], 80 * z)
    torch.testing.assert_close(states[2], one[0])
    fine = model.transport(
        z, cond, solver="unipc", grid=torch.cat([default_grid(EDM(), 400)[:-1], grid[-1:]])
    )
    assert fine.isfinite().all()
    torch.testing.assert_close(fine[0], one[0], atol=2e-3, rtol=0)
