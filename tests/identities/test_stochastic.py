"""Identities of the samplers that add noise: their formulas written out, their deterministic limits and the marginals."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import default_grid, karras_grid, uniform_grid
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.march import Noise
from distill.samplers.ode import ddim, heun
from distill.samplers.stochastic import churn, stochastic_ddim

PROCESSES = [Flow(), VPCosine(), VPLinear(), VPScaledLinear(), EDM()]
SOME = [Flow(), VPCosine(), EDM()]
MEAN, STD = [0.7, -0.4], 0.5


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A prediction of the data like no teacher's."""
    return 0.8 * torch.sin(2 * x) + 0.3 * expand(torch.cos(3 * t), x)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_without_noise_they_are_ddim_and_heun(process: Process) -> None:
    """Exactly, whatever numbers the noise holds."""
    times, x, noises = default_grid(process, 6), process.prior(noise(5)), noise(6, 5)
    for final in ("x0", "state"):
        path = stochastic_ddim(curved, process, x, times, noises, eta=0.0, return_path=True, final=final)
        assert torch.equal(path, ddim(curved, process, x, times, return_path=True, final=final))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("x0", curved(x, t), x, t, "velocity")

    expected = heun(velocity, x, times, return_path=True, last_euler=True)
    assert torch.equal(churn(curved, process, x, times, noises, return_path=True), expected)
    # So it is where no level is in range.
    outside = partial(churn, s_churn=30.0, s_min=1e4, s_max=1e5)
    torch.testing.assert_close(outside(curved, process, x, times, noises, return_path=True), expected)
    assert churn(curved, process, x, times, noises, s_churn=0.0, last_euler=False).isfinite().all() == (
        velocity(x, times[-1:].expand(5)).isfinite().all()
    )


def test_eta_is_equation_16() -> None:
    """arXiv 2010.02502, eq. 12 and 16, in its cumulative products."""
    process, x, noises = VPScaledLinear(), noise(4), noise(5, 4)
    times = torch.tensor([999, 700, 401, 250, 30, 0], dtype=torch.float64)
    for eta in (0.3, 1.0):
        expected = [x]
        for i in range(5):
            before, after = process.alpha(times[i : i + 2]) ** 2
            x0 = curved(expected[-1], times[i].expand(4))
            eps = (expected[-1] - before.sqrt() * x0) / (1 - before).sqrt()
            std = eta * ((1 - after) / (1 - before)).sqrt() * (1 - before / after).sqrt()
            expected.append(after.sqrt() * x0 + (1 - after - std**2).sqrt() * eps + std * noises[i])
        path = stochastic_ddim(curved, process, x, times, noises, eta=eta, return_path=True, final="state")
        torch.testing.assert_close(path, torch.stack(expected))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_step_with_the_true_data_keeps_the_marginal(process: Process, eta: float) -> None:
    """x_s - alpha_s x0 = a eps + c n with a^2 + c^2 = sigma_s^2; at eta = 1 with a the coefficient of q(x_s | x_t, x0)."""
    times = default_grid(process, 5)
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    old, new = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    for t, s in pairwise(times):
        state = process.add_noise(x0, old, t[None])
        found = stochastic_ddim(
            lambda x, t: x0, process, state, torch.stack([t, s]), new[None], eta=eta, final="state"
        )
        kept, fresh = (found - process.alpha(s) * x0)[0]
        sigma = process.sigma(s)
        torch.testing.assert_close(kept**2 + fresh**2, sigma**2)
        if eta == 0:
            assert abs(fresh) < 1e-12
        if eta == 1:
            ratio = process.alpha(t) * sigma / (process.alpha(s) * process.sigma(t))
            torch.testing.assert_close(kept, sigma * ratio)


