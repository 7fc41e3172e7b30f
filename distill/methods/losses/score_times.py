"""Samplers of times for the losses of score distillation: the student's, the fake score's and the GAN's."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distill.data.rng import Draws
from distill.methods.families.suits import check_own_clock
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.times import karras_index_level, lognormal_level, sid_level
from distill.typed import check_keys

Times = Callable[[Draws], Tensor]


def times_of(process: Process, options: Mapping[str, Any], where: str) -> Times:
    """A sampler of times [B] (float64) from its options.

    {name: uniform, low, high}: uniform in the process's time, as shares of its range; {name: logit_normal, mean, std}: the
    share is a sigmoid of a normal number; {name: lognormal, mean, std}: EDM's noise levels; {name: sid, t_max}: SiD's;
    {name: karras, low, high}: uniform indices of DMD2's table of 1000. Levels are translated to the process's own time and
    clamped to its range; where the levels are bounded (sid, karras), a warning says so.

    Raises:
        ValueError: an unknown name or option, or a value outside its range, named by `where`.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f"{where}: found {options!r}, expected a name and its options, such as {{name: uniform}}"
        )
    given = dict(options)
    name = given.pop("name", None)
    span = process.t_max - process.t_min

    def uniform(draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
        if not 0 <= low <= high <= 1:
            raise ValueError("expected shares of the range of times, 0 <= low <= high <= 1")
        return process.t_min + span * (low + (high - low) * draws.uniform("t").double())

    def logit_normal(draws: Draws, mean: float = 0.0, std: float = 1.0) -> Tensor:
        _check_normal(mean, std)
        return process.t_min + span * torch.sigmoid(mean + std * draws.normal("t").double())

    def at(level: Tensor) -> Tensor:
        return process.time_of(-torch.log(level.double()))

    def lognormal(draws: Draws, mean: float = -1.2, std: float = 1.2) -> Tensor:
        _check_normal(mean, std)
        return at(lognormal_level(draws.normal("t").double(), mean, std))

    def sid(draws: Draws, t_max: float = 800.0) -> Tensor:
        return at(sid_level(draws.uniform("t").double(), t_max))

    def karras(draws: Draws, low: int = 20, high: int = 980) -> Tensor:
        return at(karras_index_level(draws.uniform("t"), low, high))

    known: dict[str, Callable[..., Tensor]] = {
        f.__name__: f for f in (uniform, logit_normal, lognormal, sid, karras)
    }
    if name not in known:
        raise ValueError(f"{where}.name: found {name!r}, expected one of {sorted(known)}")
    if name in ("uniform", "logit_normal"):
        check_own_clock(process, f"{where}.name", repr(name), "lognormal, sid or karras")
    options_of = [p.name for p in inspect.signature(known[name]).parameters.values()][1:]
    check_keys(given, options_of, where)
    try:
        known[name](Draws(0, where, 0, torch.zeros(1, dtype=torch.int64)), **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: found {given} for {name!r}: {error}") from error
    bounded: dict[str, Callable[..., Tensor]] = {"sid": sid_level, "karras": karras_index_level}
    if name in bounded:
        ends = bounded[name](torch.tensor([0.0, 1.0], dtype=torch.float64), **given)
        _warn_of_ends(process, ends, f"{where}: {name!r}")
    return lambda draws: known[name](draws, **given)


def usual_times(
    process: Process, given: Mapping[str, Any] | None, paper: Mapping[str, Any], *, fake: bool
) -> Mapping[str, Any]:
    """Options for `times_of`: those `given`, or (None) what suits the process.

    Under EDM the `paper`'s noise levels. Under other processes, times of their own: the student's loss uniformly from 2 % to
    98 % of it (DMD2 and SiD-LSG on Stable Diffusion), the fake score's over all of it, under a flow logit-normally (as flows
    are trained, arXiv 2403.03206)."""
    if given is not None:
        return given
    if isinstance(process, EDM):
        return paper
    if not fake:
        return {"name": "uniform", "low": 0.02, "high": 0.98}
    return {"name": "logit_normal" if isinstance(process, Flow) else "uniform"}


def _check_normal(mean: float, std: float) -> None:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError("expected a finite mean and a positive std")


def _warn_of_ends(process: Process, levels: Tensor, where: str) -> None:
    """Warn where levels [2], lowest and highest, lie outside the process's range: draws there are clamped to its ends."""
    inside = levels * torch.tensor([1 + 1e-6, 1 - 1e-6])  # the last bit of a power is no excess
    if not bool(process.covers(-torch.log(inside)).all()):
        ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64)
        has = torch.exp(-process.log_ratio(ends)).tolist()
        warnings.warn(
            f"{where} draws noise levels {levels[0]:.3g} .. {levels[1]:.3g}, {process!r} has {has[0]:.3g} .. {has[1]:.3g}: "
            "draws outside are clamped; use name: uniform",
            stacklevel=3,
        )
