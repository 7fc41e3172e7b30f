"""CMMD and the Inception Score on sets whose value is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.evaluation.metrics.cmmd import cmmd, unit_rows


def embeddings(count: int, seed: int, shift: float = 0.0, dim: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return unit_rows(torch.randn(count, dim, generator=generator, dtype=torch.float64) + shift)


class TestCmmd:
    def test_of_a_set_against_itself_is_exactly_zero(self) -> None:
        x = embeddings(70, 0)
        assert cmmd(x, x.clone()) == 0.0

    def test_does_not_depend_on_the_order(self) -> None:
        x, y = embeddings(70, 0), embeddings(50, 1, 0.3)
        order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
        assert cmmd(x[order], y) == pytest.approx(cmmd(x, y), rel=1e-10)
        assert cmmd(x[order], x) == pytest.approx(0, abs=1e-11)

    def test_of_two_points_is_the_formula(self) -> None:
        """One embedding each, orthogonal: |a - b|^2 = 2, so CMMD = 1000 (1 + 1 - 2 exp(-2 / 200))."""
        x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)), rel=1e-12)

    def test_of_one_law_is_positive_and_shrinks_with_the_count(self) -> None:
        """Biased: the expected value is (1/n + 1/m) times the mean of 1 - k, here near 1 - exp(-2/200)."""
        draws = [cmmd(embeddings(50, 2 * i), embeddings(50, 2 * i + 1)) for i in range(40)]
        few, many = sum(draws) / 40, cmmd(embeddings(500, 0), embeddings(500, 1))
        assert few == pytest.approx(1000 * 2 / 50 * (1 - math.exp(-0.01)), rel=0.1)
        assert 0 < many < few / 5
        assert cmmd(embeddings(500, 0), embeddings(500, 1, 0.5)) > 10 * many

    def test_does_not_depend_on_the_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = embeddings(70, 0), embeddings(50, 1, 0.3)
        whole = cmmd(x, y)
        monkeypatch.setattr("distill.evaluation.metrics.cmmd.CHUNK", 13)
        assert cmmd(x, y) == pytest.approx(whole, rel=1e-12)

    def test_errors_name_the_set(self) -> None:
        x = embeddings(5, 0)
        with pytest.raises(ValueError, match="generated embeddings is empty"):
            cmmd(x[:0], x)
        with pytest.raises(ValueError, match=r"24 dimensions and reference embeddings has 3"):
            cmmd(x, x[:, :3])
        with pytest.raises(ValueError, match="reference embeddings has non-finite"):
            cmmd(x, x / 0)
        with pytest.raises(ValueError, match="generated embeddings has rows of zeros"):
            unit_rows(0 * x, "generated embeddings")
