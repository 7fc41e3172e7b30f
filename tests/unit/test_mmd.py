"""MMD finetuning: the loss by hand, both passes, the student's own sampler, the real side, resuming, and what is refused."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of
from method_support import DoubleDraws, double_step, mlp, optim, prepared, ring_batch, state
from tests_support import forked
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.data.points import Points
from distill.data.rng import Draws
from distill.engine import checkpoint
from distill.engine.fit import Fit, train
from distill.engine.update import Step
from distill.methods.mmd import MMD
from distill.methods.one_step import OneStep
from distill.models.adapters import trained_parameters
from distill.models.boundary import Boundary
from distill.models.decoder import Autoencoder, Pixels
from distill.models.denoiser import Denoiser
from distill.models.extractors.inception import Inception
from distill.models.features import load_digits64
from distill.models.generator import Generator
from distill.models.kernels import Kernel, mmd2
from distill.models.spec import SamplerSpec
from distill.nets.autoencoder import ConvAutoencoder
from distill.nets.mlp import MLP
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPLinearBetas, VPScaledLinear
from distill.stages.adapt import adapted

ANY = SamplerSpec(steps=50, any_steps=True)
FEW = SamplerSpec(steps=2, times={1: (1.0, 0.0), 2: (1.0, 0.5, 0.0)}, mode="sde")
MIXTURE = {"name": "rbf_mixture", "gamma": "median"}


def sampled_by(spec: SamplerSpec, model: Denoiser) -> Denoiser:
    model.sampler = spec
    return model


def points(count: int = 64, classes: bool = False) -> Points:
    return Points(ring={"count": 8, "radius": 1.5}, count=count, labelled=classes)


def run(method: MMD, micro: int = 1, batch: int = 16) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a step of so many micro batches, as the engine computes them, in float64."""
    whole = ring_batch(batch, classes=method.student.conditions.num_classes, dtype=torch.float64)
    assert whole.x0 is not None
    parts = list(torch.arange(batch).view(micro, -1))
    batches = [
        replace(whole, ids=part, index=part, x0=whole.x0[part], cond=whole.cond.rows(part)) for part in parts
    ]
    # Dropout is keyed by the part: the same one for all, so that it is the same in one micro batch and in several.
    steps = [Step(0, DoubleDraws(7, "s", 0, part)) for part in parts]
    update = method.updates()[0]
    assert update.before is not None
    method.student.zero_grad()
    method.student.train(update.mode == "train")
    update.before(batches, steps)
    totals = []
    for each, at in zip(batches, steps, strict=True):
        loss = update.loss(each, at)
        (loss.total / micro).backward()
        totals.append(loss.total.detach())
    found = [p.grad for p in method.student.parameters() if p.grad is not None]
    assert len(found) >= 4
    return torch.stack(totals).mean(), found


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest relative difference of two lists of gradients."""
    pairs = zip(one, other, strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


# ---- the loss and its two passes ----


def test_the_loss_is_mmd2_of_the_samples_of_the_student_s_sampler() -> None:
    method = MMD(
        sampled_by(ANY, mlp(Flow(), classes=8, double=True)), steps=2, kernel={"name": "rbf"}, classes=True
    )
    batch, at = ring_batch(16, classes=8, dtype=torch.float64), double_step(16)
    z = at.draws.normal("z", (2,))
    samples = Generator(method.student, ANY).generate(z, batch.cond, 2)
    labels = batch.cond.values["label"]
    assert batch.x0 is not None
    expected = mmd2(samples, batch.x0, Kernel("rbf"), classes=(labels, labels))
    found = method.loss(batch, at)
    # Samples pass through float32, as extractors compute in it.
    torch.testing.assert_close(found.total, expected.mmd2, rtol=1e-5, atol=1e-7)
    assert set(found.logs) == {
        *("xx", "yy", "xy", "saturated", "feature_rms", "state_rms_0", "state_rms_1", "state_rms_2")
    }
    assert float(found.logs["state_rms_0"]) == pytest.approx(float(z.square().mean().sqrt()))


STUDENTS: dict[str, Any] = {
    "flow, 2 steps": lambda: (sampled_by(ANY, mlp(Flow(), double=True)), {"steps": 2}),
    "eps on a table, ddim": lambda: (mlp(VPScaledLinear(), "eps", double=True), {"steps": 3}),
    "few steps with fresh noise": lambda: (sampled_by(FEW, mlp(Flow(), "x0", double=True)), {}),
    "mixture of widths": lambda: (
        sampled_by(ANY, mlp(Flow(), double=True)),
        {"steps": 2, "kernel": {"name": "rbf_mixture"}},
    ),
    "classes": lambda: (
        sampled_by(ANY, mlp(Flow(), classes=8, double=True)),
        {"steps": 1, "classes": True, "estimator": "biased"},
    ),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_two_passes_give_the_gradient_of_one(name: str) -> None:
    student, options = STUDENTS[name]()
    method = MMD(student, **options)
    loss, direct = run(method)
    for micro in (2, 8):
        found, split = run(method, micro)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-9)
        assert difference(direct, split) < 1e-6
    # The mean of the micro batches' own MMDs is another number.
    single = torch.stack([method.loss(each, at).total.detach() for each, at in halves(student)]).mean()
    assert abs(float(single - loss)) > 1e-3 * abs(float(loss))


def halves(student: Denoiser) -> list[tuple[Any, Step]]:
    whole = ring_batch(16, classes=student.conditions.num_classes, dtype=torch.float64)
    assert whole.x0 is not None
    return [
        (
            replace(whole, ids=part, index=part, x0=whole.x0[part], cond=whole.cond.rows(part)),
            Step(0, DoubleDraws(7, "s", 0, part)),
        )
        for part in torch.arange(16).view(2, -1)
    ]


@pytest.mark.parametrize("name", ["flow, 2 steps", "few steps with fresh noise"])
def test_activations_computed_again_change_nothing(name: str) -> None:
    found = []
    for again in (True, False):
        student, options = STUDENTS[name]()
        calls: list[int] = []
        student.net.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found.append((*run(MMD(student, recompute=again, **options)), len(calls)))
    assert torch.equal(found[0][0], found[1][0])
    assert difference(found[0][1], found[1][1]) == 0
    assert (found[0][2], found[1][2]) == (4, 2)


class Dropped(nn.Module):
    """A net that loses half of its hidden units in training mode."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.drop = nn.Linear(2, 64), nn.Linear(64, 2), nn.Dropout(0.5)
        self.double()

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.last(self.drop(torch.tanh(self.first(x))))


