"""The meaning of a network from the config of its pipeline's scheduler: noise process, prediction and time grid."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.models.pretrained import class_named
from distill.models.scheduler_grid import scheduler_of
from distill.models.spec import SamplerSpec
from distill.models.time_grid import TimeGrid
from distill.process.base import Process
from distill.process.flow import Flow
from distill.process.vp import VPCosineIDDPM, VPLinearBetas, VPScaledLinear
from distill.typed import parse

# Schedulers that add noise by one table of betas, which their configs give in the same entries.
TABLES = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "LCMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler"),
    *("UniPCMultistepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
STEPS = 50  # the default of most pipelines

# Options of schedulers that only one value is implemented of -> that value, and what another one would mean.
ONLY: dict[str, tuple[Any, str]] = {
    "timestep_type": ("discrete", "other times of the network are not implemented"),
    "use_flow_sigmas": (False, f"its times are rounded to integers; use {FLOWS[0]}"),
}
ONLY_OF_FLOWS: dict[str, tuple[Any, str]] = {
    "num_train_timesteps": (1000, "the network's times are 1000 times those of the flow, or those"),
    "stochastic_sampling": (False, "samples get no noise between the steps here"),
    "time_shift_type": ("exponential", "no other shift is implemented"),
    **{
        key: (value, "the steps are those of the shifted grid")
        for key, value in (
            ("shift_terminal", None),
            *((f"use_{kind}_sigmas", False) for kind in ("karras", "exponential", "beta")),
            ("invert_sigmas", False),
        )
    },
}
READ = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("rescale_betas_zero_snr", "shift", "use_dynamic_shifting", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len"),
}
# They clip the predicted data between the steps of a solver, and mean nothing for the network.
CLIPPING = ("clip_sample", "thresholding")
# Of solvers and time grids: teachers have their own, see `meaning`.
SOLVERS = {
    *("set_alpha_to_one", "steps_offset", "timestep_spacing", "variance_type", "skip_prk_steps"),
    *("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "interpolation_type"),
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min"),
    *("sigma_max", "final_sigmas_type", "solver_order", "solver_type", "solver_p", "algorithm_type"),
    *("lower_order_final", "euler_at_final", "lambda_min_clipped", "predict_x0", "disable_corrector"),
    *("flow_shift", "time_shift_type", "shift_terminal", "original_inference_steps", "timestep_scaling"),
}


@dataclass(frozen=True)
class Meaning:
    """What a network's states and outputs are, and how its pipeline samples it."""

    process: Process
    kind: str
    sampler: SamplerSpec


def meaning(config: Mapping[str, Any], where: str, tokens: int) -> Meaning:
    """The meaning by a scheduler's config. `where`: its file, for messages. `tokens`: of an image, which shifts of some flows
    depend on. Entries that are missing have the defaults of the scheduler's class.

    Raises:
        ValueError: names the entry: an unknown scheduler, schedule or prediction, or one that this version cannot represent.
    """
    name = config.get("_class_name")
    if name not in (*TABLES, *FLOWS):
        raise ValueError(
            f"{where}: _class_name: found {name!r}, expected one of {', '.join((*TABLES, *FLOWS))}"
        )
    config = _complete(config, str(name), where)
    if name in FLOWS:
        return _flow(config, where, tokens)
    kind = KINDS.get(str(config["prediction_type"]))
    if kind is None:
        raise ValueError(
            f"{where}: prediction_type: found {config['prediction_type']!r}, expected one of {list(KINDS)}"
        )
    # Trailing times: they start at t_max, where the noise of pairs and students belongs. (Many pipelines start below.)
    sampler = SamplerSpec(steps=STEPS, any_steps=True, solver="ddim", time_grid=TimeGrid("trailing"))
    return Meaning(_table(config, where), kind, sampler)


def sampled(
    found: Meaning,
    config: Mapping[str, Any],
    where: str,
    *,
    solver: str | None = None,
    grid: str | None = None,
) -> SamplerSpec:
    """The sampler of a teacher with a solver, and a time grid, of one's own.

    Args:
        config: of the folder's scheduler. where: its file, for messages.
        solver: one of `samplers.solvers.CALLS`; None: that of `found`.
        grid: None: that of `found`; "scheduler": the times of the solver's own scheduler of diffusers with this config.

    Raises:
        ValueError: names the option, or the entry of the config.
    """
    sampler = found.sampler if solver is None else replace(found.sampler, solver=solver)
    if grid is None:
        return sampler
    if grid != "scheduler":
        raise ValueError(f"grid: found {grid!r}, expected null or scheduler")
    name = scheduler_of(sampler.solver, isinstance(found.process, Flow))
    given = {key: value for key, value in _complete(config, name, where).items() if key in config}
    sampler = replace(sampler, time_grid=TimeGrid("scheduler", {"config": {"_class_name": name, **given}}))
    try:
        sampler.grid(found.process)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return sampler


def _complete(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """The options of a scheduler, as its class takes them: entries that it does not have are left out, as diffusers does."""
    parameters = inspect.signature(
        class_named("diffusers", name, f"{where}: _class_name").__init__
    ).parameters
    known = {key: p.default for key, p in parameters.items() if key != "self"}
    found = {key: config.get(key, default) for key, default in known.items()}
    only = ONLY | (ONLY_OF_FLOWS if name in FLOWS else {})
    for key, value in found.items():
        expected, why = only.get(key, (known[key], "this version does not know it"))
        if key in CLIPPING:
            if value:
                warnings.warn(
                    f"{where}: {key}: found {value!r}; predicted data are not clipped between the steps here, so the teacher"
                    " is sampled otherwise than by its pipeline",
                    stacklevel=2,
                )
        elif (key in only or key not in READ | SOLVERS) and value != expected:
            default = "" if key in config else f", the default of {name}"
            raise ValueError(
                f"{where}: {key}: found {value!r}{default}, expected {expected!r}: {why}; if the model is right with that, "
                f"write {json.dumps({key: expected})[1:-1]} in this file"
            )
    return found


def _table(config: Mapping[str, Any], where: str) -> Process:
    if config["trained_betas"] is not None:
        raise ValueError(f"{where}: trained_betas: found a list, expected null and a `beta_schedule`")
    schedule, count = (
        config["beta_schedule"],
        parse(int, config["num_train_timesteps"], f"{where}: num_train_timesteps"),
    )
    zero = bool(config.get("rescale_betas_zero_snr", False))
    if schedule not in BETAS:
        raise ValueError(f"{where}: beta_schedule: found {schedule!r}, expected one of {list(BETAS)}")
    if schedule == "squaredcos_cap_v2":
        if zero:
            raise ValueError(f"{where}: rescale_betas_zero_snr: found true with {schedule!r}, expected false")
        return VPCosineIDDPM(num_timesteps=count)
    table = VPScaledLinear if schedule == "scaled_linear" else VPLinearBetas
    start, end = (parse(float, config[key], f"{where}: {key}") for key in ("beta_start", "beta_end"))
    return table(start, end, count, zero_terminal_snr=zero)


def _flow(config: Mapping[str, Any], where: str, tokens: int) -> Meaning:
    factor = float(config["shift"])
    if config.get("use_dynamic_shifting"):
        least, most = config["base_image_seq_len"], config["max_image_seq_len"]
        low, high = config["base_shift"], config["max_shift"]
        factor = math.exp(low + (high - low) * (tokens - least) / (most - least))
    grid = None if factor == 1 else TimeGrid("shifted", {"factor": factor})
    return Meaning(Flow(), "velocity", SamplerSpec(steps=28, any_steps=True, solver="euler", time_grid=grid))
