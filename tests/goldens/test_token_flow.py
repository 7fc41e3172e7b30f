"""The flow of tokens, sampling filters and look-ups against reference numbers (`data/distilled_decoding/README.md`)."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from distill.methods.losses.tokens import look_up_losses
from distill.models.guidance import guide
from distill.nets.tokenizer import nearest_codes
from distill.samplers.token_filters import Filters
from distill.samplers.token_flow import denoise, log_weights, score, token_map, velocity

FAMILY = "distilled_decoding"
# The filters of the cases, by name; VAR's top-p of 0 and LlamaGen's of 1 are off.
FLOW_CASES = {
    "plain": Filters(),
    "topk5": Filters(top_k=5),
    "t07_k6_p08": Filters(temperature=0.7, top_k=6, top_p=0.8),
}


def grid(steps: int) -> Tensor:
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


@pytest.mark.parametrize("case", FLOW_CASES)
def test_filters_of_the_flow(load, case):
    found = load(FAMILY, "flow_map")
    logits = guide(found["logits_uncond"], found["logits_cond"], 2.0)
    assert_close(logits, found["logits_cfg2"], atol=1e-9, rtol=1e-7)
    p = FLOW_CASES[case].log_probs(logits).exp()
    assert_close(p, found[f"{case}.p"], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("case", FLOW_CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_denoised_velocity_and_score(load, case, dtype):
    found = load(FAMILY, "flow_map")
    log_p, x = found[f"{case}.p"].log().to(dtype), found["x"].to(dtype)
    codes, exact = found["codebook"].to(dtype), dtype == torch.float64
    near = {"atol": 1e-9, "rtol": 1e-7} if exact else {"atol": 1e-5, "rtol": 1e-3}
    for row, t in enumerate(found["ts"]):
        given = (x, t.expand(len(x)), log_p, codes)
        weights = log_weights(*given).softmax(1)
        for made, name in (
            (weights, "weights"),
            (denoise(*given), "denoised"),
            (velocity(*given), "velocity"),
        ):
            assert_close(made, found[f"{case}.{name}"][row].to(dtype), **near)
        if exact or t >= 0.1:
            wanted = found[f"{case}.score"][row].to(dtype)
            assert_close(score(*given), wanted, atol=near["atol"], rtol=near["rtol"])


@pytest.mark.parametrize("case", FLOW_CASES)
def test_the_map(load, case):
    found = load(FAMILY, "flow_map")
    log_p = found[f"{case}.p"].log()
    names = [m for key in found if (m := re.fullmatch(rf"{case}\.(euler|heun)(\d+)\.idx", key))]
    assert len(names) >= 6
    for name in names:
        solver, steps = name[1], int(name[2])
        index, end = token_map(found["noise"], log_p, found["codebook"], grid(steps), solver=solver)
        assert torch.equal(index, found[name[0]]), name[0]
        assert_close(end, found[f"{case}.{solver}{steps}.x"], atol=1e-9, rtol=1e-7)
        single, _ = token_map(
            found["noise"].float(), log_p.float(), found["codebook"].float(), grid(steps), solver=solver
        )
        assert torch.equal(single, found[name[0]]), f"{name[0]} in float32"
    index, _ = token_map(found["noise"], log_p, found["codebook"], grid(16))
    assert torch.equal(index, found[f"{case}.exact.idx"])


def test_chunks_do_not_change_the_map(load):
    found = load(FAMILY, "flow_map")
    given = (found["noise"], found["topk5.p"].log(), found["codebook"], grid(8))
    whole, parts = token_map(*given, return_path=True), token_map(*given, return_path=True, chunk=30)
    assert torch.equal(whole[0], parts[0])
    assert_close(whole[1], parts[1], atol=1e-12, rtol=1e-12)


def probabilities(found: dict[str, Tensor]) -> list[tuple[str, Filters]]:
    """name -> filters, of probs_t07_k6_p07 and probs_k6_p07 (VAR: no temperature)."""
    cases = []
    for key in found:
        if match := re.fullmatch(r"probs_(?:t(\d+)_)?k(\d+)_p(\d+)", key):
            decimals = [
                None if n is None else float(n if len(n) == 1 else f"{n[0]}.{n[1:]}") for n in match.groups()
            ]
            temperature, top_k, top_p = decimals
            cases.append(
                (
                    key,
                    Filters(
                        temperature=1.0 if temperature is None else temperature,
                        top_k=int(top_k or 0),
                        top_p=None if top_p in (0.0, 1.0) else top_p,
                    ),
                )
            )
    return cases


def test_llamagen_probabilities(load):
    found = load(FAMILY, "llamagen_gpt")
    logits = guide(found["logits_uncond"], found["logits"], 2.0)
    assert_close(logits, found["logits_cfg2"], atol=2e-5, rtol=1e-4)
    cases = probabilities(found)
    assert len(cases) >= 4
    for key, filters in cases:
        assert_close(filters.log_probs(logits).exp(), found[key], atol=2e-5, rtol=1e-4)


def test_var_probabilities_and_guidance(load):
    """(1 + s) c - s u with s = cfg k / (K - 1) is the linear schedule of the scale 1 + cfg."""
    found = load(FAMILY, "var_transformer")
    sizes = [int(n) for n in torch.bincount(found["w.lvl_1L"][0])]
    scales = Filters(guidance_schedule="linear").scales(1 + 1.5, len(sizes))
    assert scales[0] == 1
    parts = zip(found["logits_uncond"].split(sizes, 1), found["logits"].split(sizes, 1), scales, strict=True)
    logits = torch.cat([guide(u, c, scale) for u, c, scale in parts], 1)
    assert_close(logits, found["logits_cfg1p5"], atol=2e-5, rtol=1e-4)
    cases = probabilities(found)
    assert len(cases) >= 4
    for key, filters in cases:
        assert_close(filters.log_probs(logits).exp(), found[key], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prefix", ["l2", "raw"])
def test_look_up(load, prefix):
    found = load(FAMILY, "vq_lookup")
    z, book = (
        found["z"].permute(0, 2, 3, 1).clone().requires_grad_(),
        found["embedding"].clone().requires_grad_(),
    )
    unit = torch.nn.functional.normalize
    vectors, codes = (unit(z, dim=-1), unit(book, dim=-1)) if prefix == "l2" else (z, book)
    index = nearest_codes(vectors, codes)
    assert torch.equal(index.flatten(), found[f"{prefix}.indices"])
    chosen = codes[index]
    assert_close(chosen.permute(0, 3, 1, 2), found[f"{prefix}.entry_bchw"], atol=2e-5, rtol=1e-4)
    assert_close(
        (vectors + (chosen - vectors).detach()).permute(0, 3, 1, 2),
        found[f"{prefix}.z_q"],
        atol=2e-5,
        rtol=1e-4,
    )
    book_loss, commit = look_up_losses(vectors, chosen, 0.25)
    assert_close(book_loss.mean(), found[f"{prefix}.vq_loss"], atol=2e-5, rtol=1e-4)
    assert_close(commit.mean(), found[f"{prefix}.commit_loss"], atol=2e-5, rtol=1e-4)
    (of_book,) = torch.autograd.grad(book_loss.sum(), book, retain_graph=True)
    (of_z,) = torch.autograd.grad(commit.sum(), z)
    assert of_book.abs().sum() > 0
    assert of_z.abs().sum() > 0