def test_dropout_inside_the_chain_is_off_or_the_same_in_both_passes() -> None:
    def method(dropout: bool) -> MMD:
        return MMD(sampled_by(ANY, Denoiser(Dropped(), Flow(), "velocity", (2,))), steps=2, dropout=dropout)

    off, on = run(method(False)), run(method(True))
    assert difference(off[1], run(method(False))[1]) == 0
    assert difference(off[1], on[1]) > 0.01
    # One micro batch in two passes, by a second one of the same samples and masks.
    one = method(True)
    whole = ring_batch(16, dtype=torch.float64)
    steps = [Step(0, DoubleDraws(7, "s", 0, torch.arange(16)), part=part) for part in (0, 1)]
    one.student.train()
    one.first_pass([whole, whole], steps)
    for at in steps:
        rows, *_ = one._sampled(whole, at)
        again, *_ = one._sampled(whole, at)
        assert torch.equal(rows, again)
    first, second = (one._sampled(whole, at)[0] for at in steps)
    assert not torch.equal(first, second), "each part has masks of its own"


# ---- the student's own sampler ----


def test_a_plain_model_is_trained_for_the_steps_that_are_asked_for() -> None:
    student = sampled_by(ANY, mlp(Flow()))
    assert MMD(student).spec.steps == 5
    for steps, coupling in ((1, "endpoint"), (4, "few_step")):
        result = MMD(student, steps=steps).result()
        assert result.sampler.times == {steps: tuple(torch.linspace(1, 0, steps + 1).double().tolist())}
        assert (result.coupling, result.sampler.any_steps, result.sampler.solver) == (
            coupling,
            False,
            "euler",
        )
    bare = MMD(mlp(VPLinearBetas(), "eps"), steps=4, grid={"name": "leading"}).result().sampler
    assert bare.times == {4: (751.0, 501.0, 251.0, 1.0, 0.0)}
    assert bare.solver == "ddim"


