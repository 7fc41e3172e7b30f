"""Networks of which a part is trained, and methods that train them: for one process and for several. No test itself."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Average, Loss, Optim, Update
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow
from distill.world import World

SHAPE = (4,)


class Points:
    """64 points in 4 dimensions."""

    sample_shape, num_classes = SHAPE, 0
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, rows: torch.Tensor, index: torch.Tensor) -> Batch:
        return Batch(rows, index, Cond.nothing(len(rows)), x0=self.data[rows])

    def fingerprint(self) -> str:
        return "points"


def base() -> nn.Module:
    """Features [B,8]; its batch norm would change in training mode, its dropout would draw."""
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 8))


class Headed(nn.Module):
    """A base with a head, and a gain beside them that nobody trains."""

    def __init__(self, base: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((4,), 0.5))
        self.base = base
        self.head = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Dropout(dropout), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return self.gain * x + self.head(self.base(torch.cat([x, t[:, None]], dim=1)))


def denoiser(net: nn.Module) -> Denoiser:
    return Denoiser(net, Flow(), "velocity", SHAPE)


class Matching(DistillModule):
    """Flow matching of the student and of a second network, each of which trains a part of what it is given."""

    def __init__(self, student: Denoiser, fake: Denoiser | None = None, parts: str = "head") -> None:
        super().__init__(student)
        self.fake, self.parts = fake, parts

    def part(self, network: Denoiser) -> Any:
        return (network, getattr(network.net, self.parts)) if self.parts else network

    def updates(self):
        found = [Update("student", {"student": self.part(self.student)}, partial(self.loss, self.student))]
        if self.fake is not None:
            found.append(Update("fake", {"fake": self.part(self.fake)}, partial(self.loss, self.fake)))
        return found

    def averages(self):
        return {"target": Average("student", lambda step: 0.5)} if self.parts else {}

    def result(self):
        return Result(SamplerSpec(steps=1, any_steps=True), "independent")

    def loss(self, network, batch, step):
        eps, t = step.draws.normal("eps", SHAPE), step.draws.uniform("t")
        x_t = (1 - t[:, None]) * batch.x0 + t[:, None] * eps
        target = eps - batch.x0
        if "teacher" in self.frozen:
            with torch.no_grad():
                target = target + 0.5 * self.frozen["teacher"](x_t, t, batch.cond)
        if network is self.fake:  # sees what the student makes
            with torch.no_grad():
                target = self.student(x_t, t, batch.cond) - target
        return Loss((network(x_t, t, batch.cond) - target).square().mean())


def prepared(method: DistillModule, world: World | None = None) -> Any:
    optim = Optim(partial(torch.optim.AdamW, lr=0.02), Constant(), clip=1.0, ema=0.9)
    names = ["student", *(["fake"] if method.fake is not None else [])]
    method.prepare(dict.fromkeys(names, optim), seed=5, world=world)
    return method


def head_only(world: World | None = None, dropout: float = 0.0) -> Any:
    """A student whose head alone is trained."""
    torch.manual_seed(0)
    return prepared(Matching(denoiser(Headed(base(), dropout))), world)


def two_heads(world: World | None = None) -> Any:
    """A student and a fake network with heads of their own on one base."""
    torch.manual_seed(0)
    net = Headed(base())
    other = Headed(net.base)
    other.gain = copy.deepcopy(net.gain)
    return prepared(Matching(denoiser(net), denoiser(other)), world)
