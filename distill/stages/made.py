"""Outputs of stages as known before they run, for `Stage.dry_run`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill.engine.memory import Memory
from distill.models.adapters import adapter_of
from distill.models.build import build_net, build_process, fresh_as
from distill.models.conditions import Conditions, of_net
from distill.models.conditions import of_source as conditions_of
from distill.models.decoder import Decoder
from distill.models.decoder import of_source as decoder_of
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.model import Model
from distill.models.native import load_model, sketch_model
from distill.models.spec import SamplerSpec
from distill.models.weights import WEIGHTS, weights_path

if TYPE_CHECKING:
    from distill.engine.module import DistillModule

# In dry runs, networks with more parameters are built on the meta device, without memory.
LARGE_PARAMETERS = 5_000_000


@dataclass(frozen=True)
class PairsMade:
    """The properties of pairs that a training stage checks; `has`: fields of their batches beside the conditions."""

    sample_shape: tuple[int, ...]
    conditions: Conditions
    decoder: Decoder
    guidance: float
    has: tuple[str, ...] = ("x0", "z")
    baked: str | None = None
    guidance_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Made:
    """The output of a stage.

    Attributes:
        model: a model, whose net may be on the meta device. pairs: properties of pairs.
        nodes: training steps of stored nodes. trained: whether the stage trains the model.
        memory: of the networks while the stage runs; None for stages that do not predict it.
    """

    model: Generator | None = None
    pairs: PairsMade | None = None
    nodes: tuple[int, ...] = ()
    trained: bool = False
    memory: Memory | None = None


def try_model(folder: Path) -> Generator:
    """Load the model of a folder; above `LARGE_PARAMETERS` without its weights, on the meta device."""
    weights = weights_path(folder)  # weights in several files are large
    small = weights.name == WEIGHTS and weights.is_file() and weights.stat().st_size < 4 * LARGE_PARAMETERS
    return load_model(folder) if small else sketch_model(folder)


def copied(models: Mapping[str, Generator | None], *, adapters: bool) -> dict[str, Generator]:
    """Return copies of a method's models by role, which it may modify in a dry run. Where it trains adapters, the models are
    the base that they share, as `load_models` loads it."""
    given = {role: model for role, model in models.items() if model is not None}
    assert given.keys() == models.keys()  # checked by `Stage.check`
    if "init" in given:
        adapters |= adapter_of(given["init"].denoiser.net) is not None
    return {
        role: model
        if adapters and adapter_of(model.denoiser.net) is None
        else Generator(copy.deepcopy(model.denoiser), model.spec)
        for role, model in given.items()
    }


def try_build(config: Mapping[str, Any]) -> nn.Module:
    """Build the net of a config; above `LARGE_PARAMETERS` on the meta device."""
    with torch.device("meta"):
        net: nn.Module = build_net(config)
    small = sum(p.numel() for p in net.parameters()) < LARGE_PARAMETERS
    return build_net(config) if small else net


def device_of(net: nn.Module) -> torch.device:
    """Return the device of a net's parameters; the CPU if it has none."""
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def fresh_model(
    net: Mapping[str, Any],
    process: Mapping[str, Any] | None,
    kind: str,
    source: Any,
    teacher: Generator | None,
    make: Callable[[Mapping[str, Any]], Any] = build_net,
    model: Mapping[str, Any] | None = None,
) -> Generator:
    """Return an untrained model of the samples of a source (or of `PairsMade`), decoded as those of the teacher, if there is
    one: prompts do not say what samples are. `make` builds the net. `model`: class and options of another model than a
    `Denoiser`, which has no choice of process and kind."""
    built = make(net)
    if model is not None:
        made = fresh_as(
            model,
            net=built,
            sample_shape=source.sample_shape,
            conditions=of_net(built) or conditions_of(source),
            decoder=decoder_of(source),
        )
        return Generator(made, SamplerSpec(steps=1, any_steps=True))
    assert process is not None
    denoiser = Denoiser(
        built,
        build_process(process),
        kind,
        source.sample_shape,
        conditions=of_net(built) or conditions_of(source),
        decoder=decoder_of(source) if teacher is None else teacher.decoder,
    )
    return Generator(denoiser, SamplerSpec(steps=1, any_steps=True))


def check_student(student: Model, sample_shape: Sequence[int], conditions: Conditions) -> None:
    """Raise ValueError unless the student takes the data's samples and conditions; one forward call shows it."""
    if student.sample_shape != tuple(sample_shape):
        raise ValueError(
            f"data: found samples of shape {tuple(sample_shape)}, expected the student's {student.sample_shape}"
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


def of_pairs(spec: SamplerSpec, student: Model, pairs: Any) -> SamplerSpec:
    """The sampler of a student with the record of the pairs (their header, or `PairsMade`) that it learned from. What is
    baked into them cannot be changed unless the student is guidable itself."""
    return replace(spec, guidance_baked=pairs.guidance, baked=None if student.guidable else pairs.baked)


def check_reads(
    method: DistillModule,
    options: Mapping[str, Any],
    source: Any,
    data: str | Mapping[str, Any],
    before: Mapping[str, Made],
) -> None:
    """Raise ValueError unless a source that declares what its batches hold (`has`) holds what a method with these options
    reads. `before`: the stages before, for the message."""
    _check_drawn(method, source, data)
    has = getattr(source, "has", None)
    if has is None or not (missing := [name for name in method.needs(options) if name not in has]):
        return
    if missing[0] in ("path", "times", "guidance"):
        raise ValueError(
            f"data: {data!r} has no {missing[0]}, which the method {type(method).__name__} reads; expected pairs with states: "
            "true and guidance_scale: [low, high]"
        )
    made = [name for name, each in before.items() if each.pairs is not None and missing[0] in each.pairs.has]
    add = "+stage@stages.pairs=generate stages.pairs.teacher=teacher stages.pairs.count=2048 "
    raise ValueError(
        f"data: {data!r} has no {missing[0]}, which the method {type(method).__name__} reads; expected pairs: "
        f"type {'' if made else add}stages.<stage>.data={made[0] if made else 'pairs'}"
    )


def _check_drawn(method: DistillModule, source: Any, data: str | Mapping[str, Any]) -> None:
    """Raise ValueError where guidance scales were drawn for the pairs of a source and the method reads none, or others."""
    drawn, wanted = getattr(source, "guidance_range", None), method.guidance_range
    if drawn is not None and wanted is None:
        raise ValueError(
            f"data: {data!r} has a guidance scale for each pair, which the method {type(method).__name__} does not read; "
            "expected pairs of one guidance_scale"
        )
    if drawn is not None and drawn != wanted:
        raise ValueError(
            f"method.guidance_scale: found {list(wanted or ())}, but the pairs of {data!r} have guidance scales of "
            f"{list(drawn)}; expected the same"
        )
