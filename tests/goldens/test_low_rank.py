"""Low-rank adapters give the numbers of PEFT: outputs, gradients, merged weights."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from distill.models.adapter_set import stacked, truncated
from distill.models.adapters import Adapted, merged, trained_parameters


class Two(nn.Module):
    """The net of the goldens, its shapes from their weights: an image and a vector."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and weight.ndim == 4:
                out, into, size, _ = weight.shape
                self.add_module(layer, nn.Conv2d(into, out, size, padding=size // 2))
            elif kind == "weight":
                self.add_module(layer, nn.Linear(weight.shape[1], len(weight)))
        self.load_state_dict(weights)

    def forward(self, x: Tensor, t: Tensor, cond: object) -> tuple[Tensor, Tensor]:
        return self.proj(torch.tanh(self.conv1(x))), self.other(torch.tanh(self.to_q(t)))


def configurations(g: dict[str, Tensor]) -> list[str]:
    """r2_a4, r3_a3, ...; rank-stabilised ones end in _rs. (Weight-decomposed ones are not supported.)"""
    found = {name.partition(".")[0] for name in g}
    return sorted(name for name in found if re.fullmatch(r"r\d+_a\d+(_rs)?", name))


def test_outputs_gradients_and_merged_weights_are_those_of_peft(load):
    g = load("adapters", "lora")
    assert len(configurations(g)) >= 3
    for name in configurations(g):
        check(g, name)


def check(g: dict[str, Tensor], name: str) -> None:
    numbers = re.match(r"r(\d+)_a(\d+)", name)
    assert numbers is not None
    rank, alpha = int(numbers[1]), float(numbers[2])
    if name.endswith("_rs"):
        alpha *= rank**0.5  # scale alpha / sqrt(rank)
    prefix = f"{name}.sd.base_model.model."
    names = sorted({k.removeprefix(prefix).rpartition(".lora_")[0] for k in g if k.startswith(prefix)})
    base = Two({k.removeprefix("base."): v for k, v in g.items() if k.startswith("base.")})
    net = Adapted(base, rank, alpha, names)
    for ours, whole in zip(net(g["x"], g["z"], None), base(g["x"], g["z"], None), strict=True):
        assert torch.equal(ours, whole), "the identity at the start"
    trained = {k.removeprefix("net."): p for k, p in trained_parameters(net).items()}
    assert set(trained) == {k.removeprefix(prefix) for k in g if k.startswith(prefix)}
    with torch.no_grad():
        for key, parameter in trained.items():
            parameter.copy_(g[prefix + key])
    img, vec = net(g["x"], g["z"], None)
    assert (img - g[f"{name}.out.img"]).abs().max() < 2e-6
    assert (vec - g[f"{name}.out.vec"]).abs().max() < 2e-6
    (img.square().sum() + vec.square().sum()).backward()
    for key, parameter in trained.items():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, g[f"{name}.grad.{key}"], rtol=1e-4, atol=1e-6), key
    whole = merged(net)
    for layer in names:
        weight = whole.get_submodule(layer).weight
        assert (weight - g[f"{name}.merged.{layer}.weight"]).abs().max() < 2e-6
    assert (whole(g["x"], g["z"], None)[0] - img).abs().max() < 2e-6
    assert not {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in base.parameters()}


def test_sums_of_adapters_are_those_of_peft(load):
    """cat is exact, svd the best of its rank; PEFT's linear is neither and not offered."""
    g = load("adapters", "lora")
    base = Two({k.removeprefix("base."): v for k, v in g.items() if k.startswith("base.")})
    scales = {"a": 2.0, "b": 1.0}  # alpha / rank, of the goldens' README
    nets = {}
    for name, scale in scales.items():
        prefix = f"multi.{name}.sd.base_model.model."
        state = {k.removeprefix(prefix): v for k, v in g.items() if k.startswith(prefix)}
        layers = sorted({k.rpartition(".lora_")[0] for k in state})
        rank = len(state[f"{layers[0]}.lora_A.weight"])
        nets[name] = Adapted(base, rank, scale * rank, layers)
        nets[name].load_state_dict({f"net.{k}": v for k, v in state.items()}, strict=False)
    both = {"a": 1.0, "b": 1.0}
    for kind, weights in (("sum", both), ("cat", {"a": 0.7, "b": 0.4}), ("svd", {"a": 0.7, "b": 0.4})):
        factors = stacked([(nets[name], weight) for name, weight in weights.items()])
        if kind == "svd":
            factors, error = truncated(factors, nets["a"].rank)
            assert 0 < error < 1
        ranks = len(next(iter(factors.values()))[0])
        made = Adapted(base, ranks, None, list(factors))
        with torch.no_grad():
            for path, layer in made.layers().items():
                for own, given in zip(layer.factors, factors[path], strict=True):
                    own.copy_(given.reshape(own.shape))
                if (wanted := g.get(f"multi.{kind}.delta.{path}")) is not None:
                    assert (layer.delta() - wanted).abs().max() < 2e-5, (kind, path)
        img, vec = made(g["x"], g["z"], None)
        for out, name in ((img, "img"), (vec, "vec")):
            wanted = g.get(f"multi.{kind}.out.{name}", g.get(f"multi.{kind}.{name}"))
            assert wanted is not None, (kind, [k for k in g if k.startswith(f"multi.{kind}")])
            assert (out - wanted).abs().max() < 2e-5, (kind, name)