@pytest.mark.parametrize(
    ("s_churn", "s_min", "s_max", "s_noise"), [(40, 0.05, 50, 1.003), (2, 0.01, 1, 1.007)]
)
def test_churn_is_algorithm_2_of_edm(s_churn: float, s_min: float, s_max: float, s_noise: float) -> None:
    """arXiv 2206.00364, Algorithm 2, as it is printed: the paper's ranges (table 5), with gamma at its bound and below."""
    process, steps = EDM(), 12
    x, noises, times = process.prior(noise(4)), noise(steps, 4), karras_grid(process, steps)
    expected, raised = [x], 0
    for i in range(steps):
        now, after, state = times[i], times[i + 1], expected[-1]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= now <= s_max else 0
        raised += gamma > 0
        hat = now + gamma * now
        state = state + (hat**2 - now**2).sqrt() * s_noise * noises[i]
        slope = (state - curved(state, hat.expand(4))) / hat
        ahead = state + (after - hat) * slope
        if after != 0:
            ahead = state + (after - hat) * (
                slope / 2 + (ahead - curved(ahead, after.expand(4))) / (2 * after)
            )
        expected.append(ahead)
    assert 0 < raised < steps
    options = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise, "return_path": True}
    path = churn(curved, process, x, times, noises, **options)
    torch.testing.assert_close(path, torch.stack(expected))
    # Any prediction kind, and noise as a function of the step.
    by_eps = churn(
        lambda x, t: process.convert("x0", curved(x, t), x, t, "eps"),
        process,
        x,
        times,
        lambda i: noises[i],
        kind="eps",
        **options,
    )
    torch.testing.assert_close(by_eps, path)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_churn_raises_the_level_of_any_process(process: Process) -> None:
    """Seen by the network: sigma / alpha times 1 + gamma, no time beyond t_max, and a state of that level's variance."""
    times, steps = default_grid(process, 8), 8
    x0 = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    old, new = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    asked: list[tuple[Tensor, Tensor]] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return x0

    gamma = 2.4 / steps
    for t, s in pairwise(times):
        asked.clear()
        churn(
            predict,
            process,
            process.add_noise(x0, old, t[None]),
            torch.stack([t, s]),
            new[None],
            s_churn=gamma,
        )
        state, seen = asked[0]
        level = process.log_ratio(t[None])
        wanted = process.time_of(level - math.log1p(gamma)) if level.isfinite() else t[None]
        torch.testing.assert_close(seen, wanted)
        assert seen <= process.t_max
        deviation = state - process.alpha(seen) * x0
        torch.testing.assert_close(deviation.norm(), process.sigma(seen)[0])
        if t < times[0]:
            assert deviation[0, 1] > 0


def sample(name: str, process: Process, mean: list[float], x: Tensor, steps: int, draw: Noise) -> Tensor:
    """Samples of N(mean, STD^2 I) by the sampler of that name, on the Karras grid for EDM, else a uniform one."""
    model = exact_denoiser(process, [mean], STD)
    grid = karras_grid(process, steps) if isinstance(process, EDM) else uniform_grid(process, steps)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, Cond.nothing(len(x)))

    if name.startswith("eta"):
        return stochastic_ddim(predict, process, x, grid, draw, eta=float(name.split()[1]))
    s_noise = float(name.split()[1])
    return churn(predict, process, x, grid, draw, s_churn=30.0, s_min=0.01, s_max=50.0, s_noise=s_noise)


def variance(name: str, process: Process, steps: int) -> float:
    """The exact variance of the samples: for a centred Gaussian a sampler is linear, so it is the sum of the squares of the
    responses to each unit of noise alone, the initial one included."""
    units = torch.eye(steps + 1, dtype=torch.float64)[:, :, None].expand(-1, -1, 2)
    final = sample(name, process, [0.0, 0.0], process.prior(units[-1]), steps, units[:-1])
    torch.testing.assert_close(final[:, 0], final[:, 1])
    return final[:, 0].square().sum().item()


