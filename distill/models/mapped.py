"""Weights that stay in their file: tensors over the file's pages, which all processes of a machine share and of which a process
has a copy only where it writes. Sharding a network over several processes then reads the rows that a process keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from distill.models.model import Model
from distill.models.weights import tensors_of
from distill.nets.net import Net

Copied = TypeVar("Copied", bound=Model)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, modules are made with parameters on the meta device, which take no memory, and buffers with their values."""

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return None if parameter is None else nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # Its type says that hooks return nothing; what they return is registered.
    handle = register_module_parameter_registration_hook(cast(Callable[..., None], register))
    try:
        yield
    finally:
        handle.remove()


def assign(net: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Make the tensors at `path` (see `models.weights`), all of a net's and no others, its parameters and buffers. Those of
    another type than the net's are converted, which copies them."""
    own = net.state_dict()
    net.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.items()}, assign=True)
    if isinstance(net, Net):
        net.mapped = path


def mapped_copy(model: Copied) -> Copied:
    """A copy of a model whose weights are changed apart from its own, as `copy.deepcopy` makes it. Where the model's lie in a
    file and were not written to, the copy's lie there too."""
    net, memo = model.net, dict[int, object]()
    if isinstance(net, Net) and net.mapped is not None and not any(p._version for p in net.parameters()):
        stored = tensors_of(net.mapped)
        for name, parameter in net.named_parameters():
            value = stored[name].to(parameter.dtype)
            memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    return copy.deepcopy(model, memo)
