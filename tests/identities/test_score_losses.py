"""Identities of score distillation: closed forms of a Gaussian teacher, what gradients flow through, exact zeros."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.methods.losses.score import (
    FAKE_SCORE_KINDS,
    descend,
    diff_instruct_loss,
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    fake_score_weight,
    sid_loss,
)
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.scalings import edm_weight
from distill.process.vp import VPCosine, VPScaledLinear

PROCESSES = [EDM(), Flow(), VPCosine()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=repr)
ALPHAS = (0.0, 0.5, 1.0, 1.2)
FLOOR = 1e-5
"""Of sid_loss."""

GENERATOR_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    **{f"sid {alpha}": lambda x, t, f, a=alpha: sid_loss(x, t, f, alpha=a) for alpha in ALPHAS},
    "diff_instruct": diff_instruct_loss,
    "dmd": dmd_loss,
    "dmd without a floor": lambda x, t, f: dmd_loss(x, t, f, floor=0.0),
}
every_loss = pytest.mark.parametrize("name", GENERATOR_LOSSES)


def close(actual: Tensor, expected: Tensor | float, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=rtol, atol=atol)


def gauss_hermite(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(z, eps [B, 1] each, weights [B]) with sum(w f(z, eps)) = E f for z, eps ~ N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    z, eps = torch.meshgrid(torch.tensor(points), torch.tensor(points), indexing="ij")
    w = torch.outer(torch.tensor(weights), torch.tensor(weights)).flatten()
    return z.reshape(-1, 1), eps.reshape(-1, 1), w / w.sum()


def time_at(process: Process, level: float, batch: int) -> Tensor:
    """The time [B] at which sigma / alpha = level."""
    return process.time_of(torch.full((batch,), -np.log(level), dtype=torch.float64))


def x0(model: Denoiser, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    return model.x0(model.process.add_noise(x, eps, t), t, Cond.nothing(len(x)))


# --- a Gaussian teacher N(0, s^2), the student x = b + a z, its exact and frozen fake score ------------------


class Gaussian:
    """Expectations over z and the noise at one noise level; quadrature is exact, all of it being quadratic."""

    def __init__(self, process: Process, s: float, a: float, b: float, level: float) -> None:
        self.s, self.a, self.b, self.level = s, a, b, level
        self.k_teacher, self.k_fake = s**2 / (s**2 + level**2), a**2 / (a**2 + level**2)
        self.d = self.k_teacher - self.k_fake
        self.z, self.eps, self.w = gauss_hermite(8)
        self.parameters = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b)]
        self.x = self.parameters[1] + self.parameters[0] * self.z
        self.t = time_at(process, level, len(self.w))
        self.y_teacher = x0(exact_denoiser(process, [[0.0]], s), self.x, self.eps, self.t)
        self.y_fake = x0(exact_denoiser(process, [[b]], a), self.x, self.eps, self.t)
        self.m = (self.x - self.y_teacher).detach().abs().mean(1).clamp(min=FLOOR)

    def derivatives(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """d E[loss] / (da, db)."""
        da, db = torch.autograd.grad((self.w * loss).sum(), self.parameters, retain_graph=True)
        return da, db


CASES = [(0.5, 1.3, 0.4, 0.7), (1.0, 0.3, -0.8, 0.25), (0.2, 0.9, 0.0, 3.0)]
every_case = pytest.mark.parametrize(("s", "a", "b", "level"), CASES)


@every_process
@every_case
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sid_of_a_gaussian(
    process: Process, s: float, a: float, b: float, level: float, alpha: float
) -> None:
    """Value and gradient in closed form, the weight 1 / m (which has no gradient) undone."""
    g = Gaussian(process, s, a, b, level)
    loss = sid_loss(g.x, g.y_teacher, g.y_fake, alpha=alpha) * g.m
    k, d = g.k_teacher, g.d
    close((g.w * loss).sum(), (1 - alpha) * (d**2 * (a**2 + level**2) + (1 - k) ** 2 * b**2))
    da, db = g.derivatives(loss)
    close(da, 2 * d * a * (k - 1 - alpha * d))
    close(db, b * (1 - k) * (1 + g.k_fake - 2 * k + 2 * alpha * d))


@every_process
@pytest.mark.parametrize("detached", ["y_teacher", "y_fake", "x"])
def test_sid_needs_every_path_of_its_gradient(process: Process, detached: str) -> None:
    """The negative control: without one of the paths the student learns something else."""
    g = Gaussian(process, *CASES[0])
    full = g.derivatives(sid_loss(g.x, g.y_teacher, g.y_fake, alpha=1.2) * g.m)
    inputs = {"x": g.x, "y_teacher": g.y_teacher, "y_fake": g.y_fake}
    inputs[detached] = inputs[detached].detach()
    cut = g.derivatives(sid_loss(**inputs, alpha=1.2) * g.m)
    assert max(abs(one / other - 1).item() for one, other in zip(cut, full, strict=True)) > 0.05


@every_process
@every_case
def test_diff_instruct_and_dmd_of_a_gaussian(
    process: Process, s: float, a: float, b: float, level: float
) -> None:
    """Both follow yF - yT on x alone, though the predictions are made with their graphs here."""
    g = Gaussian(process, s, a, b, level)
    assert g.y_teacher.requires_grad
    assert g.y_fake.requires_grad
    dmd = dmd_loss(g.x, g.y_teacher, g.y_fake, floor=0.0) * (g.x - g.y_teacher).detach().abs().mean(1)
    for loss in (diff_instruct_loss(g.x, g.y_teacher, g.y_fake), dmd):
        da, db = g.derivatives(loss)
        close(da, -g.d * a)
        close(db, (1 - g.k_teacher) * b)


# --- mixtures ------------------------------------------------------------------------------------------------

MEANS, STD = [[-0.9], [0.2], [1.1]], 0.35


def mixture_draws(means: list[list[float]], std: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x, eps, weights) with which sums are expectations over an even mixture and the noise, to 1e-7."""
    z, eps, w = gauss_hermite(80)
    x = torch.cat([torch.tensor(mean).double() + std * z for mean in means])
    return x, eps.repeat(len(means), 1), w.repeat(len(means)) / len(means)