def test_a_few_step_student_keeps_its_sampler_boundary_and_inputs() -> None:
    boundary = Boundary("cm", sigma_min=0.002)
    few = mlp(EDM(), "x0", boundary=boundary, coupling="few_step", w=4)
    times = {1: (80.0, 0.002), 2: (80.0, 0.8, 0.002)}
    spec = SamplerSpec(
        2,
        times,
        mode="sde",
        noise_floor=0.002,
        guidance_w=1.0,
        guidance_w_range=(0.0, 3.0),
        guidance_baked=2.0,
    )
    method = MMD(sampled_by(spec, few))
    result = method.result()
    assert result.sampler == replace(spec, times={2: times[2]}, guidance_w_range=(1.0, 1.0))
    assert (result.boundary, result.coupling, result.guidable) == (boundary, "few_step", False)
    assert MMD(sampled_by(spec, few), steps=1).result().sampler.times == {1: times[1]}
    prepared(method)
    made = method.as_generator()
    z = torch.randn(4, 2)
    noise = torch.randn(2, 4, 2)
    torch.testing.assert_close(
        made.generate(z, Cond.nothing(4), noise=noise),
        Generator(few, spec).generate(z, Cond.nothing(4), noise=noise),
    )


def test_after_one_step_and_with_guidance() -> None:
    flow = mlp(Flow(), classes=8)
    one = prepared(OneStep(flow)).as_generator()
    assert MMD(one.denoiser).result().sampler.times == one.spec.times
    guided = MMD(sampled_by(ANY, flow), steps=1, guidance_scale=2.0)
    assert guided.result().guidable
    batch, at = ring_batch(16, classes=8), double_step(16)
    plain = MMD(sampled_by(ANY, flow), steps=1)
    assert guided.loss(batch, at).total != plain.loss(batch, at).total
    assert guided.result().sampler.guidance_scale == 2.0


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    base = sampled_by(ANY, mlp(Flow()))
    student = adapted(base, {"lora": {"rank": 2}})
    student.sampler = ANY
    before = {name: p.clone() for name, p in base.net.named_parameters()}
    method = prepared(MMD(student, steps=2, bank=32))
    train(method, points(), Fit(steps=2, batch_size=16), folder=tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in base.net.named_parameters())
    assert any(bool(p.any()) for n, p in trained_parameters(student.net).items() if "lora_B" in n)


# ---- images, features, clamping ----


def test_classes_are_compared_where_the_student_has_them() -> None:
    for classes in (0, 8):
        assert MMD(sampled_by(ANY, mlp(Flow(), classes=classes)), classes=None).loss_of.classes == bool(
            classes
        )


def image_student(width: int = 16) -> Denoiser:
    torch.manual_seed(0)
    net = MLP(shape=(1, 8, 8), width=width, depth=1, features=8, zero_out=False)
    return sampled_by(ANY, Denoiser(net, Flow(), "velocity", (1, 8, 8), decoder=Pixels()))


