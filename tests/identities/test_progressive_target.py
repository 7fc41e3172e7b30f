"""Identities of progressive distillation's target, on the exact mixture and on arbitrary nets, under every kind of process."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.methods.losses import progressive
from distill.methods.losses.progressive import (
    StudentGrid,
    Target,
    check_student,
    guided_target,
    landing_x0,
    progressive_loss,
    snr_weight,
    two_step_target,
)
from distill.models.analytic import exact_denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.guidance_w import draw_w
from distill.process.times import karras_grid, student_grid, uniform_grid
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.ode import Field, ddim, ddim_step

# A process and its teacher grid of a number of steps.
CHAINS = [
    (VPCosine(), uniform_grid),
    (VPLinear(), uniform_grid),
    (VPScaledLinear(), student_grid),
    (VPScaledLinear(zero_terminal_snr=True), student_grid),
    (Flow(), uniform_grid),
    (EDM(), karras_grid),
]
chains = pytest.mark.parametrize(
    ("process", "grid"), CHAINS, ids=lambda value: getattr(value, "__name__", repr(value))
)


def noise(batch: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(process: Process, kind: str = "x0") -> Field:
    """The exact denoiser of 8 Gaussians, saying ``kind``."""
    model = exact_denoiser(process)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return process.convert("x0", model.net(x, t, Cond.nothing(len(x))), x, t, kind)

    return predict


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """A net that is no denoiser of anything."""
    return 0.6 * x + 0.3 * torch.sin(3 * x) + 0.1 - 0.2 * (t / (1 + t)).to(x.dtype)[:, None]


def kinds(process: Process) -> list[str]:
    return ["x0", "eps", "velocity", *(("v",) if process.variance_preserving else ())]


def oracle(predict: Field, process: Process, kind: str, times: Tensor, target: str = "right") -> Field:
    """What a student on every second of ``times`` predicts as x0 once its loss is zero."""
    grid = StudentGrid(process, times)

    def x0(z: Tensor, u: Tensor) -> Tensor:
        place = int((times - u[0]).abs().argmin())
        index = torch.full((len(z),), grid.steps - 1 - place // 2)
        found = two_step_target(predict, process, kind, z, grid.step(index))
        return found.target.x0 if target == "right" else found.second.x0

    return x0


@chains
def test_oracle_students_end_where_the_teacher_does(process: Process, grid: object) -> None:
    """64 -> 32 -> ... -> 1 by the target alone: every student reproduces the 64-step result."""
    kind = "v" if process.variance_preserving else "x0"
    start = process.prior(noise())
    times = grid(process, 64)  # type: ignore[operator]
    final = ddim(mixture(process, kind), process, start, times, kind)
    predict = mixture(process, kind)
    for steps in (32, 16, 8, 4, 2, 1):
        predict, kind = oracle(predict, process, kind, times), "x0"
        times = times[::2]
        assert len(times) == steps + 1
        found = ddim(predict, process, start, times)
        assert (found - final).abs().max().item() < 1e-10
    # An undistilled teacher in one step is far away, so the agreement says something.
    assert (ddim(mixture(process), process, start, times) - final).abs().max().item() > 0.5


def test_the_second_x0_is_no_target() -> None:
    """A port of the method regresses on the teacher's second x0 at every step; its oracle students drift."""
    process, start = VPCosine(), noise()
    times = uniform_grid(process, 64)
    final = ddim(mixture(process), process, start, times)
    predict, errors = mixture(process), []
    for _ in range(3):
        predict = oracle(predict, process, "x0", times, target="second x0")
        times = times[::2]
        errors.append((ddim(predict, process, start, times) - final).square().mean().item())
    assert errors[0] > 1e-6
    assert errors == sorted(errors)


@chains
def test_one_step_lands_where_two_do(process: Process, grid: object) -> None:
    """The defining property, for any net, any kind and every step, with and without the clean end."""
    n = 6
    times = grid(process, 2 * n)  # type: ignore[operator]
    little_signal = float(process.alpha(times[:1])) < 1e-4
    for kind, clean_end in itertools.product(kinds(process), (False, True)):
        # x0 out of eps divides by alpha: at 1e-4 no digits are left to compare, at 0 nothing at all.
        index = torch.arange(n - (kind == "eps" and little_signal))
        step = StudentGrid(process, times, clean_end).step(index)
        z = process.add_noise(noise(len(index)), noise(len(index), 4), step.u)
        found = two_step_target(wavy, process, kind, z, step)
        assert not found.target.x0.requires_grad
        # The pair belongs to z, and its x0 leads to z_s.
        torch.testing.assert_close(process.add_noise(*found.target, step.u), z, atol=1e-10, rtol=1e-10)
        landed = ddim_step(process, "x0", found.target.x0, z, step.u, step.s)[2]
        landed[step.clean] = found.target.x0[step.clean]
        torch.testing.assert_close(landed, found.z_s, atol=1e-10, rtol=1e-10)
        if clean_end:
            torch.testing.assert_close(found.target.x0[0], found.second.x0[0], atol=1e-12, rtol=1e-12)
            assert torch.equal(found.z_s[0], found.second.x0[0])
        # The path is DDIM's.
        first = ddim_step(process, kind, wavy(z, step.u), z, step.u, step.m)
        torch.testing.assert_close(found.z_m, first[2])


