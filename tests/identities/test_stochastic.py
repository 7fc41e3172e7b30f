"""Identities of the sampler that adds noise: its formula written out, its deterministic limit and the marginals."""

from __future__ import annotations

import math
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
from distill.samplers.integrate import Noise
from distill.samplers.ode import ddim
from distill.samplers.stochastic import stochastic_ddim

PROCESSES = [Flow(), VPCosine(), VPLinear(), VPScaledLinear(), EDM()]
SOME = [Flow(), VPCosine(), EDM()]
MEAN, STD = [0.7, -0.4], 0.5


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A prediction of the data like no teacher's."""
    return 0.8 * torch.sin(2 * x) + 0.3 * expand(torch.cos(3 * t), x)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_without_noise_it_is_ddim(process: Process) -> None:
    """Exactly, whatever numbers the noise holds."""
    times, x, noises = default_grid(process, 6), process.prior(noise(5)), noise(6, 5)
    for final in ("x0", "state"):
        path = stochastic_ddim(curved, process, x, times, noises, eta=0.0, return_path=True, final=final)
        assert torch.equal(path, ddim(curved, process, x, times, return_path=True, final=final))


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


def sample(name: str, process: Process, mean: list[float], x: Tensor, steps: int, draw: Noise) -> Tensor:
    """Samples of N(mean, STD^2 I) by the sampler of that name, on the Karras grid for EDM, else a uniform one."""
    model = exact_denoiser(process, [mean], STD)
    grid = karras_grid(process, steps) if isinstance(process, EDM) else uniform_grid(process, steps)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, Cond.nothing(len(x)))

    return stochastic_ddim(predict, process, x, grid, draw, eta=float(name.split()[1]))


def variance(name: str, process: Process, steps: int) -> float:
    """The exact variance of the samples: for a centred Gaussian a sampler is linear, so it is the sum of the squares of the
    responses to each unit of noise alone, the initial one included."""
    units = torch.eye(steps + 1, dtype=torch.float64)[:, :, None].expand(-1, -1, 2)
    final = sample(name, process, [0.0, 0.0], process.prior(units[-1]), steps, units[:-1])
    torch.testing.assert_close(final[:, 0], final[:, 1])
    return final[:, 0].square().sum().item()


@pytest.mark.parametrize("process", SOME, ids=repr)
@pytest.mark.parametrize("name", ["eta 0.5", "eta 1"])
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
    assert seen == list(range(-1, steps - 1))
    # The new noise matters: the samples are no function of z alone.
    correlation = ((final - final.mean(0)) * z).mean(0) / final.std(0)
    assert (correlation.abs() < 0.97).all(), correlation
    error = STD / math.sqrt(count)
    assert ((final.mean(0) - torch.tensor(MEAN)).abs() < 5 * error + 2e-3).all()
    relative = final.var(0) / variance(name, process, steps) - 1
    assert (relative.abs() < 5 * math.sqrt(2 / count)).all(), relative


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
    half = stochastic_ddim(lambda x, t: curved(x, t).bfloat16(), process, x.bfloat16(), times, noises)
    assert half.dtype == torch.float32


def test_refusals() -> None:
    process, x, times = Flow(), noise(4), uniform_grid(Flow(), 3)
    for eta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"eta: found {eta}, expected a number in \[0, 1\]"):
            stochastic_ddim(curved, process, x, times, noise(3, 4), eta=eta)
    with pytest.raises(ValueError, match="final must be"):
        stochastic_ddim(curved, process, x, times, noise(3, 4), final="x")
    with pytest.raises(ValueError, match=r"noise: expected \[N, B, \*S\] = \[3, 4, 2\], found \[2, 4, 2\]"):
        stochastic_ddim(curved, process, x, times, noise(2, 4))
    with pytest.raises(ValueError, match=r"noise\(0\): expected \[4, 2\], found \[2\]"):
        stochastic_ddim(curved, process, x, times, lambda i: noise())
    with pytest.raises(ValueError, match="strictly descending"):
        stochastic_ddim(curved, process, x, times.flip(0), noise(3, 4))