def test_clamping() -> None:
    rows = torch.arange(8)
    batch = replace(Digits().fetch(rows, rows), cond=Cond.nothing(8))
    at = Step(0, DoubleDraws(7, "s", 0, rows).named("a"))
    slopes: dict[str, list[float]] = {}
    for clamp in ("hard", "straight_through", "none"):
        method = MMD(image_student(), steps=1, clamp=clamp)
        found = method.loss(batch, at)
        slopes[clamp] = [
            float(found.total),
            float(torch.autograd.grad(found.total, method.student.net.out.bias)[0].norm()),
        ]
        assert 0.01 < float(found.logs["saturated"]) < 0.99
    assert slopes["hard"][0] == slopes["straight_through"][0] != slopes["none"][0]
    assert slopes["hard"][1] < slopes["straight_through"][1]


def test_features_of_a_network_are_frozen_scaled_and_recorded(tmp_path: Path) -> None:
    extractor = load_digits64()
    method = prepared(MMD(image_student(), steps=1, features=extractor, feature_scale="rms", bank=256))
    train(method, Unlabelled(), Fit(steps=1, batch_size=8), folder=tmp_path)
    assert method.loss_of.bank is not None
    assert float(method.loss_of.bank.rows.square().mean()) == pytest.approx(1.0)
    assert method.loss_of.bank.rows.dtype == torch.float64
    assert method.space.scale == pytest.approx(1.0)  # norm 8 in 64 dimensions
    assert method.frozen["features"].sha256 == extractor.sha256
    assert all(p.grad is None and not p.requires_grad for p in method.frozen["features"].parameters())
    saved = checkpoint_of(tmp_path)
    assert saved["method"] == {"scale": method.space.scale}
    assert "features" not in saved["networks"]


class Unlabelled(Digits):
    """Digits without labels."""

    num_classes = 0

    def fetch(self, rows: Tensor, index: Tensor) -> Any:
        return replace(super().fetch(rows, index), cond=Cond.nothing(len(rows)))


def test_latents_are_compared_as_images() -> None:
    """Decoded, with a gradient through the decoder to the student alone; with images of another source, or decoded data."""
    torch.manual_seed(0)
    decoder = Autoencoder(ConvAutoencoder(latent=2, width=8), scale=0.5)
    net = MLP(shape=(2, 4, 4), width=16, depth=1, features=8, zero_out=False)
    student = sampled_by(ANY, Denoiser(net, Flow(), "velocity", (2, 4, 4), decoder=decoder))
    rows = torch.arange(16)
    data = Batch(rows, rows, Cond.nothing(16), x0=torch.randn(16, 2, 4, 4))
    space = load_digits64()
    method = prepared(MMD(student, steps=2, features=space, real=Digits(), bank=None, clamp="none"))
    method.before_training(Unlabelled())
    found = method.loss(data, Step(0, Draws(7, "s", 0, rows)))
    samples = Generator(student, ANY).generate(Draws(7, "s", 0, rows).normal("z", (2, 4, 4)), data.cond, 2)
    images, real = decoder.decode(samples), space(Digits().images)
    expected = mmd2(space(images).double(), real.double(), Kernel()).mmd2
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-6)
    found.total.backward()
    assert all(bool(p.grad.any()) for p in net.parameters() if p.grad is not None)
    assert all(p.grad is None for p in decoder.net.parameters())
    # Without another source the real side are the training data, which are latents.
    own = MMD(student, steps=2, features=space, clamp="none").loss(data, Step(0, Draws(7, "s", 0, rows)))
    expected = mmd2(space(images).double(), space(decoder.decode(data.x0)).double(), Kernel()).mmd2
    torch.testing.assert_close(own.total, expected, rtol=1e-4, atol=1e-6)


# ---- the real side ----


