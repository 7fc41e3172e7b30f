"""Models of tokens: generation, completion, filters, bad input; students of Distilled Decoding; pairs of tokens."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from token_support import C, L, TokenDigits, V, classes_of, codes, decoder, student, teacher, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.cond import Cond
from distill.data.rng import Draws, noise_checksum, sample_noise
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim, Step
from distill.evaluation.rows import Row
from distill.exporters.card import card
from distill.methods.autoregressive import Autoregressive
from distill.methods.distilled_decoding import DistilledDecoding
from distill.methods.losses.tokens import mean_behind
from distill.methods.reflow import Reflow
from distill.methods.sid import SiD
from distill.methods.tokenizer import Tokenizer as TokenizerMethod
from distill.models.autoencoder import entry_of
from distill.models.conditions import Labels
from distill.models.decoder import VQ, Codes, Points, codebook_of, codes_of, indices
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.involved import Involved
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher
from distill.nets.llamagen import LlamaGen
from distill.nets.mlp import MLP
from distill.nets.token_net import StudentAndTeacher, TokenTable
from distill.nets.token_transformer import TokenTransformer, student_output
from distill.nets.tokenizer import ConvTokenizer
from distill.nets.var import VAR
from distill.process.flow import Flow
from distill.process.prefix import Prefix
from distill.process.times import uniform_grid
from distill.samplers.token_filters import Filters, check_logits
from distill.samplers.token_flow import denoise, score, token_map, velocity
from distill.stages.adapt import adapted
from distill.stages.token_models import token_counts

SPEC = SamplerSpec(steps=16, any_steps=True, solver="heun")
GRID = torch.linspace(1, 0, 17, dtype=torch.float64)
CUT = SamplerSpec(steps=1, times={1: (1.0, 0.0), 2: (1.0, 0.5, 0.0)}, mode="sde", renoise="same")


def noise(count: int = 6) -> torch.Tensor:
    return sample_noise(0, "z", torch.arange(count), (L, C))


# ---- the teacher ----


def test_generation_follows_the_probabilities_of_what_is_before():
    """Each token is the one that its noise flows to under the teacher-forced probabilities of the whole sequence."""
    model, z, cond = teacher(), noise(), classes_of(6)
    with torch.no_grad():
        for scale, filters in ((1.0, Filters()), (2.0, Filters(top_k=3, guidance_schedule="linear"))):
            model = model.with_(filters=filters)
            made = model.transport(z, cond, guidance_scale=scale)[0]
            log_p = model.log_probs(made, torch.zeros(6), cond, scale)
            index, _ = token_map(z.flatten(0, 1), log_p.flatten(0, 1), codebook_of(model.decoder), GRID)
            assert torch.equal(index.view(6, L), indices(model.decoder, made))
            assert torch.equal(codes_of(model.decoder, index.view(6, L)), made)
    assert model.calls("heun", 16, 1.0) == L
    assert model.calls("euler", 64, 2.0) == 2 * L


def test_the_flow_of_tokens_as_a_path_and_a_denoiser():
    model, z, cond = teacher(), noise(), classes_of(6)
    with torch.no_grad():
        path = model.transport(z, cond, grid=GRID, times=GRID.tolist())
        made = path[-1]
        assert torch.equal(path[0], z)
        assert torch.equal(made, model.transport(z, cond, grid=GRID)[0])
        # At any time of the path, the expected code is reached by a step of Euler to t = 0.
        given = Cond(6, {**cond.values, "context": made}, cond.nulls)
        t = GRID[10].float().expand(6)
        mean = model.x0(path[10], t, given)
        by_position = model.x0(path[10], t[:, None].expand(6, L), given)
        assert torch.equal(mean, by_position)
        assert float((mean - made).norm(dim=-1).median()) < float((path[10] - made).norm(dim=-1).median())
    with pytest.raises(ValueError, match=r"context: missing"):
        model.x0(z, t, cond)


def test_a_sample_is_completed_from_its_first_tokens():
    generator, z, cond = Generator(teacher(), SPEC), noise(), classes_of(6)
    tokens = torch.randint(0, V, (6, 2), generator=torch.Generator().manual_seed(5))
    known = codes_of(generator.decoder, tokens)
    with torch.no_grad():
        made = generator.generate(z, cond, known=known)
        assert torch.equal(made[:, :2], known)
        whole = generator.generate(z, cond)
        assert torch.equal(generator.generate(z, cond, known=whole[:, :2]), whole)
    few = Generator(student().with_(coupling="few_step"), CUT)
    with torch.no_grad():
        made = few.generate(z, cond, known=known)
        state = torch.cat([known, z[:, 2:]], 1)
        assert torch.equal(made, few.denoiser.x0(state, torch.full((6,), 0.5), cond))
    pictures = few.sample(6, known=tokens)
    assert pictures.shape == (6, 1, 8, 8)
    for wrong, message in (
        (tokens[:, :1], r"known: found 1 positions, but this student was trained with \[2\]"),
        (tokens[:5], r"known: found torch.int64 \[5, 2\], expected tokens \[6,n\]"),
        (tokens.float(), "expected tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            few.sample(6, known=wrong)
    with pytest.raises(IndexError, match=r"tokens: found 8, expected indices 0 .. 7"):
        few.sample(6, known=torch.full((6, 2), V))
    flow = Generator(
        Denoiser(MLP(shape=(L, C), width=8, depth=1), Flow(), "velocity", (L, C), decoder=codes()), SPEC
    )
    with pytest.raises(ValueError, match=r"known: found 2 known positions, but states of Flow"):
        flow.sample(6, known=tokens)


def test_independent_tokens_are_a_table():
    net = TokenTable(vocabulary=V, length=L, num_classes=10)
    model = TokenTeacher(net, (L, C), conditions=Labels(10), decoder=decoder())
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [5, 5, 5, 5]])
    counts = token_counts(tokens, torch.tensor([1, 1, 2]), L, V, 10)
    assert counts[1, 0, 0] == 2
    assert counts[1, 3].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert counts[2].sum() == 4
    with torch.no_grad():
        net.table.weight.copy_((counts + 1e-30).log().flatten(1))
        made = indices(model.decoder, model.transport(noise(), Cond.of_labels([1, 2] * 3))[0])
    assert (made[1::2] == 5).all()
    assert (made[::2, :3] == tokens[0, :3]).all()
    assert model.calls("heun", 16) == 1
    for wrong, message in (
        (Cond.nothing(6), "cond: this net expects one of 10 class labels"),
        (Cond.of_labels([1] * 6).null(), r"label: expected classes 0 .. 9, found \[-1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.transport(noise(), wrong)


# ---- the student ----


def test_the_states_of_the_student():
    process = Prefix([1, 2, 1])
    assert [process.time(k) for k in range(4)] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    t = torch.tensor([process.time(k) for k in range(4)])
    assert process.alpha(t).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert torch.equal(process.alpha(t) + process.sigma(t), torch.ones(4, 4))
    assert process.known_time(3) == process.time(2)
    x0, z = torch.randn(4, 4, 2), torch.randn(4, 4, 2)
    states = process.add_noise(x0, z, t)
    assert torch.equal(states[0], z[0])
    assert torch.equal(states[2], torch.cat([x0[2, :3], z[2, 3:]]))
    assert process.log_ratio(t).tolist()[0] == -torch.inf
    assert bool((process.log_ratio(t).diff() > 0).all())
    for call, message in (
        (lambda: Prefix([]), "groups: found"),
        (lambda: Prefix([1, 0]), "groups: found"),
        (lambda: process.time(4), "groups: found 4 groups of data, expected 0 .. 3"),
        (lambda: process.known_time(2), r"known: found 2 positions, expected as many as .* \[0, 1, 3\]"),
        (lambda: process.check_kind("eps"), "expected 'x0'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_student_sees_its_own_noise_and_what_is_before_alone():
    model = student()
    x = noise(1).requires_grad_()
    with torch.enable_grad():
        logits, tokens = model.net(x, torch.ones(1), classes_of(1), heads=True)
        for out in (logits, tokens):
            for i in range(L):
                (seen,) = torch.autograd.grad(out[0, i].square().sum(), x, retain_graph=True)
                reached = seen[0].abs().sum(1) > 0
                assert reached.tolist() == [j <= i for j in range(L)]


def test_steps_of_a_student_have_one_noise():
    model, z, cond = student(split=3).with_(coupling="few_step"), noise(), classes_of(6)
    with torch.no_grad():
        first = model.x0(z, torch.ones(6), cond)
        second = model.x0(torch.cat([first[:, :2], z[:, 2:]], 1), torch.full((6,), 0.5), cond)
        made = Generator(model, CUT).generate(z, cond, 2)
        assert torch.equal(made, second)
        assert torch.equal(made[:, :2], first[:, :2])
        logits, tokens = model.net(z, torch.ones(6), cond, heads=True)
    assert torch.equal(first[:, :3], codes_of(model.decoder, logits.argmax(-1))[:, :3])
    assert torch.equal(first[:, 3], tokens[:, 3])
    data = torch.tensor([[True, False, False, False]])
    out = student_output(z, logits, tokens, codebook_of(model.decoder), data, 0)
    assert torch.equal(out[:, 0], z[:, 0])
    assert torch.equal(out[:, 1:], tokens[:, 1:])


def test_a_student_starts_from_the_weights_of_its_teacher():
    given = teacher()
    made = adapted(given, {"process": "prefix", "net": {"student": True, "dropout": 0.0}})
    own, theirs = made.net.state_dict(), given.net.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert {name.partition(".")[0] for name in set(own) - set(theirs)} == {"flag", "token_head", "codebook"}
    assert torch.equal(made.net.codebook, codebook_of(given.decoder))
    assert isinstance(made.process, Prefix)
    with pytest.raises(ValueError, match=r"adapt.net: found a TokenTransformer that is no student"):
        adapted(given, {"process": "prefix"})
    again = adapted(given, {"net": {"dropout": 0.5}})
    assert isinstance(again, TokenTeacher)
    assert all(torch.equal(again.net.state_dict()[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match=r"adapt.kind: found 'v', but TokenTeacher has no choice of kinds"):
        adapted(given, {"kind": "v"})
    with pytest.raises(ValueError, match=r"adapt.process: found prefix, but Denoiser"):
        adapted(student(), {"process": "prefix", "net": {"dropout": 0.1}})


def test_llamagen_is_trained_on_tokens_and_starts_a_student(tmp_path: Path):
    """The codebook of the net is that of the tokens: else all inputs of the teacher are token 0."""
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 1, "heads": 2, "grid": 2, "vocabulary": V, "size": C, "num_classes": 10}
    given = TokenTeacher(LlamaGen(hidden=24, **sizes), (L, C), decoder=decoder())
    assert torch.equal(given.net.codebook, codebook_of(given.decoder))
    method = Autoregressive(given, null_prob=0.0)
    method.prepare({"student": Optim(partial(torch.optim.AdamW, lr=1e-2), Constant())}, seed=0)
    train(method, TokenDigits(), Fit(3, 16), folder=tmp_path, config={})
    made = adapted(method.student, {"process": "prefix", "net": {"student": True}})
    own, theirs = made.net.state_dict(), method.student.net.state_dict()
    kept = [name for name in theirs if not name.startswith("tok_embeddings.")]
    assert all(torch.equal(own[name], theirs[name]) for name in kept)
    assert own["tok_embeddings.weight"].shape == (16, C)
    source, rows = TokenDigits(), torch.arange(8)
    loss = DistilledDecoding(made, timesteps=[0, 2]).loss(
        source.fetch(rows, rows), Step(0, Draws(0, "x", 0, rows))
    )
    assert loss.total.isfinite()


def test_a_student_of_scales_starts_from_its_teacher():
    """Its start is a level of its own: the one behind it is new, and all others are the teacher's."""
    sizes = {
        "depth": 1,
        "width": 16,
        "heads": 2,
        "scales": (1, 2),
        "vocabulary": V,
        "size": C,
        "num_classes": 10,
    }
    torch.manual_seed(0)
    given = TokenTeacher(VAR(**sizes), (5, C), decoder=codes())
    made = adapted(given, {"process": "prefix", "net": {"student": True, "split": 1}})
    own, theirs = made.net.state_dict(), given.net.state_dict()
    shifted = {"lvl_embed.weight": 0, "pos_1LC": 1}
    for name, value in theirs.items():
        if name in shifted:
            rows = own[name].movedim(shifted[name], 0)
            assert torch.equal(rows[[0, *range(2, len(rows))]], value.movedim(shifted[name], 0))
        elif not name.startswith("quantize."):
            assert torch.equal(own[name], value), name
    assert made.net.split == 1
    x = torch.randn(2, 5, C, generator=torch.Generator().manual_seed(1))
    whole, cond = made.net(x, torch.ones(2), classes_of(2), heads=True)[0], classes_of(2)
    for position in range(5):  # itself and the scales before, which is the first token
        changed = x.clone()
        changed[:, position] += 1
        moved = (made.net(changed, torch.ones(2), cond, heads=True)[0] != whole).any(-1).any(0)
        assert moved.tolist() == [position == i or (position == 0 and i > 0) for i in range(5)]


