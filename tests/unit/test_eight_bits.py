"""Optimizers with state in 8 bits, as bitsandbytes has it: numbers in blocks beside their largest values."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from method_support import mlp, optim, state, trained
from tests_support import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.engine.checkpoint import tensors_of
from distill.engine.memory import predicted
from distill.engine.parallel import local
from distill.methods.flow_matching import FlowMatching
from distill.process.flow import Flow
from distill.stages.optim import check_optim
from distill.world import World

BLOCK = 8


class EightBits(torch.optim.Optimizer):
    """Momentum in 8 bits, kept and loaded in the way of bitsandbytes: `state1` uint8 of the parameter's shape, `absmax1` of its
    blocks, and a `load_state_dict` that converts neither."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                values, kept = local(p), self.state[p]
                momentum = local(p.grad).flatten()
                if kept:
                    scale = kept["absmax1"].repeat_interleave(BLOCK)[: momentum.numel()]
                    momentum = momentum + 0.9 * (kept["state1"].flatten().float() - 128) / 127 * scale
                padded = torch.nn.functional.pad(momentum, (0, -momentum.numel() % BLOCK)).view(-1, BLOCK)
                largest = padded.abs().amax(1).clamp(min=1e-12)
                coded = (padded / largest[:, None] * 127 + 128).round().to(torch.uint8)
                kept["state1"] = coded.flatten()[: momentum.numel()].view(values.shape)
                kept["absmax1"], kept["step"] = largest, kept.get("step", 0) + 1
                values.sub_(group["lr"] * momentum.view(values.shape))

    def load_state_dict(self, state_dict: Any) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.state.update({parameters[number]: kept for number, kept in state_dict["state"].items()})


def method(**options: Any) -> FlowMatching:
    made = FlowMatching(mlp(Flow()))
    made.prepare({"student": optim(kind=EightBits)}, seed=0, **options)
    return made


def test_a_training_goes_on_with_the_same_state(tmp_path: Path) -> None:
    whole = trained(method(), tmp_path / "whole", 4)
    trained(method(), tmp_path / "parts", 2)
    parts = trained(method(), tmp_path / "parts", 4)
    (optimizer,) = parts.optimizers_by_key.values()
    assert {kept["state1"].dtype for kept in optimizer.state.values()} == {torch.uint8}
    one, two = state(whole), state(parts)
    assert all(torch.equal(one[name], two[name]) for name in one)
    (row,) = predicted(parts).rows
    assert row.unknown, "its size is not told, since it follows no shape"


def test_a_state_that_is_not_sharded_with_its_parameter_is_not_saved() -> None:
    made = method(world=World(0, 8, 0, 8), sharded=True)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        made.distribute("world", torch.device("cpu"))
        made.configure_optimizers()
        for parameter in made.student.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.optimizers_by_key["student"].step()
        with pytest.raises(
            ValueError, match=r"optim.student.optimizer: EightBits keeps state1 .* or one process"
        ):
            tensors_of(made)
    finally:
        dist.destroy_process_group()


def test_the_package_is_named_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = yaml.safe_load((ROOT / "configs/optim/adamw8bit.yaml").read_text())
    with pytest.raises(ValueError, match=r"optim.student.optimizer._target_: .*pip install bitsandbytes"):
        check_optim({"student": config}, 10)
