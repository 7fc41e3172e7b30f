"""Frozen copies of networks, training modes, and the state of torch's generators."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from distill.engine.params import trained_by
from distill.models.adapters import adapter_of
from distill.models.mapped import mapped_copy
from distill.models.model import Model

Network = TypeVar("Network", bound=nn.Module)
Copied = TypeVar("Copied", bound=Model)


def frozen_copy(network: Network, common: Iterable[nn.Module] = ()) -> Network:
    """A copy of the network in eval mode, without gradients, on the same memory. Modes, gradient flags and device of
    `network` do not change. Copy it before writing weights into it.

    common: networks whose modules, parameters and buffers stay the same objects in the copy: a base and its adapters are moved
    and sharded together."""
    shared: dict[int, object] = {id(buffer): buffer.detach() for buffer in network.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    for other in common:
        shared |= {id(part): part for part in (*other.modules(), *other.parameters(), *other.buffers())}
    return copy.deepcopy(network, shared).eval()


def trainable_copy(model: Copied, like: Model) -> Copied:
    """A copy of a model that is trained as `like` is: with weights of its own, or, where `like` has adapters, with fresh
    adapters of the same options on the model's weights."""
    adapter = adapter_of(like.net)
    if adapter is None or adapter_of(model.net) is not None:
        return mapped_copy(model)
    return model.with_(net=adapter.like(model.net), conditions=model.conditions)


def check_apart(role: str, network: nn.Module, student: nn.Module) -> None:
    """Check that training the student does not change a frozen network.

    Raises:
        ValueError: names `role`: it is the student, or shares weights with it.
    """
    trained = list(trained_by(student).values())
    same = {id(p) for p in trained} & {id(p) for p in network.parameters()}
    places = {p.data_ptr() for p in trained if not p.is_meta and p.numel()}
    if same or any(not p.is_meta and p.numel() and p.data_ptr() in places for p in network.parameters()):
        raise ValueError(
            f"{role}: shares weights with the student, which training changes; expected another model, such as "
            "copy.deepcopy(student)"
        )


def check_model(role: str, network: nn.Module, wanted: tuple[type[Model], ...]) -> None:
    """Raise ValueError naming `role` for a model of other classes than a method works on, or that no method trains."""
    if role == "student" and isinstance(network, Model) and network.kind == "score":
        raise ValueError(
            "student: predicts 'score', which is unbounded at the clean end; expected a net that predicts x0, eps, v or "
            "velocity"
        )
    if isinstance(network, Model) and not isinstance(network, wanted):
        raise ValueError(
            f"{role}: found a {type(network).__name__}, but the method needs a {' or '.join(k.__name__ for k in wanted)}; "
            "expected a stage that makes one"
        )


def recompute_activations(networks: Mapping[str, nn.Module]) -> None:
    """Let the blocks of networks keep no activations for the backward pass and compute them again there (activation
    checkpointing). Results do not change. Each role of adapters has blocks of its own around its layers, so that it computes
    again what it computed. Copies made afterwards do the same.

    Raises:
        ValueError: names a network whose net has no `enable_gradient_checkpointing`.
    """
    for role, network in networks.items():
        able: list[Any] = [m for m in network.modules() if hasattr(m, "enable_gradient_checkpointing")]
        if not able and isinstance(network, Model):
            raise ValueError(
                f"trainer.activation_checkpointing: found true, but the net {type(network.net).__name__} of the {role} cannot "
                "compute activations again; expected false"
            )
        for module in able:
            module.enable_gradient_checkpointing()


@contextmanager
def modes_kept(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Restore training modes and gradient flags after the block."""
    listed = list(networks)
    modes = [(module, module.training) for network in listed for module in network.modules()]
    gradients = [(p, p.requires_grad) for network in listed for p in network.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required in gradients:
            parameter.requires_grad_(required)


@contextmanager
def seeded(device: torch.device, key: int) -> Iterator[None]:
    """Seed torch's generators (dropout) of the CPU and of `device` with `key` inside the block; restore their state after
    it."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    with ExitStack() as stack:
        for generator in generators:
            stack.callback(generator.set_state, generator.get_state())
            generator.manual_seed(key % 2**63)
        yield