def test_the_bank_and_what_is_measured_of_it(tmp_path: Path) -> None:
    data = points(200)
    method = prepared(MMD(sampled_by(ANY, mlp(Flow())), steps=1, kernel=MIXTURE, bank=None))
    train(method, data, Fit(steps=1, batch_size=16), folder=tmp_path / "a")
    bank = method.loss_of.bank
    assert bank is not None
    assert torch.equal(bank.rows, data.images.double())
    assert method.loss_of.kernel.gamma == pytest.approx(
        1 / float(torch.pdist(data.images).square().median()), rel=1e-6
    )
    batch, at = ring_batch(16), double_step(16)
    z = at.draws.normal("z", (2,)).float()
    samples = method.student.transport(z, batch.cond, steps=1)[0].double()
    expected = mmd2(samples, bank.rows, method.loss_of.kernel).mmd2
    torch.testing.assert_close(method.loss(batch, at).total, expected, rtol=1e-4, atol=1e-6)
    # A part of the data, the same one for every number of processes; another one with another seed.
    few = prepared(MMD(sampled_by(ANY, mlp(Flow())), steps=1, bank=50))
    few.before_training(data)
    again = MMD(sampled_by(ANY, mlp(Flow())), steps=1, bank=50)
    again.prepare({"student": optim()}, seed=6)
    again.before_training(data)
    assert few.loss_of.bank is not None
    assert again.loss_of.bank is not None
    assert len(few.loss_of.bank.rows) == 50
    assert not torch.equal(few.loss_of.bank.rows, again.loss_of.bank.rows)


def test_real_data_of_another_source(tmp_path: Path) -> None:
    """The training data then give conditions alone."""

    class Conditions(Unlabelled):
        def fetch(self, rows: Tensor, index: Tensor) -> Any:
            return replace(super().fetch(rows, index), x0=None)

    options = {"real": {"_target_": "distill.data.digits.Digits"}}
    assert MMD.needs(options) == ()
    assert MMD.needs({"real": None}) == ("x0",)
    method = prepared(MMD(image_student(), steps=1, real=Digits(), bank=100))
    train(method, Conditions(), Fit(steps=2, batch_size=16), folder=tmp_path)
    assert method.loss_of.bank is not None
    assert len(method.loss_of.bank.rows) == 100

    class Other(Digits):
        def fingerprint(self) -> str:
            return "other images"

    again = prepared(MMD(image_student(), steps=1, real=Other(), bank=100))
    with pytest.raises(checkpoint.Refused, match=r"options\.real"):
        train(again, Conditions(), Fit(steps=3, batch_size=16), folder=tmp_path)


def kill_at(folder: Path, at: int | None) -> None:
    """Train 8 steps with what is measured of real features, or die in step `at`."""
    method = prepared(
        MMD(sampled_by(FEW, mlp(Flow(), "x0")), kernel=MIXTURE, feature_scale="rms", bank=40, dropout=True)
    )
    loss = method.loss

    def deadly(batch: Any, step: Step) -> Any:
        if step.iteration == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(batch, step)

    method.plan = [replace(method.plan[0], loss=deadly)]
    method.student_update = method.plan[0]
    train(
        method, points(), Fit(steps=8, batch_size=16, accumulate=2, checkpoint_every=3), folder=folder / "c"
    )
    torch.save(state(method), folder / "end.pt")


