"""How straight the paths of a flow from noise to data are, from the calls of its network alone: no states are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.models.generator import Generator
from distill.process.base import at_least_float32
from distill.process.flow import Flow


@dataclass(frozen=True)
class EulerPath:
    """Means over samples and steps of Euler's uniform grid from noise z at t = 1 to x0 at t = 0, squares summed over
    dimensions.

    Attributes:
        deviation: |(z - x0) - v|^2, the straightness S of `samplers.straightness`. chord: |z - x0|^2.
        gap: |x0 in one Euler step - x0|^2.
    """

    deviation: float
    chord: float
    gap: float


class PathSums:
    """Collects what `EulerPath` needs while a model is sampled by Euler's method; for the first `count` samples of the batch.

    The velocities v_i of N steps are enough, since z - x0 is their mean: S = mean |v_i|^2 - |mean v_i|^2."""

    def __init__(self, generator: Generator, count: int) -> None:
        self.model, self.count, self.steps = generator.denoiser, count, 0
        self.first = self.total = self.squares = torch.zeros(())

    def add(self, module: Any, args: tuple[Any, ...], out: Tensor) -> None:
        """A forward hook: the prediction `out` at the state and time in `args`."""
        process, kind = self.model.process, self.model.kind
        x, t, out = args[0][: self.count], args[1][: self.count], at_least_float32(out[: self.count])
        if self.model.boundary is not None:
            x0 = process.convert(kind, out, x, t, "x0")
            kind, out = "x0", self.model.boundary.apply(process, x0, x, t)
        v = process.convert(kind, out, x, t, "velocity").double().flatten(1)
        self.first = v if self.steps == 0 else self.first
        self.total, self.squares = self.total + v, self.squares + v.square().sum(1)
        self.steps += 1

    def path(self) -> EulerPath:
        """The means."""
        chord = self.total / self.steps
        length = chord.square().sum(1)
        deviation = (self.squares / self.steps - length).mean().clamp_min(0)  # below 0 by rounding alone
        gap = (self.first - chord).square().sum(1).mean()
        return EulerPath(float(deviation), float(length.mean()), float(gap))


@contextmanager
def watched(generator: Generator, count: int) -> Iterator[PathSums]:
    """The sums of what is sampled inside the block."""
    sums = PathSums(generator, count)
    handle = generator.denoiser.register_forward_hook(sums.add)
    try:
        yield sums
    finally:
        handle.remove()


def has_paths(generator: Generator) -> bool:
    """Whether a model is an ODE whose paths can be straight: a flow that is valid at all times."""
    model = generator.denoiser
    return model.coupling not in ("endpoint", "few_step") and isinstance(model.process, Flow)


def samples_along(generator: Generator, steps: int) -> bool:
    """Whether sampling in so many steps is Euler's method on the uniform grid of `euler_path`."""
    spec = generator.spec
    if spec.mode != "ode" or spec.solver != "euler" or spec.start_scale != 1 or not has_paths(generator):
        return False
    grid = spec.grid(generator.denoiser.process, steps)
    return torch.allclose(grid.double(), _uniform(steps), rtol=0, atol=1e-9)


@torch.inference_mode()
def euler_path(generator: Generator, ids: Tensor, seed: int, stream: str, steps: int) -> EulerPath:
    """The path of samples `ids` [B] along Euler's uniform grid, with the model's own guidance; labels go round the classes as
    in `Generator.sample`."""
    z, _ = generator.noises(seed, stream, ids)
    cond = generator.conditions.of(ids).with_guidance(generator.spec.embedded()).to(generator.device)
    with watched(generator, len(ids)) as sums:
        scale = generator.spec.guidance_scale
        generator.denoiser.transport(z, cond, grid=_uniform(steps), guidance_scale=scale)
    return sums.path()


def _uniform(steps: int) -> Tensor:
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device="cpu")
