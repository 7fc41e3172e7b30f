"""One ODE, many coordinates: with the exact denoiser the same noise ends at the same sample under every process."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import default_grid, karras_grid, uniform_grid
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosineIDDPM, VPScaledLinear
from distill.samplers.ode import ddim, euler

COUNT = 64
NOTHING = Cond.nothing(COUNT)


def noise() -> Tensor:
    return torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def endpoint() -> Tensor:
    """Where the flow of the ring of 8 carries the noise: Euler, 3,200 steps of a straight process."""
    return exact_denoiser(Flow()).transport(noise(), NOTHING, steps=3200)[0]


def rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun"])
def test_edm_ends_where_the_flow_ends(endpoint: Tensor, solver: str) -> None:
    """From prior(z) = 80 z on the default grid; errors fall with the solver's order down to the reference's own."""
    model = exact_denoiser(EDM())
    coarse, fine = (
        rms(model.transport(noise(), NOTHING, solver=solver, steps=n)[0] - endpoint) for n in (25, 100)
    )
    bound, gain = {"heun": (6e-4, 8.0)}.get(solver, (8e-3, 3.0))
    assert fine < bound
    assert coarse / fine > gain


@pytest.mark.parametrize("process", [TrigFlow(), TrigFlow(1.0), VPCosineIDDPM()], ids=repr)
def test_other_processes_end_there_too(endpoint: Tensor, process: Process) -> None:
    sample = exact_denoiser(process).transport(noise(), NOTHING, solver="euler", steps=400)[0]
    assert rms(sample - endpoint) < 2e-3


@pytest.mark.parametrize(
    "process",
    [EDM(), TrigFlow(), TrigFlow(sigma_data=2.0), VPScaledLinear(), VPScaledLinear(zero_terminal_snr=True)],
    ids=repr,
)
def test_ddim_is_the_flow_s_euler_in_other_coordinates(process: Process) -> None:
    """Step by step and to rounding: matched times, matched states, also across the last interval of a zero-SNR table."""
    flow = Flow()
    grid = default_grid(process, 12)
    start = process.prior(noise())
    states = ddim(
        lambda x, t: exact_denoiser(process).x0(x, t, NOTHING),
        process,
        start,
        grid,
        return_path=True,
        final="state",
    )
    matched = flow.matching_time(process, grid)
    scale = flow.matching_scale(process, grid)
    path = euler(
        lambda x, t: exact_denoiser(flow).velocity(x, t, NOTHING), scale[0] * start, matched, return_path=True
    )
    torch.testing.assert_close(expand(scale, states) * states, path, atol=1e-10, rtol=1e-10)


def test_the_marginal_at_a_level_is_the_flow_s_marginal() -> None:
    """exact_denoiser(EDM) and exact_denoiser(Flow) are one function of the noise level."""
    level = torch.logspace(-2, 1.5, COUNT, dtype=torch.float64)
    flow, edm = Flow(), EDM()
    x_flow = noise()
    t = flow.matching_time(edm, level)
    torch.testing.assert_close(t, level / (1 + level))
    scale = edm.matching_scale(flow, t)
    torch.testing.assert_close(scale, 1 + level)
    denoised = exact_denoiser(edm).x0(expand(scale, x_flow) * x_flow, level, NOTHING)
    torch.testing.assert_close(denoised, exact_denoiser(flow).x0(x_flow, t, NOTHING), atol=1e-9, rtol=1e-9)


def test_priors() -> None:
    z = noise()
    torch.testing.assert_close(EDM().prior(z), 80 * z)
    torch.testing.assert_close(EDM(sigma_max=5.0).prior(z), 5 * z)
    torch.testing.assert_close(TrigFlow(0.25).prior(z), 0.25 * z)
    for process in (EDM(), TrigFlow()):
        assert process.prior(z.half()).dtype == torch.float32
        # what is left of the data at t_max: nothing, or (EDM) too little to see beside the noise
        end = torch.full((COUNT,), process.t_max, dtype=torch.float64)
        x_t = process.add_noise(torch.zeros_like(z), z, end)
        torch.testing.assert_close(x_t, process.prior(z))


def test_trigflow_ends_in_pure_noise() -> None:
    """alpha(t_max) is exactly 0, in both precisions, so that predicted noise is refused as for a flow."""
    for dtype in (torch.float32, torch.float64):
        assert TrigFlow().alpha(torch.tensor([TrigFlow.t_max], dtype=dtype)).item() == 0
    with pytest.raises(ValueError, match="kind: found 'eps'"):
        Denoiser(torch.nn.Identity(), TrigFlow(), "eps", (2,))
    Denoiser(torch.nn.Identity(), EDM(), "eps", (2,))  # there alpha is 1


def test_edm_s_last_step_never_evaluates_time_zero() -> None:
    times: list[float] = []
    model = exact_denoiser(EDM())
    model.net.register_forward_hook(lambda module, args, out: times.append(args[1][0].item()))
    for solver, calls in (("euler", 6), ("ddim", 6), ("heun", 11)):
        times.clear()
        sample = model.transport(noise(), NOTHING, solver=solver, grid=karras_grid(EDM(), 6))[0]
        assert torch.isfinite(sample).all()
        assert len(times) == calls
        assert min(times) == 0.002
    # A net that predicts velocities is not asked for one there either, though it could answer.
    times.clear()
    straight = Denoiser(torch.nn.Identity(), EDM(), "velocity", (2,))
    straight.forward = lambda x, t, *rest: times.append(t[0].item()) or torch.zeros_like(x)
    straight.transport(noise(), NOTHING, solver="heun", steps=6)
    assert len(times) == 11
    assert min(times) == 0.002
    with pytest.raises(ValueError, match="steps: expected at least 1, found 0"):
        model.transport(noise(), NOTHING, steps=0)


def test_bad_constants_are_refused() -> None:
    for build, message in (
        (lambda: EDM(sigma_min=0.0), "sigma_min, sigma_max: found 0.0 and 80.0"),
        (lambda: EDM(sigma_min=80.0), "need 0 < sigma_min < sigma_max"),
        (lambda: EDM(sigma_max=float("inf")), "need 0 < sigma_min < sigma_max"),
        (lambda: EDM(rho=0.0), "rho must be positive"),
        (lambda: TrigFlow(0.0), "sigma_data must be positive"),
        (lambda: EDM().check_kind("v"), "EDM does not keep"),
        (lambda: TrigFlow(0.5).check_kind("v"), "TrigFlow does not keep"),
        (lambda: uniform_grid(EDM(), 0), "at least one step"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    TrigFlow(1.0).check_kind("v")
