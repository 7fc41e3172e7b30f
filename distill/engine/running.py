"""Cached parts of an update: iterating over a network's modules in each step costs as much as a small layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from distill.engine.ema import EmaUpdater
from distill.engine.parallel import sharded_modules, sync_gradients
from distill.engine.params import ParameterSet, joined


@dataclass
class Running:
    """One update, once its networks are on their devices.

    Attributes:
        parameters: what it trains.
        trained: the parameter sets of these.
        updaters: averages, each with its decay as a function of the update's step.
        training: parameter sets whose networks are in training mode while the update runs.
        others: networks that are in eval mode then.
    """

    parameters: list[nn.Parameter]
    trained: list[ParameterSet]
    updaters: list[tuple[Callable[[int], float], EmaUpdater]]
    training: list[ParameterSet]
    others: list[nn.Module]
    _modes: list[tuple[nn.Module, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.training = joined(self.training)
        self.sharded = sharded_modules(parameters.network for parameters in self.trained)
        training = {id(parameters.network) for parameters in self.training}
        self.others = [network for network in self.others if id(network) not in training]

    def start(self, before: Running | None) -> None:
        """Set modes and gradient flags for this update; `before` is the one that ran last; its parameters are
        frozen again. Does nothing if that is this one and no module's mode has been changed since."""
        if before is not self:
            for parameter in before.parameters if before is not None else ():
                parameter.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
        elif all(module.training == mode for module, mode in self._modes):
            return
        if not self._modes:
            for network in self.others:
                network.train(False)
            for parameters in self.training:
                parameters.train(True)
            listed = [*self.others, *(parameters.network for parameters in self.training)]
            self._modes = [(m, m.training) for m in {m: None for n in listed for m in n.modules()}]
        for module, mode in self._modes:
            object.__setattr__(module, "training", mode)  # nn.Module's own takes 20 times as long

    def sync(self, now: bool) -> None:
        """Whether the coming backward reduces gradients over processes."""
        sync_gradients(self.sharded, now)
