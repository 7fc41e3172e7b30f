"""Points: draws by number, the mixture they come from, and the exact teacher that belongs to them."""

from __future__ import annotations

import pytest
import torch

from distill.data.cond import Cond
from distill.data.points import Points, mixture_means, ring_means
from distill.models.analytic import exact_denoiser
from distill.process.flow import Flow
from distill.process.vp import VPCosine

RING = {"count": 5, "radius": 2.0}


def test_a_point_is_a_function_of_seed_stream_and_number():
    few, many = Points(ring=RING, count=10), Points(ring=RING, count=300)
    assert torch.equal(few.images, many.images[:10])
    assert torch.equal(few.labels, many.labels[:10])
    for other in (Points(ring=RING, count=10, seed=1), Points(ring=RING, count=10, stream="b")):
        assert not torch.equal(few.images, other.images)
    again = few.fresh(3, "again")
    assert torch.equal(again.images, Points(ring=RING, count=10, seed=3, stream="again").images)


def test_points_are_those_of_the_mixture():
    data = Points(ring=RING, std=0.25, count=20_000)
    assert data.images.dtype == torch.float32
    assert data.labels.bincount() == pytest.approx([4000] * 5, abs=4 * (20_000 * 0.2 * 0.8) ** 0.5)
    for k, mean in enumerate(ring_means(5, 2.0)):
        cloud = data.images[data.labels == k].double()
        assert cloud.mean(0).tolist() == pytest.approx(mean, abs=4 * 0.25 / 4000**0.5)
        assert cloud.std(0).tolist() == pytest.approx([0.25, 0.25], rel=0.05)
    assert torch.tensor(ring_means(5, 2.0)).norm(dim=1).tolist() == pytest.approx([2.0] * 5)
    assert ring_means(5, 2.0)[0] == [2.0, 0.0]


def test_as_a_source():
    rows = torch.tensor([4, 0, 4])
    plain, labelled = Points(ring=RING, count=9), Points(ring=RING, count=9, labelled=True)
    batch = plain.fetch(rows, torch.arange(3))
    assert (plain.num_classes, plain.sample_shape, len(plain)) == (0, (2,), 9)
    assert torch.equal(batch.x0, plain.images[rows])
    assert torch.equal(batch.ids, rows)
    assert batch.cond.get("label") is None
    assert labelled.num_classes == 5
    assert torch.equal(labelled.fetch(rows, torch.arange(3)).cond.get("label"), labelled.labels[rows])
    space = Points(means=[[0.0, 1.0, 2.0]], std=0.0, count=4)
    assert space.sample_shape == (3,)
    assert space.images.tolist() == [[0.0, 1.0, 2.0]] * 4


def test_the_fingerprint_knows_every_option():
    options = [
        {},
        {"std": 0.2},
        {"count": 101},
        {"seed": 1},
        {"stream": "b"},
        {"ring": {"count": 5, "radius": 1}},
    ]
    prints = {Points(**({"ring": RING, "count": 100} | option)).fingerprint() for option in options}
    assert len(prints) == len(options)
    assert Points(ring=RING, count=100).fingerprint() in prints


@pytest.mark.parametrize("process", [Flow(), VPCosine()], ids=repr)
def test_the_exact_teacher_is_the_best_predictor_of_these_points(process):
    """x0 - E[x0 | x_t] is uncorrelated with every function of x_t; it is not for a teacher of other data."""
    data = Points(ring=RING, std=0.3, count=20_000)
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(20_000, generator=generator, dtype=torch.float64)
    x_t = process.add_noise(data.images.double(), eps, t)
    features = torch.cat([x_t, x_t.sin(), x_t.prod(1, keepdim=True), torch.ones_like(t)[:, None]], dim=1)

    def correlation(std: float, radius: float) -> float:
        """The largest |mean of residual x feature| in units of its standard error."""
        teacher = exact_denoiser(process, ring_means(5, radius), std)
        residual = data.images - teacher.x0(x_t, t, Cond.nothing(20_000))
        products = residual[:, :, None] * features[:, None]
        return float((products.mean(0) / products.std(0) * 20_000**0.5).abs().max())

    assert correlation(0.3, 2.0) < 4.5
    assert correlation(0.3, 1.8) > 9
    assert correlation(0.6, 2.0) > 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ring, means: found neither, expected exactly one"),
        ({"ring": RING, "means": [[0.0]]}, "ring, means: found both"),
        ({"ring": {"count": 5}}, "ring: found {'count': 5}, expected a count"),
        ({"ring": {"count": 0, "radius": 1}}, "ring: found"),
        ({"ring": {"count": 5, "radius": "a"}}, "ring: found"),
        ({"ring": RING | {"angle": 1}}, "ring: found"),
        ({"means": [1.0, 2.0]}, r"means: expected \[K, D\]"),
        ({"means": [[1.0], [1.0, 2.0]]}, r"means: expected \[K, D\] numbers"),
        ({"means": []}, r"means: expected \[K, D\]"),
    ],
)
def test_wrong_mixtures_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mixture_means(options.get("ring"), options.get("means"))


def test_wrong_counts_are_named():
    with pytest.raises(ValueError, match="count: expected at least 1 point, found 0"):
        Points(ring=RING, count=0)
    with pytest.raises(ValueError, match="std: expected at least 0, found -1"):
        Points(ring=RING, std=-1)
