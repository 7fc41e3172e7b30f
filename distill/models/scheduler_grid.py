"""The time steps of a scheduler of diffusers as a time grid."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from distill.models.pretrained import class_named
from distill.process.base import Process
from distill.process.flow import Flow

CLASSES = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
}
"""Solver -> its scheduler of diffusers. `euler` is that of flows, the others are those of tables."""

# Their noise levels lie between the rows of the table, while the network is called at the next row.
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def scheduler_of(solver: str, flow: bool) -> str:
    """The scheduler of diffusers for a solver. Raises ValueError naming `solver` where there is none for the process."""
    known = [name for name in CLASSES if (name == "euler") == flow]
    if solver not in known:
        raise ValueError(f"solver: found {solver!r}, but grid=scheduler knows {', '.join(known)} here")
    return CLASSES[solver]


def scheduler_grid(process: Process, steps: int, config: dict[str, Any]) -> Tensor:
    """[steps + 1] float64: the times at which diffusers calls the network, then the end.

    The classes place the same number of steps at different times: with "leading" spacing and 10 steps, DDIM calls 901, 801, ..
    1 and DPM-Solver++ 901, 811, .. 91.

    Args:
        config: that of a scheduler, with its `_class_name`, one of `CLASSES`.

    Raises:
        ValueError: another class, one that is not for the process, or times that do not fall.
        ImportError: diffusers is not installed.
    """
    name = config.get("_class_name")
    flow = isinstance(process, Flow)
    expected = [made for solver, made in CLASSES.items() if (solver == "euler") == flow]
    if name not in expected:
        raise ValueError(f"config._class_name: found {name!r}, expected {' or '.join(expected)}")
    _check(config)
    scheduler = class_named("diffusers", str(name), "config._class_name").from_config(config)
    scheduler.set_timesteps(steps)
    if flow:
        times = [float(sigma) for sigma in scheduler.sigmas]
    else:
        times = [float(time) for time in scheduler.timesteps]
        # Samplers return the data predicted at the last call, so the end only has to be a time below it.
        times.append(0.0 if times[-1] > 0 else -1.0)
    if len(times) != steps + 1 or any(b >= a for a, b in pairwise(times)):
        raise ValueError(f"steps: found {steps}, for which {name} has the times {times}, which do not fall")
    return torch.tensor(times, dtype=torch.float64, device="cpu")


def _check(config: Mapping[str, Any]) -> None:
    for key in RESPACED:
        if config.get(key):
            raise ValueError(
                f"config.{key}: found true, expected false; its noise levels are not those of its times"
            )
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "config.use_dynamic_shifting: found true, expected false; the pipeline gives the scheduler its times: no "
            "grid=scheduler is needed"
        )
