"""Activations computed again in the backward pass: the same gradients, with adapters of several roles on one base too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import teacher_support
import torch
from method_support import mlp, optim
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.networks import recompute_activations
from distill.engine.update import Step
from distill.methods.flow_matching import FlowMatching
from distill.methods.sid import SiD
from distill.models.adapters import trained_parameters
from distill.models.conditions import Labels
from distill.models.denoiser import Denoiser
from distill.models.families.core import plain
from distill.models.families.sd import SD
from distill.models.prompts import Prompts, Table
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.process.vp import VPScaledLinear
from distill.stages.adapt import adapted


def teacher(dtype: str = "float32") -> Denoiser:
    """A tiny Stable Diffusion with two prompts."""
    torch.manual_seed(0)
    config = plain({**teacher_support.unet().config, "_class_name": "UNet2DConditionModel"})
    context = torch.randn(2, 5, teacher_support.WIDTH)
    table = Table(["a", "b"], {"context": context}, {"context": torch.zeros_like(context[:1])}, (4, 8, 8))
    return Denoiser(
        SD(config, dtype=dtype), VPScaledLinear(), "v", (4, 8, 8), conditions=Prompts.of_table(table)
    )


def sid(lora: dict[str, Any] | None, dtype: str = "float32") -> SiD:
    base = teacher(dtype)
    student = adapted(base, {"lora": lora}) if lora else copy.deepcopy(base)
    method = SiD(student, base)
    if lora:
        for seed, role in enumerate(
            (method.student, method.fake)
        ):  # another adapter would give other gradients
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in trained_parameters(role.net).values():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def digits() -> DistillModule:
    torch.manual_seed(0)
    net = teacher_support.shaken(UNet(width=8, embedding=16, groups=4))  # no zeros
    return FlowMatching(Denoiser(net, Flow(), "velocity", (1, 8, 8), conditions=Labels(10)))


METHODS: dict[str, Callable[[], DistillModule]] = {
    "all weights": lambda: sid(None),
    "adapters": lambda: sid({"rank": 2, "dropout": 0.2}),
    "adapters of convolutions on a base in bfloat16": lambda: sid(
        {"rank": 2, "targets": ["to_q", "conv1", "conv_shortcut"]}, "bfloat16"
    ),
    "the house's U-Net": digits,
}


def gradients(method: DistillModule, again: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients of all updates by name, and how often blocks ran."""
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    if again:
        recompute_activations(method.frozen | method.networks)
    for network in [*method.networks.values(), *method.frozen.values()]:
        network.requires_grad_(False)
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for network in {*method.frozen.values(), *method.networks.values()}:
        for module in network.modules():
            if type(module).__name__ in ("ResnetBlock2D", "ResBlock"):
                module.register_forward_pre_hook(count)
    rows = torch.arange(2)
    model = method.student
    batch = Batch(rows, rows, model.conditions.of(rows), x0=torch.zeros(2, *model.sample_shape))
    found: dict[str, Tensor] = {}
    for update in method.plan:
        trained = {role: method.trained[role] for role in update.trains}
        for parameters in method.trained.values():
            parameters.train(parameters in trained.values())
        for parameter in method.parameters_of(update):
            parameter.requires_grad_(True)
        step = Step(0, Draws(0, update.name, 0, rows))
        with step.same_dropout("loss"):
            loss = update.loss(batch, step)
        loss.total.backward()
        named = {f"{role}.{n}": p for role, part in trained.items() for n, p in part.named().items()}
        assert all(p.grad is not None for p in named.values())
        found |= {f"{update.name}: {name}": p.grad for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.requires_grad_(False)
    return found, calls[0]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_bit_equal(name: str) -> None:
    kept, once = gradients(METHODS[name](), False)
    again, twice = gradients(METHODS[name](), True)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    assert sum(float(value.abs().sum()) > 0 for value in kept.values()) > len(kept) / 2
    assert twice > once, "blocks ran again"


def test_a_net_that_cannot_is_named() -> None:
    with pytest.raises(
        ValueError, match="activation_checkpointing: found true, but the net MLP of the student cannot"
    ):
        recompute_activations({"student": mlp(Flow())})
