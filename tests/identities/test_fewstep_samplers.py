"""Identities of the few-step samplers: exact variances, agreement with DDIM, gradients, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.models.boundary import Boundary
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import karras_levels, uniform_grid
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.fewstep import (
    few_step,
    lcm_boundary,
    lcm_custom_times,
    lcm_grid,
    lcm_predictor,
    lcm_times,
    multistep_times,
    renoise,
)
from distill.samplers.ode import Field, ddim

PROCESSES = [Flow(), VPCosine(), VPLinear(), VPScaledLinear(), EDM(), TrigFlow()]
processes = pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)


def noise(batch: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(i: int) -> Tensor:
    return noise(seed=100 + i)


def wavy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.1 * torch.sin(expand(t, x).to(x.dtype))


def grid(process: Process, steps: int = 4) -> Tensor:
    """Times that keep away from a t_max without signal, where x0 and noise are not each other's."""
    return uniform_grid(process, steps) * (1 if isinstance(process, EDM) else 0.9)


# ---- exact variances: everything is linear for centred Gaussian data, so coefficients of the noises say it all ----

STD = 0.3


def exact_consistency(process: EDM, end: float) -> Field:
    """The flow map to level ``end`` of N(0, STD^2): what a perfect consistency model with sigma_min = end computes."""

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        return x * expand(((STD**2 + end**2) / (STD**2 + sigma**2)).sqrt(), x)

    return f


def variance_after(sampler: object, draws: int, start_std: float) -> float:
    """Variance of a linear sampler's result: the squares of its answers to one noise at a time."""
    total = 0.0
    for chosen in range(draws + 1):
        start = torch.full((1, 1), start_std if chosen == 0 else 0.0, dtype=torch.float64)
        answer = sampler(start, lambda i, c=chosen: torch.full((1, 1), float(i + 1 == c)).double())  # type: ignore[operator]
        total += answer.square().item()
    return total


@pytest.mark.parametrize("end", [0.002, 0.1, 0.0])
def test_noise_floor_keeps_the_data_s_variance(end: float) -> None:
    """A perfect model that ends at level e returns data with e of noise after any number of steps, if the floor is e."""
    process = EDM()
    times = torch.tensor([80.0, 5.0, 1.0, 0.2, 0.0], dtype=torch.float64)
    start = (STD**2 + 80.0**2) ** 0.5

    def run(floor: float) -> float:
        f = exact_consistency(process, end)
        return variance_after(
            lambda x, n: few_step(f, process, x, times, n, noise_floor=floor), len(times) - 2, start
        )

    assert run(end) == pytest.approx(STD**2 + end**2, rel=1e-12)
    if end == 0.1:
        # ... and too much of it with ECT's sampler.
        assert run(0.0) > (STD**2 + end**2) * 1.01


@processes
def test_renoise_is_the_process_s_transition(process: Process) -> None:
    """Re-noising a state of time s gives the marginal of time m for every variance of the data, from clean data too."""
    s = torch.tensor([0.0, 0.1, 0.3]).double() * process.t_max
    m = torch.tensor([0.2, 0.5, 0.95]).double() * process.t_max
    ones, zeros = torch.ones(3, 1).double(), torch.zeros(3, 1).double()
    scale, std = (renoise(process, a, s, m, b)[:, 0] for a, b in ((ones, zeros), (zeros, ones)))
    for data in (0.0, 0.09, 4.0):
        before = process.alpha(s) ** 2 * data + process.sigma(s) ** 2
        after = process.alpha(m) ** 2 * data + process.sigma(m) ** 2
        torch.testing.assert_close(scale**2 * before + std**2, after, atol=1e-10, rtol=1e-10)
    assert renoise(process, ones.float(), s, m, zeros.float()).dtype == torch.float32
    backwards = renoise(process, ones[1:], m[1:], s[1:], ones[1:])
    assert backwards.isnan().all()


# ---- the loop ----


