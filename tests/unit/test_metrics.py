"""Distances, spread and coverage on sets whose answer is known, and what each measure must react to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.data.digits import Digits
from distill.evaluation.measure import Reference, measure
from distill.evaluation.metrics.diversity import class_std, pixel_std
from distill.evaluation.metrics.frechet import fd, frechet_distance
from distill.evaluation.metrics.kid import kid
from distill.evaluation.metrics.nearest import nearest_distances, nn_train
from distill.evaluation.metrics.precision import CHUNK, manifold, squared_radii
from distill.evaluation.metrics.sliced import quantile_distance, sliced_wasserstein
from distill.evaluation.samples import stratified_split
from distill.models.features import Digits64, load_digits64


def normal(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestFrechet:
    def test_of_diagonal_gaussians(self) -> None:
        """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
        s1, s2 = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([3.0, 0.5, 1.0]).double()
        m1, m2 = torch.zeros(3).double(), torch.tensor([1.0, -2.0, 0.5]).double()
        expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
        found = frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
        assert found == pytest.approx(expected.item(), rel=1e-12)

    def test_is_symmetric_and_rotation_invariant(self) -> None:
        x, y = normal(200, 6, 0) * 2 + 1, normal(150, 6, 1) @ normal(6, 6, 2)
        rotation = torch.linalg.qr(normal(6, 6, 3)).Q
        assert fd(x, y) == pytest.approx(fd(y, x), rel=1e-10)
        assert fd(x @ rotation, y @ rotation) == pytest.approx(fd(x, y), rel=1e-10)

    def test_of_equal_sets_is_zero(self) -> None:
        x = normal(100, 8, 0)
        assert fd(x, x.flip(0)) == pytest.approx(0, abs=1e-10)

    def test_of_a_shift_is_its_square(self) -> None:
        x = normal(100, 8, 0)
        assert fd(x, x + 0.5) == pytest.approx(8 * 0.25, rel=1e-9)


class TestKid:
    def test_is_unbiased_for_unequal_counts(self) -> None:
        """Mean over draws of one law within three standard errors of zero, and both signs occur."""
        values = torch.tensor([kid(normal(20, 4, 2 * i), normal(35, 4, 2 * i + 1)) for i in range(200)])
        assert values.mean().abs() < 3 * values.std() / len(values) ** 0.5
        assert (values < 0).any()
        assert (values > 0).any()

    def test_equals_the_sum_over_pairs(self) -> None:
        x, y = normal(7, 3, 0), normal(5, 3, 1)

        def k(a: Tensor, b: Tensor) -> float:
            return float((a @ b / 3 + 1) ** 3)

        xx = sum(k(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
        yy = sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
        xy = sum(k(a, b) for a in x for b in y) / 35
        assert kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


class TestManifold:
    def test_on_a_line(self) -> None:
        """k = 1: real balls [-1, 1], [0, 2], [1, 19]; the generated ones have radii 1, 1 and 28.5."""
        real = torch.tensor([[0.0], [1.0], [10.0]])
        generated = torch.tensor([[0.5], [1.5], [30.0]])
        assert squared_radii(real, 1).tolist() == [1.0, 1.0, 81.0]
        found = manifold(generated, real, k=1)
        assert found.precision == pytest.approx(2 / 3)
        # 0.5 lies in the balls of 0 and 1, 1.5 in those of 1 and 10 (8.5 < 9), 30 in none.
        assert found.density == pytest.approx(4 / 3)
        assert found.coverage == pytest.approx(1)
        assert found.recall == pytest.approx(1)
        assert manifold(generated[:2], real, k=1).recall == pytest.approx(2 / 3)

    def test_of_a_set_against_itself(self) -> None:
        """Integers, so that ties are exact: closed balls for precision and recall, open ones for density."""
        grid = torch.cartesian_prod(torch.arange(6), torch.arange(7)).double() ** 2
        found = manifold(grid, grid, k=3)
        assert found.precision == found.recall == found.coverage == 1
        assert found.density <= 1

    def test_does_not_depend_on_the_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x, y = normal(90, 5, 0), normal(70, 5, 1)
        whole = manifold(x, y)
        assert CHUNK > 90
        monkeypatch.setattr("distill.evaluation.metrics.precision.CHUNK", 13)
        assert manifold(x, y) == whole

    def test_repeated_samples_leave_recall_to_few_points(self) -> None:
        x, y = normal(300, 4, 0), normal(300, 4, 1)
        spread, repeated = manifold(x, y), manifold(x[:20].repeat(15, 1), y)
        assert repeated.recall < 0.1 < spread.recall
        assert repeated.coverage < 0.5 * spread.coverage
        assert repeated.precision == pytest.approx(spread.precision, abs=0.2)


class TestSliced:
    def test_in_one_dimension_is_the_quantile_distance(self) -> None:
        x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]])
        assert sliced_wasserstein(x, y, projections=3) == pytest.approx(5**0.5)

    def test_of_unequal_counts_is_that_of_repeated_samples(self) -> None:
        x, y = normal(6, 3, 0), normal(4, 3, 1)
        expected = sliced_wasserstein(x.repeat(2, 1), y.repeat(3, 1))
        assert sliced_wasserstein(x, y) == pytest.approx(expected, rel=1e-12)
        one, three = torch.tensor([[1.0]]), torch.tensor([[0.0, 1.0, 5.0]])
        assert quantile_distance(one, three) == pytest.approx((17 / 3) ** 0.5)

    def test_of_a_shift(self) -> None:
        """A shift s is seen along u as <s, u>: SW^2 = |s|^2 / D on average over directions."""
        x = normal(50, 16, 0)
        assert sliced_wasserstein(x, x + 1, projections=4096) == pytest.approx(1, rel=0.05)
        assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-7)