def test_stable_form_is_the_textbook_form() -> None:
    """To 1e-12 in float64; in float32 the textbook's division loses digits with N and the stable form does not."""
    process = VPCosine()
    textbook_errors, stable_errors = [], []
    for n in (8, 64, 512, 4096):
        index = torch.linspace(1, n - 1, 7).long()
        step = StudentGrid(process, uniform_grid(process, 2 * n)).step(index)
        z = process.add_noise(noise(7), noise(7, 4), step.u)
        exact = two_step_target(wavy, process, "v", z, step)
        textbook = landing_x0(process, z, exact.z_s, step.u, step.s)
        bound = 1e-12 if n <= 64 else 1e-12 * n / 64  # float64 amplified by 1 / (d1 + d2)
        torch.testing.assert_close(exact.target.x0, textbook, atol=bound, rtol=bound)

        single = two_step_target(wavy, process, "v", z.float(), step)
        assert single.target.x0.dtype == torch.float32
        textbook = landing_x0(process, z.float(), single.z_s, step.u, step.s)
        stable_errors.append((single.target.x0 - exact.target.x0).abs().max().item())
        textbook_errors.append((textbook - exact.target.x0).abs().max().item())
    assert max(stable_errors) < 2e-6
    assert textbook_errors[-1] > 100 * stable_errors[-1]


def test_both_stable_forms_agree_on_a_circle() -> None:
    """Angles and straight coordinates are two charts of one straight line of predictions."""
    process = VPCosine()
    for clean_end in (False, True):
        step = StudentGrid(process, uniform_grid(process, 10), clean_end).step(torch.arange(5))
        z, v1, v2 = noise(5), noise(5, 4), noise(5, 5)
        x1, eps1, z_m = ddim_step(process, "v", v1, z, step.u, step.m)
        x2, eps2, _ = ddim_step(process, "v", v2, z_m, step.m, step.s)
        by_angles = progressive._by_angles(process, z, v1, v2, step)
        straight = progressive._by_straight_path(process, z, eps1 - x1, eps2 - x2, step)
        for a, b in zip(by_angles, straight, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_precision_of_the_target() -> None:
    """Half precision is refused, and an autocast region around the target does not reach into it."""
    process = VPCosine()
    step = StudentGrid(process, uniform_grid(process, 8)).step(torch.arange(4))
    z = noise(4).float()
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"z: found torch\.bfloat16"):
        two_step_target(wavy, process, "v", z.bfloat16(), step)
    with pytest.raises(ValueError, match=r"prediction: found torch\.float16"):
        two_step_target(lambda x, t: x.half(), process, "v", z, step)
    with pytest.raises(ValueError, match=r"uncond: found torch\.float16"):
        guided_target(process, "v", z, z.half(), z, step.u, 1.0)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return linear(x)

    outside = two_step_target(predict, process, "v", z, step)
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(z, step.u).dtype == torch.bfloat16
        inside = two_step_target(predict, process, "v", z, step)
    assert torch.equal(inside.target.x0, outside.target.x0)
    assert not inside.target.eps.requires_grad


def test_one_loss_in_every_kind() -> None:
    """w |x0 error|^2 whatever the student predicts; snr_trunc is the larger of two mean squares; gradients reach it alone."""
    for process in (VPCosine(), Flow(), EDM()):
        u = torch.tensor([0.2, 0.5, 0.8, 0.97], dtype=torch.float64) * (1 if process.t_max == 1 else 3)
        x0, eps = noise(4).requires_grad_(), noise(4, 4).requires_grad_()
        z = process.add_noise(x0, eps, u).detach()
        target = Target(x0 + 0.1, process.convert("x0", x0 + 0.1, z, u, "eps"))
        guess = noise(4, 9)
        snr = torch.exp(2 * process.log_ratio(u))
        x_error = (guess - target.x0).square().mean(1)
        eps_error = (process.convert("x0", guess, z, u, "eps") - target.eps).square().mean(1)
        expected = {
            "constant": x_error,
            "snr": eps_error,
            "snr_trunc": torch.maximum(x_error, eps_error),
            "snr+1": (1 + snr) * x_error,
        }
        for kind, (name, value) in itertools.product([*kinds(process), "score"], expected.items()):
            out = process.convert("x0", guess, z, u, kind).detach().requires_grad_()
            loss = progressive_loss(process, kind, out, target, z, u, name)
            torch.testing.assert_close(loss, value.detach(), atol=1e-10, rtol=1e-8)
            loss.sum().backward()
            assert out.grad is not None
            assert out.grad.abs().min() > 0
        assert x0.grad is None
        assert eps.grad is None
        # A half-precision student is promoted, not refused.
        half = progressive_loss(process, "x0", guess.bfloat16(), target, z, u, "constant")
        assert half.dtype == torch.float64


