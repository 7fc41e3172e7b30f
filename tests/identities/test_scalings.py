"""Boundary scalings and weights over noise levels, and the preconditioned net that uses them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.build import build_net
from distill.models.denoiser import Denoiser
from distill.nets.precond import EDMPrecond
from distill.process.edm import EDM
from distill.process.scalings import (
    SIGMA_WEIGHTS,
    cm_scalings,
    edm_scalings,
    edm_weight,
    lcm_scalings,
    rescaled_time,
    sigma_weight,
)

SIGMA = torch.logspace(-3, 2, 21, dtype=torch.float64)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.25])
def test_edm_scalings_make_inputs_and_targets_of_unit_variance(sigma_data: float) -> None:
    """arXiv 2206.00364, appendix B.6: the three conditions that define them."""
    c_skip, c_out, c_in, c_noise = edm_scalings(SIGMA, sigma_data)
    one = torch.ones_like(SIGMA)
    torch.testing.assert_close(c_in**2 * (SIGMA**2 + sigma_data**2), one)
    # the net's target (x0 - c_skip x_t) / c_out has unit variance, and c_skip makes c_out as small as can be
    torch.testing.assert_close(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMA**2) / c_out**2, one)
    for moved in (c_skip - 1e-3, c_skip + 1e-3):
        assert ((1 - moved) ** 2 * sigma_data**2 + moved**2 * SIGMA**2 > c_out**2).all()
    torch.testing.assert_close(torch.exp(4 * c_noise), SIGMA)
    torch.testing.assert_close(edm_weight(SIGMA, sigma_data) * c_out**2, one)
    clean = edm_scalings(torch.zeros(1).double(), sigma_data)
    assert (clean.c_skip.item(), clean.c_out.item()) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sigma_min", [0.002, 0.003, 0.01])
def test_cm_scalings_are_the_identity_at_sigma_min(dtype: torch.dtype, sigma_min: float) -> None:
    sigma = torch.tensor([sigma_min, 80.0], dtype=dtype)
    found = cm_scalings(sigma, sigma_min=sigma_min)
    assert found.c_skip.dtype == dtype
    assert (found.c_skip[0].item(), found.c_out[0].item()) == (1.0, 0.0)
    assert found.c_out[1] > 0
    # far from sigma_min the shift is not seen; c_in and c_noise never shift
    far = torch.tensor([1e4], dtype=dtype)
    edm = edm_scalings(far)
    for name in ("c_in", "c_noise"):
        assert torch.equal(getattr(cm_scalings(far, sigma_min=sigma_min), name), getattr(edm, name))
    torch.testing.assert_close(cm_scalings(far, sigma_min=sigma_min).c_out, edm.c_out, atol=0.0, rtol=1e-5)


def test_lcm_scalings() -> None:
    t = torch.tensor([0, 1, 19, 999])
    c_skip, c_out = lcm_scalings(t)
    assert (c_skip[0].item(), c_out[0].item()) == (1.0, 0.0)
    torch.testing.assert_close(
        c_skip, torch.tensor([1.0, 0.0024938, 6.9252e-6, 2.5050e-9]), atol=0.0, rtol=1e-4
    )
    torch.testing.assert_close(c_skip + c_out**2, torch.ones(4))
    exact = lcm_scalings(t.double(), timestep_scaling=1.0, sigma_data=1.0)
    torch.testing.assert_close(exact[1] / exact[0].sqrt(), t.double())


def test_weights() -> None:
    for name in SIGMA_WEIGHTS:
        assert sigma_weight(name, SIGMA).shape == SIGMA.shape
        assert sigma_weight(name, SIGMA.half()).dtype == torch.float32
    assert (sigma_weight("uniform", SIGMA) == 1).all()
    torch.testing.assert_close(sigma_weight("snr", SIGMA) * SIGMA**2, torch.ones_like(SIGMA))
    torch.testing.assert_close(
        sigma_weight("snr+1", SIGMA) - sigma_weight("snr", SIGMA), torch.ones_like(SIGMA)
    )
    truncated = sigma_weight("truncated-snr", SIGMA)
    assert torch.equal(truncated, torch.maximum(sigma_weight("snr", SIGMA), torch.ones_like(SIGMA)))
    assert truncated.min() == 1
    torch.testing.assert_close(sigma_weight("karras", SIGMA, 0.25), edm_weight(SIGMA, 0.25))
    torch.testing.assert_close(rescaled_time(SIGMA), 1000 * edm_scalings(SIGMA).c_noise)
    assert math.isfinite(rescaled_time(torch.zeros(1))[0].item())


def test_bad_numbers_are_refused() -> None:
    for call, field in (
        (lambda: edm_scalings(SIGMA, 0.0), "sigma_data"),
        (lambda: cm_scalings(SIGMA, -1.0), "sigma_data"),
        (lambda: cm_scalings(SIGMA, sigma_min=0.0), "sigma_min"),
        (lambda: lcm_scalings(SIGMA, 0.0), "timestep_scaling"),
        (lambda: lcm_scalings(SIGMA, sigma_data=0.0), "sigma_data"),
        (lambda: edm_weight(SIGMA, 0.0), "sigma_data"),
        (lambda: EDMPrecond(nn.Identity(), 0.0), "sigma_data"),
    ):
        with pytest.raises(ValueError, match=rf"{field}: found .*, expected a positive number"):
            call()
    with pytest.raises(ValueError, match=r"weight: found 'min-snr', expected one of \['uniform', 'snr'"):
        sigma_weight("min-snr", SIGMA)


def test_no_value_is_read() -> None:
    sigma = torch.empty(4, device="meta")
    for scalings in (edm_scalings, cm_scalings, lcm_scalings):
        assert all(part.shape == sigma.shape for part in scalings(sigma))
    for name in SIGMA_WEIGHTS:
        assert sigma_weight(name, sigma).shape == sigma.shape
    x = torch.empty(4, 2, device="meta")
    assert EDMPrecond(Recorder())(x, sigma, Cond.nothing(4)).shape == x.shape


class Recorder(nn.Module):
    """F = a (c_in x) + b, remembering what it was given; its output may be in low precision."""

    num_classes = 7

    def __init__(self, a: float = 0.0, b: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.a, self.b, self.dtype = a, b, dtype

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen = (x, t, cond)
        out = self.a * x + self.b
        return out if self.dtype is None else out.to(self.dtype)


def test_precond_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(SIGMA), 3, 2, generator=generator, dtype=torch.float64)
    net, cond = Recorder(0.3, -1.0), Cond.nothing(len(x))
    precond = EDMPrecond(net, sigma_data=0.8)
    found = precond(x, SIGMA, cond)
    level = SIGMA[:, None, None]
    inner = x / torch.sqrt(level**2 + 0.64)
    expected = 0.64 / (level**2 + 0.64) * x + level * 0.8 / torch.sqrt(level**2 + 0.64) * (0.3 * inner - 1.0)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(net.seen[0], inner)
    torch.testing.assert_close(net.seen[1], SIGMA.log() / 4)
    assert net.seen[2] is cond
    assert precond.num_classes == 7
    assert EDMPrecond(nn.Identity()).num_classes is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precond_keeps_float32_around_a_low_precision_net(dtype: torch.dtype) -> None:
    """At sigma = 0.002 D is x to 6 digits: a D, or a skip, in bfloat16 would be wrong in the third."""
    x, sigma = torch.rand(4, 8) + 1, torch.full((4,), 0.002)
    low = EDMPrecond(Recorder(0.5, 0.1, dtype))(x, sigma, Cond.nothing(4))
    exact = EDMPrecond(Recorder(0.5, 0.1))(x.double(), sigma.double(), Cond.nothing(4))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), exact, atol=3e-5, rtol=0.0)
    net = Recorder(0.5, 0.1)
    assert EDMPrecond(net)(x.to(dtype), sigma, Cond.nothing(4)).dtype == torch.float32
    assert net.seen[0].dtype == torch.float32


def test_an_optimal_net_is_the_exact_denoiser_of_gaussian_data() -> None:
    """x0 ~ N(0, sd^2): E[x0 | x_t] = c_skip x_t, so F = 0 is optimal at every level, and D is a transport to std sd."""
    precond = EDMPrecond(Recorder())
    denoiser = Denoiser(precond, EDM(), "x0", (2,))
    z = torch.randn(256, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # x(sigma) = x(80) sqrt((sigma^2 + sd^2) / (80^2 + sd^2)) solves the ODE
    expected = 80 * z * 0.5 / math.sqrt(80**2 + 0.5**2)
    for steps, rtol in ((60, 5e-3), (240, 4e-4)):  # Heun: four times the steps, a sixteenth of the error
        sample = denoiser.transport(z, Cond.nothing(256), solver="heun", steps=steps)[0]
        torch.testing.assert_close(sample, expected, atol=0.0, rtol=rtol)


def test_nested_configs_build_a_preconditioned_net() -> None:
    inner = {"_target_": "distill.nets.mlp.MLP", "shape": [2], "width": 8, "depth": 1, "num_classes": 3}
    net = build_net({"_target_": "distill.nets.precond.EDMPrecond", "net": inner, "sigma_data": 0.7})
    assert isinstance(net, EDMPrecond)
    assert (net.num_classes, net.sigma_data) == (3, 0.7)
    x, sigma = torch.randn(4, 2), torch.tensor([0.002, 0.5, 2.0, 80.0])
    out = net(x, sigma, Cond.of_labels(torch.tensor([0, 1, 2, -1])))
    torch.testing.assert_close(out, edm_scalings(sigma, 0.7).c_skip[:, None] * x)  # F starts at 0
    assert [name.split(".")[0] for name, _ in net.named_parameters()] == ["net"] * len(list(net.parameters()))
