"""The parameters that an update trains: a named set of a network's parameters.

Optimizers, averages, clipping, gradient flags and checkpoints work over these sets. What a network has beside them is frozen:
it keeps its values, stays out of checkpoints and is not copied for an average.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

# A network (all that it trains), or a network with some of its parameters, given as tensors or as a part of it.
Trainable = nn.Module | tuple[nn.Module, nn.Module | Iterable[nn.Parameter]]


def trained_by(network: nn.Module) -> Mapping[str, nn.Parameter]:
    """What a network trains: its `trained()` where it has that method (an adapter's parameters), else all parameters."""
    own = getattr(network, "trained", None)
    found: Mapping[str, nn.Parameter] = own() if callable(own) else dict(network.named_parameters())
    return found


@dataclass(frozen=True)
class ParameterSet:
    """Some or all parameters of a network, known by name: sharding replaces the tensors and keeps the names."""

    network: nn.Module
    names: tuple[str, ...]

    @classmethod
    def of(cls, given: Trainable, where: str) -> ParameterSet:
        """The set that `Update.trains` describes. Raises ValueError, starting with `where`, for an empty set and for
        parameters that are not the network's."""
        network, wanted = given if isinstance(given, tuple) else (given, None)
        own = dict(network.named_parameters())
        if wanted is None:
            names = tuple(trained_by(network))
        else:
            by_id = {id(p): name for name, p in own.items()}
            parameters = list(wanted.parameters() if isinstance(wanted, nn.Module) else wanted)
            names = tuple(by_id.get(id(p), "") for p in parameters)
        if not names:
            raise ValueError(f"{where}: found no parameters, expected at least one to train")
        if missing := [name for name in names if name not in own]:
            told = f" such as {missing[0]!r}" if missing[0] else ""
            raise ValueError(
                f"{where}: found parameters{told} that are not the network's, expected some of its {len(own)}"
            )
        chosen = set(names)
        return cls(network, tuple(name for name in own if name in chosen))

    @cached_property
    def whole(self) -> bool:
        """Whether these are all parameters of the network."""
        return len(self.names) == sum(1 for _ in self.network.parameters())

    def named(self) -> dict[str, nn.Parameter]:
        """name -> parameter as it is now: after sharding, the sharded one."""
        found = dict(self.network.named_parameters())
        return {name: found[name] for name in self.names}

    def parameters(self) -> list[nn.Parameter]:
        """The parameters as they are now, in the order of their names."""
        return list(self.named().values())

    def modes(self) -> dict[str, bool]:
        """path of a module -> whether it is in training mode while the set is trained. One whose parameters are all frozen is
        in eval mode, with all that it contains; one without parameters follows the module around it."""
        training, holding = (
            _ancestors(names) for names in (self.names, dict(self.network.named_parameters()))
        )
        modes: dict[str, bool] = {}
        for path, _ in self.network.named_modules():
            around = modes.get(path.rpartition(".")[0], True)
            modes[path] = path in training if path in holding else around
        return modes

    def train(self, mode: bool) -> None:
        """Set the network's training mode; with `mode`, its frozen modules stay in eval mode."""
        self.network.train(mode)
        if mode and not self.whole:
            modes = self.modes()
            for path, module in self.network.named_modules():
                module.training = modes[path]

    def copy(self, on_same_memory: bool = False) -> ParameterSet:
        """The same set of a network with copies of these parameters, frozen and in eval mode; or, with `on_same_memory`, with
        other parameters on the same memory, of which sharding makes copies. Modules and parameters that
        are not trained are the same objects in both: they need no second copy, and sharding places them once. Modules with
        forward hooks, which may call what is trained, are others."""
        shared: dict[int, object] = {}
        if not self.whole:
            modes, own = self.modes(), self.named()
            modules = dict(self.network.named_modules())
            hooked = _ancestors(f"{path}.hook" for path, module in modules.items() if module._forward_hooks)
            shared = {
                id(m): m for path, m in modules.items() if not modes[path] and path not in {"", *hooked}
            }
            shared |= {id(p): p for name, p in self.network.named_parameters() if name not in own}
        twins = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.parameters()}
        memo: dict[int, object] = {**shared, **(twins if on_same_memory else {})}
        twin = ParameterSet(copy.deepcopy(self.network, memo), self.names)
        for module in twin.network.modules():
            if id(module) not in shared:
                module.training = False
        for parameter in twin.parameters():
            parameter.requires_grad_(False)
        return twin

    def state(self) -> dict[str, Tensor]:
        """What training changes, by name: of a whole network its `state_dict`; else these parameters and the buffers of
        modules in training mode."""
        found: dict[str, Tensor] = self.network.state_dict()
        if self.whole:
            return found
        kept = {*self.names, *(f"{path}.{name}".lstrip(".") for path, _, name in self.buffers())}
        return {name: value for name, value in found.items() if name in kept}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`. Raises RuntimeError for other names or shapes."""
        if not self.whole and set(state) != set(expected := self.state()):
            raise RuntimeError(f"found only in one of both: {sorted(set(state) ^ set(expected))[:4]}")
        self.network.load_state_dict(dict(state), strict=self.whole)

    def buffers(self) -> list[tuple[str, nn.Module, str]]:
        """(path of a module, the module, name) of every buffer that training may change."""
        modes = self.modes()
        return [
            (path, module, name)
            for path, module in self.network.named_modules()
            if modes[path]
            for name, _ in module.named_buffers(recurse=False)
        ]


def joined(sets: Iterable[ParameterSet]) -> list[ParameterSet]:
    """One set a network: the sets of one network together."""
    names: dict[nn.Module, set[str]] = {}
    for parameters in sets:
        names.setdefault(parameters.network, set()).update(parameters.names)
    return [
        ParameterSet(network, tuple(name for name, _ in network.named_parameters() if name in chosen))
        for network, chosen in names.items()
    ]


def _ancestors(names: Iterable[str]) -> set[str]:
    """Paths of all modules that contain one of the parameters."""
    paths = {""}
    for name in names:
        while "." in name:
            name = name.rpartition(".")[0]
            paths.add(name)
    return paths
