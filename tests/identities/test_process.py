"""Identities of the processes: conversions there and back, derivatives, matched times; exact to rounding."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from torch import Tensor

from distill.methods.losses.flow import flow_matching_loss, k_step_times
from distill.models.guidance import guide
from distill.process.base import KINDS, Process, at_least_float32, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import (
    logit_normal,
    shift,
    skewed,
    truncated_exponential,
    u_shaped,
    uniform_grid,
    uniform_times,
)
from distill.process.trig import TrigFlow
from distill.process.vp import (
    VPCosine,
    VPCosineIDDPM,
    VPLinear,
    VPLinearBetas,
    VPLinearTable,
    VPScaledLinear,
)
from distill.samplers.ode import ddim, ddim_step, euler, heun


class Spiral(Process):
    """Neither straight nor variance preserving, only the four functions: every default of the base."""

    t_min, t_max = 0.0, 2.0

    def alpha(self, t: Tensor) -> Tensor:
        return (2 - at_least_float32(t)) ** 2 / 4

    def sigma(self, t: Tensor) -> Tensor:
        t = at_least_float32(t)
        return t + t**2

    def d_alpha(self, t: Tensor) -> Tensor:
        return (at_least_float32(t) - 2) / 2

    def d_sigma(self, t: Tensor) -> Tensor:
        return 1 + 2 * at_least_float32(t)


PROCESSES = [
    Flow(),
    VPCosine(),
    VPCosine(logsnr_max=12.0),
    VPLinear(),
    VPScaledLinear(),
    VPScaledLinear(zero_terminal_snr=True),
    VPLinearBetas(),
    VPCosineIDDPM(8),
    VPLinearTable(),
    EDM(),
    TrigFlow(),
    TrigFlow(sigma_data=1.0),
    Spiral(),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=repr)


def inner_times(process: Process, count: int = 7) -> Tensor:
    """Times away from both ends, off the integers; for EDM, whose levels span decades, even in their logarithm."""
    if isinstance(process, EDM):
        return torch.logspace(-2, math.log10(0.75 * process.sigma_max), count, dtype=torch.float64)
    fraction = torch.linspace(0.03, 0.96, count, dtype=torch.float64)
    return process.t_min + (process.t_max - process.t_min) * fraction


def kinds_of(process: Process) -> list[str]:
    return [kind for kind in KINDS if kind != "v" or process.variance_preserving]


def draw(batch: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, batch, *shape, generator=generator, dtype=torch.float64)
    return x0, eps


@every_process
@pytest.mark.parametrize("kind_from", KINDS)
def test_conversion_matches_the_target_and_comes_back(process: Process, kind_from: str) -> None:
    t = inner_times(process)
    x0, eps = draw(len(t), 2, 3)
    x_t = process.add_noise(x0, eps, t)
    for kind_to in KINDS:
        if not {kind_from, kind_to} <= set(kinds_of(process)):
            with pytest.raises(ValueError, match=type(process).__name__):
                process.convert(kind_from, x0, x_t, t, kind_to)
            continue
        truth = process.target(kind_from, x0, eps, t)
        there = process.convert(kind_from, truth, x_t, t, kind_to)
        torch.testing.assert_close(there, process.target(kind_to, x0, eps, t), atol=1e-9, rtol=1e-9)
        # A wrong prediction must survive the trip as well: the conversion is a bijection, not a projection.
        wrong = truth + eps.flip(0)
        there = process.convert(kind_from, wrong, x_t, t, kind_to)
        torch.testing.assert_close(
            process.convert(kind_to, there, x_t, t, kind_from), wrong, atol=1e-9, rtol=1e-9
        )


def test_same_kind_is_untouched_and_kinds_are_checked() -> None:
    x0, eps = draw(3, 2)
    t = torch.full((3,), 0.5)
    assert Flow().convert("eps", eps, x0, t, "eps") is eps
    with pytest.raises(ValueError, match="x0, eps, v, velocity, score"):
        Flow().convert("epsilon", eps, x0, t, "x0")
    with pytest.raises(ValueError, match="Flow"):
        Flow().convert("v", eps, x0, t, "v")
    with pytest.raises(ValueError, match="shapes differ"):
        Flow().convert("eps", eps[:, :1], x0, t, "x0")


def test_expand_names_both_shapes() -> None:
    assert expand(torch.ones(3), torch.ones(3, 2, 4)).shape == (3, 1, 1)
    for t in (torch.ones(()), torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(ValueError, match=r"rank \d.*for rank 2, shape \(3, 2\)"):
            expand(t, torch.ones(3, 2))


@every_process
def test_conversion_at_the_ends_of_time(process: Process) -> None:
    """What a prediction still tells at an end of time comes out finite and right."""
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
    x0, eps = draw(2, 4)
    x_t = process.add_noise(x0, eps, ends)
    if not isinstance(process, VPLinear):  # its d_sigma is infinite at 0
        velocity = process.target("velocity", x0, eps, ends)
        if not isinstance(process, Spiral):  # alpha = alpha' = 0 at its end
            torch.testing.assert_close(
                process.convert("velocity", velocity, x_t, ends, "x0"), x0, atol=1e-8, rtol=1e-8
            )
    # at t_max x0 determines eps, whatever alpha is; and score <-> eps needs no alpha at all
    last = slice(1, 2)
    converted = process.convert("x0", x0[last], x_t[last], ends[last], "eps")
    torch.testing.assert_close(converted, eps[last], atol=1e-9, rtol=1e-9)
    score = process.convert("eps", eps[last], x_t[last], ends[last], "score")
    back = process.convert("score", score, x_t[last], ends[last], "eps")
    torch.testing.assert_close(back, eps[last])


@every_process
def test_derivatives_and_log_ratio(process: Process) -> None:
    t = inner_times(process).requires_grad_()
    for value, derivative in ((process.alpha, process.d_alpha), (process.sigma, process.d_sigma)):
        # A constant alpha (EDM) is no function of t for autograd: the 0 t makes it one.
        (slope,) = torch.autograd.grad((value(t) + 0 * t).sum(), t)
        torch.testing.assert_close(derivative(t), slope, atol=1e-10, rtol=1e-8)
        step = 1e-6
        difference = (value(t + step) - value(t - step)) / (2 * step)
        torch.testing.assert_close(derivative(t), difference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(process.log_ratio(t), Process.log_ratio(process, t), atol=1e-9, rtol=1e-9)
    if process.variance_preserving:
        torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones_like(t))


@every_process
def test_time_of_inverts_log_ratio_and_clamps(process: Process) -> None:
    t = inner_times(process)
    ratio = process.log_ratio(t)
    torch.testing.assert_close(process.time_of(ratio), t, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(Process.time_of(process, ratio), t, atol=1e-9, rtol=1e-9)
    assert process.covers(ratio).all()
    ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(process.time_of(ends), torch.tensor([process.t_min, process.t_max]).double())
    single = process.time_of(ratio.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), t, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("a", PROCESSES, ids=repr)
def test_matching_time_there_and_back(a: Process) -> None:
    """Where another process reaches a's noise levels, matching is a bijection and the scale maps states onto states."""
    for b in PROCESSES:
        t = inner_times(a, 14)
        t = t[b.covers(a.log_ratio(t))]
        assert len(t) >= 3, b
        matched = b.matching_time(a, t)
        torch.testing.assert_close(b.log_ratio(matched), a.log_ratio(t), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(a.matching_time(b, matched), t, atol=1e-8, rtol=1e-8)
        x0, eps = draw(len(t), 2)
        scaled = expand(b.matching_scale(a, t), x0) * a.add_noise(x0, eps, t)
        torch.testing.assert_close(scaled, b.add_noise(x0, eps, matched), atol=1e-8, rtol=1e-8)


def test_matching_outside_the_table_uses_its_end_everywhere() -> None:
    """At pure noise Stable Diffusion's table has no time: index 999 with its own weights, and a flag."""
    flow, table = Flow(), VPScaledLinear()
    t = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    assert table.covers(flow.log_ratio(t)).tolist() == [False, True, False]
    matched = table.matching_time(flow, t)
    assert matched[0] == table.t_max
    assert matched[2] == table.t_min
    scale = table.matching_scale(flow, t)
    torch.testing.assert_close(scale, table.alpha(matched) + table.sigma(matched))


@every_process
def test_guidance_commutes_with_conversion(process: Process) -> None:
    t = inner_times(process)
    uncond, cond = draw(len(t), 3)
    x_t, _ = draw(len(t), 3, seed=1)
    scale = torch.linspace(0.0, 7.5, len(t), dtype=torch.float64)
    for kind_from in kinds_of(process):
        for kind_to in kinds_of(process):

            def to(out: Tensor, kind_from: str = kind_from, kind_to: str = kind_to) -> Tensor:
                return process.convert(kind_from, out, x_t, t, kind_to)

            torch.testing.assert_close(
                to(guide(uncond, cond, scale)), guide(to(uncond), to(cond), scale), atol=1e-8, rtol=1e-8
            )


def test_guide_ends_and_errors() -> None:
    uncond, cond = draw(3, 2)
    torch.testing.assert_close(guide(uncond, cond, 1.0), cond)
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    assert guide(uncond.bfloat16(), cond.bfloat16(), torch.ones(3)).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        guide(uncond, cond[:2], 2.0)
    with pytest.raises(ValueError, match="per-sample"):
        guide(uncond, cond, torch.ones(2))


@every_process
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_promoted(process: Process, dtype: torch.dtype) -> None:
    t = inner_times(process)
    x0, eps = (x.to(dtype) for x in draw(len(t), 4))
    for time in (t, t.float()):
        x_t = process.add_noise(x0, eps, time)
        assert x_t.dtype == torch.float32
        assert process.convert("x0", x0, x_t.to(dtype), time, "eps").dtype == torch.float32
        exact = process.add_noise(x0.double(), eps.double(), t)
        torch.testing.assert_close(x_t.double(), exact, atol=1e-5, rtol=1e-4)
    assert process.alpha(t).dtype == torch.float64
    assert process.alpha(t.to(dtype)).dtype == torch.float32
    # a float64 time leaves float32 images float32
    assert process.add_noise(x0.float(), eps.float(), t).dtype == torch.float32


@every_process
def test_no_value_is_read(process: Process) -> None:
    """Tensors on ``meta`` have no values: reading one on the host (a synchronisation on a GPU) raises."""
    x, t = torch.empty(4, 3, 2, device="meta"), torch.empty(4, device="meta")
    assert process.add_noise(x, x, t).shape == x.shape
    for kind_from in kinds_of(process):
        process.target(kind_from, x, x, t)
        ddim_step(process, kind_from, x, x, t, t)
        for kind_to in kinds_of(process):
            assert process.convert(kind_from, x, x, t, kind_to).shape == x.shape
    for one, other in ((process, Flow()), (Flow(), process)):
        one.matching_time(other, t)
        one.matching_scale(other, t)
    process.covers(t)
    times = uniform_grid(process, 3, device="meta")
    for sampler in (euler, heun):
        assert sampler(lambda x, t: x * expand(t, x), x, times).shape == x.shape
    assert ddim(lambda x, t: x, process, x, times, return_path=True).shape == (4, *x.shape)
    guide(x, x, t)
    flow_matching_loss(x, x, x)
    k_step_times(torch.empty(4, dtype=torch.int64, device="meta"), 4)
    for sampled in (u_shaped(t), logit_normal(t), skewed(t), uniform_times(t, 0.0, 1.0), shift(t, 3.0)):
        assert sampled.shape == t.shape


@every_process
def test_config_builds_the_same_process(process: Process) -> None:
    config = json.loads(json.dumps(process.config()))
    module, name = config.pop("_target_").rsplit(".", 1)
    twin = getattr(importlib.import_module(module), name)(**config)
    t = inner_times(process)
    assert twin.config() == process.config()
    assert torch.equal(twin.alpha(t), process.alpha(t))


def test_tables_survive_a_meta_context() -> None:
    with torch.device("meta"):
        process = VPScaledLinear()
    assert process.alpha(torch.zeros(1)).item() == pytest.approx(math.sqrt(1 - process.beta_start))


def test_bad_constants_are_refused() -> None:
    for build in (
        lambda: VPCosine(0.0),
        lambda: VPLinear(0.0, 1.0),
        lambda: VPScaledLinear(0.1, 0.01),
        lambda: VPScaledLinear(num_timesteps=1),
        lambda: uniform_grid(Flow(), 0),
        lambda: k_step_times(torch.zeros(1, dtype=torch.int64), 0),
        lambda: k_step_times(torch.zeros(1, dtype=torch.int64), 1, t_eps=1.0),
    ):
        with pytest.raises(ValueError, match=r"must|need"):
            build()


def test_time_samplers_have_the_stated_distributions() -> None:
    """Deterministic draws at the middles of equal bins: moments and symmetry to the error of that rule."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    rate = 4.0
    exponential = truncated_exponential(u, rate)
    mean = 1 / rate - math.exp(-rate) / (1 - math.exp(-rate))
    assert exponential.mean().item() == pytest.approx(mean, abs=1e-6)
    both = u_shaped(u, rate)
    torch.testing.assert_close(u_shaped(1 - u, rate), 1 - both)
    assert both.mean().item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(both.sort().values[::2], both.sort().values[1::2], atol=2e-4, rtol=0.0)
    normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
    assert logit_normal(normal).mean().item() == pytest.approx(0.5, abs=1e-6)
    assert logit_normal(normal, mean=1.0).median().item() == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-4)
    assert skewed(normal).median().item() == pytest.approx(1 / (1 + math.exp(1.2)), abs=1e-4)
    assert skewed(torch.tensor([50.0]).double()).item() == 1 - 1e-4


def test_grids_and_shift() -> None:
    for process in PROCESSES:
        grid = uniform_grid(process, 4)
        assert grid.shape == (5,)
        assert grid.dtype == torch.float64
        assert (grid[0].item(), grid[-1].item()) == (process.t_max, process.t_min)
        torch.testing.assert_close(grid.diff(), grid.diff()[:1].expand(4))
    t = uniform_grid(Flow(), 8)
    torch.testing.assert_close(shift(t, 1.0), t)
    torch.testing.assert_close(shift(shift(t, 3.0), 1 / 3.0), t)
    # a shift adds a constant to the log-SNR
    moved = Flow().log_ratio(shift(t, 3.0))[1:-1] - Flow().log_ratio(t)[1:-1]
    torch.testing.assert_close(moved, torch.full_like(moved, -math.log(3.0)))


def test_flow_matching_loss() -> None:
    x0, eps = draw(3, 2, 2)
    off = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    prediction = Flow().target("velocity", x0, eps, off) + expand(off, x0)
    torch.testing.assert_close(flow_matching_loss(prediction, x0, eps), off**2)
    torch.testing.assert_close(flow_matching_loss(prediction, x0, eps, "halfsum"), 0.5 * 4 * off**2)
    assert flow_matching_loss(prediction.half(), x0.half(), eps.half()).dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        flow_matching_loss(prediction[:, :1], x0, eps)
    with pytest.raises(ValueError, match="halfsum"):
        flow_matching_loss(prediction, x0, eps, "sum")
