"""Energy distance: values worked out by hand, both estimators, closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from distill.evaluation.metrics import energy
from distill.evaluation.metrics.energy import energy_distance, spread


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [3.0], [6.0]])
    between = (0 + 3 + 6 + 1 + 2 + 5) / 6
    # ordered pairs: |x - x'| sums to 2, |y - y'| to 2 (3 + 6 + 3) = 24
    assert energy_distance(x, y) == pytest.approx(2 * between - 2 / 2 - 24 / 6)
    assert energy_distance(x, y, unbiased=False) == pytest.approx(2 * between - 2 / 4 - 24 / 9)
    assert energy_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), unbiased=False) == 10


@pytest.mark.parametrize("unbiased", [True, False])
def test_chunks_change_nothing(unbiased, monkeypatch):
    x, y = normal(70, 3, 0), normal(41, 3, 1) + 1
    whole = energy_distance(x, y, unbiased=unbiased)
    distances = [[math.dist(a, b) for b in y.tolist()] for a in x.tolist()]
    assert 2 * sum(map(sum, distances)) / (70 * 41) - whole == pytest.approx(
        spread(x, unbiased=unbiased) + spread(y, unbiased=unbiased)
    )
    monkeypatch.setattr(energy, "CHUNK", 7)
    assert energy_distance(x, y, unbiased=unbiased) == pytest.approx(whole, rel=1e-12)
    known = spread(y, unbiased=unbiased)
    assert energy_distance(x, y, unbiased=unbiased, spread_of_y=known) == pytest.approx(whole, rel=1e-12)
    assert energy_distance(y, x, unbiased=unbiased) == pytest.approx(whole, rel=1e-12)
    assert energy_distance(x.view(70, 3, 1), y.view(41, 3, 1), unbiased=unbiased) == pytest.approx(whole)


def test_shifted_normals_have_their_closed_form():
    """X, Y ~ N(0, 1), N(m, 1): X - Y is N(-m, 2), whose mean absolute value is known."""
    m, s = 1.5, math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    exact = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    found = energy_distance(normal(4000, 1, 2), normal(4000, 1, 3) + m)
    assert found == pytest.approx(exact, rel=0.05)
    assert exact == pytest.approx(1.1, rel=0.1)


def test_one_estimator_is_unbiased_and_the_other_is_not():
    """Over 300 pairs of samples of one distribution, of sizes 20 and 30."""
    pairs = [(normal(20, 2, 2 * i), normal(30, 2, 2 * i + 1)) for i in range(300)]
    unbiased = torch.tensor([energy_distance(x, y) for x, y in pairs])
    biased = torch.tensor([energy_distance(x, y, unbiased=False) for x, y in pairs])
    error = float(unbiased.std()) / 300**0.5
    assert abs(float(unbiased.mean())) < 4 * error
    assert bool((unbiased < 0).any())
    assert bool((biased >= 0).all())
    mean_distance = math.sqrt(math.pi)  # E|X - X'| in the plane
    assert float(biased.mean()) == pytest.approx(mean_distance * (1 / 20 + 1 / 30), abs=4 * error)


def test_equal_samples_are_at_no_distance_however_far_out():
    x = normal(50, 2, 0) + 1e7
    assert energy_distance(x, x.flip(0), unbiased=False) == pytest.approx(0, abs=1e-9)
    assert energy_distance(x, x) < 0  # the pairs of a point with itself count between the sets alone


def test_wrong_sets_are_named():
    x = normal(5, 2, 0)
    with pytest.raises(ValueError, match="generated samples has 1 samples; this measure needs at least 2"):
        energy_distance(x[:1], x)
    with pytest.raises(ValueError, match="reference samples has 1 samples"):
        energy_distance(x, x[:1])
    with pytest.raises(ValueError, match="has 2 dimensions and reference samples has 1"):
        energy_distance(x, x[:, :1])
    bad = x.clone()
    bad[3, 0] = math.nan
    with pytest.raises(
        ValueError, match=r"reference samples has non-finite values in 1 of 5 samples \(first: 3\)"
    ):
        energy_distance(x, bad)
