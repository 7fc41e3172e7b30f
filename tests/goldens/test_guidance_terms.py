"""Guidance terms give the numbers of the authors' adapters, in a net that has them beside a block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.adapters import Adapted, trained_parameters
from distill.models.guidance import guide
from distill.nets.net import Net

KINDS = {"attention": "attention", "additive": "offset"}
TOLERANCE = 2e-5
# parts of the authors' adapters -> ours; a number is the place in an MLP with dropout and activation counted.
PARTS = {"guidance_scale_embedder": "guidance", "timestep_embedder": "time", "prompt_proj": "prompt"}


class Block(Net):
    """The net of the goldens: one linear block."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.l = nn.Linear(dim, dim)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.l(x)


def ours(name: str) -> str:
    """A name of the authors' state dict as ours."""
    part, _, rest = name.partition(".")
    part = PARTS.get(part, part)
    if part in ("guidance", "time"):
        rest = rest.removeprefix("net.")
        place, _, inner = rest.partition(".")
        rest = {"0": inner, "1": f"mlp.{inner.removeprefix('net.')}", "2": f"norm.{inner}"}[place]
    part = part.removesuffix("_proj")
    rest = rest.removeprefix("net.")
    # Linear, ReLU, dropout, LayerNorm, Linear: ours have no dropout.
    for theirs, place in (("3.", "2."), ("4.", "3.")):
        for start in ("", "mlp."):
            if rest.startswith(start + theirs):
                return f"{part}.{start}{place}{rest.removeprefix(start + theirs)}"
    return f"{part}.{rest}"


def adapted(g: dict[str, Tensor], name: str) -> Adapted:
    state = {k.removeprefix(f"{name}.sd."): v for k, v in g.items() if k.startswith(f"{name}.sd.")}
    block = Block(g["h"].shape[-1])
    block.load_state_dict({k.removeprefix("block."): v for k, v in state.items() if k.startswith("block.")})
    width, context = len(state["guidance_scale_embedder.net.0.frequencies"]), g["prompt"].shape[-1]
    options = {"kind": KINDS[name], "width": width, "blocks": ["l"], "context": context}
    net = Adapted(block, rank=0, guidance=options)
    own = {ours(k): v for k, v in state.items() if not k.startswith(("block.", "pos_enc."))}
    net.terms["l"].load_state_dict(own)
    return net


def cond(g: dict[str, Tensor]) -> Cond:
    return Cond(len(g["h"]), {"context": g["prompt"], "guidance_w": g["guidance"]})


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_authors(load, name: str) -> None:
    g = load("adapters", "agd")
    net = adapted(g, name)
    out = net(g["h"], g["timestep"], cond(g))
    assert (out - g[f"{name}.out"]).abs().max() < TOLERANCE
    block = net.net(g["h"], g["timestep"], cond(g))
    assert (block - out).abs().max() < 1e-7, "the net's own block has the hook: what was given last"
    assert (
        nn.functional.linear(g["h"], net.net.l.weight, net.net.l.bias) - g[f"{name}.block_out"]
    ).abs().max() < TOLERANCE
    # The gradient reaches the terms alone, and is that of finite differences.
    net.requires_grad_(False)
    trained = trained_parameters(net)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    out.detach()
    net(g["h"], g["timestep"], cond(g)).square().sum().backward()
    assert all(p.grad is not None for p in trained.values())
    assert all(p.grad is None for n, p in net.named_parameters() if n not in trained)
    last = next(p for n, p in trained.items() if n.endswith(("out.bias", "out.3.bias")))
    wanted = 2 * net(g["h"], g["timestep"], cond(g)).detach().sum((0, 1))
    torch.testing.assert_close(last.grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_those_of_double_precision(load, name: str) -> None:
    g = {k: v.double() for k, v in load("adapters", "agd").items()}
    net = adapted(g, name).double()
    trained = [p for n, p in trained_parameters(net).items() if not n.endswith(("frequencies", "phases"))]
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    net(g["h"], g["timestep"], cond(g)).sin().sum().backward()
    for parameter in trained:
        place = parameter.grad.abs().argmax()
        found = []
        for change in (1e-4, -1e-4):
            moved = copy.deepcopy(net)
            own = dict(trained_parameters(moved))
            name_of = next(n for n, p in trained_parameters(net).items() if p is parameter)
            with torch.no_grad():
                own[name_of].view(-1)[place] += change
                found.append(moved(g["h"], g["timestep"], cond(g)).sin().sum())
        torch.testing.assert_close(
            (found[0] - found[1]) / 2e-4, parameter.grad.view(-1)[place], rtol=1e-5, atol=1e-7
        )


def test_the_target_is_the_guided_prediction(load) -> None:
    g = load("adapters", "agd")
    scales = torch.full((len(g["eps_cond"]),), 7.5)
    for scale in (7.5, scales):
        found = guide(g["eps_uncond"], g["eps_cond"], scale)
        assert (found - g["eps_cfg_w7.5"]).abs().max() < TOLERANCE