def test_the_teacher_makes_some_groups():
    first, last = 1, 3
    given, model, z, cond = teacher(), student(), noise(), classes_of(6)
    made = Involved(
        StudentAndTeacher(model.net, given.net),
        (L, C),
        [1] * L,
        first,
        last,
        conditions=Labels(10),
        decoder=model.decoder,
    )
    assert made.calls("heun", 16) == 1 + (last - first) + 1
    with torch.no_grad():
        found = made.transport(z, cond, grid=GRID)[0]
        begun = model.x0(z, torch.ones(6), cond)[:, :first]
        between = Generator(given, SPEC).generate(z, cond, known=begun)[:, :last]
        state = torch.cat([between, z[:, last:]], 1)
        assert torch.equal(found, model.x0(state, torch.full((6,), 1 - last / L), cond))
    for bad in ((2, 2), (0, L), (-1, 2)):
        with pytest.raises(ValueError, match=r"first, last: found"):
            made.with_(first=bad[0], last=bad[1])


@pytest.mark.parametrize("make", [teacher, student, tokenizer], ids=["teacher", "student", "tokenizer"])
def test_models_come_back_from_their_folders(make, tmp_path: Path):
    model = make()
    model = model.with_(filters=Filters(top_k=3)) if make is teacher else model
    save_model(tmp_path, model, CUT if make is student else SPEC)
    again = load_model(tmp_path)
    assert again.denoiser.config() == model.config()
    if make is not tokenizer:
        assert torch.equal(again.sample(4), Generator(model, again.spec).sample(4))


