"""Goldens of the evaluation measures (data/mmd/README.md): tolerances as stated there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Load
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from distill.evaluation.metrics.cmmd import cmmd, mean_kernel, unit_rows
from distill.evaluation.metrics.frechet import fd, frechet_distance, moments
from distill.evaluation.metrics.kid import kid, self_similarity
from distill.evaluation.metrics.precision import manifold, squared_radii

Golden = dict[str, Tensor]


@pytest.fixture(scope="module")
def golden(load: Load) -> Golden:
    return load("mmd", "metrics")


@pytest.mark.parametrize("side", ["real", "fake"])
def test_moments(golden: Golden, side: str) -> None:
    mean, cov = moments(golden[side])
    torch.testing.assert_close(mean, golden[f"fid.mu_{side}"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cov, golden[f"fid.cov_{side}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("key", ["cleanfid", "guided_diffusion", "torchmetrics_f64"])
def test_frechet_distance(golden: Golden, key: str) -> None:
    expected = golden[f"fid.{key}"].item()
    assert fd(golden["fake"], golden["real"]) == pytest.approx(expected, rel=1e-6)
    stored = frechet_distance(*(golden[f"fid.{k}"] for k in ("mu_fake", "cov_fake", "mu_real", "cov_real")))
    assert stored == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_singular_covariances_warns(golden: Golden) -> None:
    with pytest.warns(UserWarning, match="singular"):
        found = fd(golden["fake"][:10], golden["real"][:10])
    assert found == pytest.approx(golden["fid.small_n10"].item(), rel=1e-4)


def test_frechet_distance_to_itself(golden: Golden) -> None:
    assert fd(golden["real"], golden["real"]) == pytest.approx(golden["fid.same"].item(), abs=1e-9)


def test_kid_of_all_rows(golden: Golden) -> None:
    real, fake = golden["real"][:200], golden["fake"]
    found = kid(fake, real)
    assert found == pytest.approx(golden["kid.full_200"].item(), rel=1e-9)
    assert found == pytest.approx(golden["kid.torchmetrics_poly_mmd_200"].item(), rel=1e-9)
    assert kid(fake, real, self_similarity(real)) == found
    assert kid(real, real) == pytest.approx(golden["kid.same_200"].item(), rel=1e-9)


def test_kid_averaged_over_the_reference_subsets(golden: Golden) -> None:
    """100 subsets of 50 as clean-fid draws them: NumPy's legacy stream, second argument first."""
    real, fake = golden["real"], golden["fake"]
    draws = np.random.RandomState(0)
    values = []
    for _ in range(100):
        x = fake[draws.choice(len(fake), 50, replace=False)]
        y = real[draws.choice(len(real), 50, replace=False)]
        values.append(kid(x, y))
    assert np.mean(values) == pytest.approx(golden["kid.subsets100x50_seed0"].item(), rel=1e-9)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage(golden: Golden, k: int) -> None:
    real, fake = golden["real"], golden["fake"]
    found = manifold(fake, real, k)
    assert found.precision == golden[f"prdc{k}.precision"].item()
    assert found.recall == pytest.approx(golden[f"prdc{k}.recall"].item(), abs=1e-15)
    assert found.density == pytest.approx(golden[f"prdc{k}.density"].item(), abs=1e-12)
    assert found.coverage == pytest.approx(golden[f"prdc{k}.coverage"].item(), abs=1e-15)
    assert manifold(fake, real, k, squared_radii(real, k)) == found


def test_closed_balls_agree_with_the_guided_diffusion_evaluator(golden: Golden) -> None:
    found = manifold(golden["fake"], golden["real"], 3)
    assert found.precision == pytest.approx(golden["gd3.precision"].item(), abs=1e-15)
    assert found.recall == pytest.approx(golden["gd3.recall"].item(), abs=1e-15)


def test_cmmd(golden: Golden) -> None:
    x, y, expected = golden["cmmd.x"], golden["cmmd.y"], golden["cmmd.value"].item()
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(y, x) == pytest.approx(expected, rel=1e-9)
    assert cmmd(x, y, mean_kernel(y, y)) == cmmd(x, y)
    # The golden's rows have norm 1 (data/mmd/README.md): of embeddings of any norm, `unit_rows` makes the same value.
    lengths = torch.linspace(0.1, 30, len(x), dtype=x.dtype)[:, None]
    assert cmmd(unit_rows(lengths * x), unit_rows(y)) == pytest.approx(expected, rel=1e-9)


class Given(nn.Module):
    """Features, or logits, that are given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_inception_score_comes_from_torchmetrics(golden: Golden) -> None:
    score = InceptionScore(feature=Given(), splits=1)
    score.update(golden["is.probs"].log())
    assert float(score.compute()[0]) == pytest.approx(golden["is.all"].item(), rel=1e-9)


def test_so_does_kid_over_subsets(golden: Golden) -> None:
    """Of one subset, which is everything: larger ones are drawn at random."""
    metric = KernelInceptionDistance(feature=Given(), subsets=1, subset_size=200).set_dtype(torch.float64)
    metric.update(golden["real"][:200], real=True)
    metric.update(golden["fake"], real=False)
    assert float(metric.compute()[0]) == pytest.approx(golden["kid.full_200"].item(), rel=1e-9)
