"""How fast every solver converges to the exact teacher: orders measured in float64 on distributions with known answers.

One Gaussian N(m, s^2 I) has the closed flow map x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) w with w constant along a
trajectory; the ring of eight has none, and RK45 at 1e-12 stands in for it, itself held to the closed form here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import default_grid, uniform_grid
from distill.process.vp import VPCosine
from distill.samplers.adaptive import rk45
from distill.samplers.integrate import Field
from distill.samplers.multistep import dpmpp_2m, unipc
from distill.samplers.ode import ddim, euler, heun
from distill.samplers.stochastic import stochastic_ddim

MEAN, STD = [0.7, -0.4], 0.5
PROCESSES = [Flow(), VPCosine(), EDM()]
Run = Callable[[Tensor, Tensor], Tensor]


def noise(batch: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicted(model: Denoiser) -> Field:
    return lambda x, t: model(x, t, Cond.nothing(len(x)))


def gaussian() -> dict[str, Denoiser]:
    return {repr(process): exact_denoiser(process, [MEAN], STD) for process in PROCESSES}


def exact(process: Process, t: Tensor) -> Tensor:
    """The state at time t (scalar) of the Gaussian's trajectories with w = noise()."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return alpha * torch.tensor(MEAN, dtype=torch.float64) + (alpha**2 * STD**2 + sigma**2).sqrt() * noise()


def even(process: Process, steps: int, start: float = -2.5, end: float = 4.0) -> Tensor:
    """Times evenly spaced in log(alpha / sigma): from noise levels 12 to 0.018 times the data's."""
    return process.time_of(torch.linspace(start, end, steps + 1, dtype=torch.float64))


def runs(model: Denoiser, lower_order_final: bool = False) -> dict[str, Run]:
    """Every deterministic solver of fixed steps: (state at times[0], times) -> state at times[-1]."""
    predict, process = predicted(model), model.process
    multistep = {"final": "state", "lower_order_final": lower_order_final}
    zeros = torch.zeros_like

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return model.velocity(x, t, Cond.nothing(len(x)))

    return {
        "euler": lambda x, times: euler(velocity, x, times),
        "heun": lambda x, times: heun(velocity, x, times, last_euler=True),
        "ddim": lambda x, times: ddim(predict, process, x, times, final="state"),
        "dpmpp_2m": lambda x, times: dpmpp_2m(predict, process, x, times, **multistep),
        "unip_2": lambda x, times: unipc(predict, process, x, times, corrector=False, **multistep),
        "unipc_1": lambda x, times: unipc(predict, process, x, times, order=1, **multistep),
        "unipc_2": lambda x, times: unipc(predict, process, x, times, order=2, **multistep),
        "unipc_3": lambda x, times: unipc(predict, process, x, times, order=3, **multistep),
        "eta_0": lambda x, times: stochastic_ddim(
            predict, process, x, times, lambda i: zeros(x), eta=0.0, final="state"
        ),
    }


ORDERS = {
    "euler": 1,
    "heun": 2,
    "ddim": 1,
    "dpmpp_2m": 2,
    "unip_2": 2,
    "unipc_1": 2,
    "unipc_2": 3,
    "unipc_3": 3,
    "eta_0": 1,
}


