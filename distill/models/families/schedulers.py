"""The meaning of a network from the config of its pipeline's scheduler: noise process, prediction and time grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.models.spec import SamplerSpec
from distill.models.time_grid import TimeGrid
from distill.process.base import Process
from distill.process.flow import Flow
from distill.process.vp import VPCosineIDDPM, VPLinearBetas, VPScaledLinear

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


@dataclass(frozen=True)
class Meaning:
    """What a network's states and outputs are, and how its pipeline samples it."""

    process: Process
    kind: str
    sampler: SamplerSpec


def meaning(config: Mapping[str, Any], where: str, tokens: int) -> Meaning:
    """The meaning by a scheduler's config. `where`: its file, for messages. `tokens`: of an image, which shifts of some flows
    depend on.

    Raises:
        ValueError: names the entry: an unknown scheduler, schedule or prediction, or one that this version cannot represent.
    """
    name = config.get("_class_name")
    if name in FLOWS:
        return _flow(config, where, tokens)
    if name not in TABLES:
        raise ValueError(
            f"{where}: _class_name: found {name!r}, expected one of {', '.join((*TABLES, *FLOWS))}"
        )
    if config.get("use_flow_sigmas"):
        raise ValueError(
            f"{where}: use_flow_sigmas: found true, whose times are rounded to integers; expected the pipeline's "
            f"own {FLOWS[0]}"
        )
    kind = KINDS.get(str(config.get("prediction_type", "epsilon")))
    if kind is None:
        raise ValueError(
            f"{where}: prediction_type: found {config['prediction_type']!r}, expected one of {list(KINDS)}"
        )
    # Trailing times: they start at t_max, where the noise of pairs and students belongs. (Many pipelines start below.)
    sampler = SamplerSpec(steps=STEPS, any_steps=True, solver="ddim", time_grid=TimeGrid("trailing"))
    return Meaning(_table(config, where), kind, sampler)


def _table(config: Mapping[str, Any], where: str) -> Process:
    if config.get("trained_betas") is not None:
        raise ValueError(f"{where}: trained_betas: found a list, expected null and a `beta_schedule`")
    schedule, count = config.get("beta_schedule", "linear"), int(config.get("num_train_timesteps", 1000))
    zero = bool(config.get("rescale_betas_zero_snr", False))
    if schedule not in BETAS:
        raise ValueError(f"{where}: beta_schedule: found {schedule!r}, expected one of {list(BETAS)}")
    if schedule == "squaredcos_cap_v2":
        if zero:
            raise ValueError(f"{where}: rescale_betas_zero_snr: found true with {schedule!r}, expected false")
        return VPCosineIDDPM(num_timesteps=count)
    table = VPScaledLinear if schedule == "scaled_linear" else VPLinearBetas
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    return table(start, end, count, zero_terminal_snr=zero)


def _flow(config: Mapping[str, Any], where: str, tokens: int) -> Meaning:
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if config.get(key):
            raise ValueError(f"{where}: {key}: found true, expected false")
    factor = float(config.get("shift", 1.0))
    if config.get("use_dynamic_shifting"):
        if (kind := config.get("time_shift_type", "exponential")) != "exponential":
            raise ValueError(f"{where}: time_shift_type: found {kind!r}, expected 'exponential'")
        least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        factor = math.exp(low + (high - low) * (tokens - least) / (most - least))
    grid = None if factor == 1 else TimeGrid("shifted", {"factor": factor})
    return Meaning(Flow(), "velocity", SamplerSpec(steps=28, any_steps=True, solver="euler", time_grid=grid))
