"""Measures of certificates against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.evaluation.certificate import flow_map, mode_of, modes_found, share_near, trajectory_error
from distill.models.analytic import exact_denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear

MEAN, STD = [0.4, -0.2], 0.3
NOTHING = Cond.nothing(64)


def noise() -> Tensor:
    return torch.randn(64, 2, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "process", [Flow(), VPCosine(), VPScaledLinear(), EDM()], ids=lambda p: type(p).__name__
)
def test_the_flow_map_of_one_gaussian(process: Process) -> None:
    """x - alpha m scales with the marginal standard deviation sqrt(alpha^2 s^2 + sigma^2) from t_max to t_min."""
    ends = torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
    alpha, sigma = process.alpha(ends), process.sigma(ends)
    spread, mean = (alpha.square() * STD**2 + sigma.square()).sqrt(), torch.tensor(MEAN, dtype=torch.float64)
    start = process.prior(noise().double())
    expected = alpha[1] * mean + spread[1] / spread[0] * (start - alpha[0] * mean)
    found = flow_map(exact_denoiser(process, [MEAN], STD), noise(), NOTHING)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)
    coarse = flow_map(exact_denoiser(process, [MEAN], STD), noise(), NOTHING, tolerance=1e-3)
    assert (coarse - expected).abs().max() > 1e-7


def test_the_flow_map_of_guidance() -> None:
    """Guidance 1 is the condition's own flow, and a larger one leads away from the other class."""
    model = exact_denoiser(VPCosine(), [[-1.0, 0.0], [1.0, 0.0]], STD, labelled=True)
    right = Cond.of_labels(torch.ones(64, dtype=torch.int64))
    plain = flow_map(model, noise(), right)
    alone = flow_map(exact_denoiser(VPCosine(), [[1.0, 0.0]], STD), noise(), NOTHING)
    torch.testing.assert_close(plain, alone, atol=1e-6, rtol=0)
    guided = flow_map(model, noise(), right, guidance_scale=3.0)
    assert (guided[:, 0] - plain[:, 0]).mean() > 0.05


def test_trajectory_error_sums_over_coordinates() -> None:
    ends = noise()
    assert trajectory_error(ends + torch.tensor([0.3, 0.4]), ends) == pytest.approx(0.5, rel=1e-6)
    assert trajectory_error(ends, ends) == 0
    # Pairs, not sets: the same points in another order are far away.
    assert trajectory_error(ends.flip(0), ends) > 1
    half = ends.clone()
    half[:32] += torch.tensor([1.0, 0.0])
    assert trajectory_error(half, ends) == pytest.approx(math.sqrt(0.5), rel=1e-6)
    with pytest.raises(ValueError, match="samples: found 63, expected one for each of 64"):
        trajectory_error(ends[1:], ends)
    with pytest.raises(ValueError, match="samples has non-finite values in 64 of 64"):
        trajectory_error(ends / 0, ends)


def test_modes_and_shares() -> None:
    means = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    near, edge, between = [0.2, 0.0], [10.0, 0.301], [5.0, 5.0]
    samples = torch.tensor([near] * 97 + [[10.0, 0.299]] * 2 + [edge])
    assert mode_of(samples, means, 0.3)[[0, 97, 99]].tolist() == [0, 1, -1]
    assert share_near(samples, means, 0.1) == pytest.approx(0.99)
    assert modes_found(samples, means, 0.1) == 2  # 2 % of the samples make a mode
    assert modes_found(torch.cat([samples, samples[:1]]), means, 0.1) == 1  # 2 of 101 do not
    assert share_near(torch.tensor([between]), means, 0.1) == 0
    assert modes_found(torch.tensor([between]), means, 0.1) == 0
    for radius in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="radius: found"):
            mode_of(samples, means, radius)
    with pytest.raises(ValueError, match="samples has 2 dimensions and means has 3"):
        mode_of(samples, torch.zeros(1, 3), 0.3)


def test_true_samples_lie_near_their_modes() -> None:
    """1 - exp(-9 / 2) of a Gaussian in the plane lies within 3 standard deviations."""
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    samples = means.repeat(10_000, 1) + 0.1 * torch.randn(20_000, 2, generator=generator)
    assert share_near(samples, means, 0.1) == pytest.approx(1 - math.exp(-4.5), abs=0.003)
    assert modes_found(samples, means, 0.1) == 2
