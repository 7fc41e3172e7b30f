"""Progressive distillation and guided distillation as methods: losses, grids, samplers, diagnostics, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of
from method_support import (
    GaussianMap,
    draws,
    frozen_copy,
    gaussian_batch,
    gaussian_teacher,
    gradients,
    mlp,
    noise,
    prepared,
    ring_batch,
    state,
    step,
    trained,
)
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.methods.denoising import Denoising
from distill.methods.guided import Guided
from distill.methods.losses.progressive import (
    StudentGrid,
    guided_target,
    landing_x0,
    progressive_loss,
    two_step_target,
)
from distill.methods.progressive import Progressive
from distill.models.analytic import exact_denoiser
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.spec import SamplerSpec
from distill.process.base import Process, expand
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import karras_grid, student_grid, uniform_grid
from distill.process.vp import VPCosine, VPScaledLinear

COSINE, TABLE = VPCosine(), VPScaledLinear()
WORLDS = [
    pytest.param(COSINE, "v", uniform_grid, id="cosine"),
    pytest.param(TABLE, "v", student_grid, id="table"),
    pytest.param(Flow(), "velocity", uniform_grid, id="flow"),
    pytest.param(EDM(), "x0", karras_grid, id="edm"),
]


def made_for(teacher: Denoiser, steps: int, **changes: Any) -> Denoiser:
    """A teacher with the sampler of a round before."""
    times = tuple(uniform_grid(teacher.process, steps).tolist())
    teacher.sampler = SamplerSpec(**{"steps": steps, "times": {steps: times}, "solver": "ddim"} | changes)
    return teacher


def progressive(process: Process = COSINE, kind: str = "v", **options: Any) -> Progressive:
    return Progressive(mlp(process, kind, seed=1), mlp(process, kind), **options)


# ---- the loss is the pure functions, put together on the draws of the step ----


@pytest.mark.parametrize(("process", "kind", "grid"), WORLDS)
@pytest.mark.parametrize("weight", ["snr_trunc", "constant"])
def test_progressive_is_the_weighted_distance_to_two_steps_of_the_teacher(
    process: Process, kind: str, grid: Any, weight: str
) -> None:
    method = prepared(progressive(process, kind, steps=4, weight=weight))
    batch, teacher, student = ring_batch(), method.frozen["teacher"], frozen_copy(method.student)
    index = draws().integer("i", 4)
    at = StudentGrid(process, grid(process, 8)).step(index)
    z = process.add_noise(batch.x0, draws().normal("eps", (2,)), at.u)
    target = two_step_target(lambda x, t: teacher(x, t, batch.cond), process, kind, z, at).target
    expected = progressive_loss(process, kind, student(z, at.u, batch.cond), target, z, at.u, weight)
    found = method.loss(batch, step())
    torch.testing.assert_close(found.total, expected.mean(), rtol=1e-5, atol=0)
    assert set(found.logs) == {"loss_noisiest", "loss_cleanest", "share_cleanest", "target_max"}
    torch.testing.assert_close(found.logs["loss_noisiest"], expected[index == 3].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logs["loss_cleanest"], expected[index == 0].mean(), rtol=1e-5, atol=0)
    assert found.logs["share_cleanest"].item() == (index == 0).float().mean().item()
    assert found.logs["target_max"].item() == pytest.approx(target.x0.abs().max().item(), rel=1e-5)


def test_teacher_and_student_may_say_different_kinds() -> None:
    """What an eps teacher says is converted; the loss is in the student's kind."""
    eps = mlp(COSINE, "eps")
    method = prepared(Progressive(mlp(COSINE, "v", seed=1), eps, steps=16))
    batch = ring_batch()
    at = StudentGrid(COSINE, uniform_grid(COSINE, 32)).step(draws().integer("i", 16))
    z = COSINE.add_noise(batch.x0, draws().normal("eps", (2,)), at.u)
    target = two_step_target(lambda x, t: eps(x, t, batch.cond), COSINE, "eps", z, at).target
    out = method.student(z, at.u, batch.cond)
    expected = progressive_loss(COSINE, "v", out, target, z, at.u).mean()
    torch.testing.assert_close(method.loss(batch, step()).total, expected, rtol=1e-5, atol=0)