# ---- training ----

METHODS = {
    "tokenizer": lambda: TokenizerMethod(tokenizer()),
    "autoregressive": lambda: Autoregressive(teacher(), held_out=4),
    "distilled_decoding": lambda: DistilledDecoding(student(split=2), timesteps=[0, 2], perceptual=0.5),
}


class Images(TokenDigits):
    """The digits themselves."""

    sample_shape = (1, 8, 8)

    def fetch(self, rows, index):
        return self.images.fetch(rows, index)


def fitted(name: str, steps: list[int], folder: Path, **options) -> DistillModule:
    """A method that was trained to each number of steps, each time anew from its checkpoint."""
    for count in steps:
        method = METHODS[name]()
        optim = Optim(partial(torch.optim.AdamW, lr=1e-2), Constant(), ema=0.9)
        method.prepare({"student": optim}, seed=3)
        train(
            method,
            Images() if name == "tokenizer" else TokenDigits(),
            Fit(count, 16, **options),
            folder=folder,
            config={},
        )
    return method


@pytest.mark.parametrize("name", METHODS)
def test_killed_and_continued_and_cut_into_parts(name: str, tmp_path: Path):
    whole = fitted(name, [4], tmp_path / "whole")
    again = fitted(name, [2, 4], tmp_path / "again")
    for part in ("networks", "ema"):
        one, two = (getattr(m, part)["student"].state_dict() for m in (whole, again))
        assert all(torch.equal(one[key], two[key]) for key in one)
    parts = fitted(name, [4], tmp_path / "parts", accumulate=2)
    one, two = (m.student.state_dict() for m in (whole, parts))
    # Adam amplifies the rounding of gradients near 0.
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 5e-3


