"""Identities of consistency targets on exact fields, and what distances, weights and tables refuse."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.methods.losses.consistency import (
    PAIR_WEIGHTS,
    grid_pair,
    masked_target,
    pair_weight,
    teacher_step,
)
from distill.methods.losses.distances import (
    elementwise_huber,
    ict_huber_c,
    l1,
    l2,
    pseudo_huber,
    squared_norm,
)
from distill.methods.losses.lcm import check_teacher, guided_ddim_step, lcm_pair
from distill.models.analytic import exact_denoiser
from distill.models.boundary import Boundary
from distill.process.base import expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.guidance_w import draw_w, scale_of_w, w_embedding, w_of_scale
from distill.process.scalings import edm_scalings
from distill.process.times import karras_levels
from distill.process.vp import VPCosine, VPScaledLinear
from distill.samplers.fewstep import lcm_grid
from distill.samplers.ode import Field, ddim_step, heun

EDM_ = EDM()


def noise(batch: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def velocity_of(x0: Field) -> Field:
    return lambda x, t: EDM_.convert("x0", x0(x, t), x, t, "velocity")


def ring() -> Field:
    model = exact_denoiser(EDM_)
    return lambda x, t: model.net(x, t, Cond.nothing(len(x)))


def ring_data(batch: int = 12) -> Tensor:
    net = exact_denoiser(EDM_).net
    return net.draw(torch.arange(batch) % 8, noise(batch, 11))  # type: ignore[operator, no-any-return]


MEAN, STD = torch.tensor([0.4, -0.2]).double(), 0.3


def one_gaussian() -> Field:
    model = exact_denoiser(EDM_, [MEAN.tolist()], STD)
    return lambda x, t: model.net(x, t, Cond.nothing(len(x)))


def exact_map(x: Tensor, t: Tensor, u: float | Tensor) -> Tensor:
    """The flow map t -> u of one Gaussian: distances from the mean shrink with the marginal standard deviation."""
    u = torch.as_tensor(u, dtype=torch.float64).expand(len(t))
    return MEAN + (x - MEAN) * expand(((STD**2 + u**2) / (STD**2 + t**2)).sqrt(), x)


def test_the_exact_map_is_a_fixpoint_of_the_loss() -> None:
    """With f = flow map to sigma_min and an exact teacher, f(x_t, t) = f(x_u, u): the loss is 0 to rounding."""
    levels = karras_levels(18)
    index = torch.arange(17)
    t, u = grid_pair(levels, index)
    x_t = EDM_.add_noise(MEAN + STD * noise(17), noise(17, 4), t)
    end = EDM_.sigma_min
    student, target = exact_map(x_t, t, end), exact_map(exact_map(x_t, t, u), u, end)
    assert l2(student, target).max().item() < 1e-28
    # ... and is not there for a teacher that takes one solver step of this coarse grid.
    step = teacher_step(velocity_of(one_gaussian()), x_t, t, u)
    assert l2(student, exact_map(step, u, end)).max().item() > 1e-7


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_loss_falls_with_the_solver_s_order(solver: str, order: int) -> None:
    """Root of the loss of one pair at a given t: (h^(order + 1)); so N of them make an error of the solver's order."""
    x_0, n = MEAN + STD * noise(4), noise(4, 4)
    errors = []
    for count in (128, 256, 512, 1024):
        levels = karras_levels(count + 1)
        t, u = grid_pair(levels, torch.tensor([1, 5, 10, 14]) * count // 16)
        x_t = EDM_.add_noise(x_0, n, t)
        x_u = teacher_step(velocity_of(one_gaussian()), x_t, t, u, solver)
        end = EDM_.sigma_min
        errors.append(l2(exact_map(x_t, t, end), exact_map(x_u, u, end)).sqrt())
    for coarse, fine in itertools.pairwise(errors):
        orders = torch.log2(coarse / fine)
        torch.testing.assert_close(orders, torch.full_like(orders, order + 1), atol=0.25, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_same_on_the_ring(solver: str, order: int) -> None:
    """8 Gaussians, where the exact map is a fine integration that both sides share below u."""
    fine = karras_levels(1025)
    field = velocity_of(ring())
    n, data = noise(), ring_data()
    errors = []
    for count in (32, 64, 128):
        stride = 1024 // count
        place = 9 * count // 16  # sigma 1.2, where the modes part
        t, u = grid_pair(fine[::stride], torch.full((len(n),), place))
        x_t = EDM_.add_noise(data, n, t)
        stepped = teacher_step(field, x_t, t, u, solver)
        exact = heun(field, x_t, fine[place * stride : (place + 1) * stride + 1])
        ends = heun(field, torch.cat([stepped, exact]), fine[(place + 1) * stride :])
        errors.append(l2(*ends.chunk(2)).mean().sqrt().item())
    assert errors[0] > 1e-5
    for coarse, finer in itertools.pairwise(errors):
        assert math.log2(coarse / finer) == pytest.approx(order + 1, abs=0.35)


def test_training_without_a_teacher_uses_the_same_noise() -> None:
    """Euler with the data in the place of the prediction is x0 + u eps, on every process that is a straight line in it."""
    x0, eps = noise(), noise(seed=4)
    t, u = torch.linspace(0.1, 0.9, 12).double(), torch.linspace(0.0, 0.5, 12).double()
    for process in (EDM_, Flow(), VPCosine()):
        x_t = process.add_noise(x0, eps, t)
        torch.testing.assert_close(
            ddim_step(process, "x0", x0, x_t, t, u)[2], process.add_noise(x0, eps, u), atol=1e-12, rtol=1e-12
        )
    for process in (EDM_, Flow()):
        x_t = process.add_noise(x0, eps, t)
        stepped = teacher_step(
            lambda x, t, p=process: p.convert("x0", x0, x, t, "velocity"), x_t, t, u, "euler"
        )
        torch.testing.assert_close(stepped, process.add_noise(x0, eps, u), atol=1e-12, rtol=1e-12)


def test_teacher_step_is_the_solver_s_and_passes_no_gradient() -> None:
    x = noise().requires_grad_()
    t, u = torch.full((12,), 3.0).double(), torch.full((12,), 1.0).double()
    field = velocity_of(ring())
    stepped = teacher_step(field, x, t, u)
    assert not stepped.requires_grad
    torch.testing.assert_close(stepped, heun(field, x, torch.tensor([3.0, 1.0]).double()).detach())
    # Euler of EDM is DDIM.
    euler = teacher_step(field, x, t, u, "euler")
    torch.testing.assert_close(euler, ddim_step(EDM_, "x0", ring()(x, t), x, t, u)[2].detach())
    # A half-precision teacher and float64 times make no half and no double state of a float32 one.
    assert teacher_step(lambda x, t: x.bfloat16(), x.float(), t, u).dtype == torch.float32
    with pytest.raises(ValueError, match="solver: found 'rk4'"):
        teacher_step(field, x, t, u, "rk4")
    with pytest.raises(ValueError, match=r"time: found torch\.int64"):
        teacher_step(field, x, t.long(), u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_boundary_error_is_exactly_zero(dtype: torch.dtype) -> None:
    """f(x, sigma_min) is x bit for bit, in the dtype of the time; elsewhere it is the form of the scalings."""
    for sigma_min in (0.002, 0.003):
        x, out = noise().to(dtype), noise(seed=4).to(dtype)
        end = torch.full((12,), sigma_min, dtype=dtype)
        boundary = Boundary("cm", sigma_min)
        assert torch.equal(boundary.apply(EDM_, out, x, end), x)
        # A float64 time drives a float32 state too.
        assert torch.equal(
            boundary.apply(EDM_, out.float(), x.float(), end.double().fill_(sigma_min)), x.float()
        )
        sigma = torch.linspace(0.01, 80, 12, dtype=dtype)
        edm = edm_scalings(sigma)
        x0 = expand(edm.c_skip, x) * x + expand(edm.c_out, x) * out
        above = sigma - sigma_min
        expected = (
            expand(0.25 / (above**2 + 0.25), x) * x + expand(above * 0.5 / (sigma**2 + 0.25).sqrt(), x) * out
        )
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            boundary.apply(EDM_, x0, x, sigma), expected, atol=tolerance, rtol=tolerance
        )


def test_masked_target_never_asks_at_zero() -> None:
    """r <= 0 takes the clean data without evaluating the network there; a NaN of the network itself stays visible."""
    x_r, x0 = noise(4), noise(4, 5)
    t, r = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([0.0, 1.0, -1e-9, 2.0]).double()
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    asked: list[Tensor] = []

    def f(x: Tensor, time: Tensor) -> Tensor:
        asked.append(time)
        return weight * x * torch.log(expand(time, x))

    target = masked_target(f, x_r, r, t, x0)
    assert [time.tolist() for time in asked] == [[1.0, 1.0, 3.0, 2.0]]
    assert not target.requires_grad
    assert torch.equal(target[[0, 2]], x0[[0, 2]])
    torch.testing.assert_close(target[3], x_r[3] * math.log(2))
    broken = masked_target(lambda x, time: x / 0 * 0, x_r, r, t, x0)
    assert broken[[0, 2]].isfinite().all()
    assert broken[[1, 3]].isnan().all()
    with pytest.raises(ValueError, match="shapes differ"):
        masked_target(lambda x, time: x[:, :1], x_r, r, t, x0)
    with pytest.raises(ValueError, match="expected a floating dtype"):
        masked_target(f, x_r, r.long(), t, x0)


DISTANCES = {
    "l1": l1,
    "l2": l2,
    "squared": squared_norm,
    "norm": pseudo_huber,
    "huber": lambda a, b: pseudo_huber(a, b, 0.03),
    "tiny": lambda a, b: pseudo_huber(a, b, 1e-8),
    "elementwise": elementwise_huber,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances(name: str) -> None:
    distance = DISTANCES[name]
    pred, target = noise(5).requires_grad_(), noise(5, 4).requires_grad_()
    d = (pred - target).detach()
    expected = {
        "l1": d.abs().mean(1),
        "l2": d.square().mean(1),
        "squared": d.square().sum(1),
        "norm": d.square().sum(1).sqrt(),
        "huber": (d.square().sum(1) + 0.03**2).sqrt() - 0.03,
        "tiny": d.square().sum(1).sqrt() - 1e-8,
        "elementwise": ((d.square() + 1e-6).sqrt() - 1e-3).mean(1),
    }[name]
    found = distance(pred, target)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found.sum().backward()
    assert target.grad is None
    assert pred.grad is not None
    assert pred.grad.abs().min() > 0
    # The same of half-precision images, in float32.
    images = distance(pred.detach().bfloat16().reshape(5, 1, 2, 1), target.detach().reshape(5, 1, 2, 1))
    assert images.shape == (5,)
    assert images.dtype == torch.float64
    assert distance(pred.bfloat16(), target.bfloat16()).dtype == torch.float32
    # A perfect prediction: distance 0 and gradient 0, no NaN.
    for dtype in (torch.float32, torch.float64):
        same = noise(3).to(dtype).requires_grad_()
        nothing = distance(same, same.detach().clone())
        nothing.sum().backward()
        assert same.grad is not None
        assert not nothing.any()
        assert not same.grad.any()
    with pytest.raises(ValueError, match="shapes differ"):
        distance(pred, target[:, :1])


def test_the_two_hubers_differ() -> None:
    """iCT's root is over the sample, LCM's over each element: only for one element are they one."""
    a, b = noise(6), noise(6, 4)
    torch.testing.assert_close(pseudo_huber(a[:, :1], b[:, :1], 0.001), elementwise_huber(a[:, :1], b[:, :1]))
    assert (pseudo_huber(a, b, 0.001) - elementwise_huber(a, b)).abs().min() > 1e-3
    assert ict_huber_c(3 * 32 * 32) == pytest.approx(0.03, abs=1e-3)
    assert ict_huber_c(3 * 64 * 64) == pytest.approx(0.06, abs=1e-3)
    for call, message in (
        (lambda: pseudo_huber(a, b, -1.0), "c: found -1.0"),
        (lambda: elementwise_huber(a, b, 0.0), "c: found 0.0"),
        (lambda: ict_huber_c(0), "size: found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_pairs_and_weights() -> None:
    levels = karras_levels(5)
    t, u = grid_pair(levels, torch.tensor([0, 3]))
    assert t.tolist() == [levels[0].item(), levels[3].item()]
    assert u.tolist() == [levels[1].item(), levels[4].item()]
    assert t.dtype == torch.float64
    for index in (4, -1):
        with pytest.raises(IndexError):
            grid_pair(levels, torch.tensor([index]))
    for case, message in (
        ((levels[:1], torch.tensor([0])), "levels: found the shape"),
        ((levels, torch.tensor([0.0])), r"index: found torch\.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            grid_pair(*case)
    for name in PAIR_WEIGHTS:
        weight = pair_weight(name, t, u)
        assert weight.dtype == torch.float64
        assert (weight > 0).all()
    torch.testing.assert_close(pair_weight("default", t, u), 1 / (t - u))
    torch.testing.assert_close(pair_weight("sqrt", t, u) ** 2, 1 / (t - u))
    torch.testing.assert_close(pair_weight("c_out", t, u) ** -2, t**2 * 0.25 / (t**2 + 0.25))
    with pytest.raises(ValueError, match="weight: found 'inverse'"):
        pair_weight("inverse", t, u)
    with pytest.raises(ValueError, match=r"time: found torch\.int64"):
        pair_weight("default", t.long(), u)


# ---- latent consistency models ----


def test_lcm_pairs() -> None:
    t, u = lcm_pair(lcm_grid(), torch.arange(50))
    assert t[[0, 1, 49]].tolist() == [19, 39, 999]
    assert u[[0, 1, 49]].tolist() == [0, 19, 979]
    assert torch.equal(u[1:], t[:-1])
    for steps in (30, 0, 1001, -1):
        with pytest.raises(ValueError, match=f"ddim_steps: found {steps}, expected a divisor of the 1000"):
            lcm_grid(1000, steps)
    with pytest.raises(ValueError, match="index: found"):
        lcm_pair(lcm_grid(), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="grid: found the shape"):
        lcm_pair(lcm_grid()[None], torch.tensor([0]))
    for index in (50, -1):
        with pytest.raises(IndexError):
            lcm_pair(lcm_grid(), torch.tensor([index]))


def test_guided_step() -> None:
    """w = 0 is the conditional step, a scale of w would be one less; no gradient reaches the teacher."""
    process = VPScaledLinear()
    t, u = (time.double() for time in lcm_pair(lcm_grid(), torch.tensor([3, 30, 49])))
    x, cond, uncond = noise(3), noise(3, 4).requires_grad_(), noise(3, 5)
    for kind in ("eps", "v", "x0"):
        plain = guided_ddim_step(process, kind, cond, uncond, x, t, u, 0.0)
        for found, expected in zip(plain, ddim_step(process, kind, cond, x, t, u), strict=True):
            torch.testing.assert_close(found, expected.detach())
            assert not found.requires_grad
        guided = guided_ddim_step(process, kind, cond, uncond, x, t, u, torch.full((3,), 7.0))
        out = (cond + 7 * (cond - uncond)).detach()
        torch.testing.assert_close(guided.x_u, ddim_step(process, kind, out, x, t, u)[2])


def test_refused_teachers() -> None:
    rescaled = VPScaledLinear(zero_terminal_snr=True)
    check_teacher(VPScaledLinear(), "eps")
    check_teacher(rescaled, "v")
    with pytest.raises(ValueError, match="kind: found 'eps', but nothing of the data is left"):
        check_teacher(rescaled, "eps")
    with pytest.raises(ValueError, match="unknown prediction kind"):
        check_teacher(rescaled, "epsilon")


def test_guidance_w() -> None:
    assert scale_of_w(6.5) == 7.5
    assert w_of_scale(7.5) == 6.5
    uniform = torch.tensor([0.0, 0.5, 1.0])
    assert draw_w(uniform, 5, 15).tolist() == [5, 10, 15]
    assert draw_w(uniform, 8, 8).tolist() == [8, 8, 8]
    for low, high in ((5, 4), (-2, 4), (math.nan, 4)):
        with pytest.raises(ValueError, match="guidance_w: found the range"):
            draw_w(uniform, low, high)
    with pytest.warns(UserWarning, match="guidance_scale of 76"):
        draw_w(uniform, 0, 75)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_w(uniform, -1, 20)


def test_w_embedding() -> None:
    w = torch.tensor([0.0, 7.5])
    features = w_embedding(w, 8)
    assert features.shape == (2, 8)
    assert features.dtype == torch.float32
    assert features[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    # The last frequency is 1e-4: 1000 w / 10000.
    assert features[1, [3, 7]].tolist() == pytest.approx([math.sin(0.75), math.cos(0.75)], rel=1e-6)
    assert w_embedding(w.double(), 8).dtype == torch.float64
    # Large angles are exact: in float32 arithmetic 14999.9 would be off by 5e-4.
    assert w_embedding(torch.tensor([14.9999], dtype=torch.float64), 4)[0, 0].item() == pytest.approx(
        math.sin(14999.9), abs=1e-10
    )
    for case, message in (((w, 3), "dim: found 3"), ((w[None], 8), "guidance_w: found the shape")):
        with pytest.raises(ValueError, match=message):
            w_embedding(*case)
