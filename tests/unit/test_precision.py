"""Networks in bfloat16 inside of Generate and Evaluate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.data.cond import Cond
from distill.models.decoder import Codes
from distill.models.denoiser import Denoiser
from distill.models.precision import in_precision
from distill.models.tokens import TokenTeacher
from distill.nets.precond import EDMPrecond
from distill.nets.token_transformer import TokenTransformer
from distill.nets.unet import UNet
from distill.process.edm import EDM
from distill.stages.artifact import digest_of, hashed_config
from distill.stages.generate import Generate


def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(channels=1, width=8, multipliers=(1,), num_classes=10)
    for parameter in net.parameters():  # layers that begin at zero
        nn.init.normal_(parameter, std=0.1)
    return net


def denoiser() -> Denoiser:
    return Denoiser(EDMPrecond(unet()), EDM(), "x0", (1, 8, 8), guidable=True)


def test_a_net_computes_as_under_autocast_and_the_solver_in_float32() -> None:
    model, plain = in_precision(denoiser(), "bfloat16"), denoiser()
    kinds = {
        p.dtype for m in model.net.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in m.parameters()
    }
    assert kinds == {torch.bfloat16}
    z = torch.randn(3, 1, 8, 8)
    cond = Cond.of_labels(torch.arange(3))
    x, t = 2 * z, torch.full((3,), 1.5)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain.net(x, t, cond)
    with torch.no_grad():
        assert torch.equal(model.net(x, t, cond), expected.float())
        found, exact = (
            each.transport(z, cond, solver="heun", steps=4, guidance_scale=2.0)[0] for each in (model, plain)
        )
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float()), "the last steps were rounded too"
    error = float((found - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.02


def test_a_model_of_tokens_does_too() -> None:
    torch.manual_seed(0)
    book = torch.randn(16, 4)
    net = TokenTransformer(vocabulary=16, length=6, width=16, depth=1, heads=2, num_classes=0)
    model = in_precision(TokenTeacher(net, (6, 4), decoder=Codes.of(book)), "bfloat16")
    state = net.begin(Cond.nothing(2))
    with torch.no_grad():
        logits = net.advance(state, None)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, logits.bfloat16().float())
        samples = model.transport(torch.randn(2, 6, 4), steps=4)[0]
    assert bool((torch.cdist(samples, book).amin(-1) == 0).all())


@pytest.mark.parametrize("stage", ["generate.Generate", "evaluate.Evaluate"])
def test_it_is_part_of_digests_unless_it_is_float32(stage: str) -> None:
    config: dict[str, Any] = {"_target_": f"distill.stages.{stage}", "count": 4}
    digests = [
        digest_of(hashed_config(config | more, ()))
        for more in ({}, {"precision": "float32"}, {"precision": "bfloat16"})
    ]
    assert digests[0] == digests[1] != digests[2]


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: found 'float16', expected one of float32, bfloat16"):
        Generate(teacher="teacher", count=4, precision="float16")
