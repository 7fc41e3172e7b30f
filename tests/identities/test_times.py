"""Grids by name and time samplers: lengths, ends, order, the numbers that other programs publish."""

from __future__ import annotations

import inspect
import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.indices import leading_indices, linspace_indices, student_indices, trailing_indices
from distill.process.times import (
    GRIDS,
    default_grid,
    grid,
    index_of,
    karras_grid,
    karras_index_level,
    karras_level,
    karras_levels,
    lognormal_level,
    lognormal_step_weights,
    shift,
    shifted_grid,
    sid_level,
    uniform_grid,
    uniform_index,
)
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosine, VPLinear, VPLinearTable, VPScaledLinear

PROCESSES = [
    Flow(),
    EDM(),
    EDM(sigma_min=0.01, sigma_max=10.0, rho=5.0),
    TrigFlow(),
    VPCosine(),
    VPLinear(),
    VPScaledLinear(),
    VPScaledLinear(zero_terminal_snr=True),
]
TABLE_GRIDS = ("leading", "trailing", "linspace", "student")


def middles(count: int) -> Tensor:
    """Uniform draws at the middles of equal bins: averages are integrals to the error of that rule."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_has_its_length_ends_and_order(process: Process, name: str) -> None:
    for steps in (1, 2, 7, 50, 128):
        if (name == "shifted" and not isinstance(process, Flow)) or (
            name in TABLE_GRIDS and not isinstance(process, VPScaledLinear)
        ):
            with pytest.raises(ValueError, match=r"expected (Flow\(\)|a table of noise levels)"):
                grid(name, process, steps)
            continue
        times = grid(name, process, steps)
        assert times.shape == (steps + 1,)
        assert times.dtype == torch.float64
        assert (times.diff() < 0).all()
        assert times[-1].item() == process.t_min
        if name != "leading":
            assert times[0].item() == process.t_max
        # what every consumer of a grid demands
        spec = SamplerSpec(steps=steps, times={steps: tuple(times.tolist())})
        assert torch.equal(spec.grid(process), times)


def test_names_and_options_are_checked() -> None:
    assert torch.equal(grid("shifted", Flow(), 4, factor=2.0), shift(uniform_grid(Flow(), 4), 2.0))
    assert torch.equal(grid("karras", EDM(), 4, rho=3.0), karras_grid(EDM(), 4, rho=3.0))
    with pytest.raises(ValueError, match=r"grid: found 'karas', expected one of \['karras', 'leading'"):
        grid("karas", EDM(), 4)
    with pytest.raises(ValueError, match=r"grid 'uniform': rho: no such key; expected device"):
        grid("uniform", EDM(), 4, rho=3.0)
    for name, make in GRIDS.items():
        assert list(inspect.signature(make).parameters)[:2] == ["process", "steps"], name
        with pytest.raises(ValueError, match="step"):
            grid(name, Flow() if name == "shifted" else VPScaledLinear(), 0)
    with pytest.raises(ValueError, match="factor: found 0"):
        shifted_grid(Flow(), 3, factor=0.0)


def test_the_default_is_karras_for_noise_levels_and_uniform_for_the_rest() -> None:
    for process in PROCESSES:
        expected = karras_grid(process, 6) if isinstance(process, EDM) else uniform_grid(process, 6)
        assert torch.equal(default_grid(process, 6), expected)
        assert torch.equal(SamplerSpec(steps=1, any_steps=True).grid(process, 6), expected)


def test_karras_levels() -> None:
    levels = karras_levels(18)
    assert (levels[0].item(), levels[-1].item()) == (80.0, 0.002)
    roots = levels ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17))
    assert karras_levels(1).tolist() == [80.0]
    torch.testing.assert_close(karras_levels(40, 0.002, 80.0, 7.0)[22].item(), 1.382, atol=5e-4, rtol=0.0)
    for bad in ({"count": 0}, {"sigma_min": 0.0}, {"sigma_min": 80.0}, {"rho": 0.0}, {"sigma_max": math.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            karras_levels(**({"count": 5} | bad))


def test_karras_grids_of_other_processes_are_the_same_noise_levels() -> None:
    """Inside the range of the process the times are those of EDM's levels; the ends are the process's own."""
    for process in (Flow(), TrigFlow(), VPCosine()):
        times = karras_grid(process, 12)
        levels = torch.exp(-process.log_ratio(times))[1:-1]
        torch.testing.assert_close(levels, karras_levels(12)[1:], atol=0.0, rtol=1e-9)
        open_end = karras_grid(process, 12, clean_end=False)
        torch.testing.assert_close(torch.exp(-process.log_ratio(open_end))[1:], karras_levels(13)[1:])
    # Index 0 of the table is the cleanest level, so nothing comes after it.
    table = VPScaledLinear()
    ends = torch.exp(-table.log_ratio(torch.tensor([0.0, 999.0]).double())).tolist()
    torch.testing.assert_close(
        torch.exp(-table.log_ratio(karras_grid(table, 12))), karras_levels(13, *ends), atol=0.0, rtol=1e-9
    )
    assert torch.equal(karras_grid(table, 12), karras_grid(table, 12, clean_end=False))
    assert karras_grid(table, 12, sigma_min=0.1)[-1] == 0
    assert karras_grid(table, 12, sigma_min=0.1, clean_end=False)[-1] > 0


def test_karras_grid_starts_where_it_is_told() -> None:
    times = karras_grid(EDM(), 10, sigma_max=5.0, sigma_min=0.01)
    assert (times[0].item(), times[-2].item(), times[-1].item()) == (5.0, 0.01, 0.0)
    start = karras_grid(Flow(), 10, sigma_max=5.0)[0]
    assert start.item() == pytest.approx(5 / 6)
    assert karras_grid(Flow(), 10)[0] == 1
    with pytest.raises(ValueError, match=r"sigma_max: found 100.0, expected a noise level of EDM.*: 0 .. 80"):
        karras_grid(EDM(), 10, sigma_max=100.0)
    with pytest.raises(ValueError, match=r"sigma_min: found 0.001, .*VPScaledLinear.*0.0291[0-9]* .. 14.6"):
        karras_grid(VPScaledLinear(), 10, sigma_min=0.001)
    with pytest.raises(ValueError, match="need 0 < sigma_min < sigma_max"):
        karras_grid(EDM(), 10, sigma_min=2.0, sigma_max=1.0)


def test_table_grids_are_the_published_ones() -> None:
    """Stable Diffusion, 1000 entries: the first and last times of the common step counts."""
    table = VPScaledLinear()
    leading = grid("leading", table, 50)
    assert leading[:2].tolist() + leading[-3:].tolist() == [981, 961, 21, 1, 0]
    assert grid("leading", table, 30)[:2].tolist() == [958, 925]
    assert grid("leading", table, 50, steps_offset=3)[0] == 983
    for name in ("trailing", "student"):
        times = grid(name, table, 50)
        assert times[:2].tolist() + times[-2:].tolist() == [999, 979, 19, 0]
        assert grid(name, table, 1).tolist() == [999, 0]
        assert grid(name, table, 4).tolist() == [999, 749, 499, 249, 0]
    # arXiv 2305.08891, table 2, and 48 steps, whose exact halves numpy's arange rounds its own way
    assert trailing_indices(1000, 10).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert trailing_indices(1000, 48)[:4].tolist() == [999, 978, 957, 936]
    assert student_indices(1000, 48)[:4].tolist() == [999, 978, 957, 937]
    assert linspace_indices(1000, 5).tolist() == [999, 749, 500, 250, 0]
    assert grid("linspace", table, 4).tolist() == [999, 749, 500, 250, 0]
    assert leading_indices(1000, 4).tolist() == [750, 500, 250, 0]


def test_a_student_keeps_every_second_level_of_its_teacher() -> None:
    for total, most in ((1000, 500), (999, 499), (5, 2)):
        for steps in range(1, most + 1, 1 if most < 10 else 7):
            student, teacher = student_indices(total, steps), student_indices(total, 2 * steps)
            assert torch.equal(student, teacher[::2])
            assert student[0] == total - 1
            assert (teacher.diff() < 0).all()
            assert teacher[-1] >= 0
            exact = [round(Fraction((j + 1) * total, steps)) - 1 for j in reversed(range(steps))]
            assert student.tolist() == exact


def test_index_grids_refuse_what_leaves_the_table_or_stands_still() -> None:
    table, short = VPScaledLinear(), VPLinearTable()
    for call, message in (
        (lambda: grid("leading", table, 50, steps_offset=0), "last starts at index 0"),
        (lambda: grid("leading", table, 50, steps_offset=20), r"steps_offset: found 20, expected 0 .. 19"),
        (lambda: grid("leading", table, 1001), "steps: found 1001, expected 1 .. 1000"),
        (lambda: grid("trailing", table, 1000), "last starts at index 0"),
        (lambda: grid("student", short, 4), "last starts at index 0"),
        (lambda: grid("student", table, 1001), "steps: found 1001, expected 1 .. 1000"),
        (lambda: grid("linspace", table, 1000), "steps: found 1001, expected 2 .. 1000"),
        (lambda: linspace_indices(1000, 1), "steps: found 1, expected 2 .. 1000"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert grid("student", short, 2).tolist() == [4, 1, 0]
    assert grid("linspace", table, 999).tolist() == list(range(999, -1, -1))


def test_sid_levels_remove_the_noisy_end() -> None:
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    highest = {1000: 80.0, 980: 71.66, 800: 24.408, 700: 12.382, 600: 5.839}
    for t_max, level in highest.items():
        found = sid_level(u, t_max)
        assert found[0].item() == pytest.approx(0.002)
        assert found[2].item() == pytest.approx(level, rel=1e-3)
    assert sid_level(u, 800)[1].item() == pytest.approx(0.9654, abs=1e-4)
    torch.testing.assert_close(sid_level(u, 1000), karras_level(u))
    for t_max in (0.0, 1001.0):
        with pytest.raises(ValueError, match="t_max: found"):
            sid_level(u, t_max)


def test_karras_index_level() -> None:
    u = middles(961)
    levels = karras_index_level(u)
    table = karras_levels(1000).flip(0)
    torch.testing.assert_close(levels, table[20:981], atol=0.0, rtol=1e-12)
    assert levels[0].item() == pytest.approx(0.0032, abs=1e-4)
    assert levels[-1].item() == pytest.approx(72.05, abs=0.01)
    for low, high in ((-1, 5), (6, 5), (0, 1000)):
        with pytest.raises(ValueError, match="low, high: found"):
            karras_index_level(u, low, high)


def test_uniform_index_holds_both_ends_and_never_leaves() -> None:
    assert torch.equal(uniform_index(middles(40), 3, 6).unique(return_counts=True)[1], torch.full((4,), 10))
    almost = torch.tensor([0.0, 1 - 2**-24, 1.0])  # the last float32 below 1, and 1 itself
    assert uniform_index(almost, 3, 6).tolist() == [3, 6, 6]
    assert uniform_index(almost, 0, 2**25).max() <= 2**25
    with pytest.raises(ValueError, match="low <= high"):
        uniform_index(almost, 2, 1)


def test_lognormal_levels() -> None:
    normal = math.sqrt(2) * torch.erfinv(2 * middles(20_001) - 1)
    log_level = lognormal_level(normal, mean=-1.1, std=2.0).log()
    assert log_level.mean().item() == pytest.approx(-1.1, abs=1e-6)
    assert log_level.std().item() == pytest.approx(2.0, abs=1e-3)
    assert lognormal_level(normal).median().item() == pytest.approx(math.exp(-1.2))


@pytest.mark.parametrize("count", [2, 11, 161])
def test_step_weights_are_the_mass_between_levels(count: int) -> None:
    levels = karras_levels(count)
    weights = lognormal_step_weights(levels, mean=-1.1, std=2.0)
    assert weights.shape == (count - 1,)
    assert weights.sum().item() == pytest.approx(1.0)
    mass = torch.tensor(
        [
            math.erf((math.log(a) + 1.1) / (math.sqrt(2) * 2))
            - math.erf((math.log(b) + 1.1) / (math.sqrt(2) * 2))
            for a, b in pairwise(levels.tolist())
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(weights, mass / mass.sum())
    # a grid that ends in 0 has the whole lower tail in its last step
    whole = lognormal_step_weights(torch.cat([levels, levels.new_zeros(1)]))
    assert whole.shape == (count,)
    assert torch.isfinite(whole).all()


def test_step_weights_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="levels: found shape"):
        lognormal_step_weights(torch.ones(1))
    with pytest.raises(ValueError, match="std: found 0"):
        lognormal_step_weights(karras_levels(5), std=0.0)


def test_index_of_draws_each_index_with_its_weight() -> None:
    weights = torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64)
    index = index_of(middles(1000), weights)
    assert torch.bincount(index, minlength=4).tolist() == [250, 0, 500, 250]
    assert index_of(torch.tensor([0.0, 0.25, 1.0]), weights).tolist() == [0, 2, 3]
    weights = lognormal_step_weights(karras_levels(21))
    counts = torch.bincount(index_of(middles(100_000), weights), minlength=20)
    torch.testing.assert_close(counts / 100_000.0, weights.float(), atol=2e-5, rtol=0.0)


def test_no_draw_is_read_on_the_host() -> None:
    """Tensors on ``meta`` have no values: reading one raises, as it would stall a device."""
    u = torch.empty(4, device="meta")
    for draw in (lognormal_level, karras_level, sid_level, karras_index_level):
        assert draw(u).shape == u.shape
    for process in PROCESSES:
        assert default_grid(process, 4, device="meta").is_meta
    weights = lognormal_step_weights(torch.empty(8, device="meta"))
    assert index_of(u, weights).shape == u.shape
    with torch.device("meta"):
        assert default_grid(EDM(), 3)[0].item() == 80.0
        assert grid("trailing", VPScaledLinear(), 4).tolist() == [999, 749, 499, 249, 0]