@every_process
def test_no_direction_where_the_student_has_the_data_s_distribution(process: Process) -> None:
    """Two ways to write one mixture: the direction is zero at every point, and so is E[x - yT]."""
    teacher = exact_denoiser(process, MEANS, STD)
    fake = exact_denoiser(process, [*MEANS[::-1], *MEANS], STD)
    x, eps, w = mixture_draws(MEANS, STD)
    t = time_at(process, 0.6, len(x))
    y_teacher, y_fake = x0(teacher, x, eps, t), x0(fake, x, eps, t)
    close(y_fake - y_teacher, 0.0)
    close(dmd_gradient(x, y_teacher, y_fake), 0.0, atol=1e-9)
    close((w[:, None] * (x - y_teacher)).sum(0), 0.0, atol=1e-6)
    elsewhere = x0(exact_denoiser(process, [[m[0] + 0.3] for m in MEANS], STD), x, eps, t)
    assert (w[:, None] * (elsewhere - y_teacher)).sum() > 0.05


@every_process
@pytest.mark.parametrize("alpha", ALPHAS)
def test_sid_value_under_an_exact_fake_score(process: Process, alpha: float) -> None:
    """(yT - yF) is orthogonal to yF - x, so E[m loss] = (1 - alpha) E|yT - yF|^2: negative for alpha > 1."""
    means, std = [[-0.4], [0.5]], 0.5
    x, eps, w = mixture_draws(means, std)
    t = time_at(process, 0.6, len(x))
    y_teacher = x0(exact_denoiser(process, MEANS, STD), x, eps, t)
    y_fake = x0(exact_denoiser(process, means, std), x, eps, t)
    m = (x - y_teacher).abs().mean(1).clamp(min=FLOOR)
    square = (w * (y_teacher - y_fake).square().sum(1)).sum()
    assert square > 1e-3
    value = (w * m * sid_loss(x, y_teacher, y_fake, alpha=alpha)).sum()
    close(value / square, 1 - alpha, atol=1e-6)


# --- exact properties ----------------------------------------------------------------------------------------


def ring_predictions(x: Tensor, process: Process | None = None) -> Tensor:
    """A teacher that is not linear, at four noise levels in turn."""
    model = exact_denoiser(process or Flow())
    t = torch.linspace(0.2, 0.8, len(x), dtype=torch.float64)
    return x0(model, x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype), t)


def draws(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 4, *shape, generator=generator, dtype=torch.float64).to(dtype))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_learned_while_the_fake_score_is_the_teacher(name: str, dtype: torch.dtype) -> None:
    (x,) = draws(1, 2, dtype=dtype)
    x.requires_grad_(True)
    loss = GENERATOR_LOSSES[name](x, ring_predictions(x), ring_predictions(x))
    assert torch.equal(loss.detach(), torch.zeros(len(x), dtype=dtype))
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_alpha_adds_the_squared_difference() -> None:
    x, y_teacher, y_fake = draws(3, 2, 3)
    m = (x - y_teacher).abs().mean((1, 2))
    gap = sid_loss(x, y_teacher, y_fake, alpha=0.5) - sid_loss(x, y_teacher, y_fake, alpha=1.0)
    close(gap, 0.5 * (y_teacher - y_fake).square().sum((1, 2)) / m)