class TestDiversity:
    def test_class_std_ignores_the_means_and_weighs_classes_equally(self) -> None:
        base = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(4).view(3, 1, 2, 2)
        images = torch.cat([base, 10 + 3 * base, 10 + 3 * base])
        labels = torch.tensor([0] * 3 + [1] * 6)
        second = 3 * (4 / 5) ** 0.5
        assert class_std(images, labels) == pytest.approx((1 + second) / 2)
        assert pixel_std(images) > 5

    def test_class_std_shrinks_with_the_samples(self) -> None:
        images, labels = normal(100, 9, 0), torch.arange(100) % 5
        means = torch.stack([images[labels == c].mean(0) for c in range(5)])[labels]
        shrunk = means + 0.3 * (images - means)
        assert class_std(shrunk, labels) == pytest.approx(0.3 * class_std(images, labels))

    def test_nearest_training_image(self) -> None:
        train = torch.zeros(3, 1, 2, 2)
        train[1] = 2
        train[2] = 10
        images = torch.stack([torch.full((1, 2, 2), 1.75), torch.full((1, 2, 2), -1.0)])
        assert nearest_distances(images, train).tolist() == pytest.approx([0.5, 2.0])
        assert nn_train(images, train) == pytest.approx(1.25)


class TestErrors:
    @pytest.mark.parametrize("measure_pair", [fd, kid, manifold, sliced_wasserstein, nn_train])
    def test_name_the_set(self, measure_pair) -> None:  # type: ignore[no-untyped-def]
        x, bad = normal(20, 4, 0), normal(20, 4, 1)
        bad[3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"images|generated.*non-finite.*1 of 20.*first: 3"):
            measure_pair(bad, x)
        with pytest.raises(ValueError, match=r"(real|reference|training).*non-finite"):
            measure_pair(x, bad)
        with pytest.raises(ValueError, match="is empty"):
            measure_pair(x[:0], x)
        with pytest.raises(ValueError, match=r"4 dimensions and .* has 3"):
            measure_pair(x, x[:, :3])

    def test_too_few_samples(self) -> None:
        x = normal(6, 2, 0)
        with pytest.raises(ValueError, match="has 5 samples; this measure needs at least 6"):
            manifold(x[:5], x, k=5)
        with pytest.raises(ValueError, match="at least 2"):
            fd(x[:1], x)
        with pytest.raises(ValueError, match="class 1 has one sample"):
            class_std(x, torch.tensor([0, 0, 0, 1, 0, 0]))
        with pytest.raises(ValueError, match="expected 6 integer labels"):
            class_std(x, torch.zeros(6))


class TestSplit:
    def test_is_stratified_disjoint_and_exact(self) -> None:
        labels = torch.tensor([0] * 51 + [1] * 30 + [2] * 19)
        rest, held = stratified_split(labels, 100, 33, torch.Generator().manual_seed(0))
        assert sorted(torch.cat([rest, held]).tolist()) == list(range(100))
        assert len(held) == 33
        for found, share in zip(labels[held].bincount().tolist(), (51, 30, 19), strict=True):
            assert abs(found - 0.33 * share) < 1

    def test_without_labels_and_out_of_range(self) -> None:
        rest, held = stratified_split(None, 10, 4, torch.Generator())
        assert (len(rest), len(held)) == (6, 4)
        with pytest.raises(ValueError, match="cannot choose 10 of 10"):
            stratified_split(None, 10, 10, torch.Generator())


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def extractor() -> Digits64:
    return load_digits64()


@pytest.fixture(scope="module")
def reference(digits: Digits, extractor: Digits64) -> Reference:
    return Reference(digits.images, digits.labels, extractor)


