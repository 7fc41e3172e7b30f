"""What the tests of the distillation methods share: small nets, a world of one Gaussian whose flow map is known, batches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.cache.pairs import Header
from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.points import Points
from distill.data.rng import Draws, noise_checksum
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant
from distill.engine.update import Optim, Step
from distill.models.analytic import exact_denoiser
from distill.models.boundary import Boundary
from distill.models.conditions import Labels
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.process.base import Process, expand
from distill.stages.renamed import MOVED

MEAN, STD = (0.4, -0.2), 0.3


def pairs_header(**changes: Any) -> Header:
    """Of ten pairs of 8x8 pixels with ten classes."""
    given = {
        "sample_shape": (1, 8, 8),
        "count": 10,
        "seed": 3,
        "stream": "pairs",
        "noise_checksum": noise_checksum(3, "pairs", (1, 8, 8)),
        "teacher": "t",
        "solver": "euler",
        "steps": 3,
        "guidance_scale": 1.0,
        "conditions": Labels(10).config(),
        "decoder": Pixels().config(),
    }
    return Header(**given | changes)


def noise(batch: int = 12, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(
    process: Process,
    kind: str = "velocity",
    *,
    classes: int = 0,
    w: int = 0,
    seed: int = 0,
    double: bool = False,
    shape: tuple[int, ...] = (2,),
    **meaning: Any,
) -> Denoiser:
    """A small random net, for two dimensions or another shape, on whose answer every input has a say."""
    torch.manual_seed(seed)
    scale = 30.0 / process.t_max
    net = MLP(
        shape=shape,
        width=16,
        depth=2,
        features=8,
        num_classes=classes,
        time_scale=scale,
        guidance_embedding=w,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = net.double() if double else net
    return Denoiser(net, process, kind, shape, **{"guidable": classes > 0} | meaning)


class GaussianMap(nn.Module):
    """As a net of `kind` under `process`: the flow map from t to `end` of N(mean, std^2 I), in the coordinates of `boundary`.

    `boundary` is what a method will put over the prediction; the net's output is what has to go in for the map to come out."""

    num_classes = 0

    def __init__(
        self, process: Process, kind: str, boundary: Boundary | None, end: float, std: float = STD
    ) -> None:
        super().__init__()
        self.process, self.kind, self.boundary, self.std = process, kind, boundary, std
        self.end = torch.tensor([end], dtype=torch.float64)
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def answer(self, x: Tensor, t: Tensor) -> Tensor:
        """The state at `end`; divided by alpha there, unless the boundary is that of "lcm"."""
        mean = torch.tensor(MEAN, dtype=torch.float64)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        alpha_end, sigma_end = self.process.alpha(self.end), self.process.sigma(self.end)
        scale = (alpha_end.square() * self.std**2 + sigma_end.square()).sqrt()
        shrink = expand(scale / (alpha.square() * self.std**2 + sigma.square()).sqrt(), x)
        moved = alpha_end * mean + (x - expand(alpha, x) * mean) * shrink
        return moved if self.boundary is not None and self.boundary.form == "lcm" else moved / alpha_end

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        wanted = self.answer(x, t)
        if self.boundary is not None:
            zero, one = torch.zeros_like(x), torch.ones_like(x)
            rest = wanted - self.boundary.apply(self.process, zero, x, t)
            share = self.boundary.apply(self.process, one, zero, t)
            wanted = torch.where(share == 0, x, rest / torch.where(share == 0, one, share))
        if self.kind == "velocity":  # x0 = x - t v of a flow
            return self.gain * torch.where(
                expand(t, x) == 0, 0.0, (x - wanted) / expand(t.clamp(min=1e-300), x)
            )
        return self.gain * self.process.convert("x0", wanted, x, t, self.kind)


def gaussian_teacher(process: Process, std: float = STD) -> Denoiser:
    """The exact denoiser of the same Gaussian."""
    return exact_denoiser(process, [list(MEAN)], std)


def gaussian_batch(batch: int = 256, std: float = STD) -> Batch:
    rows = torch.arange(batch)
    x0 = torch.tensor(MEAN, dtype=torch.float64) + std * noise(batch, 11)
    return Batch(rows, rows, Cond.nothing(batch), x0=x0)


def ring_batch(batch: int = 32, classes: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Points of the ring of 8, with their labels where there are classes."""
    points = Points(ring={"count": 8, "radius": 1.5}, count=batch, labelled=classes > 0)
    rows = torch.arange(batch)
    found = points.fetch(rows, rows)
    assert found.x0 is not None
    return Batch(rows, rows, found.cond, x0=found.x0.to(dtype))


def step(batch: int = 32, iteration: int = 0) -> Step:
    return Step(iteration, draws(batch))


def draws(batch: int = 32) -> Draws:
    return Draws(7, "s", 0, torch.arange(batch))


def optim(lr: float = 0.01, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> Optim:
    return Optim(**{"optimizer": partial(kind, lr=lr), "schedule": Constant(), "ema": 0.9} | settings)


def prepared(method: DistillModule, **settings: Any) -> DistillModule:
    """With the same settings for each of its optimizers."""
    method.prepare({update.name: optim(**settings) for update in method.updates()}, seed=5)
    return method


def trained(
    method: DistillModule, folder: Path, steps: int, classes: int = 0, **attached: Any
) -> DistillModule:
    """The prepared method after `steps` steps in all, from the checkpoint in the folder where there is one."""
    source = Points(ring={"count": 8, "radius": 1.5}, count=64, labelled=classes > 0)
    train(method, source, Fit(steps=steps, batch_size=16), folder=folder, config={}, **attached)
    return method


def state(method: DistillModule) -> dict[str, Tensor]:
    """Every weight and average of a method, by name."""
    parts = {**method.networks, **{f"ema.{name}": network for name, network in method.ema.items()}}
    return {f"{part}.{k}": v.clone() for part, m in parts.items() for k, v in m.state_dict().items()}


def gradients(total: Tensor, network: nn.Module) -> list[Tensor]:
    """Gradients of a loss by the parameters of a network, zeros where it does not depend on them."""
    found = torch.autograd.grad(total, list(network.parameters()), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, network.parameters(), strict=True)]


class DoubleDraws(Draws):
    """The same draws in float64, for losses that are compared with others to the last digits."""

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return super().uniform(name, shape).double()

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return super().normal(name, shape).double()

    def named(self, name: str) -> Draws:
        return DoubleDraws(self.seed, f"{self.stream}/{name}", self.step, self.index)


def double_step(batch: int = 32, stream: str = "s", iteration: int = 0) -> Step:
    return Step(iteration, DoubleDraws(7, stream, iteration, torch.arange(batch)))


def frozen_copy(network: Denoiser) -> Denoiser:
    """The same network as a constant: another object, without gradients."""
    return copy.deepcopy(network).requires_grad_(False)


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of score distillation, given by their former names (`levels`, `guidance_teacher`), in the methods' blocks."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        block, _, inner = MOVED.get(name, "").partition(".")
        if inner:
            found[block] = {**found.get(block, {}), inner: value}
        else:
            found[name] = value
    return found
