"""Schedules of the consistency family: ends, monotonicity, published numbers, errors; and the half-life of an average."""

from __future__ import annotations

import math

import pytest
import torch

from distill.engine.ema import halflife_decay
from distill.process.curriculum import (
    adaptive_ema,
    doubling_scales,
    ect_r,
    ect_ratio,
    ema_and_scales,
    progressive_scales,
)

LEVELS = torch.logspace(-3, 2, 31, dtype=torch.float64)


@pytest.mark.parametrize(("start", "end"), [(2, 150), (2, 200), (5, 5), (1, 1)])
def test_progressive_scales_rise_from_start_to_end(start: int, end: int) -> None:
    total = 997
    scales = [progressive_scales(step, total, start, end) for step in range(total + 1)]
    assert scales[0] == max(start, 2)
    assert scales[-1] == end + 1
    assert scales == sorted(scales)


def test_adaptive_ema_keeps_the_memory_in_noise_levels() -> None:
    """exp(-c / (N - 1)): ema^start where there is one interval, and the same memory of levels ever after."""
    assert adaptive_ema(0, 100, 0.9, 2, 150) == pytest.approx(0.81)
    for step in (0, 10, 100):
        intervals = progressive_scales(step, 100, 2, 150) - 1
        assert intervals * math.log(adaptive_ema(step, 100, 0.9, 2, 150)) == pytest.approx(2 * math.log(0.9))


def test_modes() -> None:
    options = {"ema": 0.95, "start": 40, "end": 40}
    assert ema_and_scales(10**9, 1, **options, ema_mode="fixed", scale_mode="fixed") == (0.95, 40)
    assert ema_and_scales(0, 10, ema=0.0, start=2, end=20, ema_mode="fixed") == (0.0, 2)
    assert ema_and_scales(10, 10, ema=0.9, start=2, end=20) == (adaptive_ema(10, 10, 0.9, 2, 20), 21)


def test_doubling_scales() -> None:
    """iCT's own: 8 stages, 10 doubled up to 1280, and one more level."""
    total = 400_000
    stages = [doubling_scales(step, total) for step in range(0, total, total // 8)]
    assert stages == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert doubling_scales(total // 8 - 1, total) == 11
    assert doubling_scales(total, total) == 1281  # floor(k / K') is 8 there: the cap holds
    # an end between two doublings: floor(end / start) = 2 makes two stages, and the end is the cap
    assert [doubling_scales(step, 8, 10, 25) for step in (0, 3, 4, 7, 8)] == [11, 11, 21, 21, 26]
    assert doubling_scales(0, 1, 10, 10) == 11


@pytest.mark.parametrize("mapping", ["const", "sigmoid"])
def test_ect_pairs_close_up_over_the_stages(mapping: str) -> None:
    stages = torch.stack([ect_r(LEVELS, stage, 2.0, mapping) for stage in range(9)])
    assert (stages >= 0).all()
    assert (stages < LEVELS).all()
    assert (stages.diff(dim=0) >= 0).all()
    # at high noise the sigmoid is closed and both are t (1 - d)
    torch.testing.assert_close(
        stages[:, -1] / LEVELS[-1], torch.tensor([ect_ratio(n) for n in range(9)]).double()
    )


def test_ect_starts_as_denoising_and_can_be_capped() -> None:
    assert (ect_r(LEVELS[LEVELS < 1.9], 0) == 0).all()
    assert ect_r(torch.tensor([3.0]), 0) > 0
    assert ect_ratio(0, 256.0) == 255 / 256
    assert ect_ratio(20, 2.0, max_ratio=0.999) == pytest.approx(0.999)
    torch.testing.assert_close(ect_r(LEVELS, 20, mapping="const", max_ratio=0.999), 0.999 * LEVELS)
    torch.testing.assert_close(ect_r(LEVELS, 2, k=0.0), ect_r(LEVELS, 2, mapping="const"))
    assert ect_r(torch.ones(2, dtype=torch.bfloat16), 0).dtype == torch.float32
    assert ect_r(torch.empty(3, device="meta"), 1).shape == (3,)


def test_bad_input_is_refused() -> None:
    one = torch.ones(1)
    for call, message in (
        (lambda: progressive_scales(11, 10), "step, total: found 11 and 10"),
        (lambda: progressive_scales(-1, 10), "step, total: found -1 and 10"),
        (lambda: progressive_scales(0, 0), "step, total: found 0 and 0"),
        (lambda: progressive_scales(0, 10, 20, 10), "start, end: found 20 and 10"),
        (lambda: adaptive_ema(0, 10, 1.0), "ema: found 1.0"),
        (lambda: ema_and_scales(0, 10, ema=1.0, start=2, end=3), "ema: found 1.0"),
        (lambda: ema_and_scales(0, 10, ema=0.9, start=2, end=3, ema_mode="fix"), "ema_mode: found 'fix'"),
        (lambda: ema_and_scales(0, 10, ema=0.9, start=2, end=3, scale_mode="fix"), "scale_mode: found 'fix'"),
        (
            lambda: ema_and_scales(0, 10, ema=0.9, start=2, end=3, scale_mode="fixed"),
            "ema_mode: found 'adaptive'",
        ),
        (
            lambda: ema_and_scales(0, 10, ema=0.9, start=1, end=3, ema_mode="fixed", scale_mode="fixed"),
            "start: found 1, expected at least 2",
        ),
        (lambda: doubling_scales(0, 7), "total: found 7, expected at least 8 steps"),
        (lambda: doubling_scales(0, 10, 20, 10), "start, end: found 20 and 10"),
        (lambda: ect_r(one, 0, mapping="tanh"), "mapping: found 'tanh', expected one of"),
        (lambda: ect_r(one, 0, k=-1.0), "k, b: found -1.0"),
        (lambda: ect_r(one, -1), "stage: found -1"),
        (lambda: ect_r(one, 0, q=1.0), "q: found 1.0"),
        (lambda: ect_ratio(0, max_ratio=0.0), "max_ratio: found 0.0"),
        (lambda: halflife_decay(-1, 1, 1, 0.05), "images_before, batch, halflife_images, ramp: found -1"),
        (lambda: halflife_decay(0, 0, 1, 0.05), "found 0, 0"),
        (lambda: halflife_decay(0, 1, 1, 0.0), "above 0 or None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_halflife_is_counted_in_images() -> None:
    """After `halflife` images half of the start is left, whatever the batch; the ramp keeps it a part of the past."""
    for batch in (10, 100, 1000):
        left = 1.0
        for _ in range(10_000 // batch):
            left *= halflife_decay(0, batch, 10_000, None)
        assert left == pytest.approx(0.5)
    assert halflife_decay(0, 64, 1000, 0.05) == 0.0  # the first update copies
    assert halflife_decay(1e9, 64, 0, 0.05) == 0.0
    assert halflife_decay(2000, 100, 10_000, 0.05) == pytest.approx(0.5)
    assert halflife_decay(1e9, 100, 10_000, 0.05) == halflife_decay(0, 100, 10_000, None)