def test_tokens_that_are_held_out_are_not_trained_on():
    method, source = Autoregressive(teacher(), held_out=4, null_prob=0.0), TokenDigits()
    rows = torch.arange(64)
    batch = source.fetch(rows, rows)
    held = method._held(batch)
    assert 8 <= int(held.sum()) <= 24
    most = batch.cond.get("label")[held].bincount(minlength=10).max()
    assert int(most) < int(held.sum()), "of several classes"
    chosen = source.fetch(rows[held], rows[held])
    loss = method.loss(chosen, Step(0, Draws(0, "x", 0, rows[held])))
    assert float(loss.total) == 0
    assert float(loss.logs["held_out"]) > 0


def test_the_loss_ignores_positions_of_data():
    """Other tokens at positions that are data change no loss; at positions of noise they do."""
    method, source, rows = DistilledDecoding(student(), timesteps=[0, 2]), TokenDigits(), torch.arange(8)
    batch, draws = source.fetch(rows, rows), Draws(0, "x", 0, rows)
    data = (draws.integer("t", 2) == 1)[:, None] & (torch.arange(L) < 2)
    assert 0 < int(data.sum()) < data.numel()
    other = (batch.tokens + 1) % V

    def loss(tokens: torch.Tensor) -> float:
        return float(method.loss(replace(batch, tokens=tokens), Step(0, draws)).total)

    given = loss(batch.tokens)
    assert loss(torch.where(data, other, batch.tokens)) == given
    assert loss(torch.where(data, batch.tokens, other)) != given
    values = torch.arange(8.0).view(2, 4)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    assert mean_behind(values, mask).tolist() == [2.5, 5.5]
    assert method.result().sampler.times == {1: (1.0, 0.0), 2: (1.0, 0.5, 0.0)}