def test_weights_of_zero_signal_stay_finite() -> None:
    """The default on v at zero terminal SNR weighs as at pure noise; it never divides."""
    ends = torch.tensor([-torch.inf, -40.0, 0.0, 40.0])
    assert snr_weight("snr_trunc", "v", ends).tolist() == pytest.approx([1, 1, 0.5, 1])
    assert snr_weight("constant", "v", ends).tolist() == pytest.approx([1, 1, 0.5, 0], abs=1e-6)
    assert snr_weight("snr", "v", ends).tolist() == pytest.approx([0, 0, 0.5, 1], abs=1e-6)
    assert snr_weight("snr_trunc", "x0", ends[:1]).tolist() == [1]


def test_guided_target_without_guidance() -> None:
    process, u = VPCosine(), torch.tensor([0.3, 0.8], dtype=torch.float64)
    z, cond, uncond = noise(2), noise(2, 4), noise(2, 5)
    plain = guided_target(process, "v", cond, uncond, z, u, 0.0)
    torch.testing.assert_close(plain.x0, process.convert("v", cond, z, u, "x0"))
    # w = 1 goes as far past the conditional prediction as that is from the unconditional one.
    twice = guided_target(process, "x0", cond, uncond, z, u, torch.ones(2).double())
    torch.testing.assert_close(twice.x0, 2 * cond - uncond)
    clipped = guided_target(process, "x0", 3 * cond, uncond, z, u, 1.0, clip=0.5)
    assert clipped.x0.abs().max() == 0.5
    torch.testing.assert_close(process.add_noise(*clipped, u), z)


def test_refusals_of_grids() -> None:
    process = VPCosine()
    times = uniform_grid(process, 4)
    assert StudentGrid(process, times).steps == 2
    for wrong in (times[:-1], times[:1], times[None]):
        with pytest.raises(ValueError, match="times: found the shape"):
            StudentGrid(process, wrong)
    for wrong in (times.flip(0), times[[0, 1, 1, 2, 3]]):
        with pytest.raises(ValueError, match="descending"):
            StudentGrid(process, wrong)
    for wrong in (times + 0.1, times - 0.1):
        with pytest.raises(ValueError, match="expected times of VPCosine"):
            StudentGrid(process, wrong)
    for index in (2, -1):
        with pytest.raises(IndexError):
            StudentGrid(process, times).step(torch.tensor([index]))


def test_refusals_of_students_and_weights() -> None:
    process, flow = VPCosine(), Flow()
    check_student(process, "v", 1)
    check_student(process, "eps", 9)
    for case, message in (
        ((process, "eps", 8), "it has 8 steps"),
        ((flow, "eps", 64), "nothing of the data is left"),
        ((process, "noise", 4), "unknown prediction kind"),
        ((flow, "v", 4), "alpha\\^2"),
        ((process, "v", 0), "steps: found 0"),
        ((process, "v", 4, "snr2"), "weight: found 'snr2'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_student(*case)
    with pytest.warns(UserWarning, match="'snr' is zero at t_max of Flow"):
        check_student(flow, "velocity", 4, "snr")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_student(process, "v", 4, "snr")
        draw_w(noise(1), 0, 4)
    with pytest.raises(ValueError, match="kind: found 'velocity'"):
        snr_weight("snr", "velocity", torch.zeros(1))
    with pytest.raises(ValueError, match="clip: found 0"):
        guided_target(process, "v", noise(1), noise(1), noise(1), torch.ones(1), 1.0, clip=0)
    z, u = noise(2), torch.tensor([0.5, 0.6])
    with pytest.raises(ValueError, match="shapes differ"):
        progressive_loss(process, "v", z[:, :1], Target(z, z), z, u)
    with pytest.raises(ValueError, match="unknown prediction kind"):
        two_step_target(
            wavy,
            process,
            "noise",
            z,
            StudentGrid(process, uniform_grid(process, 2)).step(torch.zeros(2).long()),
        )
