"""Tabulated processes: zero terminal SNR to its last digit, and tables that are other processes in disguise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.models.denoiser import Denoiser
from distill.process.flow import Flow
from distill.process.tables import VPTable
from distill.process.vp import VPCosineIDDPM, VPLinear, VPLinearBetas, VPLinearTable, VPScaledLinear

ZERO = [
    VPScaledLinear(zero_terminal_snr=True),
    VPLinearBetas(zero_terminal_snr=True),
    VPScaledLinear(num_timesteps=2, zero_terminal_snr=True),
]
every_zero = pytest.mark.parametrize("table", ZERO, ids=repr)


def last_interval(table: VPTable) -> Tensor:
    """Times of the interval that ends in pure noise: its left end, its inside, close to its end, the end."""
    fraction = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-9, 1.0], dtype=torch.float64)
    return table.t_max - 1 + fraction


@every_zero
def test_the_last_interval_is_exact_at_both_ends_and_falls(table: VPTable) -> None:
    t = last_interval(table)
    alpha, sigma = table.alpha(t), table.sigma(t)
    assert alpha[-1] == 0
    assert sigma[-1] == 1
    assert table.log_ratio(t)[-1] == -math.inf
    torch.testing.assert_close(alpha[0] ** 2, table.alphas_cumprod[-2], atol=0.0, rtol=1e-13)
    dense = torch.linspace(table.t_max - 1, table.t_max, 10_001, dtype=torch.float64)
    assert (table.alpha(dense).diff() < 0).all()
    assert (table.log_ratio(dense).diff() < 0).all()
    # sigma = sqrt(1 - alpha^2) moves by less than a rounding near the end
    assert (table.sigma(dense).diff() >= 0).all()
    # continuous where the kinds of interpolation meet
    before = torch.nextafter(t[:1], torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(table.alpha(before), alpha[:1], atol=1e-12, rtol=0.0)


@every_zero
def test_the_last_interval_has_finite_derivatives(table: VPTable) -> None:
    t = last_interval(table)
    assert torch.isfinite(table.d_alpha(t)).all()
    assert torch.isfinite(table.d_sigma(t)).all()
    assert table.d_alpha(t)[-1] < 0
    assert table.d_sigma(t)[-1] == 0  # alpha^2 + sigma^2 = 1 and alpha = 0
    inner, step = t[1:5], 1e-5
    for value, derivative in ((table.alpha, table.d_alpha), (table.sigma, table.d_sigma)):
        difference = (value(inner + step) - value(inner - step)) / (2 * step)
        torch.testing.assert_close(derivative(inner), difference, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(
        table.alpha(t) * table.d_alpha(t) + table.sigma(t) * table.d_sigma(t),
        torch.zeros_like(t),
        atol=1e-15,
        rtol=0.0,
    )


@every_zero
def test_the_last_interval_is_inverted(table: VPTable) -> None:
    t = last_interval(table)
    torch.testing.assert_close(table.time_of(table.log_ratio(t)), t, atol=1e-11, rtol=0.0)
    torch.testing.assert_close(
        table.matching_time(Flow(), Flow().matching_time(table, t)), t, atol=1e-11, rtol=0.0
    )
    assert table.covers(table.log_ratio(t)).all()
    assert table.matching_time(Flow(), torch.ones(1).double()) == table.t_max
    single = t.float()
    assert table.alpha(single)[-1] == 0
    torch.testing.assert_close(
        table.alpha(single).double(), table.alpha(single.double()), atol=1e-8, rtol=1e-6
    )


@every_zero
def test_conversions_hold_to_the_end(table: VPTable) -> None:
    """Data, v and velocity determine each other in all of the last interval; noise does not determine data at its end."""
    t = last_interval(table)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(t), 3, generator=generator, dtype=torch.float64)
    x_t = table.add_noise(x0, eps, t)
    for kind_from in ("x0", "v", "velocity"):
        truth = table.target(kind_from, x0, eps, t)
        for kind_to in ("x0", "eps", "v", "velocity", "score"):
            found = table.convert(kind_from, truth, x_t, t, kind_to)
            torch.testing.assert_close(found, table.target(kind_to, x0, eps, t), atol=1e-9, rtol=1e-9)
    assert not torch.isfinite(table.convert("eps", eps, x_t, t, "x0")[-1]).any()


def test_a_denoiser_refuses_noise_predictions_of_zero_terminal_snr() -> None:
    net = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"kind: found 'eps'.*expected 'x0', 'v' or 'velocity'"):
        Denoiser(net, ZERO[0], "eps", (2,))
    Denoiser(net, ZERO[0], "v", (2,))
    Denoiser(net, VPScaledLinear(), "eps", (2,))


def test_the_rescaling_keeps_the_first_entry_and_the_rest_in_place() -> None:
    plain, zero = VPScaledLinear(), VPScaledLinear(zero_terminal_snr=True)
    torch.testing.assert_close(zero.alphas_cumprod[0], plain.alphas_cumprod[0], atol=0.0, rtol=1e-14)
    # alpha is moved affinely: ratios of differences stay
    old, new = plain.alphas_cumprod.sqrt(), zero.alphas_cumprod.sqrt()
    torch.testing.assert_close(new.diff() / new[0].sub(new[-1]), old.diff() / old[0].sub(old[-1]))
    assert not plain.zero_end
    assert zero.zero_end


def test_tables_of_other_processes() -> None:
    table = VPLinearTable(0.1, 20.0, num_timesteps=50)
    index = torch.arange(50).double()
    continuous = VPLinear(0.1, 20.0)
    torch.testing.assert_close(
        table.log_ratio(index), continuous.log_ratio((index + 1) / 50), atol=1e-9, rtol=1e-9
    )
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    linear = VPLinearBetas().alphas_cumprod
    torch.testing.assert_close(1 - linear[1:] / linear[:-1], betas[1:], atol=1e-12, rtol=0.0)
    torch.testing.assert_close(1 - linear[0], betas[0])
    cosine = VPCosineIDDPM(64)
    f = torch.cos(math.pi / 2 * (torch.arange(1, 65).double() / 64 + 0.008) / 1.008) ** 2
    first = math.cos(math.pi / 2 * 0.008 / 1.008) ** 2
    # the products telescope to f wherever the clip did not act
    torch.testing.assert_close(cosine.alphas_cumprod[:-1], f[:-1] / first, atol=0.0, rtol=1e-12)
    assert cosine.alphas_cumprod[-1] == pytest.approx(0.001 * cosine.alphas_cumprod[-2].item())


def test_bad_tables_are_refused() -> None:
    for build, message in (
        (lambda: VPLinearBetas(0.1, 0.01), "0 < beta_start <= beta_end < 1"),
        (lambda: VPLinearBetas(num_timesteps=1), "num_timesteps must be at least 2"),
        (lambda: VPCosineIDDPM(1), "num_timesteps must be at least 2"),
        (lambda: VPCosineIDDPM(s=0.0), "s must be positive"),
        (lambda: VPCosineIDDPM(max_beta=1.0), "max_beta must lie in"),
        (lambda: VPLinearTable(0.0), "0 < beta_min <= beta_max"),
        (lambda: VPLinearTable(num_timesteps=1), "num_timesteps must be at least 2"),
        (lambda: VPTable(torch.tensor([0.5, 0.6], dtype=torch.float64)), "must fall strictly"),
        (lambda: VPTable(torch.tensor([1.0, 0.6], dtype=torch.float64)), "must fall strictly"),
        (lambda: VPTable(torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)), "must fall strictly"),
        (lambda: VPTable(torch.tensor([0.5, float("nan")], dtype=torch.float64)), "must fall strictly"),
        (lambda: VPTable(torch.tensor([0.5], dtype=torch.float64)), "must fall strictly"),
        (lambda: VPTable(torch.tensor([0.5, -0.1], dtype=torch.float64)), "must fall strictly"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
