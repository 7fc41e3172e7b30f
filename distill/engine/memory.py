"""Predicted memory of a training's networks: bytes of weights, gradients, optimizer state and averages by role.

The numbers are those of the tensors that training keeps between steps, on the meta device too, where nothing is allocated.
Activations, and the blocks that sharding gathers for a moment, come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from distill.engine.module import DistillModule

KINDS = ("weights", "gradients", "optimizer", "averages")
# Shapes of stand-ins for parameters: different sizes, so that a state's sizes show which of the parameter's they follow.
STAND_IN = (2, 3, 5, 7, 11)


class Size(NamedTuple):
    """One tensor: its shape, bytes a number, and whether sharding divides it along its first dimension."""

    shape: tuple[int, ...]
    width: int
    sharded: bool = True

    def bytes(self, processes: int = 1) -> int:
        """On one of `processes` processes that the tensor is sharded over, padding included."""
        if not self.sharded or not self.shape:
            return self.width * math.prod(self.shape)
        return self.width * -(-self.shape[0] // processes) * math.prod(self.shape[1:])


@dataclass
class Row:
    """The memory of one role.

    Attributes:
        role: of the network. parameters: of the network, those that it shares with other roles included.
        trained: parameters that training changes.
        sizes: kind (`KINDS`) -> tensors; of weights those that no earlier row has.
        unknown: whether the optimizer's state could not be predicted.
    """

    role: str
    parameters: int
    trained: int = 0
    sizes: dict[str, list[Size]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    unknown: bool = False

    def bytes(self, kind: str, processes: int = 1) -> int:
        """Bytes of a kind on one process."""
        return sum(size.bytes(processes) for size in self.sizes[kind])


@dataclass
class Memory:
    """Rows of all roles. `updates`: of each update, the gradients that exist while it runs; they are freed at its end.
    `alternate`: the networks of the rows are in memory one after another. `accumulated`: gradients are those of several micro
    batches, which each process keeps whole until the last one, unless it reduces each."""

    rows: list[Row]
    updates: list[list[Size]] = field(default_factory=list)
    alternate: bool = False
    accumulated: bool = False

    def _over(self, kind: str, processes: int, reduce_each: bool) -> int:
        """Processes that a kind is sharded over."""
        return 1 if kind == "gradients" and self.accumulated and not reduce_each else processes

    def total(self, processes: int = 1, reduce_each: bool = False) -> dict[str, int]:
        """kind -> bytes on one process; of gradients those of the update that has most."""
        added = max if self.alternate else sum
        over = partial(self._over, processes=processes, reduce_each=reduce_each)
        found = {kind: added([row.bytes(kind, over(kind)) for row in self.rows] or [0]) for kind in KINDS}
        gradients = [sum(size.bytes(over("gradients")) for size in sizes) for sizes in self.updates]
        return found | {"gradients": max(gradients, default=0)}

    def describe(self, processes: int = 1, reduce_each: bool = False) -> list[str]:
        """The lines of a table; of memory without training, of weights alone."""
        kinds = KINDS if self.updates else ("weights",)
        table = [["", "parameters", *(("trained",) if self.updates else ()), *kinds]]
        for row in self.rows:
            over = {kind: self._over(kind, processes, reduce_each) for kind in kinds}
            cells = [_readable(row.bytes(kind, over[kind])) for kind in kinds]
            if row.unknown:
                cells[KINDS.index("optimizer")] = "?"
            trained = [f"{row.trained:,}" if row.trained else "-"] if self.updates else []
            table.append([row.role, f"{row.parameters:,}", *trained, *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([f"{name:<{widths[0]}}", *map(str.rjust, cells, widths[1:])]) for name, *cells in table
        ]
        if not self.updates:
            return lines
        total = sum(self.total(processes, reduce_each).values())
        where = f" on each of {processes} processes" if processes > 1 else ""
        return [*lines, f"{_readable(total)}{where}, without activations"]


def _readable(count: int) -> str:
    """Bytes in the largest unit of which there is one, of 1024 each."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return "-" if not count else f"{count} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def predicted(method: DistillModule, accumulate: int = 1) -> Memory:
    """The memory of a method's networks, once `prepare` has run and before they are sharded; steps have `accumulate` micro
    batches."""
    seen: set[int] = set()
    rows: dict[str, Row] = {}
    for role, network in [*method.frozen.items(), *method.networks.items()]:
        trained = method.trained[role].parameters() if role in method.trained else []
        rows[role] = Row(role, _count(network.parameters()), _count(trained))
        rows[role].sizes["weights"] = list(_fresh(_tensors(network), seen))
    owner = {
        id(p): rows[role] for role, found in reversed(method.trained.items()) for p in found.parameters()
    }
    updates: list[list[Size]] = []
    for update in method.plan:
        own = method.parameters_of(update)
        states = optimizer_state(method.optim[update.name].optimizer, own)
        for parameter, state in zip(own, states or [[]] * len(own), strict=True):
            row = owner[id(parameter)]
            row.sizes["gradients"].append(size_of(parameter))
            row.sizes["optimizer"] += state
            row.unknown |= states is None
        updates.append([size_of(parameter) for parameter in own])
    owned = {id(t) for n in [*method.frozen.values(), *method.networks.values()] for t, _ in _tensors(n)}
    for name, average in method.averaged.items():
        followed = method.further[name].of if name in method.further else name
        # Known by themselves: before networks are sharded, averages may lie on the memory of what they follow.
        found = (pair for pair in _tensors(average.network) if id(pair[0]) not in owned)
        rows[followed].sizes["averages"] += [size_of(tensor, sharded=sharded) for tensor, sharded in found]
    memory = Memory([*rows.values()], updates, accumulated=accumulate > 1)
    if decoder := decoder_row(method.student.decoder.weights()):
        memory.rows.append(decoder)
    return memory


