"""Consistency distillation, consistency training and latent consistency as methods: losses, targets, curricula, options."""

from __future__ import annotations

import math
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

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.families.trajectory import level_grid, noise_level
from distill.methods.lcm import LCM
from distill.methods.losses.consistency import grid_pair, masked_target, pair_weight, teacher_step
from distill.methods.losses.distances import elementwise_huber, ict_huber_c, l1, l2, pseudo_huber
from distill.methods.losses.lcm import guided_ddim_step, lcm_pair
from distill.models.analytic import exact_denoiser
from distill.models.boundary import Boundary
from distill.models.denoiser import Denoiser
from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.process.curriculum import adaptive_ema, doubling_scales, ect_r, progressive_scales
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.scalings import sigma_weight
from distill.process.times import index_of, karras_levels, lognormal_level, lognormal_step_weights
from distill.process.vp import VPCosine, VPLinear, VPScaledLinear
from distill.samplers.fewstep import lcm_grid, lcm_times

TABLE = VPScaledLinear()
FLOW_MODEL = {"coupling": "few_step"}


def consistency(process: Process | None = None, kind: str = "velocity", **options: Any) -> Consistency:
    process = process or Flow()
    return Consistency(mlp(process, kind, seed=1), mlp(process, kind), **options)


def training(process: Process | None = None, kind: str = "velocity", **options: Any) -> ConsistencyTraining:
    return ConsistencyTraining(mlp(process or Flow(), kind), **{"total_steps": 100} | options)


def latent(
    *, student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **options: Any
) -> LCM:
    """With 8 classes, and w as an input of the student."""
    networks = [
        mlp(TABLE, "v", classes=8, **{"seed": 1, "w": 8} | (student or {})),
        mlp(TABLE, "v", classes=8, **teacher or {}),
    ]
    return LCM(*networks, **options)


# ---- the loss is the pure functions, put together on the draws of the step ----


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize(
    ("process", "kind", "grid"),
    [(EDM(), "x0", "auto"), (Flow(), "velocity", "auto"), (VPCosine(), "v", "karras")],
    ids=["edm", "flow", "vp"],
)
def test_consistency_is_the_distance_along_a_step_of_the_teacher(
    process: Process, kind: str, grid: str, solver: str
) -> None:
    method = consistency(
        process, kind, grid=grid, solver=solver, scales=9, loss="l2", weight="karras", sample_steps=[1, 2]
    )
    batch, teacher, student = ring_batch(), method.teacher, frozen_copy(method.student)
    levels = level_grid(process, 9, grid)
    t, u = grid_pair(levels, draws().integer("n", 8))
    x_t = process.add_noise(batch.x0, draws().normal("eps", (2,)), t)
    x_u = teacher_step(lambda x, time: teacher.velocity(x, time, batch.cond), x_t, t, u, solver)
    distance = l2(student.x0(x_t, t, batch.cond), student.x0(x_u, u, batch.cond))
    weight = sigma_weight("karras", noise_level(process, t))
    found = prepared(method).loss(batch, step())
    torch.testing.assert_close(found.total.double(), (weight * distance.double()).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.logs["unweighted"], distance.mean())
    assert t.dtype == torch.float64


