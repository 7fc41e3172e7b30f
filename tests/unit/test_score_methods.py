"""SiD, DMD, DisBack and Degrade as methods: losses and gradients against formulas written here, orders, nodes, GAN, logs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from method_support import (
    DoubleDraws,
    double_step,
    draws,
    gradients,
    mlp,
    nested,
    optim,
    prepared,
    ring_batch,
    state,
    step,
    trained,
)
from torch import Tensor, nn
from torch.nn.functional import softplus

from distill.data.batch import Batch
from distill.data.cond import NULL_LABEL, Cond
from distill.data.points import Points
from distill.data.rng import Draws
from distill.engine import module as engine
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.update import Loss, Step
from distill.methods.degrade import Degrade
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.families.matching import DistributionMatching
from distill.methods.families.score import ScoreDistillation
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear

WORLDS = [
    pytest.param(EDM(), "x0", id="edm"),
    pytest.param(Flow(), "velocity", id="flow"),
    pytest.param(VPCosine(), "v", id="cosine"),
]
every_world = pytest.mark.parametrize(("process", "kind"), WORLDS)
B, CLASSES = 32, 8
# The papers' noise levels, which the classes take by themselves under EDM alone.
SID: dict[str, Any] = {"generator_times": {"name": "sid"}, "fake": {"times": {"name": "lognormal"}}}
TABLE: dict[str, Any] = {
    "generator_times": {"name": "karras"},
    "fake": {"times": {"name": "karras", "low": 0, "high": 999}},
}
Method = Callable[..., ScoreDistillation]


def disback(student: Denoiser, teacher: Denoiser, **options: Any) -> DisBack:
    """Without nodes."""
    return DisBack(student, teacher, [], **options)


METHODS: dict[str, Method] = {
    "sid": SiD,
    "dmd": DMD,
    "diff-instruct": partial(DMD, normalise=False),
    "disback": disback,
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=list(METHODS))


def made(make: Method, process: Process, kind: str, *, far: bool = True, **options: Any) -> ScoreDistillation:
    """A method on random nets in float64; `far`: a fake score that has left the teacher."""
    classes = options.pop("classes", 0)
    net = partial(mlp, process, kind, classes=classes, double=options.pop("double", True))
    method = make(net(seed=1), net(seed=0), **nested(options))
    if far:
        method.fake.net.load_state_dict(net(seed=2).net.state_dict())
    return method


# ---- the formulas, written a second time ----


def column(values: Tensor) -> Tensor:
    return values[:, None]


def answer(model: Denoiser, x: Tensor, t: Tensor, cond: Cond, scale: float = 1.0) -> Tensor:
    """What the bare net says, guided by hand."""
    told: Tensor = model.net(x, t.to(x.dtype), cond)
    if scale == 1:
        return told
    unconditional = model.net(x, t.to(x.dtype), Cond.of_labels(torch.full((len(x),), NULL_LABEL)))
    return unconditional + scale * (told - unconditional)


def x0(model: Denoiser, x: Tensor, t: Tensor, cond: Cond, scale: float = 1.0) -> Tensor:
    out = answer(model, x, t, cond, scale)
    alpha, sigma = column(model.process.alpha(t)), column(model.process.sigma(t))
    if model.kind == "x0":
        return out
    return x - sigma * out if model.kind == "velocity" else alpha * x - sigma * out


def sid_times(process: Process, u: Tensor, t_max: float) -> Tensor:
    """Section 1.1: sigma = (80^(1/7) + (1 - t) (0.002^(1/7) - 80^(1/7)))^7 with t = u t_max / 1000."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return process.time_of(-torch.log((high + (1 - u * t_max / 1000) * (low - high)) ** 7))


def table_times(process: Process, u: Tensor, first: int, last: int) -> Tensor:
    """A uniform index of DMD2's table of 1000 noise levels."""
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    index = first + torch.floor(u * (last - first + 1))
    return process.time_of(-torch.log((low + index / 999 * (high - low)) ** 7))


