"""Filters of HiPA: a projection that splits energy, edges of a unit step, and shares of white noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.methods.losses.frequency import (
    edge_distance,
    edges,
    feature_distance,
    fourier_distance,
    high_frequency_ratio,
    high_pass,
)


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (7, 12)])
@pytest.mark.parametrize("rho", [0.25, 0.5, 1.0])
def test_the_filter_is_a_projection_that_splits_energy(size: tuple[int, int], rho: float) -> None:
    x = images(2, 3, *size)
    high = high_pass(x, rho)
    torch.testing.assert_close(high_pass(high, rho), high, rtol=0, atol=1e-12)
    parts = high.square().sum() + (x - high).square().sum()
    torch.testing.assert_close(parts, x.square().sum(), rtol=1e-12, atol=0)
    assert high_pass(torch.full_like(x, 0.7), rho).abs().max() < 1e-12
    assert high_pass(x.to(torch.bfloat16), rho).dtype == torch.float32


def test_the_filter_keeps_the_frequencies_that_it_says() -> None:
    columns = torch.arange(16, dtype=torch.float64)
    for cycles, kept in ((1, False), (2, True), (8, True)):  # of 16 pixels; rho 0.25 is 2 cycles
        wave = torch.cos(2 * math.pi * cycles * columns / 16).expand(1, 1, 16, 16)
        for x in (wave, wave.transpose(2, 3)):
            wanted = x if kept else torch.zeros_like(x)
            torch.testing.assert_close(high_pass(x, 0.25), wanted, rtol=0, atol=1e-12)
    # The filter is round: (1.5, 1.5) of 16 would need a square of side 1.5 / 16.
    both = torch.cos(2 * math.pi * columns / 16)[:, None] * torch.cos(2 * math.pi * columns / 16)
    assert high_pass(both[None, None], 0.25).abs().max() < 1e-12, "sqrt 2 cycles are below 2"
    torch.testing.assert_close(high_pass(both[None, None], 0.17)[0, 0], both, rtol=0, atol=1e-12)


def test_edges_of_a_step() -> None:
    x = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    x[..., 4:] = 1
    for found in (edges(x), edges(x.transpose(2, 3)).transpose(2, 3)):
        assert found.shape == (1, 1, 6, 8)
        torch.testing.assert_close(found[..., 3:5], torch.ones(1, 1, 6, 2).double(), rtol=0, atol=1e-9)
        assert found[..., :3].max() < 1e-5
    grey = torch.tensor([0.299, 0.587, 0.114]).double().view(1, 3, 1, 1) * images(1, 1, 6, 6)
    colour = images(1, 3, 6, 6)
    weighted = (colour * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(edges(colour, luminance=True), edges(weighted), rtol=1e-5, atol=1e-6)
    assert edges(grey).shape[1] == 3
    assert torch.equal(edges(x, luminance=True), edges(x)), "grey images are their luminance"


def test_gradients_are_finite_on_flat_images() -> None:
    flat = torch.zeros(1, 1, 8, 8, requires_grad=True)
    for distance in (fourier_distance, edge_distance):
        (gradient,) = torch.autograd.grad(distance(flat, images(1, 1, 8, 8).float()).sum(), flat)
        assert gradient.isfinite().all()
        (gradient,) = torch.autograd.grad(distance(flat, torch.zeros(1, 1, 8, 8)).sum(), flat)
        assert gradient.isfinite().all()


def test_shares_of_white_noise() -> None:
    """The mean removed: 55 of 63 frequencies at 8x8 and rho 0.5."""
    assert float(high_frequency_ratio(images(4000, 1, 8, 8), 0.5)) == pytest.approx(55 / 63, abs=2e-3)
    assert float(high_frequency_ratio(images(30, 1, 64, 64), 0.5)) == pytest.approx(0.8064, abs=2e-3)
    smooth = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    assert high_frequency_ratio(smooth + 3.0, 0.5) < 0.05
    assert high_frequency_ratio(torch.full((1, 1, 8, 8), 2.0)) == 0


def test_distances_are_those_of_the_formulas() -> None:
    x, y = images(3, 2, 8, 8), images(3, 2, 8, 8, seed=1)
    wanted = (high_pass(x, 0.5) - high_pass(y, 0.5)).abs().flatten(1).mean(1)
    torch.testing.assert_close(fourier_distance(x, y, 0.5), wanted)
    torch.testing.assert_close(edge_distance(x, y), (edges(x) - edges(y)).abs().flatten(1).mean(1))
    f, g = images(3, 5), images(3, 5, seed=1)
    cosine = torch.nn.functional.cosine_similarity(f, g)
    torch.testing.assert_close(feature_distance(f, 7 * g), 2 - 2 * cosine)
    for rho in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"rho: found .*, expected a share of the Nyquist frequency"):
            high_pass(x, rho)
