"""AGD: trajectories with a guidance each, the loss by hand, adapters that take the guidance, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_support import optim, pairs_header, state
from torch import Tensor, nn

from distill.cache.pairs import Header, Pairs
from distill.cache.writer import shard_rows, write_pairs
from distill.data.rng import Draws
from distill.engine.fit import Fit, train
from distill.engine.update import Step
from distill.exporters.export import Options, check
from distill.methods.agd import AGD
from distill.methods.hipa import HiPA
from distill.methods.one_step import OneStep
from distill.models.adapters import Adapted, adapter_of, merged, trained_parameters
from distill.models.conditions import Labels
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import load_model, load_models, save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPCosine
from distill.stages.adapt import adapted
from distill.stages.generate import Generate
from distill.stages.made import PairsMade, check_reads

ANY = SamplerSpec(steps=4, any_steps=True)
KINDS = {
    "embedding": {"rank": 2, "guidance": {"width": 8}},
    "attention": {"rank": 0, "guidance": {"kind": "attention", "width": 8}},
    "offset": {"rank": 0, "guidance": {"kind": "offset", "width": 8}},
}


def model(*, guidable: bool = True, **options: Any) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(**{"width": 8, "embedding": 16, "groups": 4, "multipliers": [1]} | options)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Denoiser(net, Flow(), "velocity", (1, 8, 8), decoder=Pixels(), guidable=guidable)


def models(folder: Path, lora: dict[str, Any]) -> dict[str, Denoiser]:
    if not (folder / "teacher").exists():
        save_model(folder / "teacher", model(), ANY)
    loaded = load_models({"init": folder / "teacher", "teacher": folder / "teacher"}, adapters=True)
    torch.manual_seed(1)
    student = adapted(loaded["init"].denoiser, {"lora": lora})
    return {"student": student, "teacher": loaded["teacher"].denoiser}


GUIDED = {"times": (1.0, 0.5, 0.0), "guidance_range": (1.0, 4.0)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(
        folder, model(), pairs_header(steps=2, **GUIDED), batch_size=3, shard_bytes=4 * (4 * 64 * 4 + 12)
    )
    return Pairs(folder)


def test_trajectories_are_the_teacher_s_with_the_guidance_of_their_ids(pairs: Pairs) -> None:
    assert [shard.count for shard in pairs.shards] == [4, 4, 2]
    assert shard_rows((1, 8, 8), 4 * (4 * 64 * 4 + 12), 3) == 4
    rows = torch.tensor([9, 0, 5])
    batch = pairs.fetch(rows, torch.arange(3))
    assert batch.path is not None
    assert batch.guidance is not None
    assert batch.times.tolist() == [1.0, 0.5, 0.0]
    assert batch.path.shape == (3, 3, 1, 8, 8)
    assert torch.equal(batch.path[:, 0], batch.z)
    assert torch.equal(batch.path[:, -1], batch.x0)
    assert bool(((batch.guidance >= 1) & (batch.guidance <= 4)).all())
    assert len(set(pairs.guidance.tolist())) == 10
    assert torch.equal(pairs.header.guidance_of(rows), batch.guidance)
    for i in range(3):
        wanted = (
            model()
            .eval()
            .transport(
                batch.z[i : i + 1],
                batch.cond.rows(torch.tensor([i])),
                steps=2,
                guidance_scale=float(batch.guidance[i]),
                times=[1.0, 0.5, 0.0],
            )
        )
        torch.testing.assert_close(batch.path[i], wanted[:, 0], rtol=1e-4, atol=1e-5)
    again = Header.from_dict(pairs.header.to_dict(), "header")
    assert again == pairs.header
    assert not {"times", "guidance_range"} & pairs_header(steps=2).to_dict().keys(), (
        "pairs without are described as ever"
    )


def test_the_loss_is_that_of_the_formula(pairs: Pairs, tmp_path: Path) -> None:
    method = AGD(**models(tmp_path, KINDS["embedding"]))
    with torch.no_grad():
        for parameter in trained_parameters(method.student.net).values():
            parameter.add_(0.1)
    rows = torch.arange(6)
    batch, step = pairs.fetch(rows, rows), Step(0, Draws(0, "s", 0, rows))
    found = method.loss(batch, step)
    index, wanted, whole = step.draws.integer("k", 2).tolist(), [], []
    assert set(index) == {0, 1}
    for i, k in enumerate(index):
        x, t, g = batch.path[i, k][None], torch.tensor([[1.0, 0.5][k]]), batch.guidance[i]
        cond = batch.cond.rows(torch.tensor([i]))
        c, u = (method.teacher.net(x, t, each) for each in (cond, cond.null()))
        target = u + g * (c - u)
        wanted.append((method.student.net(x, t, cond.with_guidance(float(g - 1))) - target).square().mean())
        whole.append((c - target).square().mean())
    torch.testing.assert_close(found.total, torch.stack(wanted).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.logs["share"], found.total.detach() / torch.stack(whole).mean(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_of_each_kind_is_trained_alone_and_continues_bit_equal(
    kind: str, pairs: Pairs, tmp_path: Path
) -> None:
    def method() -> AGD:
        made = AGD(**models(tmp_path, KINDS[kind]))
        made.prepare({"student": optim(lr=0.02)}, seed=5)
        return made

    def run(made: AGD, folder: Path, steps: int) -> dict[str, Tensor]:
        train(made, pairs, Fit(steps=steps, batch_size=8), folder=folder, config={})
        return state(made)

    whole, rows = method(), torch.arange(4)
    batch = pairs.fetch(rows, rows)
    cond, t = batch.cond.with_guidance(2.0), torch.ones(4)
    plain = whole.teacher(batch.z, t, batch.cond)
    assert torch.equal(whole.student(batch.z, t, cond), plain), "identity at the start"
    before, after = state(whole), run(whole, tmp_path / "whole", 4)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert all(".lora_" in key or ".terms." in key for key in moved)
    assert len([key for key in moved if ".terms." in key]) >= 2
    made = whole.student(batch.z, t, cond)
    assert not torch.allclose(made, whole.student(batch.z, t, cond.with_guidance(0.0)))
    assert not torch.allclose(made, plain)
    assert torch.equal(whole.teacher(batch.z, t, batch.cond), plain), "the base is the teacher"
    run(method(), tmp_path / "parts", 2)
    continued = run(method(), tmp_path / "parts", 4)
    assert all(torch.equal(after[key], continued[key]) for key in after)
    # The folder holds the terms alone; another net of the same base, and a copy, share nothing of them.
    generator = whole.as_generator()
    save_model(tmp_path / "student", generator.denoiser, generator.spec)
    again = load_model(tmp_path / "student")
    assert torch.equal(again.sample(3, guidance_w=2.0), generator.sample(3, guidance_w=2.0))
    assert again.spec.guidance_w_range == (0.0, 3.0)
    assert again.network_calls() == 4, "one call a step"
    size = sum(p.numel() for p in trained_parameters(again.denoiser.net).values())
    assert (tmp_path / "student" / "model.safetensors").stat().st_size < 4 * size + 8000
    # Without the adapters: the base with ordinary guidance.
    base = load_model(tmp_path / "teacher")
    assert not torch.equal(base.sample(3, guidance_scale=3.0), base.sample(3))


def test_what_an_input_of_the_guidance_does_not_allow(pairs: Pairs, tmp_path: Path) -> None:
    given = models(tmp_path, KINDS["embedding"])
    method = AGD(**given)
    method.prepare({"student": optim(ema=None)}, seed=0)
    generator = method.as_generator()
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 2.0, but this model applies the guidance itself"
    ):
        generator.sample(1, guidance_scale=2.0)
    with pytest.raises(
        ValueError, match=r"guidance_w: found 5.0, expected 0.0 .. 3.0, what the model was trained"
    ):
        generator.sample(1, guidance_w=5.0)
    with pytest.raises(ValueError, match="guidance_w: missing; this net was trained with the guidance"):
        given["student"].net(
            torch.zeros(1, 1, 8, 8), torch.ones(1), Labels(10).of(torch.zeros(1, dtype=torch.int64))
        )
    with pytest.raises(ValueError, match="merged: the adapter takes the guidance w as an input"):
        merged(given["student"].net)
    for options in ({"merged": True}, {"format": "lora"}):
        with pytest.raises(ValueError, match="the adapter takes the guidance w as an input"):
            check(Generator(generator.denoiser, generator.spec), Options(**options))
    with pytest.raises(ValueError, match="student: takes the guidance as an input"):
        HiPA(given["student"])
    assert (
        adapter_of(given["student"].net).like(model().net).guidance
        == adapter_of(given["student"].net).guidance
    )
    assert adapted(given["student"], {"lora": KINDS["embedding"]}) is given["student"]
    with pytest.raises(ValueError, match=r"adapt.lora: found .* has adapters of rank 2"):
        adapted(given["student"], {"lora": {"rank": 2}})


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"guidance": {"kind": "sum"}}, "adapt.lora.guidance.kind: found 'sum', expected"),
        ({"guidance": {"width": 5}}, "adapt.lora.guidance.width: found 5, expected an even number"),
        (
            {"guidance": {"blocks": ["attn2"]}},
            "adapt.lora.guidance.blocks: found .*'attn2' names no block .* embed",
        ),
        (
            {"guidance": {"blocks": ["time"]}},
            "adapt.lora.guidance.blocks: found time, which has no linear layer",
        ),
        ({"guidance": {"colour": 1}}, "guidance.colour: no such key"),
        ({"rank": 0}, "adapt.lora.rank: found 0, expected at least 1"),
    ],
)
def test_terms_that_do_not_fit_are_refused(lora: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adapted(model(), {"lora": lora})


def test_models_and_pairs_that_do_not_fit_are_refused(pairs: Pairs, tmp_path: Path) -> None:
    given = models(tmp_path, KINDS["embedding"])
    for options, words in (
        ({"guidance_scale": [2.0]}, r"guidance_scale: found \[2.0\], expected \[low, high\]"),
        ({"guidance_scale": [3.0, 2.0]}, r"guidance_scale: found \[3.0, 2.0\], expected \[low, high\]"),
        ({"sample_scale": 5.0}, "sample_scale: found 5.0, expected 1 .. 4"),
        ({"teacher": model(guidable=False)}, "teacher: found a model without a null condition"),
        ({"student": model()}, "student: does not take the guidance as an input; expected student=guidance"),
        ({"teacher": given["teacher"].with_(kind="x0")}, "student: predicts 'velocity', the teacher 'x0'"),
        ({"teacher": given["teacher"].with_(process=VPCosine(), kind="v")}, "teacher: lives under"),
    ):
        with pytest.raises(ValueError, match=words):
            AGD(**given | options)
    with pytest.raises(
        ValueError, match="guidance: the net takes the guidance as an input; expected a net without"
    ):
        Adapted(model(guidance_embedding=8).net, guidance={})
    method = AGD(**given)
    plain = PairsMade((1, 8, 8), Labels(10), Pixels(), 1.0)
    with pytest.raises(
        ValueError, match="data: 'pairs' has no path, which the method AGD reads; expected pairs with states"
    ):
        check_reads(method, {}, plain, "pairs", {})
    other = PairsMade(
        (1, 8, 8), Labels(10), Pixels(), 1.0, ("x0", "z", "path", "times", "guidance"), None, (1.0, 3.0)
    )
    with pytest.raises(
        ValueError, match=r"method.guidance_scale: found \[1.0, 4.0\], but the pairs .* of \[1.0, 3.0\]"
    ):
        check_reads(method, {}, other, "pairs", {})
    with pytest.raises(
        ValueError, match="data: 'pairs' has a guidance scale for each pair, which the method OneStep"
    ):
        check_reads(OneStep(model()), {}, other, "pairs", {})
    for scale in ([2.0], [3.0, 1.0], ["a", 2.0]):
        with pytest.raises(ValueError, match="guidance_scale"):
            Generate("teacher", 4, guidance_scale=scale)
    for changes in ({"times": (0.0, 1.0)}, {"guidance_range": (3.0, 1.0)}, {**GUIDED, "guidance_scale": 2.0}):
        with pytest.raises(ValueError, match=r"times|guidance_range"):
            pairs_header(steps=2, **changes)