def test_both_nets_get_the_same_guidance() -> None:
    networks = [mlp(COSINE, "v", classes=8, w=8, seed=seed) for seed in (1, 0)]
    method = prepared(Progressive(*networks, steps=2, w_min=1.0, w_max=3.0))
    batch, student, teacher = ring_batch(classes=8), *networks
    cond = batch.cond.with_guidance(1 + 2 * draws().uniform("w"))
    at = StudentGrid(COSINE, uniform_grid(COSINE, 4)).step(draws().integer("i", 2))
    z = COSINE.add_noise(batch.x0, draws().normal("eps", (2,)), at.u)
    target = two_step_target(lambda x, t: teacher(x, t, cond), COSINE, "v", z, at).target
    expected = progressive_loss(COSINE, "v", student(z, at.u, cond), target, z, at.u).mean()
    torch.testing.assert_close(method.loss(batch, step()).total, expected, rtol=1e-5, atol=0)
    spec = method.result().sampler
    assert (spec.guidance_w, spec.guidance_w_range, spec.guidance_baked) == (1.0, (1.0, 3.0), 1.0)


def test_the_teacher_is_guided_and_the_student_is_not() -> None:
    networks = [mlp(COSINE, "v", classes=8, seed=seed) for seed in (1, 0)]
    method = prepared(Progressive(*networks, steps=2, guidance_scale=2.5))
    batch, (student, teacher) = ring_batch(classes=8), networks
    at = StudentGrid(COSINE, uniform_grid(COSINE, 4)).step(draws().integer("i", 2))
    z = COSINE.add_noise(batch.x0, draws().normal("eps", (2,)), at.u)
    target = two_step_target(lambda x, t: teacher(x, t, batch.cond, 2.5), COSINE, "v", z, at).target
    expected = progressive_loss(COSINE, "v", student(z, at.u, batch.cond), target, z, at.u).mean()
    torch.testing.assert_close(method.loss(batch, step()).total, expected, rtol=1e-5, atol=0)
    assert method.result().sampler.guidance_baked == 2.5
    assert not method.result().guidable
    # The next round's teacher is that student: nothing is guided again, and what was is not forgotten.
    student = method.as_generator().denoiser
    made_for(student, 2, guidance_baked=2.5)
    following = Progressive(mlp(COSINE, "v", classes=8), student, steps=1)
    assert following.result().sampler.guidance_baked == 2.5
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 2.5, but the teacher was trained without a null"
    ):
        Progressive(mlp(COSINE, "v", classes=8), student, steps=1, guidance_scale=2.5)


# ---- exact teachers ----


class Oracle(nn.Module):
    """The x0 of a student of N steps whose loss is zero, for a teacher."""

    num_classes = 0

    def __init__(self, teacher: Denoiser, times: Tensor) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.grid = StudentGrid(teacher.process, times)
        object.__setattr__(self, "teacher", teacher)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        place = (self.grid.times[::2, None] - t).abs().argmin(0)
        at = self.grid.step(self.grid.steps - 1 - place)
        teacher, process = self.teacher, self.grid.process

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return teacher(x, t, cond)

        return two_step_target(predict, process, teacher.kind, x, at).target.x0 + self.unused


