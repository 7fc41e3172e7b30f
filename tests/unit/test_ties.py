"""Measures on sets with equal rows, equal distances and flat covariances, against formulas written another way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from distill.data.digits import Digits
from distill.evaluation.certificate import mode_of
from distill.evaluation.measure import Reference, extract, measure
from distill.evaluation.metrics.cmmd import cmmd, unit_rows
from distill.evaluation.metrics.diversity import class_std, pixel_std
from distill.evaluation.metrics.energy import energy_distance
from distill.evaluation.metrics.frechet import fd
from distill.evaluation.metrics.kid import kid
from distill.evaluation.metrics.nearest import nearest_distances, nn_train
from distill.evaluation.metrics.precision import manifold, squared_distances, squared_radii
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.models.features import load_digits64


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_scipy(x: Tensor, y: Tensor, k: int = 5) -> tuple[float, ...]:
    """The four measures from whole matrices of direct distances."""
    a, b = x.numpy(), y.numpy()

    def radii(rows: np.ndarray) -> np.ndarray:
        own = cdist(rows, rows)
        np.fill_diagonal(own, np.inf)
        return np.sort(own, axis=1)[:, k - 1]

    between, x_radii, y_radii = cdist(a, b), radii(a), radii(b)
    return (
        float((between <= y_radii).any(1).mean()),
        float((between <= x_radii[:, None]).any(0).mean()),
        float((between < y_radii).sum() / (k * len(a))),
        float((between.min(0) < y_radii).mean()),
    )


def cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Sets with ties at every scale."""
    features = extract(load_digits64(), Digits().images[:600])[0]
    pixels = Digits().images[:600].flatten(1).double()
    mixed = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    points = normal(300, 16, 1)
    clusters = torch.cat([points[:100] * 1e-9, 1 + points[100:] * 1e-8])
    return {
        "features against themselves": (features, features),
        "in another order": (features[mixed], features),
        "pixels against themselves": (pixels[mixed], pixels),
        "a part": (features[:200], features),
        "one row": (features[:1].repeat(50, 1), features[:1].repeat(50, 1)),
        "one row against many": (features[:1].repeat(50, 1), features),
        "many against one row": (features, features[:1].repeat(50, 1)),
        "every row twice": (features[:300].repeat(2, 1), features[:300]),
        "every row eight times": (points[:40].repeat(8, 1), points[:40].repeat_interleave(8, 0)),
        "far from the origin": (points + 1000, points[mixed[mixed < 300]] + 1000),
        "tiny": (points * 1e-8 + 1, points * 1e-8 + 1),
        "tight clusters": (clusters, clusters.flip(0)),
        "huge": (points * 1e8, points.flip(0) * 1e8),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_the_four_measures_are_those_of_direct_distances(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = cases()[name]
    expected = pytest.approx(by_scipy(x, y), abs=1e-12)
    assert manifold(x, y) == expected
    for chunk in (7, 64):  # a pair has one distance, whatever block it is computed in
        monkeypatch.setattr("distill.evaluation.metrics.precision.CHUNK", chunk)
        assert manifold(x, y) == expected


@pytest.mark.parametrize("threads", [1, 2])
def test_digits_against_themselves(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        features = extract(load_digits64(), Digits().images)[0]
        assert tuple(manifold(features, features)) == (1, 1, 1, 1)
    finally:
        torch.set_num_threads(before)


def test_one_row_many_times() -> None:
    """All radii are 0: closed balls hold their centre, open ones hold nothing."""
    row = normal(1, 64, 0).repeat(50, 1)
    assert squared_radii(row, 5).tolist() == [0.0] * 50
    assert tuple(manifold(row, row)) == (1, 1, 0, 0)


def test_noise_of_products_decides_no_tie() -> None:
    """On a lattice every radius is met by many points; a turn of the axes leaves all distances what they are."""
    lattice = torch.tensor(list(itertools.product(range(5), repeat=3)), dtype=torch.float64)
    turn = torch.linalg.qr(normal(3, 3, 4)).Q
    expected = pytest.approx(by_scipy(lattice, lattice), abs=1e-12)
    assert manifold(lattice, lattice) == expected
    assert manifold(lattice @ turn + 0.1, lattice @ turn + 0.1) == expected


def test_squared_distances_of_near_rows() -> None:
    x = normal(40, 8, 0)
    y = torch.cat([x + 1e-7 * normal(40, 8, 1), x, x * 3, normal(20, 8, 2) * 1e-3])
    found = squared_distances(x, y)
    torch.testing.assert_close(found, torch.from_numpy(cdist(x.numpy(), y.numpy()) ** 2), rtol=1e-10, atol=0)
    assert not found[:, 40:80].diagonal().any()


def test_copies_of_training_images_lie_at_distance_zero() -> None:
    images = Digits().images
    assert nearest_distances(images[:300], images).tolist() == [0.0] * 300
    assert nn_train(images[:50] / 3 + 0.1, images[:100] / 3 + 0.1) == 0


def test_frechet_of_flat_sets() -> None:
    """On a line the distance is that of two normal laws in one dimension: the other dimensions add nothing."""
    a, b, along = normal(60, 1, 0), 2 * normal(50, 1, 1) + 1, normal(1, 12, 2)
    along /= along.norm()
    expected = float((a.mean() - b.mean()).square() + (a.std() - b.std()).square())
    assert fd(a @ along, b @ along) == pytest.approx(expected, abs=1e-6)
    one = normal(1, 12, 3)
    assert fd(one.repeat(30, 1), one.repeat(20, 1)) == pytest.approx(0, abs=1e-12)
    assert fd(one.repeat(30, 1), one.repeat(20, 1) + 0.5) == pytest.approx(12 * 0.25, rel=1e-12)


def test_equal_rows_in_every_other_measure() -> None:
    one, other = normal(1, 6, 0), normal(1, 6, 1)
    x, y = one.repeat(9, 1), other.repeat(7, 1)
    k = lambda a, b: float((a @ b.T / 6 + 1) ** 3)  # noqa: E731
    assert kid(x, y) == pytest.approx(k(one, one) + k(other, other) - 2 * k(one, other), rel=1e-12)
    assert kid(x, x) == pytest.approx(0, abs=1e-12)
    gap = float((one - other).norm())
    assert energy_distance(x, y) == pytest.approx(2 * gap, rel=1e-12)
    assert energy_distance(x, x) == 0
    assert sliced_wasserstein(x, x[:5]) == pytest.approx(0, abs=1e-15)
    assert cmmd(unit_rows(x), unit_rows(x)) == 0
    a, b = unit_rows(one), unit_rows(other)
    expected = 1000 * (2 - 2 * np.exp(-float((a - b).square().sum()) / 200))
    assert cmmd(a.repeat(9, 1), b.repeat(7, 1)) == pytest.approx(expected, rel=1e-9)
    assert pixel_std(x) == class_std(x, torch.zeros(9, dtype=torch.int64)) == 0
    assert mode_of(x, one, 1e-12).tolist() == [0] * 9


@pytest.mark.filterwarnings("ignore:generated features")
def test_a_class_of_one_sample_has_no_spread() -> None:
    digits = Digits()
    extractor = load_digits64()
    reference = Reference(digits.images, digits.labels, extractor)
    row = measure(digits.images[:12], torch.arange(12), reference, extractor)
    assert row["class_std"] is None
    assert row["nn_train"] == 0