def decoder_row(weights: Mapping[str, Tensor]) -> Row | None:
    """The row of a decoder's weights, which every process holds; None for decoders without any."""
    return (
        stored_row("decoder", [size_of(tensor, sharded=False) for tensor in weights.values()])
        if weights
        else None
    )


def stored_row(role: str, sizes: Iterable[Size]) -> Row:
    """The row of a network that is not trained, of its parameters."""
    listed = list(sizes)
    row = Row(role, sum(math.prod(size.shape) for size in listed))
    row.sizes["weights"] = listed
    return row


def network_row(role: str, network: nn.Module) -> Row:
    """The row of a network that is not trained."""
    row = Row(role, _count(network.parameters()))
    row.sizes["weights"] = list(_fresh(_tensors(network), set()))
    return row


def optimizer_state(make: Callable[[Any], Any], parameters: list[nn.Parameter]) -> list[list[Size]] | None:
    """The state that an optimizer keeps of each parameter after a step, found by a step on small stand-ins with the same
    numbers of dimensions and types. None where the state of a stand-in is not made of tensors that have, in each dimension,
    the size of the parameter or 1; and for optimizers that cannot make that step on a CPU."""
    kinds = dict.fromkeys((p.dim(), p.dtype) for p in parameters)
    stand_ins = {kind: torch.zeros(STAND_IN[: kind[0]], dtype=kind[1], requires_grad=True) for kind in kinds}
    for tensor in stand_ins.values():
        tensor.grad = torch.zeros_like(tensor)
    try:
        optimizer = make(list(stand_ins.values()))
        optimizer.step()
    except (RuntimeError, TypeError):
        return None
    states = {
        kind: [value for value in optimizer.state[tensor].values() if isinstance(value, Tensor)]
        for kind, tensor in stand_ins.items()
    }
    for (dimensions, _), values in states.items():
        for value in values:
            fits = zip(value.shape, STAND_IN[:dimensions], strict=False)
            if value.dim() not in (0, dimensions) or any(size not in (1, own) for size, own in fits):
                return None
    return [[_like(value, p) for value in states[p.dim(), p.dtype]] for p in parameters]


def _like(value: Tensor, parameter: Tensor) -> Size:
    """The size of a parameter's state, as `value` is that of its stand-in."""
    shape = [1 if size == 1 else own for size, own in zip(value.shape, parameter.shape, strict=False)]
    return Size(tuple(shape), value.element_size(), sharded=value.dim() > 0)


def size_of(tensor: Tensor, *, sharded: bool = True) -> Size:
    """The size of a tensor."""
    return Size(tuple(tensor.shape), tensor.element_size(), sharded)


def _tensors(network: nn.Module) -> Iterator[tuple[Tensor, bool]]:
    """(tensor, whether it is sharded) of a network."""
    yield from ((parameter, True) for parameter in network.parameters())
    yield from ((buffer, False) for buffer in network.buffers())


def _fresh(tensors: Iterable[tuple[Tensor, bool]], seen: set[int]) -> Iterator[Size]:
    """Sizes of the tensors whose storage is not in `seen`, which is extended. The address of the storage itself names it:
    that of its data is 0 on the meta device."""
    for tensor, sharded in tensors:
        if (key := tensor.untyped_storage()._cdata) not in seen:
            seen.add(key)
            yield size_of(tensor, sharded=sharded)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)