def test_a_killed_training_goes_on_bit_equal(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert forked(kill_at, whole, None) == 0
    assert forked(kill_at, parts, 5) == -signal.SIGKILL
    saved = checkpoint_of(parts / "c")
    assert saved["progress"]["step"] == 3
    assert set(saved["method"]) == {"scale", "gamma"}
    assert forked(kill_at, parts, None) == 0
    one, other = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_diagnostics_are_of_the_average() -> None:
    method = prepared(MMD(image_student(), steps=2, bank=100))
    method.before_training(Unlabelled())
    rows = torch.arange(8)
    batch = Unlabelled().fetch(rows, rows)
    with torch.no_grad():
        found = method.diagnostics(batch, DoubleDraws(7, "s", 0, rows))
        method.best().net.out.bias.add_(1.0)
        moved = method.diagnostics(batch, DoubleDraws(7, "s", 0, rows))
    assert set(found.scalars) == {"mmd2", "saturated"}
    assert found.scalars["mmd2"] != moved.scalars["mmd2"]
    assert [(label, images.shape) for label, images in found.rows] == [("student", (8, 1, 8, 8))]


# ---- what is refused ----


class Trainable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": 0}, "steps: expected at least 1, found 0"),
    ({"grid": {"name": "quadratic"}}, "grid.name: found 'quadratic', expected one of"),
    ({"grid": {"name": "trailing"}}, "grid: .*trailing.*table"),
    (
        {"guidance_scale": 2.0},
        "guidance_scale: found 2.0, but the student was not trained with a null condition",
    ),
    ({"features": "clip"}, "features: found str, expected a feature extractor"),
    ({"features": Trainable().eval()}, "features: 2 parameters require a gradient, such as layer.weight"),
    ({"features": Trainable().requires_grad_(False)}, "features: found a network in training mode"),
    (
        {"features": nn.Flatten(0).eval()},
        r"features: found rows of shape \[4\] of 2 images, expected \[2, D\]",
    ),
    ({"feature_scale": "std"}, "feature_scale: found 'std', expected 'none' or 'rms'"),
    ({"kernel": {"name": "cauchy"}}, "kernel.name: found 'cauchy'"),
    ({"kernel": {"gamma": 0.0}}, "kernel.gamma: found 0.0, expected a positive number"),
    ({"kernel": {"degree": 0}}, "kernel.degree: found 0"),
    ({"estimator": "linear"}, "estimator: found 'linear', expected one of"),
    ({"classes": True}, "classes: found true, but the student has none; expected false"),
    ({"bank": 1}, "bank: found 1, expected a number of real samples, at least 2, 0 .the batch. or null"),
    ({"bank": 0, "real": points()}, "bank: found 0, expected .* at least 2, or null .all of `real`."),
    (
        {"bank": 10, "real": Digits()},
        r"real: found samples of shape \[1, 8, 8\], expected the student's decoded \[2\]",
    ),
    ({"clamp": "soft"}, "clamp: found 'soft', expected one of"),
    ({"precision": "bfloat16"}, "precision: found 'bfloat16', expected one of"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        MMD(sampled_by(ANY, mlp(Flow())), **{"steps": 2, **options})


def test_refused_samplers() -> None:
    few = sampled_by(FEW, mlp(Flow(), "x0"))
    with pytest.raises(
        ValueError, match=r"steps: this model was distilled for \[1, 2\] step.* not valid at 3"
    ):
        MMD(few, steps=3)
    with pytest.raises(ValueError, match=r"grid: found .* the student is made for the times of its sampler"):
        MMD(few, grid={"name": "uniform"})
    with pytest.raises(ValueError, match="student: is sampled with 'rk45', which chooses its own steps"):
        MMD(sampled_by(replace(ANY, solver="rk45"), mlp(Flow())), steps=2)
    table = mlp(VPLinearBetas(), "eps")
    with pytest.raises(
        ValueError, match="grid: the first of 1 steps is at t = 1, where a state holds 1 of the data"
    ):
        MMD(table, steps=1, grid={"name": "leading"})
    MMD(table, steps=2, grid={"name": "leading"})
    with pytest.raises(ValueError, match=r"steps: found 2000, expected 1 \.\. 1000"):
        MMD(table, steps=2000, grid={"name": "leading"})
    with pytest.raises(ValueError, match="kind: found 'eps', but under VPCosine"):
        MMD(mlp(VPCosine(), "eps"), steps=2)


def test_refused_extractors_of_images() -> None:
    with pytest.raises(ValueError, match=r"features: digits64 reads images \[B, 1, 8, 8\], got \[2, 2\]"):
        MMD(mlp(Flow()), features=load_digits64())
    inception = Inception(nn.Flatten(), resize=lambda image: image.astype("float32"), dim=3).eval()
    with pytest.raises(ValueError, match="features: inception_other measures and gives no gradient"):
        MMD(image_student(), features=inception)

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)

    with pytest.raises(ValueError, match="features: give no gradient to the images"):
        MMD(image_student(), features=Cut().eval())


def test_refused_data(tmp_path: Path) -> None:
    class Bright(Unlabelled):
        def fetch(self, rows: Tensor, index: Tensor) -> Any:
            batch = super().fetch(rows, index)
            return replace(batch, x0=127.5 * (batch.x0 + 1))

    method = prepared(MMD(image_student(), steps=1))
    with pytest.raises(ValueError, match=r"real: found values 0 .. 255, expected \[-1.0, 1.0\]"):
        train(method, Bright(), Fit(steps=1, batch_size=8), folder=tmp_path / "a")

    class Broken(Points):
        def fetch(self, rows: Tensor, index: Tensor) -> Any:
            batch = super().fetch(rows, index)
            return replace(batch, x0=batch.x0 / 0)

    broken = Broken(ring={"count": 8, "radius": 1.5}, count=16)
    method = prepared(MMD(sampled_by(ANY, mlp(Flow())), steps=1))
    with pytest.raises(ValueError, match="features: found numbers that are not finite of real samples"):
        method.before_training(broken)
    with pytest.raises(ValueError, match="real: found 1 samples, expected at least 2"):
        method.before_training(points(1))
    with pytest.raises(ValueError, match="features: found 1 samples, expected at least 2 on each side"):
        train(method, points(), Fit(steps=1, batch_size=1), folder=tmp_path / "b")
    labelled = prepared(MMD(sampled_by(ANY, mlp(Flow(), classes=8)), steps=1, classes=True))
    with pytest.raises(ValueError, match="classes: found true, but the real samples have no labels"):
        labelled.before_training(points())
    with pytest.raises(ValueError, match="classes: found true, but the data have no labels"):
        labelled.loss_of.labels(Cond.nothing(8))
    with pytest.raises(ValueError, match="bank: is not filled; call before_training"):
        MMD(sampled_by(ANY, mlp(Flow())), steps=1, bank=10).loss(ring_batch(8), double_step(8))
    zeros = Points(means=[[0.0, 0.0]], std=0.0, count=16)
    scaled = prepared(MMD(sampled_by(ANY, mlp(Flow())), steps=1, feature_scale="rms"))
    with pytest.raises(ValueError, match="feature_scale: found 'rms', but all real features are 0"):
        scaled.before_training(zeros)


def test_features_of_the_wrong_size_for_the_kernel_are_warned_of() -> None:
    method = prepared(MMD(sampled_by(ANY, mlp(Flow())), steps=1))
    with pytest.warns(UserWarning, match="kernel: gamma .* of real features is .* use feature_scale=rms"):
        method.before_training(Points(ring={"count": 8, "radius": 100.0}, count=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.before_training(points())


def test_a_frozen_student_and_features_without_a_gradient() -> None:
    method = MMD(sampled_by(ANY, mlp(Flow())), steps=1)
    method.student.requires_grad_(False)
    with pytest.raises(ValueError, match="features: the generated ones do not require a gradient"):
        method.loss(ring_batch(8), double_step(8))


class Bursting(nn.Module):
    """Not finite at t = 0.5."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.weight * x / (t - 0.5).abs()[:, None]


def test_the_step_where_the_sampler_diverges_is_named(tmp_path: Path) -> None:
    method = prepared(MMD(sampled_by(ANY, Denoiser(Bursting(), Flow(), "velocity", (2,))), steps=4))
    with pytest.raises(
        FloatingPointError, match=r"the states of the sampler were not finite after step 3 of 4, from t = 0.5"
    ):
        train(method, points(), Fit(steps=4, batch_size=8, max_nonfinite=2), folder=tmp_path)