def resampled(digits: Digits, pool: int | None = None) -> tuple[Tensor, Tensor]:
    """100 images a class, drawn with replacement from the first `pool` of the class."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for label in range(10):
        members = (digits.labels == label).nonzero()[:pool, 0]
        rows.append(members[torch.randint(len(members), (100,), generator=generator)])
    return digits.images[torch.cat(rows)], digits.labels[torch.cat(rows)]


class TestDigits:
    """The measures on real digits; bounds lie between what the named defect gives and what real data give."""

    def test_reference_values(self, reference: Reference, digits: Digits) -> None:
        real = reference.references()
        assert real["class_std"] == pytest.approx(0.330, abs=2e-3)
        assert real["pixel_std"] == pytest.approx(0.4605, abs=2e-3)
        assert 2.05 < real["heldout_nn"] < 2.2
        assert real["class_accuracy"] > 0.99
        assert reference.digest == digits.fingerprint()

    def test_floor_separates_real_from_noise(
        self, reference: Reference, extractor: Digits64, digits: Digits
    ) -> None:
        floor = reference.floor(splits=2)
        assert 0.02 < floor["fd"] < 0.1
        assert floor["kid"] < 0
        assert 0.03 < floor["sliced_wasserstein"] < 0.05
        noise = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        row = measure(noise, torch.arange(1000) % 10, reference, extractor)
        assert row["fd"] > 50 * floor["fd"]  # type: ignore[operator]
        assert row["kid"] > 0.1  # type: ignore[operator]
        assert row["coverage"] < 0.1  # type: ignore[operator]
        assert row["class_accuracy"] < 0.2  # type: ignore[operator]

    def test_row_has_the_keys_of_the_contract(self, reference: Reference, extractor: Digits64) -> None:
        images = reference.values[:20].float().view(20, 1, 8, 8)
        row = measure(images, None, reference, extractor)
        assert list(row) == [
            "fd", "kid", "cmmd", "sliced_wasserstein", "precision", "recall", "density", "coverage",
            "class_std", "pixel_std", "nn_train", "class_accuracy",
        ]  # fmt: skip
        assert [name for name, value in row.items() if value is None] == [
            "cmmd", "class_std", "class_accuracy",
        ]  # fmt: skip
        assert measure(images, torch.arange(20), reference, extractor)["class_std"] is None

    def test_a_dropped_class_lowers_coverage_and_recall(
        self, reference: Reference, extractor: Digits64, digits: Digits
    ) -> None:
        images, labels = resampled(digits)
        whole = measure(images, labels, reference, extractor)
        kept = labels != 3
        without = measure(images[kept], labels[kept], reference, extractor)
        assert without["coverage"] < whole["coverage"] - 0.05  # type: ignore[operator]
        assert without["recall"] < whole["recall"] - 0.05  # type: ignore[operator]
        assert without["fd"] > 3 * whole["fd"]  # type: ignore[operator]

    def test_repeated_training_images_lower_coverage_and_recall(
        self, reference: Reference, extractor: Digits64, digits: Digits
    ) -> None:
        whole = measure(*resampled(digits), reference, extractor)
        repeated = measure(*resampled(digits, pool=50), reference, extractor)
        assert repeated["coverage"] < whole["coverage"] - 0.1  # type: ignore[operator]
        assert repeated["recall"] < whole["recall"] - 0.1  # type: ignore[operator]
        assert repeated["nn_train"] == pytest.approx(0, abs=1e-5)

    def test_shrinking_to_class_means_raises_accuracy_and_lowers_the_rest(
        self, reference: Reference, extractor: Digits64, digits: Digits
    ) -> None:
        images, labels = resampled(digits)
        means = torch.stack([digits.images[digits.labels == c].mean(0) for c in range(10)])[labels]
        whole = measure(images, labels, reference, extractor)
        shrunk = measure(means + 0.25 * (images - means), labels, reference, extractor)
        assert shrunk["class_accuracy"] >= whole["class_accuracy"]  # type: ignore[operator]
        assert shrunk["precision"] > 0.95  # type: ignore[operator]
        assert shrunk["recall"] < 0.1  # type: ignore[operator]
        assert shrunk["coverage"] < 0.6  # type: ignore[operator]
        assert shrunk["class_std"] == pytest.approx(0.25 * whole["class_std"], rel=0.05)  # type: ignore[operator]

    def test_refuses_what_does_not_belong_to_the_reference(
        self, reference: Reference, extractor: Digits64, digits: Digits
    ) -> None:
        other = Digits64(sha256="0")
        with pytest.raises(ValueError, match="the reference was made with digits64"):
            measure(digits.images[:20], None, reference, other)
        with pytest.raises(ValueError, match=r"generated images are \[1, 9, 9\]"):
            measure(torch.zeros(20, 1, 9, 9), None, reference, extractor)
        broken = digits.images[:20].clone()
        broken[7] = torch.inf
        with pytest.raises(ValueError, match="generated images has non-finite"):
            measure(broken, None, reference, extractor)

    def test_protocol_describes_itself(self, reference: Reference) -> None:
        protocol = reference.protocol(2000, "digits, all images", floor={"fd": 0.0537})
        text = protocol.describe()
        for part in (
            "digits64",
            "2000 class-balanced",
            "1797 real",
            "1x8x8",
            "k=5",
            "fd_digits64@898 0.0537",
        ):
            assert part in text
        assert "\n" not in text
        assert protocol.to_dict()["resolution"] == [1, 8, 8]
        assert type(protocol).from_dict(protocol.to_dict()).describe() == text
        assert protocol.names()["fd"] == "fd_digits64"
        assert reference.references({"fd": 0.05})["floor_fd"] == 0.05