def start_of(process: Process, level: float | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """(first state, its time [B]): noise of `level`, or the process's own at t_max."""
    if level is None:
        return process.prior(z), torch.full((len(z),), process.t_max, dtype=torch.float64)
    t = process.time_of(torch.full((len(z),), -math.log(level), dtype=torch.float64))
    return column(process.sigma(t)) * z, t


def seen(
    method: ScoreDistillation, level: float | None, t: Tensor, cond: Cond, teacher: float = 1, fake: float = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, yT, yF) of the student's update of a one-step student, with all graphs."""
    d, process = double_step().draws, method.student.process
    x = x0(method.student, *start_of(process, level, d.normal("z", (2,))), cond)
    x_t = column(process.alpha(t)) * x + column(process.sigma(t)) * d.normal("eps", (2,))
    return x, x0(method.teacher, x_t, t, cond, teacher), x0(method.fake, x_t, t, cond, fake)


def sid_by_hand(x: Tensor, y_teacher: Tensor, y_fake: Tensor, alpha: float, detach: str = "weight") -> Tensor:
    """100 sum (yT - yF) ((yT - x) - alpha (yT - yF)) / m, averaged over the batch."""
    m = (x - y_teacher).abs().mean(1).clamp(min=1e-5)
    m = m.detach() if "weight" in detach else m
    y_teacher = y_teacher.detach() if "teacher" in detach else y_teacher
    y_fake = y_fake.detach() if "fake" in detach else y_fake
    product = (y_teacher - y_fake) * ((y_teacher - x) - alpha * (y_teacher - y_fake))
    return 100 * (product.sum(1) / m).mean()


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def close(found: Tensor, expected: Tensor, rtol: float = 1e-9) -> None:
    assert expected.abs().max() > 1e-6, "a comparison of zeros says nothing"
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@every_world
@every_method
def test_times_where_none_are_chosen(process: Process, kind: str, make: Method) -> None:
    """The papers' noise levels under EDM, the process's own time elsewhere."""
    method, d = made(make, process, kind), double_step().draws
    u, n = d.uniform("t"), d.normal("t")
    if isinstance(process, EDM):
        student = sid_times(process, u, 800) if make is SiD else table_times(process, u, 20, 980)
        fake = torch.exp(-1.2 + 1.2 * n) if make is SiD else table_times(process, u, 0, 999)
    else:
        student, fake = 0.02 + 0.96 * u, torch.sigmoid(n) if isinstance(process, Flow) else u
    close(method.generator_times(d), student)
    close(method.matching.times(d), fake)


# ---- where the gradient flows ----


@every_world
@pytest.mark.parametrize(("alpha", "level"), [(1.2, None), (0.5, 2.5)])
def test_sid_s_gradient_flows_through_both_inputs_and_not_through_the_weight(
    process: Process, kind: str, alpha: float, level: float | None
) -> None:
    method = made(SiD, process, kind, alpha=alpha, levels=None if level is None else [level], **SID)
    batch = ring_batch(dtype=torch.float64)
    t = sid_times(process, double_step().draws.uniform("t"), 800)
    predictions = seen(method, level, t, batch.cond)
    expected = sid_by_hand(*predictions, alpha)
    found = method.student_loss(batch, double_step())
    close(found.total.detach(), expected.detach())
    close(found.logs["loss_unscaled"], expected.detach() / 100)
    wanted, got = (flat(gradients(total, method.student)) for total in (expected, found.total))
    close(got, wanted)
    for wrong in ("weight teacher", "weight fake", "weight teacher fake", ""):
        other = flat(gradients(sid_by_hand(*predictions, alpha, wrong), method.student))
        assert (other - got).norm() > 0.01 * got.norm(), f"detached: {wrong!r}"


@every_world
@pytest.mark.parametrize("name", ["dmd", "diff-instruct", "disback"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_distribution_matching_moves_x_alone_along_the_difference(
    process: Process, kind: str, name: str, reduction: str
) -> None:
    """The gradient is that of <direction, x> with a constant direction, though both networks could be differentiated."""
    method = made(METHODS[name], process, kind, reduction=reduction, **TABLE)
    batch = ring_batch(dtype=torch.float64)
    t = table_times(process, double_step().draws.uniform("t"), 20, 980)
    x, y_teacher, y_fake = seen(method, None, t, batch.cond)
    m = (x - y_teacher).abs().mean(1)
    m = torch.maximum(m, 1e-3 * x.square().mean(1).sqrt())
    direction = (y_fake - y_teacher) / (1 if name == "diff-instruct" else column(m))
    constant = direction.detach() / (B * (2 if reduction == "mean" else 1))
    with_graph: list[bool] = []
    for model in (method.teacher, method.fake):
        model.net.register_forward_pre_hook(lambda *_: with_graph.append(torch.is_grad_enabled()))
    loss = method.student_loss(batch, double_step())
    assert with_graph == [False, False], "activations that nobody needs"
    close(flat(gradients(loss.total, method.student)), flat(gradients((constant * x).sum(), method.student)))
    for network in (method.teacher.requires_grad_(True), method.fake.requires_grad_(True)):
        assert not flat(gradients(method.student_loss(batch, double_step()).total, network)).any()
    rms = direction.square().mean().sqrt().detach()
    close(loss.logs["direction"], rms)
    if name != "diff-instruct":
        close(loss.total.detach(), 0.5 * rms.square() * (2 if reduction == "sum" else 1))


@pytest.mark.parametrize(
    ("make", "options", "trains"),
    [
        (SiD, {"alpha": 1.2}, {"fake": {"fake"}, "student": {"student"}}),
        (SiD, {"levels": [4.0, 1.0]}, {"fake": {"fake"}, "student": {"student"}}),
        (DMD, {"gan": {}}, {"student": {"student"}, "fake": {"fake", "head"}}),
        (DMD, {"gan": {"features": "teacher"}}, {"student": {"student"}, "fake": {"fake", "head"}}),
        (disback, {"levels": [4.0, 1.0]}, {"student": {"student"}, "fake": {"fake"}}),
    ],
    ids=["sid", "few-step sid", "gan on the fake", "gan on the teacher", "few-step disback"],
)
def test_each_update_gives_gradients_to_what_it_trains_alone(
    make: Method, options: dict[str, Any], trains: dict[str, set[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    """Noted by the engine's own steps: teacher and fake after the student's update, the student and the head likewise."""
    method = made(make, Flow(), "velocity", double=False, **options)
    prepared(method)
    found: list[set[str]] = []
    original = engine.step_unless

    def note(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
        everything = {**method.networks, **method.frozen}
        given = {
            r: [p.grad is not None and bool(p.grad.any()) for p in n.parameters()]
            for r, n in everything.items()
        }
        assert all(all(flags) == any(flags) for flags in given.values())
        found.append({role for role, flags in given.items() if any(flags)})
        original(optimizer, bad)

    monkeypatch.setattr(engine, "step_unless", note)
    before = flat([p.clone() for p in method.teacher.parameters()])
    trained(method, tmp_path, 1)
    assert found == list(trains.values())
    assert torch.equal(flat(list(method.teacher.parameters())), before)


# ---- the fake score is the teacher ----


@every_method
@pytest.mark.parametrize("levels", [None, [9.0, 1.0, 0.2]], ids=["one step", "three steps"])
@every_world
def test_nothing_moves_while_the_fake_score_is_the_teacher(
    process: Process, kind: str, levels: list[float] | None, make: Method
) -> None:
    """In float32 and exactly, for SiD whatever alpha is. Where a prediction is converted to x0, the paths through teacher and
    fake score are added up one by one, and SiD's gradient is zero to rounding."""
    rounding = 0.0
    if make is SiD and kind != "x0":
        apart = made(make, process, kind, double=False, levels=levels)
        rounding = 1e-6 * float(
            flat(gradients(apart.student_loss(ring_batch(), step()).total, apart.student)).norm()
        )
    for alpha in (0.5, 1.0, 1.2) if make is SiD else (None,):
        options = {} if alpha is None else {"alpha": alpha}
        method = made(make, process, kind, far=False, double=False, levels=levels, **options)
        for iteration in range(3):
            d = Draws(7, "train/student", iteration, torch.arange(B))
            total = method.student_loss(ring_batch(), Step(iteration, d)).total
            assert total.item() == 0
            assert float(flat(gradients(total, method.student)).norm()) <= rounding


ORDERS = [
    ("sid", 1, None, "FS FS FS"),
    ("sid", 2, None, "F FS F FS F FS"),
    ("sid", 5, None, "F F F F FS F F F F FS F F F F FS"),
    ("sid", 2, "student", "SF F SF F SF"),
    ("dmd", 1, None, "SF SF SF"),
    ("dmd", 2, None, "SF F SF F SF"),
    ("dmd", 5, None, "SF F F F F SF F F F F SF"),
    ("dmd", 2, "fake", "F FS F FS F FS"),
    ("disback", 2, None, "SF F SF F SF"),
]


@pytest.mark.parametrize(("name", "ratio", "first", "order"), ORDERS)
def test_the_order_of_updates(name: str, ratio: int, first: str | None, order: str, tmp_path: Path) -> None:
    """Three steps of the student, F a fake update, S a student's; a blank ends an iteration."""
    updates = {"fake_per_student": ratio, "first": first}
    method = made(METHODS[name], Flow(), "velocity", double=False, updates=updates)
    found: dict[int, str] = {}

    def noted(letter: str, loss: Any) -> Any:
        def note(batch: Batch, at: Step) -> Loss:
            found[at.iteration] = found.get(at.iteration, "") + letter
            result: Loss = loss(batch, at)
            return result

        return note

    for letter, loss in (("F", "fake_loss"), ("S", "student_loss")):
        setattr(method, loss, noted(letter, getattr(method, loss)))
    trained(prepared(method), tmp_path, 3)
    assert " ".join(found.values()) == order
    assert method.progress.step == 3


def test_dmd_s_first_step_is_none_and_sid_s_is_one(tmp_path: Path) -> None:
    """The student's first update comes before the fake score has moved, or after."""
    for make, moves in ((DMD, False), (SiD, True)):
        method = made(make, Flow(), "velocity", far=False, double=False, fake_updates_per_generator=1)
        before = flat([p.clone() for p in method.student.parameters()])
        trained(prepared(method, kind=torch.optim.Adam), tmp_path / make.__name__, 1)
        assert torch.equal(flat(list(method.student.parameters())), before) is not moves
        assert not torch.equal(flat(list(method.fake.parameters())), flat(list(method.teacher.parameters())))


# ---- the fake score's loss ----


FAKE = [
    pytest.param(EDM(), "x0", "sum", id="edm"),
    pytest.param(Flow(), "velocity", "mean", id="flow"),
    pytest.param(VPCosine(), "v", "sum", id="cosine"),
]


@pytest.mark.parametrize(("process", "kind", "reduction"), FAKE)
@pytest.mark.parametrize("kappa", [1.0, 0.0, -1.0, 1.5])
def test_the_fake_score_learns_the_student_s_samples(
    process: Process, kind: str, reduction: str, kappa: float
) -> None:
    """Section 4, with conditions dropped and guidance kappa inside the training prediction."""
    options: dict[str, Any] = {"fake_times": {"name": "lognormal" if reduction == "sum" else "uniform"}}
    guided = {} if kappa == 1 else {"guidance_fake_train": kappa, "null_prob": 0.25}
    options |= {"sigma_data": 0.7} if kind == "x0" else {}
    method = made(SiD, process, kind, classes=CLASSES, **options, **guided)
    method.matching.reduction = reduction
    batch, d = ring_batch(classes=CLASSES, dtype=torch.float64), double_step().draws
    x = x0(method.student, *start_of(process, None, d.normal("z", (2,))), batch.cond)
    t = process.time_of(1.2 - 1.2 * d.normal("t")) if reduction == "sum" else d.uniform("t")
    eps = d.normal("eps", (2,))
    alpha, sigma = process.alpha(t), process.sigma(t)
    dropped = d.uniform("null") < guided.get("null_prob", 0)
    assert kappa == 1 or 3 < int(dropped.sum()) < 13
    cond = Cond.of_labels(torch.where(dropped, NULL_LABEL, batch.cond.get("label")))
    told = answer(method.fake, column(alpha) * x + column(sigma) * eps, t, cond, kappa)
    snr = (alpha / sigma).square()
    target, weight = {
        "x0": (x, snr + 0.7**-2),
        "velocity": (eps - x, torch.ones(B)),
        "v": (column(alpha) * eps - column(sigma) * x, snr / (1 + snr)),
    }[kind]
    expected = (weight * (told - target).square().sum(1)).mean() / (1 if reduction == "sum" else 2)
    loss = method.fake_loss(batch, double_step())
    close(loss.total.detach(), expected.detach())
    close(flat(gradients(loss.total, method.fake)), flat(gradients(expected, method.fake)))
    loose = method.matching(method.fake, x, batch.cond, d).mean()  # samples that still carry their graph
    for total in (loss.total, loose):
        assert not flat(gradients(total, method.student)).any()


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_the_share_of_dropped_conditions(share: float) -> None:
    method = made(SiD, Flow(), "velocity", double=False, classes=CLASSES, null_prob=share)
    found: list[Cond] = []
    method.fake.net.register_forward_pre_hook(lambda net, given: found.append(given[2]))
    method.fake_loss(ring_batch(2000, classes=CLASSES), step(2000))
    dropped = float((found[0].get("label") == NULL_LABEL).float().mean())
    assert dropped == 0 if share == 0 else abs(dropped - share) < 0.02


def fakes_of(method: ScoreDistillation) -> list[tuple[Tensor, Cond]]:
    """Fills with (samples, conditions) as the fake score is trained on them."""
    found: list[tuple[Tensor, Cond]] = []
    original = method.matching

    def noted(model: Denoiser, x: Tensor, cond: Cond, d: Draws) -> Tensor:
        found.append((x, cond))
        return original(model, x, cond, d)

    method.matching = noted  # type: ignore[assignment]
    return found


def calls_of(model: Denoiser) -> list[tuple[Tensor, Tensor, Cond]]:
    """Fills with (x_t, t, cond) of every forward call of a net."""
    found: list[tuple[Tensor, Tensor, Cond]] = []
    model.net.register_forward_pre_hook(lambda net, given: found.append(given))
    return found


def both(method: Any, batch: Batch, iteration: int, student: bool = True) -> None:
    """One iteration of distribution matching as the engine runs it."""
    shared: dict[str, Tensor] = {}
    for name, loss in (("student", method.student_loss), ("fake", method.fake_loss)):
        if name == "fake" or student:
            loss(batch, Step(iteration, Draws(7, f"train/{name}", iteration, batch.index), shared))


def test_dmd_s_fake_score_reuses_the_student_s_images_and_labels() -> None:
    """In the iteration of a student's update no further sample is made; in the others they are new."""
    method = made(DMD, Flow(), "velocity", double=False, levels=[4.0, 1.0, 0.3], classes=CLASSES)
    learned, calls, batch = fakes_of(method), calls_of(method.student), ring_batch(classes=CLASSES)
    for iteration in range(6):
        calls.clear()
        both(method, batch, iteration)
        assert 1 <= len(calls) <= 3
        (x_t, t, cond), (x, told) = calls[-1], learned[-1]
        assert torch.equal(x, x_t - t[:, None] * method.student.net(x_t, t, cond))
        assert torch.equal(told.get("label"), cond.get("label")), (
            "the fake score hears of other classes than were made"
        )
        assert not x.requires_grad
        assert not torch.equal(told.get("label"), batch.cond.get("label")), "labels: uniform"
    calls.clear()
    both(method, batch, 6, student=False)
    assert len(calls) == 3, "the mixture takes all steps"
    assert torch.equal(learned[-1][1].get("label"), calls[0][2].get("label"))
    assert not any(torch.equal(learned[-1][0], x) for x, _ in learned[:-1])


@pytest.mark.parametrize("first", ["student", "fake"])
@pytest.mark.parametrize("make", [DMD, SiD])
def test_fresh_samples_are_made_with_the_weights_of_now(make: Method, first: str, tmp_path: Path) -> None:
    """In training by the engine: from the noise of the fake score's update, after or before the student's."""
    method = made(
        make, Flow(), "velocity", far=True, double=False, updates={"first": first, "samples": "fresh"}
    )
    learned, weights = fakes_of(method), []
    method.fake.net.register_forward_pre_hook(
        lambda *_: (
            weights.append(copy.deepcopy(method.student.net.state_dict()))
            if method.fake.net.training
            else None
        )
    )
    start = copy.deepcopy(method.student.net.state_dict())
    trained(prepared(method), tmp_path, 1)
    assert same(method.student.net, weights[0]) is (first == "student")
    if first == "fake":
        assert all(torch.equal(start[name], value) for name, value in weights[0].items())
    method.student.net.load_state_dict(weights[0])
    d = Draws(5, "train/fake", 0, torch.arange(len(learned[0][0])))
    assert torch.equal(learned[0][0], method.input.mixture(method.student, learned[0][1], d))


def test_sid_s_fake_score_gets_a_mixture_from_noise_of_its_own() -> None:
    method = made(SiD, Flow(), "velocity", double=False, levels=[4.0, 1.0, 0.3])
    learned, calls, batch = fakes_of(method), calls_of(method.student), ring_batch()
    both(method, batch, 0)
    ((x, cond),) = learned
    assert not torch.equal(calls[0][0], calls[-3][0]), "the student's start is another"
    d = Draws(7, "train/fake", 0, batch.index)
    assert torch.equal(x, method.input.mixture(method.student, cond, d))
    assert not x.requires_grad


def test_the_mixture_holds_the_outputs_of_every_step() -> None:
    method = made(SiD, Flow(), "velocity", levels=[4.0, 1.0, 0.3])
    calls = calls_of(method.student)
    with torch.no_grad():
        x = method.input.mixture(method.student, Cond.nothing(B), double_step().draws)
        outputs = torch.stack([x0(method.student, *call) for call in list(calls)])
    of_step = (x == outputs).all(2)
    assert of_step.any(0).all()
    assert (of_step.sum(1) > 4).all(), "each of three steps has about a third of 32"


# ---- few steps ----


@every_world
def test_without_damping_the_sampler_is_the_training_s_bit_for_bit(process: Process, kind: str) -> None:
    method = made(SiD, process, kind, double=False, levels=[9.0, 1.0, 0.2])
    calls, cond = calls_of(method.student), Cond.nothing(B)

    def fresh(i: int) -> Tensor:
        return d.normal(f"renoise{i}", (2,))

    for iteration in range(20):
        d = Draws(7, "train/student", iteration, torch.arange(B))
        calls.clear()
        x = method.input.output(method.student, cond, d)
        if len(calls) == 3:
            break
    assert len(calls) == 3
    sample = Generator(method.student, method.result().sampler).generate(
        d.normal("z", (2,)), cond, noise=fresh
    )
    assert torch.equal(x, sample)
    last = d.integer("k", 3) == 2
    assert 0 < int(last.sum()) < B
    with torch.no_grad():
        assert torch.equal(method.input.mixture(method.student, cond, d)[last], sample[last])


@every_method
def test_damped_noise_is_the_sampler_s_and_never_training_s(make: Method) -> None:
    whole, damped = (
        made(make, Flow(), "velocity", levels=[4.0, 1.0], noise_scale=gamma) for gamma in (1.0, 0.45)
    )
    batch = ring_batch(dtype=torch.float64)
    for loss in ("student_loss", "fake_loss"):
        found = [getattr(method, loss)(batch, double_step()).total for method in (whole, damped)]
        assert torch.equal(*found)
    assert (whole.result().sampler.noise_scale, damped.result().sampler.noise_scale) == (1.0, 0.45)
    z, fresh = torch.randn(2, B, 2, generator=torch.Generator().manual_seed(0)).double()
    found = Generator(damped.student, damped.result().sampler).generate(z, batch.cond, noise=lambda i: fresh)
    first, then = (torch.full((B,), t, dtype=torch.float64) for t in (0.8, 0.5))
    once = x0(damped.student, 0.8 * z, first, batch.cond)
    close(found.detach(), x0(damped.student, 0.5 * once + 0.45 * 0.5 * fresh, then, batch.cond).detach())


def test_one_step_for_all_processes_and_each_as_often() -> None:
    """k follows from seed, stream and iteration; which samples a process holds does not matter."""
    method = made(DMD, Flow(), "velocity", double=False, levels=[4.0, 1.0, 0.3])
    calls, counts = calls_of(method.student), [0, 0, 0]
    with torch.no_grad():
        for iteration in range(600):
            taken = []
            for rank in range(2 if iteration < 30 else 1):
                calls.clear()
                d = Draws(7, "train/student", iteration, 1000 * rank + torch.arange(2))
                method.input.output(method.student, Cond.nothing(2), d)
                taken.append(len(calls) - 1)
            assert len(set(taken)) == 1
            counts[taken[0]] += 1
    assert all(abs(count - 200) < 40 for count in counts), counts  # 3.5 standard deviations


STARTS = [
    (EDM(), None, False, 80.0, 80.0),
    (EDM(), None, True, 1.0, 80.0),
    (EDM(), [2.5], False, 2.5, 2.5),
    (EDM(), [2.5], True, 1.0, 2.5),
    (Flow(), None, False, 1.0, 1.0),
    (Flow(), [4.0], False, 0.8, 0.8),
    (Flow(), [4.0], True, 1.0, 0.8),
    (VPScaledLinear(), None, False, 1.0, 999.0),
    (VPScaledLinear(), [2.5017], False, 0.9286, 625.0),
    (VPScaledLinear(), [1.161], True, 1.0, 399.0),
]


@pytest.mark.parametrize(("process", "levels", "unit", "scale", "time"), STARTS, ids=str)
def test_the_first_state(
    process: Process, levels: list[float] | None, unit: bool, scale: float, time: float
) -> None:
    """Section 2: 80 z of EDM, SiD's 2.5 z, DMD2's unit noise at index 399, SiD-LSG's scaled noise at 625."""
    uniform = {"name": "sid" if isinstance(process, EDM) else "uniform"}
    times = {
        "generator_times": uniform,
        "fake_times": uniform | ({"low": 0.01} if isinstance(process, Flow) else {}),
    }
    kind = "eps" if isinstance(process, VPScaledLinear) else "x0"
    method = made(SiD, process, kind, levels=levels, unit_noise=unit, **times)
    calls = calls_of(method.student)
    method.student_loss(ring_batch(dtype=torch.float64), double_step())
    x, t, _ = calls[0]
    torch.testing.assert_close(x, scale * double_step().draws.normal("z", (2,)), rtol=1e-4, atol=0)
    torch.testing.assert_close(t, torch.full_like(t, time), rtol=1e-3, atol=0)
    assert method.result().coupling == ("endpoint" if levels is None else "few_step")
    sample = Generator(method.student, method.result().sampler).generate(x / scale, Cond.nothing(B))
    close(sample.detach(), method.student.x0(x, t, Cond.nothing(B)).detach(), rtol=1e-4)


def test_real_noised_students_start_from_data() -> None:
    """Both updates see outputs of the same kind of input: data at a level of each sample's own, with the data's labels."""
    options = {"levels": [4.0, 1.0], "input": "real_noised", "labels": "data", "classes": CLASSES}
    method = made(DMD, Flow(), "velocity", **options)
    batch, calls, learned = ring_batch(classes=CLASSES, dtype=torch.float64), calls_of(method.student), []
    for loss in (method.student_loss, method.fake_loss):
        calls.clear()
        learned = fakes_of(method)
        loss(batch, double_step())
        d, ((x_t, t, cond),) = double_step().draws, calls
        assert set(t.tolist()) == {0.8, 0.5}
        close(x_t, column(1 - t) * batch.x0 + column(t) * d.normal("z", (2,)))
        assert torch.equal(cond.get("label"), batch.cond.get("label"))
    assert not learned[0][0].requires_grad


# ---- guidance ----


KAPPAS = [(1.5, 1.5, 1.5), (3.0, 2.0, 1.0), (1.0, 0.0, 0.0), (1.0, -1.0, 1.0)]


@pytest.mark.parametrize(("teacher", "fake", "fake_train"), KAPPAS)
def test_long_short_guidance(teacher: float, fake: float, fake_train: float) -> None:
    """SiD-LSG's scales in the student's update; Zero-CFG and Anti-CFG are fake scales of 0 and below."""
    scales = {"guidance_teacher": teacher, "guidance_fake": fake, "guidance_fake_train": fake_train}
    method = made(SiD, Flow(), "velocity", classes=CLASSES, null_prob=0.1, **scales, **SID)
    batch = ring_batch(classes=CLASSES, dtype=torch.float64)
    t = sid_times(Flow(), double_step().draws.uniform("t"), 800)
    expected = sid_by_hand(*seen(method, None, t, batch.cond, teacher, fake), 1.0)
    found = method.student_loss(batch, double_step()).total
    close(found.detach(), expected.detach())
    close(flat(gradients(found, method.student)), flat(gradients(expected, method.student)))
    assert method.result().sampler.guidance_baked == teacher
    assert method.result().sampler.guidance_scale == 1


@pytest.mark.parametrize("name", ["dmd", "disback"])
def test_the_normaliser_is_the_guided_teacher_s(name: str) -> None:
    method = made(
        METHODS[name], Flow(), "velocity", classes=CLASSES, guidance_teacher=3.0, labels="data", **TABLE
    )
    batch = ring_batch(classes=CLASSES, dtype=torch.float64)
    t = table_times(Flow(), double_step().draws.uniform("t"), 20, 980)
    x, y_teacher, y_fake = seen(method, None, t, batch.cond, teacher=3.0)
    m = (x - y_teacher).abs().mean(1)
    constant = ((y_fake - y_teacher) / column(m)).detach() / (2 * B)
    loss = method.student_loss(batch, double_step())
    close(flat(gradients(loss.total, method.student)), flat(gradients((constant * x).sum(), method.student)))
    unguided = (x - seen(method, None, t, batch.cond)[1]).abs().mean(1)
    assert not torch.allclose(m, unguided, rtol=0.05)
    close(loss.logs["teacher_error"], m.mean().detach())
    close(loss.logs["teacher_error_min"], m.min().detach())


# ---- scale ----


@pytest.mark.parametrize("process", [Flow(), EDM()], ids=repr)
def test_the_loss_scale_changes_no_step_of_adam(process: Process, tmp_path: Path) -> None:
    """Under beta1 = 0, over steps in which the second moment has a memory."""
    adam: Any = partial(torch.optim.Adam, betas=(0.0, 0.999))
    moves, losses = [], []
    for scale in (100.0, 1000.0):
        method = made(SiD, process, "x0", double=False, loss_scale_g=scale)
        losses.append(method.student_loss(ring_batch(), step()).total.item())
        start = flat([p.clone() for p in method.student.parameters()]).double()
        trained(prepared(method, kind=adam, clip=None, lr=1e-3), tmp_path / f"{scale}", 4)
        moves.append(flat(list(method.student.parameters())).double() - start)
    assert losses[1] == pytest.approx(10 * losses[0])
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[0].norm()


class Scaled(nn.Module):
    """c D(x / c): the denoiser of data that are c times as large, seen at x_t = x0 + sigma eps."""

    num_classes = 0

    def __init__(self, inner: nn.Module, c: float) -> None:
        super().__init__()
        self.inner, self.c = inner, c

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told: Tensor = self.c * self.inner(x / self.c, t / self.c, cond)
        return told


@pytest.mark.parametrize(("make", "power"), [(DMD, 0), (METHODS["diff-instruct"], 2), (SiD, 1)])
def test_scaling_data_noise_and_predictions_together(make: Method, power: int) -> None:
    """DMD's loss does not change, Diff-Instruct's grows with the square and SiD's, which is divided by |x - yT|, in
    proportion."""
    c, nets = 3.0, [mlp(EDM(), "x0", seed=seed, double=True).net for seed in (1, 0, 2)]
    found = []
    for factor in (1.0, c):
        student, teacher, fake = (Denoiser(Scaled(net, factor), EDM(), "x0", (2,)) for net in nets)
        method = make(student, teacher, sampling={"levels": [2.5 * factor]})
        method.fake.net.load_state_dict(fake.net.state_dict())
        method.fake.net.c = factor
        method.generator_times = lambda d, factor=factor: factor * (0.1 + 3 * d.uniform("t"))
        found.append(method.student_loss(ring_batch(dtype=torch.float64), double_step()).total.detach())
    close(found[1], c**power * found[0])


# ---- DisBack ----


def write_nodes(folder: Path, count: int) -> list[Path]:
    """Model folders of a teacher (seed 0) and `count` degraded ones."""
    for number in range(count + 1):
        node = mlp(Flow(), seed=0 if number == 0 else 10 + number)
        save_model(folder / f"{number}", node, SamplerSpec(steps=50, any_steps=True))
    return [folder / f"{number}" for number in range(count + 1)]


def walk(nodes: Sequence[Path], **options: Any) -> DisBack:
    return DisBack(
        mlp(Flow(), seed=1), mlp(Flow(), seed=0), nodes, **nested({"fake_updates_per_generator": 1} | options)
    )


def weights_of(nodes: int) -> list[dict[str, Tensor]]:
    return [mlp(Flow(), seed=0 if n == 0 else 10 + n).net.state_dict() for n in range(nodes + 1)]


def same(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def targets_of(method: DisBack, nodes: int) -> list[int]:
    """Fills with the node whose weights the target has at each student step."""
    found: list[int] = []
    original = method.student_loss
    known = weights_of(nodes)

    def noted(batch: Batch, at: Step) -> Loss:
        loss = original(batch, at)
        (node,) = [n for n, weights in enumerate(known) if same(method.frozen["teacher"].net, weights)]
        assert loss.logs["node"].item() == node
        found.append(node)
        return loss

    method.student_loss = noted  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"levels": [4.0, 1.0], "normalise": False},
        {"gan": {"weight_g": 0.5}, "fake_updates_per_generator": 2},
    ],
    ids=["one step", "two steps of Diff-Instruct", "gan"],
)
def test_disback_without_nodes_is_dmd_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for name in ("dmd", "disback"):
        torch.manual_seed(len(found))
        method = made(METHODS[name], Flow(), "velocity", far=False, double=False, **options)
        torch.manual_seed(len(found))  # neither owes anything to the global generator
        found.append(state(trained(prepared(method), tmp_path / name, 6)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    path = write_nodes(tmp_path / "nodes", 1)
    assert same(walk(path).fake.net, weights_of(1)[1]), "with one node, the fake score alone is another"


@pytest.mark.parametrize(("stays", "expected"), [(2, [2, 2, 1, 1, 0, 0, 0]), ([1, 3], [2, 1, 1, 1, 0, 0, 0])])
def test_the_targets_walk_back_to_the_teacher_s_own_bytes(
    stays: int | list[int], expected: list[int], tmp_path: Path
) -> None:
    nodes = write_nodes(tmp_path / "nodes", 3)

    def fresh() -> tuple[DisBack, list[int]]:
        method = walk(nodes, steps_per_node=stays)
        assert same(method.fake.net, weights_of(3)[3]), "the fake score starts as the last node"
        assert same(method.student.net, mlp(Flow(), seed=1).net.state_dict())
        found = targets_of(method, 3)
        prepared(method)
        return method, found

    whole, found = fresh()
    trained(whole, tmp_path / "whole", 7)
    assert found == expected
    assert same(whole.frozen["teacher"].net, weights_of(0)[0])
    (first, _), (second, later) = fresh(), fresh()
    trained(first, tmp_path / "parts", 3)
    trained(second, tmp_path / "parts", 7)
    assert later == expected[3:]
    assert all(torch.equal(value, state(second)[key]) for key, value in state(whole).items())


def plateaus(losses: Sequence[float], window: int, tolerance: float, node: int) -> list[int]:
    """The rule, written a second time: the target of every step. Losses that are not finite are not in the means."""
    found, here, means = [], [], []
    for loss in losses:
        found.append(node)
        here.append(loss)
        finite = [value for value in here if math.isfinite(value)]
        if node > 0 and len(here) == window:
            here = []
            if finite:
                means.append(sum(finite) / len(finite))
                if len(means) > 1 and not means[-1] < means[-2] * (1 - tolerance):
                    node, means = node - 1, []
    return found


def test_the_walk_goes_on_where_the_loss_stops_falling(tmp_path: Path, monkeypatch: Any) -> None:
    falling = [4, 4, 3, 3, 2, 2, 1.99, 1.99]
    series = [*falling, 9, 7, 5, math.nan, 6, 6, 1, 2, math.inf, math.nan, math.nan, 1, 0, 0.5, 0.49, 3, 2]
    for window, tolerance in ((2, 0.01), (2, 0.0), (1, 0.2), (3, 0.1)):
        method = walk(
            write_nodes(tmp_path / "nodes", 4), criterion="plateau", window=window, tolerance=tolerance
        )
        prepared(method)
        found = []
        for loss in series:
            told = Loss(torch.tensor(float(loss)), {})
            monkeypatch.setattr(DistributionMatching, "student_loss", lambda *_, told=told: told)
            found.append(int(method.student_loss(ring_batch(), step()).logs["node"]))
            method.progress.step += 1
            method.after_step()
        assert found == plateaus(series, window, tolerance, 3)
        assert found[0] == 3
        assert len(set(found)) > 2, "the series must make it go on"


# ---- Degrade ----


def degrade(**options: Any) -> Degrade:
    return Degrade(
        mlp(Flow(), seed=0, double=True),
        mlp(Flow(), seed=1, double=True),
        **nested({"total_steps": 5} | options),
    )


def test_degrading_fits_the_teacher_to_the_initial_student() -> None:
    method, batch = degrade(levels=[4.0], fake_times={"name": "uniform"}), ring_batch(dtype=torch.float64)
    d = double_step().draws
    x = x0(method.generator, *start_of(Flow(), 4.0, d.normal("z", (2,))), batch.cond)
    t, eps = d.uniform("t"), d.normal("eps", (2,))
    told = answer(method.student, column(1 - t) * x + column(t) * eps, t, batch.cond)
    loss = method.loss(batch, double_step())
    close(loss.total.detach(), (told - (eps - x)).square().mean().detach())
    close(loss.logs["x_std"], x.std().detach())
    method.generator.requires_grad_(True)
    assert not flat(gradients(method.loss(batch, double_step()).total, method.generator)).any()
    assert flat(gradients(loss.total, method.student)).any()


def test_degrading_sees_every_step_of_the_initial_student() -> None:
    method, batch = degrade(levels=[4.0, 1.0, 0.3]), ring_batch(dtype=torch.float64)
    mixture = method.input.mixture(method.generator, batch.cond, double_step().draws)
    close(method.loss(batch, double_step()).logs["x_std"], mixture.std())


def test_the_way_is_stored_and_ends_at_the_initial_student(tmp_path: Path) -> None:
    method = degrade(total_steps=60, node_every=25, fake_times={"name": "logit_normal"})
    assert list(method.snapshots()) == [25, 50, 60]
    assert method.result().coupling == "independent"
    teacher = mlp(Flow(), seed=0)
    teacher.sampler = SamplerSpec(steps=7, any_steps=True, solver="heun")
    assert Degrade(teacher, mlp(Flow(), seed=1)).result().sampler == teacher.sampler
    losses, batch = [], ring_batch(512, dtype=torch.float64)
    loss = partial(method.loss, batch, Step(0, DoubleDraws(7, "check", 0, torch.arange(512))))
    source, kept = Points(ring={"count": 8, "radius": 1.5}, count=64), []
    losses.append(loss().total.item())
    train(
        prepared(method, kind=torch.optim.Adam),
        source,
        Fit(steps=60, batch_size=64),
        folder=tmp_path,
        config={},
        snapshot=kept.append,
    )
    losses.append(loss().total.item())
    assert kept == [25, 50, 60]
    assert losses[1] < 0.7 * losses[0]


# ---- the GAN ----


def unet(seed: int, size: int = 8, multipliers: Sequence[int] = (1, 2)) -> Denoiser:
    torch.manual_seed(seed)
    net = UNet(width=8, embedding=16, groups=4, num_classes=0, multipliers=multipliers)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, Flow(), "velocity", (1, size, size))


def images(batch: int = 16) -> Batch:
    rows = torch.arange(batch)
    noise = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(rows, rows, Cond.nothing(batch), x0=0.3 * noise + 0.5)


def gan(features: str = "fake", pixels: bool = False, **options: Any) -> tuple[DMD, Batch]:
    """A method whose fake score is the teacher, so that the student's gradient is the GAN's."""
    settings = {"features": features, "weight_g": 1.0, "weight_d": 1.0} | options
    if pixels:
        return DMD(unet(1), unet(0), gan=settings, **TABLE), images()
    method = made(DMD, Flow(), "velocity", far=False, double=False, gan=settings, **TABLE)
    assert isinstance(method, DMD)
    return method, ring_batch()


every_gan = pytest.mark.parametrize("features", ["fake", "teacher"])
on_both = pytest.mark.parametrize("pixels", [False, True], ids=["points", "pixels"])


@every_gan
@on_both
@pytest.mark.parametrize("diffusion", [True, False])
def test_the_student_pushes_logits_up(features: str, pixels: bool, diffusion: bool) -> None:
    method, batch = gan(features, pixels, diffusion=diffusion)
    at = step(len(batch))

    def logit() -> Tensor:
        x = method.input.output(method.student, batch.cond, at.draws)
        return method.logits(x, batch.cond, at, "generated")

    before = logit()
    loss = method.student_loss(batch, at)
    close(loss.total.detach(), softplus(-before).mean().detach(), rtol=1e-4)
    found = gradients(loss.total, method.student)
    slope = flat(found)
    with torch.no_grad():
        for parameter, gradient in zip(method.student.parameters(), found, strict=True):
            parameter -= 1e-2 / float(slope.norm()) * gradient
    assert logit().mean() > before.mean()


@every_gan
@on_both
def test_the_head_s_gradient_is_that_of_the_logistic_loss(features: str, pixels: bool) -> None:
    method, batch = gan(features, pixels)
    at = step(len(batch))
    x = method.input.mixture(method.student, batch.cond, at.draws)
    with torch.no_grad():
        logits = {}
        for name, sample in (("real", batch.x0), ("generated", x)):
            d = at.draws.named(name)
            t = table_times(Flow(), d.uniform("t").double(), 0, 999)
            eps = at.draws.normal(f"{name}_eps", sample.shape[1:])
            shape = (-1, *(1,) * (sample.dim() - 1))
            x_t = (1 - t).float().reshape(shape) * sample + t.float().reshape(shape) * eps
            logits[name] = (method.features(x_t, t, batch.cond).clone(), None)
    features_of = {name: kept for name, (kept, _) in logits.items()}
    real, made_up = method.head(features_of["real"]), method.head(features_of["generated"])
    told = (-torch.log(torch.sigmoid(real)) - torch.log(1 - torch.sigmoid(made_up))).mean()
    loss = method.fake_loss(batch, at)
    close(
        flat(gradients(loss.total, method.head)),
        flat(gradients(told, method.head)),
        rtol=1e-3,
    )
    close(loss.logs["gan"].detach(), told.detach(), rtol=1e-4)
    close(loss.logs["logit_real"].detach(), real.mean().detach(), rtol=1e-3)
    close(loss.logs["logit_fake"].detach(), made_up.mean().detach(), rtol=1e-3)
    right = [*(real > 0).flatten().tolist(), *(made_up < 0).flatten().tolist()]
    assert loss.logs["accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)
    assert not flat(gradients(loss.total, method.student)).any()


@on_both
def test_whose_features_learn_to_tell(pixels: bool) -> None:
    """Those of the fake score are trained with the head, those of the teacher stay as they are."""
    for features, changed in (("fake", True), ("teacher", False)):
        found = []
        for weight in (0.0, 5.0):
            method, batch = gan(features, pixels, weight_d=weight)
            found.append(flat(gradients(method.fake_loss(batch, step(len(batch))).total, method.fake)))
        assert torch.equal(*found) is not changed


def test_the_head_s_first_weights_follow_from_the_seed() -> None:
    """Not from what ran before in the process, or in another one of the same run."""
    found = []
    for before, seed in ((0, 5), (1, 5), (0, 6)):
        torch.manual_seed(before)
        method, _ = gan()
        torch.manual_seed(before)
        method.prepare({update.name: optim() for update in method.updates()}, seed=seed)
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(before))
        found.append(flat([p.detach() for p in method.head.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert [update.trains.get("head") for update in method.plan] == [None, method.head]


def test_the_head_hears_the_label_that_was_asked_for_and_the_data_s() -> None:
    method = made(DMD, Flow(), "velocity", double=False, classes=CLASSES, gan={}, labels="uniform")
    assert isinstance(method, DMD)
    batch, found, tap = ring_batch(classes=CLASSES), [], method.features

    def noted(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        found.append(cond.get("label"))
        return tap(x, t, cond)

    method.features = noted  # type: ignore[assignment]
    calls = calls_of(method.student)
    both(method, batch, 0)
    student, real, generated = found
    assert torch.equal(real, batch.cond.get("label"))
    assert torch.equal(student, calls[0][2].get("label"))
    assert torch.equal(generated, calls[0][2].get("label"))
    assert not torch.equal(student, real)


# ---- what is shown and logged ----


@every_method
def test_diagnostics(make: Method) -> None:
    method = made(make, EDM(), "x0", far=False, double=False)
    prepared(method)
    batch = ring_batch(256)

    def told() -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        with torch.no_grad():
            found = method.diagnostics(batch, draws(256))
        return dict(found.scalars), list(found.rows)

    scalars, rows = told()
    named = {"x_mean", "x_std", "x_max", "x_std_data", "gap_0.3", "gap_1", "gap_3"}
    binned = ("level", "gap", "teacher_error", "fake_error")
    assert set(scalars) == named | {f"{name}_bin{number}" for name in binned for number in range(10)}
    levels = [scalars[f"level_bin{number}"].item() for number in range(10)]
    assert levels == sorted(levels)
    assert levels[9] > 10 * levels[0]
    assert [scalars[f"gap_bin{number}"].item() for number in range(10)] == [0] * 10
    assert [label for label, _ in rows] == [
        "student",
        *(f"{who} x0, {level}" for level in ("0.3", "1", "3") for who in ("teacher", "fake")),
    ]
    assert [scalars[f"gap_{level}"].item() for level in ("0.3", "1", "3")] == [0, 0, 0]
    method.fake.net.load_state_dict(mlp(EDM(), "x0", seed=2).net.state_dict())
    apart, rows = told()
    for i, level in enumerate((0.3, 1.0, 3.0)):
        x_t = rows[0][1] + level * draws(256).normal("eps", (2,))
        t = torch.full((256,), level)
        by_hand = [x0(model, x_t, t, batch.cond).detach() for model in (method.teacher, method.fake)]
        torch.testing.assert_close(
            [row for _, row in rows[1 + 2 * i : 3 + 2 * i]], by_hand, rtol=1e-4, atol=1e-4
        )
        assert apart[f"gap_{level:g}"].item() == pytest.approx(
            float((by_hand[0] - by_hand[1]).square().mean()), rel=1e-3
        )
    assert scalars["x_std"] > 0.1
    assert scalars["x_std_data"].item() == pytest.approx(batch.x0.std().item())
    for parameter in method.ema["student"].parameters():  # it is the average that is shown
        parameter.data.zero_()
    with pytest.warns(UserWarning, match="standard deviation 0, the data 1.*: the student has collapsed"):
        assert told()[0]["x_std"].item() == 0


def test_the_gap_is_that_of_the_guided_predictions() -> None:
    """As in the student's update; both guided alike, it is zero while the fake score is the teacher."""
    options = {"guidance_teacher": 3.0, "guidance_fake": 3.0, "null_prob": 0.1, "classes": CLASSES}
    method = made(SiD, Flow(), "velocity", far=False, double=False, **options)
    prepared(method)
    with torch.no_grad():
        found = method.diagnostics(ring_batch(classes=CLASSES), draws()).scalars
        assert found["gap_1"].item() == 0
        method.guidance = replace(method.guidance, fake=1.0)
        assert method.diagnostics(ring_batch(classes=CLASSES), draws()).scalars["gap_1"].item() > 0


SCORE = {"gap", "teacher_error", "teacher_error_min", "x_mean", "x_std"}


@pytest.mark.parametrize(
    ("make", "options", "student", "fake"),
    [
        (SiD, {}, SCORE | {"loss_unscaled"}, set()),
        (DMD, {}, SCORE | {"direction"}, set()),
        (
            DMD,
            {"gan": {}},
            SCORE | {"direction", "gan"},
            {"score", "gan", "logit_real", "logit_fake", "accuracy"},
        ),
    ],
    ids=["sid", "dmd", "gan"],
)
def test_logs(make: Method, options: dict[str, Any], student: set[str], fake: set[str]) -> None:
    method, batch = made(make, Flow(), "velocity", double=False, **options), ring_batch()
    found = method.student_loss(batch, step()).logs
    assert set(found) == student
    assert not any(value.requires_grad for value in found.values())
    assert 0 < found["teacher_error_min"] < found["teacher_error"]
    assert set(method.fake_loss(batch, step()).logs) == fake


def test_checkpoints_hold_what_is_trained_and_no_teacher(tmp_path: Path) -> None:
    method, _ = gan()
    trained(prepared(method), tmp_path, 2)
    other = prepared(made(DMD, Flow(), "velocity", double=False))
    with pytest.raises(
        ValueError,
        match=r"is the checkpoint of another training: .*options.gan: found .*, expected '\(absent\)'",
    ):
        trained(other, tmp_path, 4)
    assert isinstance(method, DistillModule)
    assert sorted(method.networks) == ["fake", "head", "student"]