def test_joint_scaling() -> None:
    """DMD's direction does not change, Diff-Instruct's is proportional; the floor scales with the data."""
    x, y_teacher, y_fake = draws(3, 2, 3)
    y_teacher[0] = x[0] + 1e-7 * y_teacher[0]  # here the floor acts
    c = 37.0
    for floor in (0.0, 1e-3):
        direction = dmd_gradient(x, y_teacher, y_fake, floor=floor)
        close(dmd_gradient(c * x, c * y_teacher, c * y_fake, floor=floor), direction)
    gradients = []
    for factor in (1.0, c):
        scaled = (factor * x).requires_grad_(True)
        loss = diff_instruct_loss(scaled, factor * y_teacher, factor * y_fake).sum()
        gradients += torch.autograd.grad(loss, scaled)
    close(gradients[1], c * gradients[0])


def test_the_floor_of_dmd_acts_only_where_the_normaliser_vanishes() -> None:
    x, y_teacher, y_fake = draws(3, 2)
    y_teacher[0] = x[0] + 1e-7
    bare, floored = (dmd_gradient(x, y_teacher, y_fake, floor=floor) for floor in (0.0, 1e-3))
    close(floored[1:], bare[1:])
    assert bare[0].abs().max() > 1e6
    rms = x[0].square().mean().sqrt()
    close(floored[0], (y_fake[0] - y_teacher[0]) / (1e-3 * rms))


def test_dmd_value_is_half_the_squared_direction() -> None:
    """Without cancellation: a float32 image of size 100 and a direction of size 1e-4."""
    x, direction = draws(2, 5, 5, dtype=torch.float32)
    x = 100 * x
    y_teacher = torch.zeros_like(x)
    m = x.abs().mean((1, 2))
    wanted = 1e-4 * direction
    loss = dmd_loss(x, y_teacher, wanted * m[:, None, None])
    close(loss, 0.5 * wanted.square().mean((1, 2)), rtol=1e-5, atol=0)
    total = dmd_loss(x, y_teacher, wanted * m[:, None, None], reduction="sum")
    close(total, 25 * loss, rtol=1e-5, atol=0)


def test_dmd_direction_is_a_constant() -> None:
    """Of each half by itself: the direction has no graph, and descending gives none to it."""
    inputs = [tensor.requires_grad_(True) for tensor in draws(3, 2)]
    assert not dmd_gradient(*inputs).requires_grad
    x, direction, _ = inputs
    found = torch.autograd.grad(descend(x, direction, reduction="sum").sum(), inputs, allow_unused=True)
    close(found[0], direction)
    assert found[1] is None


@pytest.mark.parametrize("name", ["sid 1.2", "diff_instruct", "dmd"])
def test_teacher_and_fake_keep_their_weights_and_get_no_gradient(name: str) -> None:
    """SiD differentiates through both networks, whose parameters are frozen; the others leave even trainable
    ones without a gradient."""
    torch.manual_seed(0)
    generator, teacher, fake = (nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(3))
    for network in (teacher, fake):
        network.requires_grad_(not name.startswith("sid"))
    before = [p.clone() for network in (teacher, fake) for p in network.parameters()]
    z, eps = draws(2, 3, dtype=torch.float32)
    x = generator(z)
    x_t = x + 0.5 * eps
    GENERATOR_LOSSES[name](x, teacher(x_t), fake(x_t)).mean().backward()
    torch.optim.SGD(generator.parameters(), lr=0.1).step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in generator.parameters())
    after = [p for network in (teacher, fake) for p in network.parameters()]
    assert all(p.grad is None for p in after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_loss_scale_leaves_adam_s_steps_alone() -> None:
    """Under Adam with beta1 = 0 a factor moves the gradient away from epsilon and does nothing else."""
    y_teacher, y_fake = draws(2, 6)
    steps = []
    for scale in (10.0, 100.0):
        x = draws(3, 6)[2].requires_grad_(True)
        start = x.detach().clone()
        optimizer = torch.optim.Adam([x], lr=1e-2, betas=(0.0, 0.999), eps=1e-8)
        sid_loss(x, y_teacher, y_fake, loss_scale_g=scale).mean().backward()
        assert x.grad.abs().min() > 1e-3
        optimizer.step()
        steps.append(x.detach() - start)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=0)