def test_the_distance_and_the_guidance_are_those_of_the_options() -> None:
    batch = ring_batch(classes=8)
    losses = {}
    for name, options in {
        "l2": {"loss": "l2"},
        "l1": {"loss": "l1"},
        "huber": {"loss": "huber", "huber_c": 0.1},
        "pseudo_huber": {"loss": "pseudo_huber", "huber_c": 0.1},
        "guided": {"loss": "l2", "guidance_scale": 3.0},
        "snr": {"loss": "l2", "weight": "snr"},
    }.items():
        method = Consistency(mlp(Flow(), classes=8, seed=1), mlp(Flow(), classes=8), **options)
        losses[name] = prepared(method).loss(batch, step()).total.item()
    assert len({round(value, 6) for value in losses.values()}) == len(losses)
    t, u = grid_pair(level_grid(Flow(), 18), draws().integer("n", 17))
    x_t = Flow().add_noise(batch.x0, draws().normal("eps", (2,)), t)
    teacher, student = method.teacher, method.student

    def velocity(x: Tensor, time: Tensor) -> Tensor:
        return teacher.velocity(x, time, batch.cond, 3.0)

    x_u = teacher_step(velocity, x_t, t, u)
    expected = l2(student.x0(x_t, t, batch.cond), student.x0(x_u, u, batch.cond)).mean()
    assert losses["guided"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("process", [EDM(), Flow(), VPCosine(), TABLE], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("curriculum", ["cm", "ict", "ect"])
def test_consistency_training_is_the_distance_along_one_noise(curriculum: str, process: Process) -> None:
    kind = {"EDM": "x0", "Flow": "velocity"}.get(type(process).__name__, "v")
    law = {} if curriculum == "cm" else {"mean": -0.5, "std": 1.5}
    method, k = training(process, kind, curriculum=curriculum, **law), 60
    prepared(method)
    batch, student = ring_batch(), frozen_copy(method.student)
    if curriculum == "ect":
        t = process.time_of(-torch.log(lognormal_level(draws().normal("t").double(), -0.5, 1.5)))
        r = ect_r(noise_level(process, t), math.floor(8 * k / 100), 2.0)
        u = torch.where(r > 0, process.time_of(-torch.log(r)), 0.0)
        r = torch.where(u > 0, noise_level(process, u), 0.0)
    else:
        count = (progressive_scales if curriculum == "cm" else doubling_scales)(
            k, 100, *((2, 150) if curriculum == "cm" else (10, 1280))
        )
        grid = level_grid(process, count, "karras")
        if curriculum == "cm":
            index = draws().integer("n", count - 1)
        else:
            index = index_of(
                draws().uniform("n"), lognormal_step_weights(noise_level(process, grid), -0.5, 1.5)
            )
        t, u = grid_pair(grid, index)
        r = noise_level(process, u)
    eps = draws().normal("eps", (2,))
    x_t, x_u = process.add_noise(batch.x0, eps, t), process.add_noise(batch.x0, eps, u)

    def f(x: Tensor, time: Tensor) -> Tensor:
        return student.x0(x, time, batch.cond)

    if curriculum == "ect":
        target = masked_target(f, x_u, u, t, batch.x0)
        distance, weight = (
            pseudo_huber(f(x_t, t), target, 0.0),
            pair_weight("default", noise_level(process, t), r),
        )
    elif curriculum == "ict":
        distance = pseudo_huber(f(x_t, t), f(x_u, u), ict_huber_c(2))
        weight = pair_weight("default", noise_level(process, t), r)
    else:
        distance, weight = l2(f(x_t, t), f(x_u, u)), torch.ones_like(t)
    found = method.loss(batch, step(iteration=k))
    assert bool(found.total.isfinite())
    torch.testing.assert_close(found.total.double(), (weight * distance.double()).mean(), rtol=1e-5, atol=0)
    assert bool(((t > u) | (t == 0)).all())  # t = 0 is a table's first level, which is not clean
    assert found.logs["share_clean_target"].item() == (
        float((u <= 0).double().mean()) if curriculum == "ect" else 0
    )


def test_ect_is_finite_on_a_table_whose_cleanest_level_is_noisy() -> None:
    """Levels below the table's first are its first; there the target is the clean image, at a distance that is not 0."""
    method = prepared(training(TABLE, "v", curriculum="ect", mean=-6.0, std=0.5))
    found = method.loss(ring_batch(), step(iteration=99))
    t, u = method.pair(draws(), 99)
    assert float(t.max()) == 0.0
    assert bool((u == 0).all())
    assert bool(found.total.isfinite())
    assert found.logs["share_clean_target"].item() == 1
    expected = found.logs["unweighted"] / float(noise_level(TABLE, t[:1]))
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_latent_consistency_is_the_distance_along_a_guided_step(fixed: bool) -> None:
    if fixed:
        method, w = latent(student={"w": 0}, w_min=3.0, w_max=3.0), torch.full((32,), 3.0)
    else:
        method, w = latent(w_min=2.0, w_max=6.0), 2 + 4 * draws().uniform("w")
    assert isinstance(method, LCM)
    batch, teacher, student = ring_batch(classes=8), method.teacher, frozen_copy(method.student)
    t, u = (time.double() for time in lcm_pair(lcm_grid(1000, 50), draws().integer("j", 50)))
    x_t = TABLE.add_noise(batch.x0, draws().normal("eps", (2,)), t)
    with_label, without = teacher(x_t, t, batch.cond), teacher(x_t, t, batch.cond.null())
    x_u = guided_ddim_step(TABLE, "v", with_label, without, x_t, t, u, w).x_u
    cond = batch.cond if fixed else batch.cond.with_guidance(w)
    expected = elementwise_huber(student.x0(x_t, t, cond), student.x0(x_u, u, cond), 0.001).mean()
    found = prepared(method).loss(batch, step())
    # The target network starts as the student.
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=0)
    assert found.logs["w"].item() == pytest.approx(w.mean().item(), rel=1e-6)


def test_unguided_latent_consistency_asks_the_teacher_once() -> None:
    method = prepared(latent(student={"w": 0}, teacher={"guidable": False}, w_min=0.0, w_max=0.0))
    sizes = []
    forward = method.frozen["teacher"].net.forward
    method.frozen["teacher"].net.forward = lambda x, t, cond: sizes.append(len(x)) or forward(x, t, cond)
    assert bool(method.loss(ring_batch(classes=8), step()).total.isfinite())
    assert sizes == [32]
    # Negative guidance is guidance, too.
    negative = prepared(latent(student={"w": 8}, w_min=-0.5, w_max=0.0))
    sizes.clear()
    forward = negative.frozen["teacher"].net.forward
    negative.frozen["teacher"].net.forward = lambda x, t, cond: sizes.append(len(x)) or forward(x, t, cond)
    negative.loss(ring_batch(classes=8), step())
    assert sizes == [64]


# ---- exact teachers: what a perfect student scores ----


def exact_student(process: Process, kind: str, boundary: Boundary | None, end: float, std: float) -> Denoiser:
    return Denoiser(GaussianMap(process, kind, boundary, end, std), process, kind, (2,))


class AsV(nn.Module):
    """A denoiser as a net that predicts v."""

    num_classes = 0

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.model.predict("v", x, t, cond)


@pytest.mark.parametrize(("solver", "least"), [("heun", 40.0), ("euler", 10.0)])
@pytest.mark.parametrize(
    ("process", "kind"), [(EDM(), "x0"), (Flow(), "velocity"), (VPCosine(), "v")], ids=["edm", "flow", "vp"]
)
def test_the_exact_flow_map_is_a_fixpoint_of_distillation_up_to_the_solver(
    process: Process, kind: str, solver: str, least: float
) -> None:
    """One Gaussian: the loss of the exact map is the solver's local error, squared: of order 2 (p + 1) in the step."""
    batch, losses = gaussian_batch(), []
    for scales in (33, 65, 129):
        levels = level_grid(process, scales)
        plain = Consistency(mlp(process, kind), mlp(process, kind), scales=scales)
        student = exact_student(process, kind, plain.student.boundary, float(levels[-1]), 0.3)
        teacher = gaussian_teacher(process)
        if (
            kind == "v"
        ):  # of a predicted x0 the last step would be Euler's: it is divided by the sigma of t_min
            teacher = Denoiser(AsV(teacher), process, "v", (2,))
        method = Consistency(student, teacher, scales=scales, solver=solver, loss="l2")
        losses.append(prepared(method).loss(batch, step(256)).total.item())
    assert losses[0] / losses[1] > least
    assert losses[1] / losses[2] > least
    assert losses[2] < (1e-9 if solver == "heun" else 1e-5)
    student.net.gain.data.mul_(1.1)
    assert method.loss(batch, step(256)).total.item() > losses[2] * (100 if solver == "heun" else 3)


def test_an_exact_teacher_of_clean_data_has_no_velocity_there_and_needs_none() -> None:
    """Its velocity is 0 / 0 at a flow's t = 0, and infinite times 0 at VPLinear's: the last step is Euler's."""
    for process, kind in ((Flow(), "velocity"), (VPLinear(), "v")):
        method = prepared(
            Consistency(
                mlp(process, kind, double=True), gaussian_teacher(process), scales=3, sample_steps=[1]
            )
        )
        loss = method.loss(gaussian_batch(), step(256)).total
        assert bool(loss.isfinite()), process
        assert all(bool(g.isfinite().all()) for g in gradients(loss, method.student))
    regular = Consistency(mlp(Flow(), seed=1), mlp(Flow()))
    assert regular.singular is None


@pytest.mark.parametrize("curriculum", ["cm", "ict", "ect"])
@pytest.mark.parametrize(("process", "kind"), [(EDM(), "x0"), (Flow(), "velocity")], ids=["edm", "flow"])
def test_one_point_of_data_is_a_fixpoint_of_training(curriculum: str, process: Process, kind: str) -> None:
    """With one data point m, (x_t, x_u) of one noise lie on a trajectory, so that the exact map has no loss at all."""
    plain = training(process, kind, curriculum=curriculum)
    end = 0.0 if curriculum == "ect" else float(plain.end)
    method = ConsistencyTraining(
        exact_student(process, kind, plain.student.boundary, end, 0.0), curriculum=curriculum, total_steps=100
    )
    batch = gaussian_batch(std=0.0)
    loss = prepared(method).loss(batch, step(256, iteration=50)).logs["unweighted"].item()
    assert loss < 1e-12
    method.student.net.gain.data.mul_(1.1)
    assert method.loss(batch, step(256, iteration=0)).logs["unweighted"].item() > 1e-6


def test_the_exact_map_is_a_fixpoint_of_latent_consistency_up_to_its_grid() -> None:
    batch, losses = gaussian_batch(), []
    for k in (50, 100, 200):
        student = exact_student(TABLE, "v", Boundary("lcm"), 0.0, 0.3)
        method = LCM(student, gaussian_teacher(TABLE), w_min=0.0, w_max=0.0, ddim_steps=k, loss="l2")
        losses.append(prepared(method).loss(batch, step(256)).total.item())
    assert (
        losses[0] / losses[1] > 8
    )  # DDIM is of order 1: its local error squared falls with the fourth power
    assert losses[1] / losses[2] > 8
    assert losses[2] < 1e-7


# ---- what is trained and what is a constant ----


def methods() -> dict[str, Any]:
    """name -> (a method that keeps a target network where it can, classes)."""
    return {
        "consistency": lambda: (consistency(scales=5, target_decay=0.8, sample_steps=[1, 2]), 0),
        "consistency, itself": lambda: (consistency(scales=5, sample_steps=[1, 2]), 0),
        "cm": lambda: (training(curriculum="cm", total_steps=12, mu0=0.7), 0),
        "ict": lambda: (training(curriculum="ict", total_steps=12), 0),
        "ect": lambda: (training(curriculum="ect", total_steps=12), 0),
        "lcm": lambda: (latent(target_decay=0.8), 8),
        "lcm, itself": lambda: (latent(target_decay=0.0), 8),
    }


WITH_TARGET = ["consistency", "cm", "lcm"]
every_method = pytest.mark.parametrize("name", list(methods()))


@every_method
def test_the_target_is_a_constant_and_the_teacher_frozen(name: str) -> None:
    method, classes = methods()[name]()
    batch = ring_batch(classes=classes)
    prepared(method)
    teacher = method.frozen.get("teacher")
    assert (teacher is None) == (name in ("cm", "ict", "ect"))
    for network in method.frozen.values():
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
        network.requires_grad_(True)  # even so no gradient may reach it
    for network in method.ema.values():
        network.requires_grad_(True)
    total = method.loss(batch, step(iteration=6)).total
    for network in [*method.frozen.values(), *method.ema.values()]:
        assert not any(bool(g.any()) for g in gradients(total, network))
    found = gradients(total, method.student)
    assert all(bool(g.any()) for g in found)
    # The gradient is that of a loss whose target comes from another network of the same weights.
    judge = frozen_copy(method.student)
    method.further["target"] = None  # type: ignore[assignment]
    method.ema["target"] = judge
    again = method.loss(batch, step(iteration=6)).total
    torch.testing.assert_close(again, total, rtol=0, atol=0)
    for mine, other in zip(found, gradients(again, method.student), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_TARGET)
def test_the_target_network_is_another_object_that_judges(name: str) -> None:
    method, classes = methods()[name]()
    prepared(method)
    assert sorted(method.ema) == ["student", "target"]
    target = method.average("target")
    assert target is not method.student
    mine = {p.data_ptr() for p in method.student.parameters()}
    assert not mine & {p.data_ptr() for p in target.parameters()}
    assert not any(p.requires_grad for p in target.parameters())
    assert target.boundary == method.student.boundary
    before = method.loss(ring_batch(classes=classes), step(iteration=6)).total.item()
    for parameter in target.parameters():
        parameter.data.mul_(1.5)
    assert method.loss(ring_batch(classes=classes), step(iteration=6)).total.item() != before


def test_without_a_decay_there_is_no_target_network() -> None:
    for name in ("consistency, itself", "ict", "ect", "lcm, itself"):
        method, _ = methods()[name]()
        assert sorted(prepared(method).ema) == ["student"]


@pytest.mark.parametrize("name", WITH_TARGET)
def test_the_target_follows_the_student_after_its_step(name: str, tmp_path: Path) -> None:
    """target <- mu target + (1 - mu) student, with the student as it is after the optimizer's step and mu of that step."""
    method, classes = methods()[name]()
    prepared(method, lr=0.1, kind=torch.optim.SGD, ema=None)
    assert sorted(method.ema) == ["target"]
    start = state(method)
    trained(method, tmp_path, 1, classes)
    decay = adaptive_ema(0, 12, 0.7, 2, 150) if name == "cm" else 0.8
    end = state(method)
    moved = 0
    for key in (key.removeprefix("student.") for key in start if key.startswith("student.")):
        old, new = start[f"student.{key}"], end[f"student.{key}"]
        assert torch.equal(start[f"ema.target.{key}"], old)
        torch.testing.assert_close(end[f"ema.target.{key}"], decay * old + (1 - decay) * new)
        moved += int(not torch.equal(old, new))
    assert moved > 0


@pytest.mark.parametrize("name", [*WITH_TARGET, "ect"])
def test_continuing_equals_not_stopping_target_included(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[DistillModule, int]:
        method, classes = methods()[name]()
        return prepared(method), classes

    (whole, classes), (first, _), (second, _) = fresh(), fresh(), fresh()
    trained(whole, tmp_path / "whole", 12, classes)
    trained(first, tmp_path / "parts", 6, classes)
    kept = checkpoint_of(tmp_path / "parts")
    assert sorted(kept["ema"]) == (["student"] if name == "ect" else ["student", "target"])
    assert sorted(kept["networks"]) == ["student"]
    trained(second, tmp_path / "parts", 12, classes)
    expected, found = state(whole), state(second)
    assert sorted(found) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert any(not torch.equal(value, state(first)[key]) for key, value in expected.items())


def test_a_target_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    method = consistency(scales=5, sample_steps=[1])
    method.frozen["teacher"].net.out.bias.data.fill_(float("nan"))
    prepared(method)
    start = state(method)
    with pytest.raises(
        FloatingPointError, match="update 'student': loss or gradient was not finite in 10 steps"
    ):
        trained(method, tmp_path, 20)
    end = state(method)
    assert all(torch.equal(end[key], value) for key, value in start.items())


# ---- curricula ----


def test_curricula_advance_with_the_step() -> None:
    cm, ict, ect = (training(curriculum=name, total_steps=160) for name in ("cm", "ict", "ect"))
    steps = [0, 1, 20, 40, 80, 120, 159, 160, 500]
    assert [cm.scales(k) for k in steps[:-1]] == [progressive_scales(k, 160, 2, 150) for k in steps[:-1]]
    assert (cm.scales(0), cm.scales(160), cm.scales(500)) == (2, 151, 151)
    assert [ict.scales(k) for k in (0, 19, 20, 40, 140, 160)] == [11, 11, 21, 41, 1281, 1281]
    assert [ect.scales(k) for k in (0, 19, 20, 40, 159, 160, 500)] == [0, 0, 1, 2, 7, 7, 7]
    decays = [cm.decay(k) for k in steps]
    assert decays[0] == pytest.approx(0.81)  # below mu0 at the start, as in the released code
    assert decays == sorted(decays)
    assert decays[-1] == adaptive_ema(160, 160, 0.9, 2, 150)
    for method in (cm, ict, ect):
        prepared(method)
        logged = [method.loss(ring_batch(), step(iteration=k)).logs["levels"].item() for k in (0, 80, 159)]
        assert logged == [method.scales(k) for k in (0, 80, 159)]
        assert logged == sorted(set(logged))
        logs = method.loss(ring_batch(), step(iteration=80)).logs
        t, u = method.pair(draws(), 80)
        assert logs["ratio"].item() == pytest.approx(
            (noise_level(Flow(), u) / noise_level(Flow(), t)).mean().item()
        )
        assert ("target_decay" in logs) == (method is cm)
    assert cm.loss(ring_batch(), step(iteration=80)).logs["target_decay"].item() == pytest.approx(
        cm.decay(80)
    )
    # Other numbers of levels are other options.
    assert training(curriculum="cm", s0=4, s1=4).scales(50) == progressive_scales(50, 100, 4, 4)
    assert training(curriculum="ict", s0=5, s1=40).scales(99) == 41


def test_pairs_come_closer_and_stages_begin_with_clean_targets() -> None:
    ect = training(EDM(), "x0", curriculum="ect", total_steps=80)
    gaps, clean = [], []
    for k in (0, 20, 40, 79):
        t, u = ect.pair(draws(512), k)
        gaps.append(((t - u) / t).mean().item())
        clean.append((u == 0).double().mean().item())
        assert t.dtype == u.dtype == torch.float64
    assert gaps == sorted(gaps, reverse=True)
    assert clean[0] > 0.8  # r = 0 below a noise level of about 2
    assert clean[-1] == 0
    cm = training(curriculum="cm", s0=2, s1=8)
    t, u = cm.pair(draws(64), 0)
    grid = level_grid(Flow(), 2, "karras")
    assert t.unique().tolist() == grid[:1].tolist()
    assert u.unique().tolist() == grid[1:].tolist()


# ---- how students are sampled, and what is logged ----


def test_samplers_of_consistency_students() -> None:
    process = EDM()
    method = consistency(process, "x0", sample_steps=[4, 1, 2])
    spec, levels = method.result().sampler, karras_levels(18)
    assert (spec.mode, spec.steps, spec.any_steps) == ("sde", 1, False)
    assert spec.times == {
        4: (*levels[[0, 4, 8, 13]].tolist(), 0.0),
        1: (80.0, 0.0),
        2: (*levels[[0, 8]].tolist(), 0.0),
    }
    assert (spec.noise_floor, spec.noise_scale, spec.guidance_w) == (0.002, 1.0, None)
    assert method.student.boundary == Boundary("cm", sigma_min=0.002)
    assert method.result().coupling == "few_step"
    flow = Consistency(mlp(Flow(), classes=8, seed=1), mlp(Flow(), classes=8), guidance_scale=2.5)
    assert flow.result().sampler.guidance_baked == 2.5
    assert flow.result().sampler.noise_floor == 0.0
    assert flow.student.boundary is None
    assert flow.result().sampler.times[2] == (1.0, pytest.approx(9 / 17), 0.0)
    assert not flow.result().guidable


def test_samplers_of_trained_students() -> None:
    """Where the grid of pairs ends above clean data, the student is the identity there; easy tuning needs no such place."""
    for process, kind, end in (
        (EDM(), "x0", 0.002),
        (Flow(), "velocity", 0.002),
        (VPCosine(), "v", 0.002),
        (TABLE, "v", 0.02916716),
    ):
        for curriculum in ("cm", "ict"):
            method = training(process, kind, curriculum=curriculum)
            assert method.student.boundary is not None
            assert method.student.boundary.sigma_min == pytest.approx(end)
            assert method.result().sampler.noise_floor == method.student.boundary.sigma_min
        ect = training(process, kind, curriculum="ect")
        assert (ect.student.boundary, ect.result().sampler.noise_floor) == (None, 0.0)
        spec = ect.result().sampler
        assert (spec.mode, sorted(spec.times), spec.times[1][0]) == ("sde", [1, 2, 4], process.t_max)
    # A fresh start from a consistency model forgets its boundary.
    student = mlp(EDM(), "x0", boundary=Boundary("cm"), coupling="few_step")
    assert ConsistencyTraining(student, total_steps=5).student.boundary is None


def test_samplers_of_latent_consistency_students() -> None:
    spec = latent(w_min=2.0, w_max=6.0, sample_w=3.5).result().sampler
    assert (spec.mode, spec.steps, sorted(spec.times)) == ("sde", 4, [1, 2, 4, 8])
    assert spec.times[4] == (999.0, 759.0, 499.0, 259.0, 0.0) == tuple(lcm_times(4).tolist())
    assert (spec.guidance_w, spec.guidance_w_range, spec.guidance_baked) == (3.5, (2.0, 6.0), 1.0)
    assert latent(w_min=2.0, w_max=6.0).result().sampler.guidance_w == 2.0
    fixed = latent(student={"w": 0}, w_min=3.0, w_max=3.0, sample_steps=[2, 1], timestep_scaling=5.0)
    assert (
        fixed.result().sampler.steps,
        fixed.result().sampler.guidance_w,
        fixed.result().sampler.guidance_baked,
    ) == (1, None, 4.0)
    assert fixed.student.boundary == Boundary("lcm", timestep_scaling=5.0)
    for method in (fixed, latent()):
        assert SamplerSpec.from_dict(method.result().sampler.to_dict()) == method.result().sampler


DIAGNOSED = {"trajectory", "boundary", "x_mean", "x_std", "x_std_teacher", "x_max"}
THIRDS = {"loss_noisy", "loss_middle", "loss_clean", "x_std"}


@every_method
def test_diagnostics(name: str) -> None:
    method, classes = methods()[name]()
    prepared(method)
    batch = ring_batch(classes=classes)
    with torch.no_grad():
        told, again = (method.diagnostics(batch, draws()) for _ in range(2))
    assert set(told.scalars) == DIAGNOSED
    assert all(bool(value.isfinite()) and value.ndim == 0 for value in told.scalars.values())
    assert told.scalars == again.scalars
    assert told.scalars["boundary"].item() < (1e-6 if name != "ect" else 1e-2)
    teacher = "teacher" if method.frozen else "student, 4 steps"
    assert [label for label, _ in told.rows] == [teacher, "student, 1 step"]
    logs = set(method.loss(batch, step()).logs)
    assert logs >= THIRDS
    # They are of the average: what is exported.
    method.ema["student"].net.out.bias.data.add_(1.0)
    with torch.no_grad():
        assert method.diagnostics(batch, draws()).scalars["x_mean"] != told.scalars["x_mean"]


@pytest.mark.parametrize(
    ("process", "kind", "grid"),
    [
        (EDM(), "x0", "auto"),
        (Flow(), "velocity", "karras"),
        (VPCosine(), "v", "auto"),
        (VPCosine(), "x0", "auto"),
        (TABLE, "v", "auto"),
    ],
)
def test_the_boundary_error_is_zero_wherever_the_grid_ends(process: Process, kind: str, grid: str) -> None:
    method = prepared(consistency(process, kind, grid=grid))
    with torch.no_grad():
        told = method.diagnostics(ring_batch(), draws())
    assert told.scalars["boundary"].item() == 0
    method.student = method.student.with_(boundary=None)
    with torch.no_grad():
        assert method.diagnostics(ring_batch(), draws()).scalars["boundary"].item() > 1e-6


def test_the_trajectory_is_measured_against_the_teacher_s_endpoints() -> None:
    student = exact_student(Flow(), "velocity", None, 0.0, 0.3)
    method = prepared(Consistency(student, gaussian_teacher(Flow()), scales=65))
    batch = Batch(*(torch.arange(32),) * 2, ring_batch().cond, x0=noise(32, 5))
    with torch.no_grad():
        told = method.diagnostics(batch, draws())
        assert told.scalars["trajectory"].item() < 1e-3
        method.ema["student"].net.gain.data.mul_(1.2)
        assert method.diagnostics(batch, draws()).scalars["trajectory"].item() > 0.05


# ---- bad input ----

CONSISTENCY = [
    ({"scales": 1}, "scales: found 1, expected an integer of at least 2"),
    ({"scales": 2.5}, "scales: found 2.5"),
    ({"grid": "cosine"}, "grid: found 'cosine', expected one of"),
    ({"solver": "rk45"}, "solver: found 'rk45', expected 'heun' or 'euler'"),
    ({"loss": "lpips"}, r"loss: found 'lpips', expected one of \['pseudo_huber', 'huber', 'l2', 'l1'\]"),
    ({"huber_c": -1.0}, "c: found -1.0, expected at least 0"),
    ({"loss": "huber", "huber_c": 0.0}, "c: found 0.0, expected a positive number"),
    ({"weight": "snr-1"}, "weight: found 'snr-1', expected one of"),
    ({"target_decay": 1.0}, r"target_decay: expected a number in \[0, 1\), found 1.0"),
    ({"target_decay": -0.1}, "target_decay: .* found -0.1"),
    (
        {"guidance_scale": 2.0},
        "guidance_scale: found 2.0, but the teacher was trained without a null condition",
    ),
    ({"sample_steps": []}, r"sample_steps: found \[\], expected a list of step counts in 1 .. 17"),
    ({"sample_steps": [1, 18]}, r"sample_steps: found \[1, 18\]"),
    ({"sample_steps": [0]}, r"sample_steps: found \[0\]"),
    ({"sample_steps": 4}, "sample_steps: found 4, expected a list"),
    ({"sample_steps": [1.5]}, "sample_steps: found"),
]


@pytest.mark.parametrize(("options", "message"), CONSISTENCY)
def test_wrong_options_of_consistency(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency(**options)


def test_wrong_models_of_consistency() -> None:
    student = mlp(Flow())
    for teacher, message in (
        (
            mlp(VPCosine(), "v"),
            r"teacher: lives under VPCosine\(logsnr_max=20.0\), the student under Flow\(\)",
        ),
        (mlp(Flow(), coupling="few_step"), "teacher: found a few-step student, which has no trajectories"),
        (mlp(Flow(), coupling="endpoint"), "teacher: found a few-step student"),
        (mlp(Flow(), w=8), "teacher: takes the guidance as an input; expected a teacher without"),
        (mlp(Flow(), classes=8), "teacher.conditions: found 8 classes, expected the student's no conditions"),
        (
            exact_denoiser(Flow(), [[0.0] * 3]),
            r"teacher.sample_shape: found \(3,\), expected the student's \(2,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Consistency(student, teacher)
    for process in (Flow(), VPLinear()):
        with pytest.raises(ValueError, match=r"grid: ends at t = 0 .* expected 'karras'"):
            consistency(process, "x0")
        boundary = consistency(process, "x0", grid="karras").student.boundary
        assert boundary is not None
        assert boundary.sigma_min == pytest.approx(0.002)
    embeds = prepared(Consistency(mlp(Flow(), w=8), student))
    with pytest.raises(ValueError, match="guidance_w: missing"):
        embeds.loss(ring_batch(), step())
    with pytest.raises(TypeError, match="teacher"):
        Consistency(student)  # type: ignore[call-arg]


TRAINING = [
    ({"curriculum": "sct"}, r"curriculum: found 'sct', expected one of \['cm', 'ict', 'ect'\]"),
    ({"total_steps": 0}, "total_steps: found 0, expected at least 1"),
    ({"total_steps": -3}, "total_steps: found -3"),
    ({"total_steps": None}, "total_steps: found None"),
    ({"curriculum": "ict", "total_steps": 5}, "total_steps: found 5, expected at least 8 steps, one a stage"),
    (
        {"curriculum": "cm", "s0": 20, "s1": 10},
        "s0, s1: found 20 and 10, expected integers with 1 <= s0 <= s1",
    ),
    ({"curriculum": "cm", "s0": 0}, "s0, s1: found 0 and 150"),
    ({"curriculum": "ict", "s1": 4}, "s0, s1: found 10 and 4"),
    ({"curriculum": "ict", "s0": 2.5}, "s0, s1: found 2.5"),
    ({"curriculum": "ect", "s0": 2}, "s0, s1: found 2 and None, but 'ect' has no levels to count"),
    ({"curriculum": "cm", "mu0": 1.0}, r"mu0: found 1.0, expected a number in \(0, 1\)"),
    ({"curriculum": "cm", "mu0": 0.0}, "mu0: found 0.0"),
    ({"q": 1.0}, "q, stages: found 1.0 and 8, expected q > 1"),
    ({"stages": 0}, "q, stages: found 2.0 and 0"),
    ({"std": 0.0}, "std: found 0.0, expected a positive number"),
    ({"huber_c": -0.1}, "huber_c: found -0.1, expected a number of at least 0"),
    ({"sample_steps": []}, "sample_steps: found"),
    ({"sample_steps": [1, 40]}, r"sample_steps: found \[1, 40\], expected a list of step counts in 1 .. 17"),
]


@pytest.mark.parametrize(("options", "message"), TRAINING)
def test_wrong_options_of_consistency_training(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_wrong_models_of_consistency_training() -> None:
    for coupling in ("endpoint", "paired"):
        with pytest.raises(ValueError, match=f"init: found a model of {coupling} noise and data"):
            ConsistencyTraining(mlp(Flow(), coupling=coupling), total_steps=5)
    with pytest.raises(TypeError, match="teacher"):
        ConsistencyTraining(mlp(Flow()), total_steps=5, teacher=mlp(Flow()))  # type: ignore[call-arg]


LATENT = [
    ({"w_min": 4.0, "w_max": 2.0}, "w_min, w_max: found 4.0 and 2.0, expected -1 <= w_min <= w_max"),
    ({"w_min": -2.0}, "w_min, w_max: found -2.0"),
    (
        {"w_min": 2.0, "w_max": 2.0},
        "w_min, w_max, embed_w: found 2.0, 2.0, True, expected a student without a guidance",
    ),
    (
        {"student": {"w": 0}},
        r"w_min, w_max, embed_w: found 0.0, 1.0, True, expected a student with a guidance .*adapt",
    ),
    (
        {"teacher": {"guidable": False}},
        "w_max: found 1.0, but the teacher was trained without a null condition",
    ),
    ({"teacher": {"w": 8}}, "teacher: takes the guidance as an input"),
    ({"teacher": {"coupling": "few_step"}}, "teacher: found a few-step student"),
    ({"ddim_steps": 30}, "ddim_steps: found 30, expected a divisor of the 1000 timesteps"),
    ({"ddim_steps": 2000}, "ddim_steps: found 2000"),
    ({"ddim_steps": 0}, "ddim_steps: found 0"),
    ({"ddim_steps": 50.0}, "ddim_steps: found 50.0"),
    ({"timestep_scaling": 0.0}, "timestep_scaling: found 0.0, expected a positive number"),
    ({"target_decay": 1.0}, "target_decay: .* found 1.0"),
    ({"loss": "lpips"}, "loss: found 'lpips'"),
    ({"huber_c": 0.0}, "c: found 0.0, expected a positive number"),
    ({"sample_steps": [60]}, r"sample_steps: found \[60\], expected a list of step counts in 1 .. 50"),
    ({"sample_steps": []}, "sample_steps: found"),
    ({"sample_w": 1.5}, "sample_w: found 1.5, expected 0.0 .. 1.0"),
    (
        {"w_min": 2.0, "w_max": 2.0, "student": {"w": 0}, "sample_w": 3.0},
        "sample_w: found 3.0, expected 2.0 .. 2.0",
    ),
]


@pytest.mark.parametrize(("options", "message"), LATENT)
def test_wrong_options_of_latent_consistency(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent(**options)


def test_wrong_models_of_latent_consistency() -> None:
    with pytest.raises(ValueError, match=r"student: found VPCosine.*expected a table of noise levels"):
        LCM(mlp(VPCosine(), "v", classes=8, w=8), mlp(VPCosine(), "v", classes=8))
    clean = VPScaledLinear(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"teacher: lives under VPScaledLinear\(.*zero_terminal_snr=True"):
        LCM(mlp(TABLE, "v", classes=8, w=8), mlp(clean, "v", classes=8))
    with pytest.raises(ValueError, match=r"kind: found 'eps', but under .* alpha is 0 at t_max"):
        mlp(clean, "eps")
    with pytest.warns(
        UserWarning, match="guidance_w: 100.0 is a guidance_scale of 101.0; w = guidance_scale - 1"
    ):
        latent(w_min=0.0, w_max=100.0)


def test_wrong_processes() -> None:
    for options, message in (
        ({"sigma_min": 0.0}, "sigma_min, sigma_max: found 0.0 and 80.0"),
        ({"sigma_min": 90.0}, "sigma_min, sigma_max: found 90.0 and 80.0"),
        ({"rho": 0.0}, "rho must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            EDM(**options)
    for kind in ("noise", "V"):
        with pytest.raises(ValueError, match=f"unknown prediction kind '{kind}'"):
            mlp(Flow(), kind)
    assert l1(noise(3), noise(3)).sum() == 0
