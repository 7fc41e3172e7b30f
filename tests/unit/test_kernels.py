"""Kernels and MMD^2: against sums over pairs, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.evaluation.metrics.kid import kid
from distill.models.kernels import CHUNK, Kernel, mean_within, mmd2, squared_distances


def normal(count: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) + shift


KERNELS: dict[str, tuple[dict[str, Any], Any]] = {
    "polynomial": ({}, lambda a, b: (float(a @ b) / 3 + 1) ** 3),
    "polynomial of degree 1": ({"degree": 1, "c": 0.5}, lambda a, b: float(a @ b) / 3 + 0.5),
    "linear": ({"name": "linear", "gamma": 2.0}, lambda a, b: 2 * float(a @ b)),
    "rbf": ({"name": "rbf"}, lambda a, b: math.exp(-float((a - b).square().sum()) / 3)),
    "rbf_mixture": (
        {"name": "rbf_mixture", "gamma": 0.7, "scales": [0.5, 3.0]},
        lambda a, b: sum(math.exp(-s * 0.7 * float((a - b).square().sum())) for s in (0.5, 3.0)) / 2,
    ),
}


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("name", KERNELS)
def test_equals_the_sum_over_pairs(name: str, estimator: str) -> None:
    options, k = KERNELS[name]
    x, y = normal(7, 3, 0), normal(5, 3, 1, shift=0.5)

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        values = [
            k(u, v)
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not same or estimator == "biased" or i != j
        ]
        return sum(values) / len(values)

    terms = mmd2(x, y, Kernel(**options), estimator)
    assert float(terms.xx) == pytest.approx(mean(x, x, True), rel=1e-12)
    assert float(terms.yy) == pytest.approx(mean(y, y, True), rel=1e-12)
    assert float(terms.xy) == pytest.approx(mean(x, y, False), rel=1e-12)
    assert float(terms.mmd2) == pytest.approx(float(terms.xx + terms.yy - 2 * terms.xy), rel=1e-12)


def test_classes_are_compared_with_themselves_alone() -> None:
    x, y = normal(9, 3, 0), normal(8, 3, 1)
    a, b = torch.arange(9) % 3, torch.arange(8) % 3
    terms, kernel = mmd2(x, y, Kernel("rbf"), classes=(a, b)), Kernel("rbf")
    same = (a[:, None] == a) & ~torch.eye(9, dtype=torch.bool)
    assert float(terms.xx) == pytest.approx(float((kernel(x, x) * same).sum()) / 72, rel=1e-12)
    assert float(terms.xy) == pytest.approx(float((kernel(x, y) * (a[:, None] == b)).sum()) / 72, rel=1e-12)
    # The same samples under other labels: equal marginals, which the labels tell apart.
    wrong = mmd2(x, x.clone(), Kernel("rbf"), "biased", classes=(a, (a + 1) % 3)).mmd2
    right = mmd2(x, x.clone(), Kernel("rbf"), "biased", classes=(a, a)).mmd2
    assert float(right) == pytest.approx(0, abs=1e-12)
    assert float(wrong) > 0.1


def test_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(60, 4, 0), normal(45, 4, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    for kernel in (Kernel(), Kernel("rbf_mixture", gamma=0.2)):
        whole = mmd2(x, y, kernel)
        assert float(mmd2(x[order], y, kernel).mmd2) == pytest.approx(float(whole.mmd2), rel=1e-9)
        assert float(mmd2(x, x.clone(), kernel).mmd2) < 0, "unbiased"
        assert float(mmd2(x, x.clone(), kernel, "biased").mmd2) == pytest.approx(0, abs=1e-12)
        known = mmd2(x, y, kernel, yy=mean_within(kernel, y))
        assert torch.equal(torch.stack(known), torch.stack(whole))
        assert CHUNK > 60
        with monkeypatch.context() as patch:
            patch.setattr("distill.models.kernels.CHUNK", 13)
            torch.testing.assert_close(
                torch.stack(mmd2(x, y, kernel)), torch.stack(whole), rtol=1e-12, atol=0
            )
    assert float(mmd2(x, y, Kernel()).mmd2) == pytest.approx(kid(x, y), rel=1e-12)
    # Over random halves of one sample the mean is 0 within its error.
    everything, draws = normal(80, 3, 5), []
    for seed in range(200):
        rows = torch.randperm(80, generator=torch.Generator().manual_seed(seed))
        draws.append(float(mmd2(everything[rows[:40]], everything[rows[40:]], Kernel("rbf")).mmd2))
    mean = sum(draws) / 200
    error = (sum((value - mean) ** 2 for value in draws) / 199 / 200) ** 0.5
    assert abs(mean) < 3 * error


def test_the_real_side_gets_no_gradient_where_it_asks_none() -> None:
    x, y = normal(6, 3, 0).requires_grad_(True), normal(5, 3, 1)
    mmd2(x, y, Kernel()).mmd2.backward()
    assert x.grad is not None
    assert y.grad is None


def test_autocast_does_not_reach_the_gram_matrix() -> None:
    x, y = normal(6, 300, 0).float(), normal(5, 300, 1).float()
    for kernel in (Kernel(), Kernel("rbf")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kernel(x, y)
        assert found.dtype == torch.float32
        assert torch.equal(found, kernel(x, y))


def test_the_median_heuristic() -> None:
    y = normal(50, 4, 0)
    kernel = Kernel("rbf_mixture", gamma="median").settled(y)
    pairs = torch.pdist(y).square()
    assert kernel.gamma == pytest.approx(1 / float(pairs.median()), rel=1e-9)
    assert kernel.settled(2 * y) is kernel, "a number stays"
    with pytest.raises(ValueError, match="gamma: found 'median', but half of the real features are equal"):
        Kernel("rbf", gamma="median").settled(torch.ones(4, 2).double())
    with pytest.raises(ValueError, match="gamma: found 'median'; expected a kernel that `settled`"):
        Kernel("rbf", gamma="median")(y, y)


def test_distances_are_never_negative() -> None:
    x = 1e3 + normal(30, 4, 0)
    found = squared_distances(x, x)
    assert found.min() >= 0
    torch.testing.assert_close(found, torch.cdist(x, x).square(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cauchy"}, "name: found 'cauchy', expected one of"),
        ({"degree": 0}, "degree: found 0, expected an integer of at least 1"),
        ({"degree": 2.5}, "degree: found 2.5"),
        ({"degree": True}, "degree: found True"),
        ({"gamma": 0.0}, "gamma: found 0.0, expected a positive number, 'median', or null"),
        ({"gamma": -1}, "gamma: found -1"),
        ({"gamma": "mean"}, "gamma: found 'mean'"),
        ({"c": math.inf}, "c: found inf"),
        ({"name": "rbf_mixture", "scales": []}, r"scales: found \[\], expected a list of positive numbers"),
        ({"name": "rbf_mixture", "scales": [1.0, 0.0]}, r"scales: found \[1.0, 0.0\]"),
        ({"name": "rbf", "degree": 2}, "degree: found 2, which the kernel 'rbf' does not have; expected 3"),
        ({"name": "linear", "c": 2.0}, "c: found 2.0, which the kernel 'linear' does not have"),
        ({"scales": [1.0]}, r"scales: found \[1.0\], which the kernel 'polynomial' does not have"),
    ],
)
def test_bad_kernels(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kernel(**options)


def test_bad_rows() -> None:
    x, y = normal(6, 3, 0), normal(5, 3, 1)
    for bad in (x.half(), x.bfloat16(), x[0]):
        with pytest.raises(
            ValueError, match=r"features: generated: found .* expected \[N, D\] in float32 or float64"
        ):
            mmd2(bad, y, Kernel())
        with pytest.raises(ValueError, match="features: real: found"):
            mmd2(y, bad, Kernel())
    with pytest.raises(ValueError, match="found 3 dimensions of generated and 2 of real samples"):
        mmd2(x, y[:, :2], Kernel())
    with pytest.raises(ValueError, match="features: found 1 samples, expected at least 2 on each side"):
        mmd2(x[:1], y, Kernel())
    with pytest.raises(ValueError, match="features: found 1 samples"):
        mmd2(x, y[:1], Kernel())
    with pytest.raises(ValueError, match="estimator: found 'v', expected one of"):
        mmd2(x, y, Kernel(), "v")