@pytest.mark.parametrize(("process", "kind", "grid"), WORLDS)
def test_a_chain_of_oracles_has_no_loss_and_ends_where_the_teacher_does(
    process: Process, kind: str, grid: Any
) -> None:
    """16 -> 8 -> 4 -> 2 -> 1 through the method: each round takes the times of the one before."""
    teacher, batch, z = exact_denoiser(process), ring_batch(dtype=torch.float64), noise(32, 5)
    final = teacher.transport(z, batch.cond, solver="ddim", grid=grid(process, 16))[0]
    for steps in (8, 4, 2, 1):
        times = grid(process, 16)[:: 8 // steps]
        student = Denoiser(Oracle(teacher, times), process, "x0", (2,))
        method = prepared(Progressive(student, teacher, steps=steps))
        torch.testing.assert_close(method.grid.times, times)
        assert method.loss(batch, step()).total.item() < 1e-20
        with torch.no_grad():
            told = method.diagnostics(batch, draws()).scalars
        assert told["match"].item() < 1e-12  # from float32 noise
        assert told["undistilled"].item() > 1e-4
        spec = method.result().sampler
        assert spec.times[steps] == tuple(times[::2].tolist())
        teacher, student.sampler = student, spec
        made = student.transport(z, batch.cond, solver="ddim", grid=spec.grid(process))[0]
        assert (made - final).abs().max().item() < 1e-10
        student.net.unused.data.add_(0.1)
        assert method.loss(batch, step()).total.item() > 1e-3
        student.net.unused.data.zero_()


class Lands(GaussianMap):
    """The x0 with which one DDIM step of a student of N steps follows the flow of N(mean, std^2 I) exactly."""

    def __init__(self, process: Process, steps: int) -> None:
        super().__init__(process, "x0", None, 0.0)
        self.steps = steps

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        s = t - 1 / self.steps
        mean = torch.tensor([[0.4, -0.2]], dtype=torch.float64)
        alpha_t, alpha_s = self.process.alpha(t), self.process.alpha(s)
        spread = [
            (a.square() * self.std**2 + self.process.sigma(v).square()).sqrt()
            for a, v in ((alpha_t, t), (alpha_s, s))
        ]
        z_s = expand(alpha_s, x) * mean + (x - expand(alpha_t, x) * mean) * expand(spread[1] / spread[0], x)
        exact = mean + (x - expand(alpha_t, x) * mean) * expand(self.std / spread[0], x)
        landing = landing_x0(self.process, x, z_s, t, s)
        return self.gain * torch.where(expand(s.abs() < 1e-9, x), exact, landing)


def test_the_exact_flow_is_a_fixpoint_up_to_the_solver() -> None:
    """The loss of a student on the exact flow is the error of the teacher's two DDIM steps, which falls as they shorten."""
    losses = []
    for steps in (16, 32, 64):
        student = Denoiser(Lands(COSINE, steps), COSINE, "x0", (2,))
        method = prepared(Progressive(student, gaussian_teacher(COSINE), steps=steps, weight="constant"))
        losses.append(method.loss(gaussian_batch(), step(256)).total.item())
    assert losses[0] / losses[1] > 3
    assert losses[1] / losses[2] > 3
    assert losses[2] < 1e-5
    student.net.gain.data.mul_(1.1)
    assert method.loss(gaussian_batch(), step(256)).total.item() > 100 * losses[2]


# ---- what is trained, saved and sampled ----


def methods() -> dict[str, Any]:
    return {
        "progressive": lambda: (progressive(steps=2), 0),
        "progressive, w": lambda: (
            Progressive(
                *(mlp(COSINE, "v", classes=8, w=8, seed=s) for s in (1, 0)), steps=2, w_min=0.0, w_max=2.0
            ),
            8,
        ),
        "guided": lambda: (
            Guided(mlp(COSINE, "v", classes=8, w=8, seed=1), mlp(COSINE, "v", classes=8), w_max=2.0),
            8,
        ),
        "another kind": lambda: (Guided(mlp(COSINE, "v", seed=1), mlp(COSINE, "eps")), 0),
    }


every_method = pytest.mark.parametrize("name", list(methods()))


@every_method
def test_the_student_is_trained_and_the_teacher_frozen(name: str) -> None:
    method, classes = methods()[name]()
    prepared(method)
    teacher = method.frozen["teacher"]
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.requires_grad_(True)
    total = method.loss(ring_batch(classes=classes), step()).total
    assert not any(bool(g.any()) for g in gradients(total, teacher))
    assert all(bool(g.any()) for g in gradients(total, method.student))
    assert sorted(method.ema) == ["student"]
    assert [update.name for update in method.updates()] == ["student"]


@every_method
def test_continuing_equals_not_stopping(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[DistillModule, int]:
        method, classes = methods()[name]()
        return prepared(method), classes

    (whole, classes), (first, _), (second, _) = fresh(), fresh(), fresh()
    trained(whole, tmp_path / "whole", 10, classes)
    trained(first, tmp_path / "parts", 5, classes)
    kept = checkpoint_of(tmp_path / "parts")
    assert (sorted(kept["networks"]), sorted(kept["ema"])) == (["student"], ["student"])
    assert SamplerSpec.from_dict(kept["sampler"]) == first.result().sampler
    trained(second, tmp_path / "parts", 10, classes)
    for key, value in state(whole).items():
        assert torch.equal(state(second)[key], value), key
        assert not torch.equal(state(first)[key], value) or "frequencies" in key


def test_samplers() -> None:
    spec = progressive(steps=4).result().sampler
    assert (spec.mode, spec.solver, spec.steps, spec.any_steps) == ("ode", "ddim", 4, False)
    assert spec.times == {4: pytest.approx((1.0, 0.75, 0.5, 0.25, 0.0))}
    assert [n for n in range(1, 9) if spec.valid(n)] == [4]
    table = progressive(TABLE, steps=2).result().sampler
    assert table.times == {2: (999.0, 499.0, 0.0)}
    assert (
        progressive(TABLE, steps=64).result().sampler.steps == 64
    )  # 1000 levels are no multiple of 128: levels are rounded
    assert progressive().result().coupling == "few_step"
    method, _ = methods()["guided"]()
    spec = method.result().sampler
    assert (spec.solver, spec.any_steps, spec.guidance_w, spec.guidance_w_range) == (
        "ddim",
        True,
        0.0,
        (0.0, 2.0),
    )
    other, _ = methods()["another kind"]()
    assert (other.result().sampler.guidance_w, other.result().coupling) == (None, "independent")
    paired = Guided(mlp(Flow(), seed=1), mlp(Flow(), coupling="paired"))
    assert paired.result().coupling == "paired"


def test_the_times_are_those_of_the_teacher_s_sampler() -> None:
    """A teacher that was made for other times than its process's default keeps them: no chain mixes grids."""
    times = (1.0, 0.9, 0.5, 0.2, 0.0)
    teacher = made_for(mlp(COSINE, "v"), 4, times={4: times})
    method = Progressive(mlp(COSINE, "v", seed=1), teacher, steps=2)
    assert tuple(method.grid.times.tolist()) == times
    assert method.result().sampler.times == {2: (1.0, 0.5, 0.0)}


@pytest.mark.parametrize("name", ["progressive", "progressive, w"])
def test_diagnostics_of_a_round(name: str) -> None:
    method, classes = methods()[name]()
    prepared(method)
    batch = ring_batch(classes=classes)
    with torch.no_grad():
        told, again = (method.diagnostics(batch, draws()) for _ in range(2))
    assert set(told.scalars) == {"match", "undistilled", "x_mean", "x_std", "x_max"}
    assert told.scalars == again.scalars
    assert [label for label, _ in told.rows] == ["teacher, 4", "teacher, 2", "student, 2"]
    (_, wanted), (_, naive), (_, made) = told.rows
    assert told.scalars["match"].item() == pytest.approx((made - wanted).square().mean().item())
    assert told.scalars["undistilled"].item() == pytest.approx((naive - wanted).square().mean().item())
    cond = batch.cond.with_guidance(2 * draws().uniform("w")) if classes else batch.cond
    grid = uniform_grid(COSINE, 4)
    with torch.no_grad():
        expected = method.frozen["teacher"].transport(
            draws().normal("z", (2,)), cond, solver="ddim", grid=grid
        )
    torch.testing.assert_close(wanted, expected[0])
    method.ema["student"].net.out.bias.data.add_(1.0)  # it is the average that is measured
    with torch.no_grad():
        assert method.diagnostics(batch, draws()).scalars["match"] != told.scalars["match"]


# ---- guided distillation, stage 1 ----


def test_guided_is_the_weighted_distance_to_the_guided_data() -> None:
    method = prepared(
        Guided(
            mlp(COSINE, "v", classes=8, w=8, seed=1),
            mlp(COSINE, "eps", classes=8),
            w_min=1.0,
            w_max=3.0,
            weight="constant",
            clip=1.5,
        )
    )
    batch, teacher, student = ring_batch(classes=8), method.frozen["teacher"], method.student
    u, w = draws().uniform("u"), 1 + 2 * draws().uniform("w")
    z = COSINE.add_noise(batch.x0, draws().normal("eps", (2,)), u)
    target = guided_target(
        COSINE, "eps", teacher(z, u, batch.cond), teacher(z, u, batch.cond.null()), z, u, w, 1.5
    )
    out = student(z, u, batch.cond.with_guidance(w))
    expected = progressive_loss(COSINE, "v", out, target, z, u, "constant").mean()
    found = method.loss(batch, step())
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=0)
    assert found.logs["target_max"].item() == 1.5


def test_another_kind_of_the_same_answer_has_no_loss() -> None:
    """The exact denoiser said as v against itself said as x0; a net that is only read as v is wrong, and repaired."""

    class AsV(nn.Module):
        num_classes = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = exact_denoiser(COSINE).net, nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return COSINE.convert("x0", self.inner(x, t, cond), x, t, "v") + self.unused

    method = prepared(Guided(Denoiser(AsV(), COSINE, "v", (2,)), exact_denoiser(COSINE)))
    batch = ring_batch(dtype=torch.float64)
    assert method.loss(batch, step()).total.item() < 1e-7  # the times are float32
    net = mlp(COSINE, "eps")
    misread = Denoiser(net.net, COSINE, "v", (2,))
    assert prepared(Guided(misread, frozen_copy(net))).loss(batch, step()).total.item() > 0.1


def test_negative_guidance_and_one_scale_are_guidance() -> None:
    for low, high in ((-0.5, 0.0), (2.0, 2.0)):
        method = prepared(
            Guided(
                mlp(COSINE, "v", classes=8, w=8, seed=1), mlp(COSINE, "v", classes=8), w_min=low, w_max=high
            )
        )
        assert method.embeds
        assert method.result().sampler.guidance_w_range == (low, high)
        batch, teacher = ring_batch(classes=8), method.frozen["teacher"]
        u, w = draws().uniform("u"), low + (high - low) * draws().uniform("w")
        z = COSINE.add_noise(batch.x0, draws().normal("eps", (2,)), u)
        target = guided_target(
            COSINE, "v", teacher(z, u, batch.cond), teacher(z, u, batch.cond.null()), z, u, w
        )
        out = method.student(z, u, batch.cond.with_guidance(w))
        expected = progressive_loss(COSINE, "v", out, target, z, u, "snr+1").mean()
        torch.testing.assert_close(method.loss(batch, step()).total, expected, rtol=1e-4, atol=0)


# ---- bad input ----

PROGRESSIVE = [
    ({"steps": 0}, {}, "steps: found 0, expected an integer of at least 1"),
    ({"steps": 1.5}, {}, "steps: found 1.5"),
    ({"weight": "snr2"}, {}, "weight: found 'snr2', expected one of"),
    ({"steps": 8}, {"kind": "eps"}, "kind: found 'eps', but the student divides by alpha and it has 8 steps"),
    ({"steps": 600}, {"process": TABLE}, "steps: found 1200, expected 1 .. 1000"),
    ({"guidance_scale": 3.0}, {}, "guidance_scale: found 3.0, but the teacher was trained without a null"),
    ({"w_min": 0.0}, {}, "w_min, w_max: found 0.0 and None, expected both or neither"),
    (
        {"w_min": 3.0, "w_max": 2.0},
        {"w": 8},
        "w_min, w_max: found 3.0 and 2.0, expected -1 <= w_min <= w_max",
    ),
    ({"w_min": -2.0, "w_max": 2.0}, {"w": 8}, "w_min, w_max: found -2.0"),
    ({}, {"w": 8}, "w_min, w_max: missing; the student's net takes the guidance w as an input"),
    (
        {"w_min": 0.0, "w_max": 2.0},
        {},
        "w_min, w_max: found 0.0 and 2.0, but the student's net does not take",
    ),
]


@pytest.mark.parametrize(("options", "net", "message"), PROGRESSIVE)
def test_wrong_options_of_progressive(options: dict[str, Any], net: dict[str, Any], message: str) -> None:
    net = {"process": COSINE, "kind": "v"} | net
    with pytest.raises(ValueError, match=message):
        Progressive(mlp(**net), mlp(**net), **options)


def test_wrong_teachers_of_progressive() -> None:
    student, embeds = mlp(COSINE, "v"), mlp(COSINE, "v", w=8)
    limited = made_for(mlp(COSINE, "v", w=8), 4, guidance_w=0.0, guidance_w_range=(0.0, 2.0))
    for pair, options, message in (
        ((student, mlp(Flow())), {}, r"teacher: lives under Flow\(\), the student under VPCosine"),
        ((student, made_for(mlp(COSINE, "v"), 4)), {"steps": 1}, r"teacher: made for \[4\] step\(s\); .* one of 2"),
        ((student, mlp(COSINE, "v", boundary=Boundary("cm"))), {}, "teacher: found a consistency model"),
        ((student, made_for(mlp(COSINE, "v"), 2, mode="sde")), {}, "teacher: found a consistency model"),
        ((student, exact_denoiser(COSINE, [[0.0]])), {}, r"teacher.sample_shape: found \(1,\)"),
        ((student, mlp(COSINE, "v", classes=8)), {}, "teacher.conditions: found 8 classes, expected the student's no"),
        ((embeds, student), {"w_min": 0.0, "w_max": 2.0}, "but the teacher's net does not take the guidance"),
        ((student, embeds), {}, "w_min, w_max: missing; the teacher's net takes the guidance w"),
        ((embeds, limited), {"steps": 2, "w_min": 0.0, "w_max": 4.0}, "0.0 and 4.0, but the teacher was trained for 0.0 .. 2"),
        ((embeds, limited), {"steps": 2, "w_min": -0.5, "w_max": 1.0}, "but the teacher was trained for"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Progressive(*pair, **options)
    assert Progressive(embeds, limited, steps=2, w_min=0.5, w_max=1.5).w_range == (0.5, 1.5)
    with pytest.warns(UserWarning, match="'snr' is zero at t_max of Flow"):
        progressive(Flow(), "velocity", weight="snr")
    with pytest.warns(UserWarning, match="guidance_w: 25.0 is a guidance_scale of 26.0"):
        Progressive(embeds, mlp(COSINE, "v", w=8), w_min=0.0, w_max=25.0)
    # What a student of consistency had over its net goes: it is trained as a plain prediction.
    assert Progressive(mlp(COSINE, "v", boundary=Boundary("cm")), student).student.boundary is None


def test_half_precision_is_kept_out_of_the_target() -> None:
    """A teacher in bfloat16 is promoted, and autocast does not reach into the target."""
    method = prepared(progressive(steps=1))
    plain = method.loss(ring_batch(), step()).logs["target_max"]
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            method.frozen["teacher"](ring_batch().x0, torch.ones(32), Cond.nothing(32)).dtype
            == torch.bfloat16
        )
        inside = method.loss(ring_batch(), step()).logs["target_max"]
    assert torch.equal(plain, inside)


GUIDED = [
    ({}, {}, {"w_min": 3.0, "w_max": 2.0}, "w_min, w_max: found 3.0 and 2.0"),
    ({}, {}, {"w_min": 1.0}, "w_min, w_max: found 1.0 and 0.0"),
    ({}, {}, {}, "w_min, w_max: missing; the student's net takes the guidance w as an input"),
    ({"w": 0}, {}, {"w_max": 2.0}, "w_min, w_max: found 0.0 and 2.0, but the student's net does not take"),
    ({}, {"guidable": False}, {"w_max": 2.0}, "w_max: found 2.0, but the teacher was trained without a null"),
    ({}, {"w": 8}, {"w_max": 2.0}, "teacher: takes the guidance as an input"),
    ({}, {"coupling": "few_step"}, {"w_max": 2.0}, "teacher: found a few-step student"),
    ({}, {"coupling": "endpoint"}, {"w_max": 2.0}, "teacher: found a few-step student"),
    ({}, {}, {"w_max": 2.0, "weight": "edm"}, "weight: found 'edm', expected one of"),
    ({}, {}, {"w_max": 2.0, "clip": 0.0}, "clip: found 0.0, expected a positive number or null"),
    ({"kind": "eps"}, {}, {"w_max": 2.0}, "kind: found 'eps', but the student divides by alpha"),
    ({}, {"process": Flow(), "kind": "velocity"}, {"w_max": 2.0}, r"teacher: lives under Flow\(\)"),
]


@pytest.mark.parametrize(("student", "teacher", "options", "message"), GUIDED)
def test_wrong_options_of_guided(
    student: dict[str, Any], teacher: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    base = {"process": COSINE, "kind": "v", "classes": 8}
    with pytest.raises(ValueError, match=message):
        Guided(mlp(**base | {"w": 8} | student), mlp(**base | teacher), **options)


@pytest.mark.parametrize(
    ("process", "kind", "options", "message"),
    [
        (COSINE, "v", {"null_prob": 1.0}, r"null_prob: expected a probability in \[0, 1\), found 1.0"),
        (COSINE, "v", {"times": "cosine"}, "times: found 'cosine', expected one of"),
        (COSINE, "v", {"weight": "snr"}, "weight: found 'snr', expected one of"),
        (COSINE, "v", {"weight": "edm"}, r"weight: found 'edm' under VPCosine.*expected the process EDM"),
        (EDM(), "x0", {"times": "lognormal", "std": 0.0}, "std: found 0.0, expected a positive number"),
    ],
)
def test_wrong_options_of_denoising(
    process: Process, kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising(mlp(process, kind), **options)


@pytest.mark.parametrize(
    ("process", "kind", "options"),
    [
        (COSINE, "v", {}),
        (COSINE, "eps", {"times": "lognormal", "mean": -1.0, "std": 0.7}),
        (EDM(), "x0", {"times": "lognormal", "weight": "edm"}),
        (TABLE, "v", {}),
    ],
)
def test_denoising_regresses_the_net_s_own_kind(process: Process, kind: str, options: dict[str, Any]) -> None:
    method = prepared(Denoising(mlp(process, kind, classes=8), null_prob=0.25, **options))
    batch, student = ring_batch(classes=8), method.student
    if options.get("times"):
        level = torch.exp(options.get("mean", -1.2) + options.get("std", 1.2) * draws().normal("t"))
        t = process.time_of(-torch.log(level))
    else:
        t = process.t_max * draws().uniform("t")
    eps = draws().normal("eps", (2,))
    cond = batch.cond.drop(draws().uniform("null") < 0.25)
    assert not torch.equal(cond.get("label"), batch.cond.get("label"))
    out = student(process.add_noise(batch.x0, eps, t), t, cond)
    error = (out - process.target(kind, batch.x0, eps, t)).square().mean(1)
    weight = (t**2 + 0.25) / (0.5 * t) ** 2 if options.get("weight") == "edm" else 1.0
    torch.testing.assert_close(method.loss(batch, step()).total, (weight * error).mean(), rtol=1e-5, atol=0)
    spec = method.result().sampler
    assert (spec.solver, spec.steps) == (("heun", 18) if isinstance(process, EDM) else ("ddim", 50))
    assert method.result().guidable
    assert not Denoising(mlp(process, kind, classes=8), null_prob=0.0, **options).result().guidable