@processes
def test_formula(process: Process) -> None:
    """alpha x0 + sigma noise at the NEXT time; the network is asked N times, the noise N - 1 times, none follows the last."""
    times = grid(process, 3)
    asked: list[float] = []
    drawn: list[int] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        asked.append(t[0].item())
        return wavy(x, t)

    def draw(i: int) -> Tensor:
        drawn.append(i)
        return fresh(i)

    x = noise()
    path = few_step(predict, process, x, times, draw, return_path=True)
    assert asked == times[:-1].tolist()
    assert drawn == [0, 1]
    for i in range(2):
        x0 = wavy(x, times[i].expand(5))
        x = process.add_noise(x0, fresh(i), times[i + 1].expand(5))
        torch.testing.assert_close(path[i + 1], x, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(path[3], wavy(x, times[2].expand(5)), atol=1e-12, rtol=1e-12)
    assert torch.equal(path[-1], few_step(wavy, process, noise(), times, fresh))
    seen: list[int] = []
    few_step(wavy, process, noise(), times, fresh, on_state=lambda i, state: seen.append(i))
    assert seen == [0, 1, 2, 3]


@processes
def test_deterministic_is_ddim(process: Process) -> None:
    """Without noise it is DDIM; so is drawing, at each step, exactly the noise that the state implies."""
    times, x = grid(process), noise()
    by_ddim = ddim(wavy, process, x, times, return_path=True)
    assert torch.equal(few_step(wavy, process, x, times, return_path=True), by_ddim)

    def implied(i: int) -> Tensor:
        t = times[i].expand(5)
        return process.convert("x0", wavy(by_ddim[i], t), by_ddim[i], t, "eps")

    again = few_step(wavy, process, x, times, implied, return_path=True)
    torch.testing.assert_close(again, by_ddim, atol=1e-9, rtol=1e-9)
    assert not torch.equal(few_step(wavy, process, x, times, fresh), by_ddim[-1])


def test_noise_scale() -> None:
    """1 changes no bit, 0 drops the fresh noise, 2 doubles it."""
    process, x = VPScaledLinear(), noise().float()
    times = lcm_times(4)

    def draw(i: int) -> Tensor:
        return fresh(i).float()

    plain = few_step(wavy, process, x, times, draw)
    assert plain.dtype == torch.float32
    assert torch.equal(few_step(wavy, process, x, times, draw, noise_scale=1.0), plain)
    assert torch.equal(few_step(wavy, process, x, times, draw, noise_scale=1), plain)
    silent = few_step(wavy, process, x, times, lambda i: torch.full_like(x, 9.0), noise_scale=0.0)
    assert torch.equal(silent, few_step(wavy, process, x, times, lambda i: torch.zeros_like(x)))
    doubled = few_step(wavy, process, x, times, draw, noise_scale=2.0)
    torch.testing.assert_close(doubled, few_step(wavy, process, x, times, lambda i: 2 * draw(i)))
    assert not torch.equal(doubled, plain)


def test_samples_do_not_depend_on_their_batch() -> None:
    process, times = VPCosine(), grid(VPCosine())
    whole = few_step(wavy, process, noise(), times, fresh)
    parts = [
        few_step(wavy, process, noise()[k : k + 2], times, lambda i, k=k: fresh(i)[k : k + 2]) for k in (0, 2)
    ]
    assert torch.equal(torch.cat(parts), whole[:4])


@pytest.mark.parametrize("name", ["consistency", "ode", "latent"])
def test_differentiable_in_the_initial_noise(name: str) -> None:
    def sample(z: Tensor) -> Tensor:
        if name == "latent":
            predictor = lcm_predictor(wavy, VPScaledLinear(), "v")
            return few_step(predictor, VPScaledLinear(), z, lcm_times(3), lambda i: fresh(i)[:2])
        process = EDM()
        times = torch.tensor([80.0, 2.0, 0.5, 0.0], dtype=torch.float64)

        def f(x: Tensor, sigma: Tensor) -> Tensor:
            return Boundary("cm").apply(process, wavy(x / 10, sigma), x, sigma)

        return few_step(f, process, 3 * z, times, (lambda i: fresh(i)[:2]) if name == "consistency" else None)

    z = noise(2).requires_grad_()
    assert torch.autograd.gradcheck(sample, z)
    (gradient,) = torch.autograd.grad(sample(z).sum(), z)
    assert gradient.abs().min() > 0


def test_nothing_is_read_on_the_host() -> None:
    """Under fake tensors every read of a value raises."""
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    from distill.methods.losses.consistency import grid_pair, masked_target, pair_weight, teacher_step
    from distill.methods.losses.distances import pseudo_huber
    from distill.methods.losses.lcm import guided_ddim_step, lcm_pair
    from distill.methods.losses.progressive import StudentGrid, progressive_loss, two_step_target
    from distill.process.guidance_w import draw_w, w_embedding

    tables = VPScaledLinear()
    student_grid = StudentGrid(VPCosine(), uniform_grid(VPCosine(), 8))
    straight_grid = StudentGrid(Flow(), uniform_grid(Flow(), 8))
    levels, times, latent = karras_levels(18), lcm_times(4), lcm_grid()
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        x, t = torch.randn(3, 2), torch.rand(3, dtype=torch.float64)
        index = torch.randint(0, 4, (3,))
        for grid_, kind in ((student_grid, "v"), (straight_grid, "velocity")):
            step = grid_.step(index)
            found = two_step_target(wavy, grid_.process, kind, x, step)
            progressive_loss(grid_.process, kind, x, found.target, x, step.u)
        pair = grid_pair(levels, index)
        assert [time.shape for time in pair] == [(3,), (3,)]
        r = t / 2
        target = masked_target(wavy, teacher_step(wavy, x, t, r), r, t, x)
        loss = pair_weight("default", t, r) * pseudo_huber(Boundary("cm").apply(EDM(), x, x, t), target, 0.03)
        a, b = (time.double() for time in lcm_pair(latent, index))
        guided_ddim_step(tables, "eps", x, x, x, a, b, draw_w(t, 5, 15))
        w_embedding(t, 8)
        few_step(lcm_predictor(wavy, tables, "v"), tables, x, times, lambda i: x, noise_floor=0.1)
        renoise(tables, x, a, a + 1, x)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            loss.sum().item()


# ---- what is refused ----


def test_refusals_of_the_loop() -> None:
    process, x, times = EDM(), noise(), torch.tensor([80.0, 1.0, 0.0], dtype=torch.float64)
    for options in ({"noise_scale": -1.0}, {"noise_floor": -0.1}):
        with pytest.raises(ValueError, match="noise_scale, noise_floor: found"):
            few_step(wavy, process, x, times, fresh, **options)
    for options in ({"noise_scale": 0.5}, {"noise_floor": 0.1}):
        with pytest.raises(ValueError, match="noise is None"):
            few_step(wavy, process, x, times, **options)
    with pytest.raises(ValueError, match="times must be 1-D"):
        few_step(wavy, process, x, times[:1], fresh)
    with pytest.raises(ValueError, match="shapes differ"):
        few_step(wavy, process, x, times, lambda i: noise(4))


def test_refusals_of_times() -> None:
    levels = karras_levels(40)
    assert multistep_times(levels, (0, 22, 39)).tolist() == levels[[0, 22, 39]].tolist()
    for places in ((), (0,), (1, 39), (0, 22, 22), (0, 40), (39, 0), (0, -1)):
        with pytest.raises(ValueError, match="expected at least two rising places from 0 up to 39"):
            multistep_times(levels, places)


def test_latent_times() -> None:
    assert lcm_times(4).tolist() == [999, 759, 499, 259, 0]
    assert lcm_times(50)[:-1].tolist() == lcm_grid().flip(0).tolist()
    # Places are those of numpy.linspace, roundings included: 15 of 30 levels comes out as 14.999... for 22 steps.
    for steps in range(1, 31):
        places = np.floor(np.linspace(0, 30, steps, endpoint=False)).astype(int).tolist()
        expected = lcm_grid(300, 30).flip(0)[places].tolist()
        assert lcm_times(steps, num_timesteps=300, original_steps=30)[:-1].tolist() == expected
    # Trimmed by strength the custom list keeps its clean end, and the sampler adds no noise after it.
    assert lcm_custom_times([999, 759, 499, 259], strength=0.5).tolist() == [499, 259, 0]
    drawn: list[int] = []
    few_step(
        wavy,
        VPScaledLinear(),
        noise(),
        lcm_custom_times([999, 759, 499, 259], strength=0.5),
        lambda i: (drawn.append(i), fresh(i))[1],
    )
    assert drawn == [0]
    for options, message in (
        ({"steps": 0}, "steps: found 0, expected 1 .. 50"),
        ({"steps": 51}, "steps: found 51, expected 1 .. 50"),
        (
            {"steps": 26, "strength": 0.5},
            r"steps: found 26, expected 1 .. 25 \(original_steps 50, strength 0.5\)",
        ),
        ({"steps": 1, "strength": 0.0}, "strength: found 0.0"),
        ({"steps": 1, "strength": 1.1}, "strength: found 1.1"),
        ({"steps": 1, "strength": 0.01}, "steps: found 1, expected 1 .. 0"),
        ({"steps": 4, "original_steps": 30}, "ddim_steps: found 30, expected a divisor of the 1000"),
        ({"steps": 4, "original_steps": 2000}, "ddim_steps: found 2000"),
    ):
        with pytest.raises(ValueError, match=message):
            lcm_times(**options)
    for timesteps in ([], [999, 999], [259, 999], [1000, 499], [499, 0], [-1]):
        with pytest.raises(ValueError, match=r"timesteps: found .* expected strictly descending"):
            lcm_custom_times(timesteps)
    for strength in (0.0, 1.5, 0.1):
        with pytest.raises(ValueError, match=f"strength: found {strength}"):
            lcm_custom_times([999, 499], strength=strength)


def test_latent_boundary() -> None:
    """x itself at t = 0, x0 alone a few steps on; conversions reach it from every kind."""
    x, x0 = noise(), noise(seed=4)
    assert torch.equal(lcm_boundary(x0, x, torch.zeros(5)), x)
    torch.testing.assert_close(lcm_boundary(x0, x, torch.full((5,), 19)), x0, atol=1e-4, rtol=1e-4)
    process, t = VPScaledLinear(), torch.full((5,), 259.0).double()
    eps = process.convert("x0", x0, x, t, "eps")
    found = lcm_predictor(lambda x, t: eps, process, "eps")(x, t)
    torch.testing.assert_close(found, lcm_boundary(x0, x, t), atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="timestep_scaling"):
        lcm_boundary(x0, x, t, 0.0)
    with pytest.raises(ValueError, match="unknown prediction kind"):
        lcm_predictor(wavy, process, "epsilon")