@pytest.mark.parametrize("process", SOME, ids=repr)
@pytest.mark.parametrize("name", ["eta 0.5", "eta 1", "churn 1"])
def test_marginals_on_one_gaussian(process: Process, name: str) -> None:
    """The variance tends to that of the data as 1 / N or faster; mean and variance of 20000 samples are within five standard
    errors of what N steps give."""
    off = [abs(variance(name, process, steps) / STD**2 - 1) for steps in (100, 200, 400)]
    assert off[2] < 0.035
    assert all(fine < 0.6 * coarse for coarse, fine in pairwise(off)), off

    count, steps = 20_000, 50
    generator = torch.Generator().manual_seed(4)
    seen: list[int] = []

    def fresh(i: int) -> Tensor:
        seen.append(i)
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    z = fresh(-1)
    final = sample(name, process, MEAN, process.prior(z), steps, fresh)
    assert seen == list(range(-1, steps - name.startswith("eta")))
    # The new noise matters: the samples are no function of z alone.
    correlation = ((final - final.mean(0)) * z).mean(0) / final.std(0)
    assert (correlation.abs() < 0.97).all(), correlation
    error = STD / math.sqrt(count)
    assert ((final.mean(0) - torch.tensor(MEAN)).abs() < 5 * error + 2e-3).all()
    relative = final.var(0) / variance(name, process, steps) - 1
    assert (relative.abs() < 5 * math.sqrt(2 / count)).all(), relative


@pytest.mark.parametrize("process", SOME, ids=repr)
def test_a_wrong_amount_of_noise_does_not_converge(process: Process) -> None:
    """3% more noise in each step than the level takes, and the variance stays wrong."""
    assert variance("churn 1.03", process, 400) / STD**2 - 1 > 0.05


def test_noise_as_tensor_or_function_and_precision() -> None:
    process, x, noises, times = VPCosine(), noise(4), noise(3, 4), uniform_grid(VPCosine(), 3)
    asked: list[int] = []

    def draw(i: int) -> Tensor:
        asked.append(i)
        return noises[i]

    for final, expected in (("x0", [0, 1]), ("state", [0, 1, 2])):
        asked.clear()
        found = stochastic_ddim(curved, process, x, times, draw, final=final)
        assert asked == expected
        assert torch.equal(found, stochastic_ddim(curved, process, x, times, noises, final=final))
    asked.clear()
    churn(curved, process, x, times, draw, s_churn=1.0)
    assert asked == [0, 1, 2]
    asked.clear()
    churn(curved, process, x, times, draw)
    assert asked == []  # nothing to add
    half = stochastic_ddim(lambda x, t: curved(x, t).bfloat16(), process, x.bfloat16(), times, noises)
    assert half.dtype == torch.float32
    assert churn(curved, process, x.float(), times, noises, s_churn=1.0).dtype == torch.float32


def test_refusals() -> None:
    process, x, times = Flow(), noise(4), uniform_grid(Flow(), 3)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"eta: found {eta}, expected a number in \[0, 1\]"):
            stochastic_ddim(curved, process, x, times, noise(3, 4), eta=eta)
    with pytest.raises(ValueError, match="s_min, s_max: found 2 and 1"):
        churn(curved, process, x, times, noise(3, 4), s_min=2, s_max=1)
    for name in ("s_churn", "s_min", "s_noise"):
        with pytest.raises(ValueError, match=rf"{name}: found -1, expected a number >= 0"):
            churn(curved, process, x, times, noise(3, 4), **{name: -1})
    with pytest.raises(ValueError, match="final must be"):
        stochastic_ddim(curved, process, x, times, noise(3, 4), final="x")
    for sampler in (stochastic_ddim, partial(churn, s_churn=1.0)):
        with pytest.raises(
            ValueError, match=r"noise: expected \[N, B, \*S\] = \[3, 4, 2\], found \[2, 4, 2\]"
        ):
            sampler(curved, process, x, times, noise(2, 4))
        with pytest.raises(ValueError, match=r"noise\(0\): expected \[4, 2\], found \[2\]"):
            sampler(curved, process, x, times, lambda i: noise())
        with pytest.raises(ValueError, match="strictly descending"):
            sampler(curved, process, x, times.flip(0), noise(3, 4))
