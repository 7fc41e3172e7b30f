"""Sampling with networks in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from distill.models.model import Model
from distill.nets.net import Net

PRECISIONS = ("float32", "bfloat16")
# Layers whose products autocast takes in bfloat16, whatever the type of their weights.
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
CALLED = ("forward", "begin", "advance", "velocity")  # what models call of their nets


def check_precision(precision: str) -> None:
    """Raise ValueError for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: found {precision!r}, expected one of {', '.join(PRECISIONS)}")


def in_precision(model: Model, precision: str) -> Model:
    """The model, changed in place for sampling: with "bfloat16" its net computes under autocast, and the weights of linear and
    convolution layers are kept in that type, which changes no result. What nets return, states of solvers and decoders stay
    float32. Raises ValueError for an unknown precision."""
    check_precision(precision)
    if precision == "float32":
        return model
    layers = [module for module in model.net.modules() if isinstance(module, LAYERS)]
    # A weight that another module reads too, such as a table of embeddings, stays as it is.
    others = [module for module in model.net.modules() if not isinstance(module, LAYERS)]
    kept = {id(p) for module in others for p in module.parameters(recurse=False)}
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            if id(parameter) not in kept and parameter.dtype == torch.float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.net.modules():
        if isinstance(module, Net) or module is model.net:
            for name in CALLED:
                if callable(method := getattr(type(module), name, None)):
                    object.__setattr__(module, name, MethodType(_in_bfloat16(method), module))
    return model


def _in_bfloat16(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a module under autocast, with results in float32."""

    def call(module: nn.Module, *args: Any, **options: Any) -> Any:
        kinds = {t.device.type for t in args if isinstance(t, Tensor)} or {
            next(module.parameters()).device.type
        }
        with torch.autocast(kinds.pop(), dtype=torch.bfloat16):
            found = method(module, *args, **options)
        if isinstance(found, tuple):
            return tuple(_float32(part) for part in found)
        return _float32(found)

    return call


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if half else value
