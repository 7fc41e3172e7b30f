"""What stages will leave behind, known before any of them runs, so that the later ones can be tried on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill.models.build import build_net, build_process
from distill.models.conditions import Conditions
from distill.models.denoiser import Denoiser
from distill.models.description import WEIGHTS, read_description
from distill.models.generator import Generator
from distill.models.native import load_model, sketch_model
from distill.models.spec import SamplerSpec

# Networks above this size are built on the meta device when a stage is tried: nothing is allocated.
LARGE_PARAMETERS = 5_000_000


@dataclass(frozen=True)
class Part:
    """A model, the config that its net is built from, and how it is sampled."""

    denoiser: Denoiser
    net: Mapping[str, Any]
    spec: SamplerSpec

    @property
    def generator(self) -> Generator:
        """The model with its sampler."""
        return Generator(self.denoiser, self.spec)


@dataclass(frozen=True)
class PairsMade:
    """What a training stage asks of pairs before they exist."""

    sample_shape: tuple[int, ...]
    conditions: Conditions
    guidance: float


@dataclass(frozen=True)
class Made:
    """What a stage will leave behind: a model (its net may lie on the meta device; whether it is trained here), pairs, the
    steps of stored nodes, or nothing that others use."""

    model: Part | None = None
    pairs: PairsMade | None = None
    nodes: tuple[int, ...] = ()
    trained: bool = False


def read_part(folder: Path) -> Part:
    """The model of a folder."""
    generator = load_model(folder)
    return Part(generator.denoiser, read_description(folder)["net"], generator.spec)


def try_part(folder: Path) -> Part:
    """The model of a folder as `read_part` gives it; a large one without its weights, on the meta device."""
    if (folder / WEIGHTS).is_file() and (folder / WEIGHTS).stat().st_size < 4 * LARGE_PARAMETERS:
        return read_part(folder)
    generator = sketch_model(folder)
    return Part(generator.denoiser, read_description(folder)["net"], generator.spec)


def copied(part: Part | None) -> Part:
    """A copy that a method under trial may do anything with."""
    assert part is not None  # `Stage.check` has seen to it that the stage makes a model
    return Part(copy.deepcopy(part.denoiser), dict(part.net), part.spec)


def try_build(config: Mapping[str, Any]) -> nn.Module:
    """The net of a config; a large one on the meta device."""
    with torch.device("meta"):
        net: nn.Module = build_net(config)
    small = sum(p.numel() for p in net.parameters()) < LARGE_PARAMETERS
    return build_net(config) if small else net


def device_of(net: nn.Module) -> torch.device:
    """Where the parameters lie; the CPU for a net without any."""
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def fresh_part(
    net: Mapping[str, Any],
    process: Mapping[str, Any],
    kind: str,
    sample_shape: Sequence[int],
    make: Callable[[Mapping[str, Any]], Any] = build_net,
) -> Part:
    """An untrained model; `make` builds the net."""
    built = make(net)
    denoiser = Denoiser(built, build_process(process), kind, sample_shape)
    return Part(denoiser, net, SamplerSpec(steps=1, any_steps=True))


def check_student(student: Denoiser, sample_shape: Sequence[int], conditions: Conditions) -> None:
    """Raise ValueError unless the student takes the data's samples and conditions; one forward call shows it."""
    if student.sample_shape != tuple(sample_shape):
        raise ValueError(
            f"data: samples of shape {tuple(sample_shape)}, but the student makes {student.sample_shape}"
        )
    student.conditions.accepts(conditions)
    device = device_of(student.net)
    cond = conditions.of(torch.zeros(1, dtype=torch.int64))
    cond = cond.with_guidance(0.0 if student.embeds_guidance else None).to(device)
    x, t = (
        torch.zeros(1, *sample_shape, device=device),
        torch.full((1,), student.process.t_max, device=device),
    )
    try:
        with torch.no_grad():
            student(x, t, cond)
    except RuntimeError as error:
        raise ValueError(f"net: does not take samples of shape {tuple(sample_shape)}: {error}") from error