def test_a_method_of_scores_refuses_a_model_of_tokens():
    with pytest.raises(ValueError, match=r"student: found a TokenTeacher, but the method needs a Denoiser"):
        SiD(teacher(), teacher())
    with pytest.raises(ValueError, match=r"student: found a Denoiser, but the method needs a TokenTeacher"):
        Autoregressive(student())


OPTIONS = {
    "tokenizer": (TokenizerMethod, tokenizer, {}, {"commitment": 1.0, "revive": 1.0}),
    "autoregressive": (Autoregressive, teacher, {}, {"null_prob": 0.9, "held_out": 2, "steps": 8}),
    "distilled_decoding": (
        DistilledDecoding,
        partial(student, split=2),
        {"timesteps": [0, 2]},
        {"timesteps": [0, 3], "sample_steps": [2], "ce": 2.0, "emb": 2.0, "perceptual": 1.0},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_acts(name: str):
    cls, make, base, options = OPTIONS[name]
    assert set(options) == set(inspect.signature(cls).parameters) - {"student"}
    source, rows = Images() if name == "tokenizer" else TokenDigits(), torch.arange(64)
    batch = source.fetch(rows, rows)

    def seen(**given):
        method = cls(make(), **(base | given))
        with torch.no_grad():
            return float(method.loss(batch, Step(0, Draws(0, "x", 0, rows))).total), method.result()

    assert seen() == seen()
    for option, value in options.items():
        assert seen(**{option: value}) != seen(), option


# ---- pairs ----


def header_of(model: TokenTeacher, count: int = 20, **options) -> Header:
    known = {
        "sample_shape": model.sample_shape,
        "count": count,
        "seed": 0,
        "stream": "pairs",
        "noise_checksum": noise_checksum(0, "pairs", model.sample_shape),
        "teacher": "0" * 64,
        "solver": "heun",
        "steps": 16,
        "guidance_scale": 2.0,
        "conditions": model.conditions.config(),
        "decoder": entry_of(model.decoder),
        "column": model.column,
        "settings": model.transport_settings(),
    }
    return Header(**(known | options))


def test_pairs_of_tokens(tmp_path: Path):
    model = teacher(filters=Filters(top_k=5))
    header = header_of(model)
    write_pairs(tmp_path, model, header, batch_size=7, shard_bytes=200)
    pairs = Pairs(tmp_path)
    assert len(pairs.shards) > 1
    rows = torch.tensor([3, 19, 0])
    batch = pairs.fetch(rows, rows)
    with torch.no_grad():
        wanted = model.transport(batch.z, batch.cond, guidance_scale=2.0)[0]
    assert torch.equal(batch.x0, wanted)
    assert torch.equal(codes_of(pairs.decoder, batch.tokens), wanted)
    assert pairs.header.baked == "guidance 2, temperature 1, top-k 5, top-p off"
    plain = json.loads((tmp_path / "manifest.json").read_text())["header"]
    assert plain["column"] == "tokens"
    # A flow in code space learns from them with nothing more.
    torch.manual_seed(0)
    net = MLP(shape=(L, C), width=16, depth=1, num_classes=10)
    method = Reflow(Denoiser(net, Flow(), "velocity", (L, C), decoder=pairs.decoder))
    method.prepare({"student": Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())}, seed=0)
    train(method, pairs, Fit(4, 10), folder=tmp_path / "reflow", config={})
    assert method.as_generator().sample(4).shape == (4, 1, 8, 8)
    # Another tokenizer, and tokens that it does not have.
    weights = tmp_path / "decoder.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"abcd")
    with pytest.raises(ValueError, match=r"decoder.safetensors: sha256: found"):
        Pairs(tmp_path)
    weights.write_bytes(kept)
    with pytest.raises(ValueError, match=r"tokens: found [0-9], expected indices below 2"):
        Pairs.check_values(tmp_path, {"tokens": torch.tensor([[3]], dtype=torch.uint16)}, "tokens", 2)


def test_guidance_of_the_pairs_cannot_be_changed():
    baked = "guidance 2, temperature 1, top-k 5, top-p off"
    generator = Generator(student().with_(coupling="few_step"), replace(CUT, guidance_baked=2.0, baked=baked))
    message = f"guidance_scale: found 3, but {baked} is baked into the pairs"
    with pytest.raises(ValueError, match=message):
        generator.sample(2, guidance_scale=3)
    with pytest.raises(ValueError, match=message):
        Row("distill", [1], guidance_scale=3).sampled(generator)
    assert f"- {baked}: baked into the pairs" in card("x", generator, [], None, grid=False)
    again = SamplerSpec.from_dict(generator.spec.to_dict())
    assert again == generator.spec
    assert "baked" not in SPEC.to_dict()
    assert "renoise" not in SPEC.to_dict()


# ---- bad input ----


def unit_codes(count: int = V) -> torch.Tensor:
    return torch.randn(count, C, generator=torch.Generator().manual_seed(0))


def flow_of(logits: torch.Tensor, book: torch.Tensor | None = None) -> torch.Tensor:
    """Tokens of 300 noises under one row of logits."""
    z = torch.randn(300, C, generator=torch.Generator().manual_seed(1))
    book = unit_codes(len(logits)) if book is None else book
    return token_map(z, logits.log_softmax(0).expand(300, -1), book, GRID)[0]


class Fixed(TokenTransformer):
    """Logits that are given."""

    logits: torch.Tensor

    def advance(self, state, codes):
        return self.logits.expand(2, 1, -1)


def fixed(logits: list[float]) -> TokenTeacher:
    net = Fixed(num_classes=0, vocabulary=3, size=C, length=2, width=8, depth=1, heads=1)
    net.logits = torch.tensor(logits)
    return TokenTeacher(net, (2, C), decoder=Codes.of(unit_codes(3)))


class Long(ConvTokenizer):
    """Says that it normalises its codes, and does not."""

    def codes(self):
        return self.book * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TokenTeacher(teacher().net, (L, C), decoder=Codes.of(unit_codes(9))),
            "vocabulary is 8, expected that of the codebook, 9",
        ),
        (
            lambda: token_map(noise()[0], torch.zeros(L, 9), unit_codes(), GRID),
            r"log_p: found shape \[4, 9\], expected \[4, 8\]",
        ),
        (
            lambda: token_map(noise()[0, :, :3], torch.zeros(L, V), unit_codes(), GRID),
            r"noise: found shape \[4, 3\], expected \[N, 4\]",
        ),
        (
            lambda: teacher().transport(noise()[:, :3], classes_of(6)),
            r"z: found shape \[6, 3, 4\] .* expected \[6, 4, 4\]",
        ),
        (
            lambda: TokenTeacher(teacher().net, (L, 5), decoder=codes()),
            r"sample_shape: found \[4, 5\], expected \[L,C\] with the C = 4",
        ),
        (
            lambda: TokenTeacher(teacher().net, (5, C), decoder=codes()),
            "net.groups: found 4 positions in groups, expected the 5",
        ),
        (
            lambda: teacher().transport(noise().index_fill(0, torch.tensor([2]), torch.nan), classes_of(6)),
            "z: found NaN or infinity at sample 2, position 0",
        ),
        (
            lambda: TokenTeacher(teacher().net, (L, C), decoder=Codes.of(unit_codes() * torch.nan)),
            "decoder: code 0 of the codebook is not finite",
        ),
        (
            lambda: fixed([0, torch.nan, 0]).transport(torch.randn(2, 2, C)),
            "logits: found NaN or .inf at sample 0, position 0",
        ),
        (
            lambda: fixed([0, torch.inf, 0]).transport(torch.randn(2, 2, C)),
            "logits: found NaN or .inf at sample 0, position 0",
        ),
        (
            lambda: fixed([-torch.inf] * 3).transport(torch.randn(2, 2, C)),
            "no token left after top-k/top-p at position 0",
        ),
        (
            lambda: check_logits(torch.tensor([[[0.0, 1], [-torch.inf, -torch.inf]]])),
            "no token left .* position 1",
        ),
        (
            lambda: TokenTeacher(student().net, (L, C), decoder=decoder()),
            "net: found a student, expected a network of tokens that gives logits",
        ),
        (
            lambda: TokenTeacher(
                LlamaGen(width=8, depth=1, heads=2, grid=2, vocabulary=V, size=3), (L, C), decoder=decoder()
            ),
            "net: found 8 codes of 3 numbers, expected those of the codebook, 8 of 4",
        ),
        (lambda: Filters(top_k=-1), "top_k: found -1"),
        (lambda: Filters(top_p=0.0), "top_p: found 0.0, expected a share in"),
        (lambda: Filters(top_p=1.5), "top_p: found 1.5"),
        (lambda: Filters(temperature=-1.0), "temperature: found -1.0"),
        (lambda: Filters(guided_groups=-1), "guided_groups: found -1"),
        (lambda: Filters(guidance_schedule="cosine"), "guidance_schedule: found 'cosine'"),
        (
            lambda: TokenTeacher(
                teacher().net,
                (L, C),
                decoder=VQ(Long(patch=4, grid=2, vocabulary=V, size=C, width=8, l2_norm=True)),
            ),
            "expected 1 .- 1e-3",
        ),
        (lambda: velocity(noise()[0], torch.zeros(L), torch.zeros(L, V), unit_codes()), "t: found 0"),
        (lambda: score(noise()[0], torch.zeros(L), torch.zeros(L, V), unit_codes()), "t: found 0"),
        (lambda: DistilledDecoding(student(), timesteps=[0, 2, 2]), r"timesteps: found \[0, 2, 2\]"),
        (lambda: DistilledDecoding(student(), timesteps=[1, 2]), r"timesteps: found \[1, 2\]"),
        (
            lambda: DistilledDecoding(student(), timesteps=[0, L]),
            r"timesteps: found \[0, 4\], .* less than 4",
        ),
        (lambda: DistilledDecoding(student(), timesteps=[0, 1.5]), "timesteps: found"),
        (
            lambda: DistilledDecoding(student(), timesteps=[0], sample_steps=[2]),
            r"sample_steps: found \[2\], expected counts in 1 .. 1",
        ),
        (lambda: student(split=L + 1), "split: found 5, expected null, or of a student 0 .. 4"),
        (
            lambda: DistilledDecoding(student(), timesteps=[0, 2], perceptual=1.0),
            "perceptual: found 1.0, but all tokens come from the logits",
        ),
        (lambda: DistilledDecoding(student(), timesteps=[0, 2], ce=0.0, emb=0.0), "ce, emb: found 0 and 0"),
        (
            lambda: teacher(guidable=False).transport(noise(), classes_of(6), guidance_scale=2.0),
            "guidance_scale: found 2.0, but the teacher was trained without",
        ),
        (
            lambda: teacher().transport(noise(), classes_of(6), guidance_scale=0.5),
            "guidance_scale: found 0.5, expected at least 1",
        ),
        (lambda: teacher().check_transport(1.0, "dpmpp_2m"), "solver: found 'dpmpp_2m'"),
        (lambda: teacher().transport(noise(), classes_of(6), solver="rk45"), "solver: found 'rk45'"),
        (
            lambda: token_map(noise()[0], torch.zeros(L, V), unit_codes(), torch.tensor([1.0, 1e-17])),
            "times: found",
        ),
        (lambda: tokenizer().check_transport(), "a tokenizer, which makes no samples"),
        (lambda: indices(Points(), noise()), "decoder: found Points, whose samples are no tokens"),
        (lambda: SamplerSpec(steps=1, any_steps=True, renoise="same"), "renoise: found 'same'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_legal_extremes():
    one = torch.full((V,), -torch.inf).index_fill(0, torch.tensor([3]), 0.0)
    assert (flow_of(one) == 3).all(), "one-hot"
    z = noise()[0]
    assert velocity(z, torch.full((L,), 0.5), one.log_softmax(0).expand(L, -1), unit_codes()).isfinite().all()
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert Filters(top_k=2).log_probs(logits).isfinite().tolist() == [True, True, True, False], (
        "ties are kept"
    )
    assert torch.equal(Filters(top_k=9).log_probs(logits), Filters(top_k=0).log_probs(logits))
    assert Filters(temperature=0).log_probs(logits).exp().tolist() == [1, 0, 0, 0]
    assert torch.equal(Filters(top_p=1.0).log_probs(logits), Filters().log_probs(logits))
    # At t = 0 the nearest code that has a probability.
    book = unit_codes()
    log_p = torch.zeros(V).index_fill(0, torch.tensor([2]), -torch.inf).log_softmax(0)
    near = denoise(book + 1e-3, torch.zeros(V), log_p.expand(V, -1), book)
    assert torch.allclose(near[[0, 1, 3]], book[[0, 1, 3]])
    assert not torch.allclose(near[2], book[2])
    with pytest.warns(UserWarning, match=r"computed in float32"):
        half, _ = token_map(z.half(), torch.zeros(L, V), unit_codes(), uniform_grid(Flow(), 16))
    whole, _ = token_map(z.half().float(), torch.zeros(L, V), unit_codes(), uniform_grid(Flow(), 16))
    assert torch.equal(half, whole)
    twice = Codes.of(torch.cat([unit_codes()[:4], unit_codes()[:4]]))
    with pytest.warns(UserWarning, match=r"the codebook has equal codes"):
        TokenTeacher(teacher().net, (L, C), decoder=twice).transport(noise(), classes_of(6))


def test_no_tensor_of_all_positions_codes_and_numbers():
    """The largest tensor of the map is that of the weights of one chunk."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    book = torch.randn(64, 16)
    with Watch():
        token_map(torch.randn(200, 16), torch.zeros(200, 64), book, GRID, chunk=64 * 50)
    assert largest <= 200 * 64, "no more than the log probabilities that were given"