# --- the fake score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("process", "weighting"),
    [(p, w) for p in (Flow(), VPCosine(), VPScaledLinear()) for w in ("edm", "eps")]
    + [(VPCosine(), "v"), (VPScaledLinear(), "v"), (Flow(), "flow"), (EDM(), "edm")],
    ids=str,
)
def test_fake_score_weightings_as_errors_of_the_data(process: Process, weighting: str) -> None:
    """eps and SiD-LSG's v are snr |error|^2, the flow's velocity |error|^2 / t^2, EDM's (snr + 1 / sd^2) |error|^2."""
    x, eps, error = draws(3, 2, 3)
    t = process.t_min + (process.t_max - process.t_min) * torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    kind = FAKE_SCORE_KINDS[weighting]
    x_t = process.add_noise(x, eps, t)
    prediction = process.convert("x0", x + error, x_t, t, kind)
    loss = fake_score_loss(prediction, x, eps, t, process, weighting=weighting, sigma_data=0.7)
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    expected = {"edm": snr + 0.7**-2, "eps": snr, "v": snr, "flow": t**-2}[weighting]
    close(loss, expected * error.square().sum((1, 2)), rtol=1e-6)
    mean = fake_score_loss(
        prediction, x, eps, t, process, weighting=weighting, sigma_data=0.7, reduction="mean"
    )
    close(6 * mean, loss)


def test_edm_weight_depends_on_the_noise_level_alone() -> None:
    level = torch.tensor([0.02, 0.5, 3.0, 70.0]).double()
    for process in PROCESSES:
        t = process.time_of(-torch.log(level))
        close(fake_score_weight(process, t, "edm", sigma_data=0.6), edm_weight(level, 0.6), rtol=1e-7)


def test_fake_score_gives_the_generator_no_gradient() -> None:
    x, eps, prediction = (tensor.requires_grad_(True) for tensor in draws(3, 2, 3))
    t = torch.full((4,), 0.4, dtype=torch.float64)
    for weighting in ("edm", "eps", "flow"):
        loss = fake_score_loss(prediction, x, eps, t, Flow(), weighting=weighting).sum()
        found = torch.autograd.grad(loss, [prediction, x, eps], allow_unused=True)
        assert [gradient is None for gradient in found] == [False, True, True]


# --- what all of them share ----------------------------------------------------------------------------------

ALL_LOSSES = {
    **GENERATOR_LOSSES,
    "fake_score": lambda x, prediction, eps: fake_score_loss(
        prediction, x, eps, torch.full((len(x),), 0.4, dtype=torch.float64, device=x.device), Flow()
    ),
}


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible_in_its_own_sample(name: str, place: int, value: float) -> None:
    inputs = draws(3, 2, 3)
    clean = ALL_LOSSES[name](*inputs)
    inputs[place][1, 0, 2] = value
    dirty = ALL_LOSSES[name](*inputs)
    assert not dirty[1].isfinite()
    others = [0, 2, 3]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_dtypes_and_devices(name: str) -> None:
    """At least float32 whatever comes in, and no look at a value: the meta device has none."""
    for given in (torch.bfloat16, torch.float32, torch.float64):
        loss = ALL_LOSSES[name](*draws(3, 2, 3, dtype=given))
        assert loss.dtype == torch.promote_types(given, torch.float32)
        assert loss.shape == (4,)
    assert ALL_LOSSES[name](*(tensor.to("meta") for tensor in draws(3, 2, 3))).shape == (4,)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_nothing_is_broadcast(name: str) -> None:
    x, y_teacher, y_fake = draws(3, 2, 3)
    with pytest.raises(ValueError, match=r"shapes differ: .*\(4, 1, 3\)"):
        ALL_LOSSES[name](x, y_teacher, y_fake[:, :1])


def test_bad_options_are_named() -> None:
    x, y_teacher, y_fake = draws(3, 2)
    t = torch.full((4,), 0.4)
    with pytest.raises(ValueError, match="alpha: found nan"):
        sid_loss(x, y_teacher, y_fake, alpha=float("nan"))
    with pytest.raises(ValueError, match="floor: found -1"):
        dmd_loss(x, y_teacher, y_fake, floor=-1)
    for loss in (sid_loss, diff_instruct_loss, dmd_loss):
        with pytest.raises(ValueError, match="reduction: found 'none'"):
            loss(x, y_teacher, y_fake, reduction="none")
    with pytest.raises(ValueError, match="weighting: found 'snr'"):
        fake_score_loss(x, y_teacher, y_fake, t, Flow(), weighting="snr")
    with pytest.raises(ValueError, match="'v' needs alpha"):
        fake_score_loss(x, y_teacher, y_fake, t, Flow(), weighting="v")
    with pytest.raises(ValueError, match="sigma_data: found 0"):
        fake_score_loss(x, y_teacher, y_fake, t, Flow(), sigma_data=0)