def slopes(
    run: Run, grid: Callable[[int], Tensor], ends: Callable[[Tensor], tuple[Tensor, Tensor]], *steps: int
):
    """log2 of the ratio of errors (root mean square over samples) at each step count and its double."""
    errors = []
    for count in steps:
        times = grid(count)
        start, end = ends(times)
        errors.append((run(start, times) - end).square().mean().sqrt().item())
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)], errors


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_order_on_one_gaussian(process: Process, name: str) -> None:
    """Against the closed form, on a grid that is even in log(alpha / sigma)."""
    found, errors = slopes(
        runs(gaussian()[repr(process)])[name],
        lambda steps: even(process, steps),
        lambda times: (exact(process, times[0]), exact(process, times[-1])),
        *(64, 128, 256),
    )
    low, high = ORDERS[name] - 0.12, ORDERS[name] + (1.0 if name == "unipc_3" else 0.12)
    assert all(low < slope < high for slope in found), (found, errors)


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_order_on_the_ring(process: Process) -> None:
    """Against RK45 at 1e-12: eight narrow Gaussians bend the trajectories, so the orders set in later."""
    model = exact_denoiser(process)
    times = even(process, 1)
    start = (process.alpha(times[0]) ** 2 * 1.1 + process.sigma(times[0]) ** 2).sqrt() * noise(32, seed=1)
    end, _ = rk45(predicted(model), process, start, times, rtol=1e-12, atol=1e-12)
    error = {}
    for name, run in runs(model).items():
        found, errors = slopes(
            run, lambda steps: even(process, steps), lambda times: (start, end), *(128, 256)
        )
        assert found[0] > ORDERS[name] - 0.2, (name, found, errors)
        error[name] = errors[-1]
    # Order for order the better method is better by far at the same number of calls.
    assert error["unipc_3"] < error["unipc_2"] / 5 < error["dpmpp_2m"] / 30 < error["ddim"] / 300, error


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_rk45_meets_its_tolerance(process: Process) -> None:
    """The closed form, at both ends and between; calls grow as tolerance^(-1/5)."""
    model, times = gaussian()[repr(process)], even(process, 3)
    calls = []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        path, used = rk45(
            predicted(model),
            process,
            exact(process, times[0]),
            times,
            rtol=tolerance,
            atol=tolerance,
            return_path=True,
        )
        expected = torch.stack([exact(process, t) for t in times])
        assert (path - expected).abs().max() < 20 * tolerance * (1 + process.alpha(times).max())
        calls.append(used)
    # Two decades of tolerance are a factor 10^(2/5) = 2.5 in steps, once a few starting steps are outweighed.
    assert calls == sorted(calls)
    assert 2.0 < calls[3] / calls[2] < 3.0, calls


@pytest.mark.parametrize(
    ("process", "spacing", "steps", "least"),
    [
        # Evenly into pure noise and clean data: the ends cost a logarithm (1.77 and 2.08 measured).
        (Flow(), "uniform", (128, 256), {"dpmpp_2m": 1.65, "unipc_2": 1.9, "unipc_3": 1.9}),
        # Quadratically finer towards both ends: the full orders.
        (Flow(), "fine ends", (64, 128), {"dpmpp_2m": 1.9, "unipc_2": 2.8, "unipc_3": 3.5}),
        (VPCosine(), "fine ends", (64, 128), {"dpmpp_2m": 1.9, "unipc_2": 2.8, "unipc_3": 3.5}),
        (EDM(), "default", (32, 64), {"dpmpp_2m": 1.9, "unipc_2": 2.8, "unipc_3": 2.8}),
    ],
    ids=["flow", "flow fine", "vp fine", "edm"],
)
def test_order_from_pure_noise_to_clean_data(
    process: Process, spacing: str, steps: tuple[int, int], least: dict[str, float]
) -> None:
    """The whole range, infinite log-ratios included: nothing is cut off, and the step into clean data costs no order."""

    def grid(count: int) -> Tensor:
        if spacing == "fine ends":
            return (1 - torch.cos(math.pi * uniform_grid(process, count))) / 2
        return (default_grid if spacing == "default" else uniform_grid)(process, count)

    model = gaussian()[repr(process)]
    for name, bound in least.items():
        found, errors = slopes(
            runs(model, lower_order_final=True)[name],
            grid,
            lambda times: (exact(process, times[0]), exact(process, times[-1])),
            *steps,
        )
        assert found[0] > bound, (name, found, errors)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_process_ends_at_the_same_samples(process: Process) -> None:
    """The trajectories of all processes coincide once rescaled, so the same noise ends at the same data."""
    flow, z = Flow(), noise(8, seed=2)
    expected, _ = rk45(predicted(exact_denoiser(flow)), flow, z, uniform_grid(flow, 1), rtol=1e-9, atol=1e-9)
    # The other processes start a trace of data above pure noise: states on the flow's trajectories are matched.
    start = torch.tensor([process.t_max], dtype=torch.float64)
    before = torch.cat([torch.ones(1).double(), flow.matching_time(process, start)])
    matched = z
    if before[1] < 1:
        matched, _ = rk45(predicted(exact_denoiser(flow)), flow, z, before, rtol=1e-9, atol=1e-9)
    matched = matched / flow.matching_scale(process, start)
    end = torch.tensor([process.t_min], dtype=torch.float64)
    found, _ = rk45(
        predicted(exact_denoiser(process)), process, matched, torch.cat([start, end]), rtol=1e-9, atol=1e-9
    )
    # VPCosine's t_min keeps noise of 4.5e-5; the tangent below tau = 1e-4 errs by 1e-4^2 / 0.1^2.
    torch.testing.assert_close(found, expected, atol=2e-4 if isinstance(process, VPCosine) else 2e-6, rtol=0)
