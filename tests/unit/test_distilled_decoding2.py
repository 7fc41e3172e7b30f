"""Distilled Decoding 2: exact scores of the teacher, its diffusion of codes, the one-step generator; bad input."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from token_support import C, L, TokenDigits, classes_of, flow, generator, scores, student, teacher

from distill.data.rng import Draws, sample_noise
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim, Step
from distill.methods.distilled_decoding2 import DistilledDecoding2
from distill.methods.losses.score import sid_loss
from distill.methods.sid import SiD
from distill.methods.teacher_score import TeacherScore
from distill.models.code_flow import with_context
from distill.models.decoder import codebook_of
from distill.models.native import load_model, save_model
from distill.nets.code_flow import CodeFlowNet
from distill.nets.llamagen import LlamaGen
from distill.nets.token_transformer import TokenTransformer
from distill.nets.var import VAR
from distill.samplers.token_filters import Filters
from distill.samplers.token_flow import velocity
from distill.stages.adapt import adapted

METHODS = {"teacher_score": (TeacherScore, scores), "distilled_decoding2": (DistilledDecoding2, generator)}


def noise(count: int = 6) -> torch.Tensor:
    return sample_noise(0, "z", torch.arange(count), (L, C))


def batch_of(count: int = 8):
    rows = torch.arange(count)
    return TokenDigits().fetch(rows, rows), Step(0, Draws(0, "x", 0, rows))


@torch.no_grad()
def test_the_body_is_that_of_the_teacher():
    """What its last layer reads, of the codes before a position alone."""
    model, given = flow(), teacher()
    codes, cond = codebook_of(given.decoder)[torch.randint(0, 8, (6, L))], classes_of(6)
    net = model.code_net
    assert torch.equal(
        given.net.head(net.body(codes, torch.zeros(6), cond)), given.net(codes, torch.zeros(6), cond)
    )
    x, t, ahead = noise(), torch.rand(6, L), with_context(cond, codes)
    whole = model(x, t, ahead)
    for changed in ("codes", "x", "t"):
        given_codes, given_x, given_t = codes.clone(), x.clone(), t.clone()
        {"codes": given_codes, "x": given_x, "t": given_t}[changed][:, 1] += 0.5
        moved = (model(given_x, given_t, with_context(cond, given_codes)) != whole).flatten(2).any(-1).any(0)
        assert moved.tolist() == [i > 1 if changed == "codes" else i == 1 for i in range(L)]


@torch.no_grad()
def test_codes_are_made_one_after_the_other_with_the_cache():
    model, z, cond = flow(), noise(), classes_of(6)
    made = model.transport(z, cond, steps=3)[0]
    book, again = codebook_of(model.decoder), torch.zeros_like(z)
    for i in range(L):  # Euler of position i, given the codes before, in whole calls
        x = z.clone()
        for t, u in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            x = x + (u - t) * model(x, torch.full((6,), t), with_context(cond, again))
        again[:, i] = book[torch.cdist(x[:, i], book).argmin(-1)]
    assert torch.allclose(made, again)
    assert model.calls("euler", 3) == L
    one = model.x0(z, torch.ones(6), cond)
    assert torch.allclose(one, z - model(z, torch.ones(6), with_context(cond, z)), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("filters", [Filters(), Filters(top_k=3, temperature=0.7)])
def test_the_loss_compares_with_the_exact_velocity(filters: Filters):
    """Position by position, from the closed form; guided and filtered as the teacher is sampled."""
    given = teacher().with_(filters=filters)
    method = TeacherScore(flow(), given, draws=3, guidance_scale=2.0)
    batch, step = batch_of(4)
    q_t, t, eps = method.scores.noisy(batch.x0, step.draws)
    assert q_t.shape == (12, L, C)
    clean = batch.x0.repeat_interleave(3, 0)
    assert torch.allclose(q_t, (1 - t[..., None]) * clean + t[..., None] * eps, atol=1e-6)
    assert float(t.min()) >= 0.02
    assert float(t.max()) <= 0.98
    log_p = given.log_probs(batch.x0, torch.zeros(4), batch.cond, 2.0).repeat_interleave(3, 0)
    wanted = torch.stack(
        [velocity(q_t[:, i], t[:, i], log_p[:, i], codebook_of(given.decoder)) for i in range(L)], 1
    )
    found = method.scores.teacher_velocity(given, batch.x0, q_t, t, batch.cond)
    assert torch.allclose(found, wanted, atol=1e-4)
    made = method.student(q_t, t, with_context(batch.cond, batch.x0))
    assert torch.allclose(method.loss(batch, step).total, (made - wanted).square().mean(), rtol=1e-4)
    assert "guidance 2, temperature" in method.result().sampler.baked


def test_the_generator_s_gradient_passes_through_both_predictions():
    """SiD's loss, with codes before a position as constants: its gradient on q is that of the formula by itself."""
    method = DistilledDecoding2(**generator())
    batch, step = batch_of(4)
    q = torch.randn(4, L, C, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    found = torch.autograd.grad(
        sid_loss(q.flatten(0, 1), *method.predictions(q, batch.cond, step.draws)).sum(), q
    )[0]
    codes = method.student.nearest(q.detach())
    q_t, t, _ = method.scores.noisy(q, step.draws, 1)
    log_p = method.teacher.log_probs(codes, torch.zeros(4), batch.cond).detach()
    book, total = codebook_of(method.teacher.decoder), 0.0
    for i in range(L):
        time = t[:, i, None]
        logits = log_p[:, i] - (q_t[:, i, None] - (1 - time[..., None]) * book).square().sum(-1) / (
            2 * time**2
        )
        real = logits.softmax(-1) @ book
        fake = (q_t - t[..., None] * method.fake(q_t, t, with_context(batch.cond, codes)))[:, i]
        weight = (q[:, i] - real).detach().abs().mean(1, keepdim=True)
        total = total + ((real - fake) * (fake - q[:, i]) / weight).sum()
    assert torch.allclose(found, torch.autograd.grad(total, q)[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_models_come_back_and_bodies_are_any_network_of_tokens(name: str, tmp_path: Path):
    cls, make = METHODS[name]
    method = cls(**make())
    method.prepare({u.name: Optim(torch.optim.AdamW, Constant()) for u in method.updates()}, seed=0)
    made = method.as_generator()
    save_model(tmp_path, made.denoiser, made.spec)
    again = load_model(tmp_path)
    assert again.denoiser.config() == made.denoiser.config()
    assert torch.equal(again.sample(3), made.sample(3))
    for body in (
        LlamaGen(
            width=16, depth=1, heads=2, grid=2, vocabulary=8, size=C, num_classes=10, hidden=16, logits=False
        ),
        VAR(depth=1, width=16, heads=2, scales=(1, 2), vocabulary=8, size=C, num_classes=10, logits=False),
    ):
        net = CodeFlowNet(body, C, width=8, layers=1)
        x = torch.randn(2, sum(body.groups), C)
        assert net(x, torch.ones(2), classes_of(2)).shape == x.shape


def fitted(name: str, steps: list[int], folder: Path) -> DistillModule:
    cls, make = METHODS[name]
    for count in steps:
        options = {"lead": 1, "fake_per_student": 2} if name == "distilled_decoding2" else {}
        method = cls(**make(), **options)
        optim = Optim(partial(torch.optim.AdamW, lr=1e-2), Constant(), ema=0.9)
        method.prepare({update.name: optim for update in method.updates()}, seed=3)
        train(method, TokenDigits(), Fit(count, 16), folder=folder, config={})
    return method


@pytest.mark.parametrize("name", METHODS)
def test_killed_and_continued(name: str, tmp_path: Path):
    one, two = fitted(name, [4], tmp_path / "a"), fitted(name, [2, 4], tmp_path / "b")
    assert one.progress.iteration == (9 if name == "distilled_decoding2" else 4)
    for role, network in one.networks.items():
        for a, b in zip(network.parameters(), two.networks[role].parameters(), strict=True):
            assert torch.equal(a, b), role


OPTIONS = {
    "teacher_score": {"draws": 3, "t_min": 0.3, "t_max": 0.5, "guidance_scale": 2.0, "steps": 3},
    "distilled_decoding2": {
        "alpha": 0.5, "floor": 1.0, "fake_per_student": 3, "lead": 5, "draws": 3, "t_min": 0.3, "t_max": 0.5,
        "guidance_scale": 2.0, "nearest": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_every_option_acts(name: str):
    (cls, make), options = METHODS[name], OPTIONS[name]
    assert set(options) == set(inspect.signature(cls).parameters) - {"student", "teacher", "guidance"}
    batch, step = batch_of()

    def seen(**given):
        method = cls(**make(), **given)
        updates = method.updates()
        with torch.no_grad():
            losses = [float(update.loss(batch, step).total) for update in updates]
        return losses, [(update.every, update.start) for update in updates], method.result()

    assert seen() == seen()
    for option, value in options.items():
        assert seen(**{option: value}) != seen(), option


def other_groups():
    net = TokenTransformer(vocabulary=8, size=C, length=L, num_classes=10, width=16, depth=1, heads=2)
    net.groups = (2, 2)
    return teacher().with_(net=net)


BAD = {
    "student": (lambda: TeacherScore(teacher(), teacher()), "student: found a TokenTeacher, expected a flow of codes"),
    "teacher": (lambda: TeacherScore(flow(), flow(6)), "teacher: found a CodeFlow, expected a model of tokens"),
    "groups": (lambda: TeacherScore(flow(), other_groups()), r"teacher: found groups \[2, 2\], expected"),
    "draws": (lambda: TeacherScore(flow(), teacher(), draws=0), "draws: found 0"),
    "times": (lambda: TeacherScore(flow(), teacher(), t_min=0.0), "t_min, t_max: found 0.0 and 0.98"),
    "guidance": (lambda: TeacherScore(flow(), teacher(), guidance_scale=0.5), "guidance_scale: found 0.5"),
    "no null": (lambda: TeacherScore(flow(), teacher(guidable=False), guidance_scale=2.0), "guidance_scale"),
    "steps": (lambda: TeacherScore(flow(), teacher(), steps=0), "steps: found 0"),
    "ratio": (lambda: DistilledDecoding2(**generator(), fake_per_student=0), "fake_per_student, lead: found 0 and 0"),
    "floor": (lambda: DistilledDecoding2(**generator(), floor=0.0), "floor: found 0.0"),
    "alpha": (lambda: DistilledDecoding2(**generator(), alpha=float("nan")), "alpha: found nan"),
    "other model": (
        lambda: DistilledDecoding2(**generator() | {"guidance": student()}),
        "guidance: found a Denoiser, expected a flow of codes",
    ),
    "body": (lambda: CodeFlowNet(teacher().net, C), "body: found TokenTransformer, expected .* logits: false"),
    "head": (lambda: CodeFlowNet(flow().net.body, C, width=3), "size, width, layers: found 4, 3, 3"),
    "shape": (lambda: flow().with_(sample_shape=(3, C)), r"sample_shape: found \[3, 4\], expected \[4, 4\]"),
    "net": (lambda: flow().with_(net=teacher().net), "net: found TokenTransformer, expected a CodeFlowNet"),
    "guided": (lambda: flow().x0(noise(), torch.ones(6), classes_of(6), 2.0), "guidance_scale: found 2.0, expected 1"),
    "solver": (lambda: flow().transport(noise(), classes_of(6), solver="ddim", steps=2), "solver: found 'ddim'"),
    "path": (lambda: flow().transport(noise(), classes_of(6), steps=2, times=[1, 0]), "times: found several"),
    "adapt": (lambda: adapted(student(), {"process": "code_flow"}), "adapt.process: found code_flow, but Denoiser"),
    "adapt.net": (
        lambda: adapted(teacher(), {"process": "code_flow", "net": {"body": {"width": 32}}}),
        "adapt.net: the weights do not fit",
    ),
    "sid": (lambda: SiD(flow(), flow()), "student: found a CodeFlow"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
