"""The stock schedulers of diffusers that sample as students do: one table, and nothing that is only alike."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from distill.models.boundary import Boundary
from distill.models.generator import Generator
from distill.nets.converted import Converted, Retimed
from distill.process.base import Process
from distill.process.flow import Flow
from distill.process.tables import VPTable
from distill.process.vp import VPCosineIDDPM, VPLinearBetas, VPScaledLinear
from distill.samplers.fewstep import lcm_times

KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
ALIKE = 1e-4  # what a boundary or a noise floor may change of a prediction or of a noise level


@dataclass(frozen=True)
class Stock:
    """A scheduler of diffusers.

    Attributes:
        name: its class. config: its arguments. call: arguments of the pipeline that make the model's steps.
    """

    name: str
    config: dict[str, Any]
    call: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How a student is sampled, for the table.

    Attributes:
        process, kind: of the diffusers network. times: of its calls, and the end. fresh: with fresh noise between the steps.
        raw: a flow of a network whose times are those of another process. boundary: the model's, None where it changes nothing.
        explicit: the pipeline's arguments. start: the first state is so many times unit noise.
    """

    process: Process
    kind: str
    times: tuple[float, ...]
    fresh: bool
    raw: bool
    boundary: Boundary | None
    explicit: Collection[str]
    start: float = 1.0

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def whole(self) -> bool:
        """Times are indices of the table, and the first state is unit noise."""
        return self.start == 1 and all(time == int(time) for time in self.times)

    @property
    def boundary_is_small(self) -> bool:
        """A boundary that changes predictions by `ALIKE` at most."""
        return self.boundary is None or _changes_nothing(self.boundary, self.process, self.times[:-1])

    @property
    def own(self) -> dict[str, Any]:
        """The options of schedulers with a table of betas."""
        table: Any = self.process
        shared = {"num_train_timesteps": table.num_timesteps, "prediction_type": KINDS[self.kind]}
        shared["steps_offset"] = 1  # without it, pipelines warn; only "leading" times have one
        if isinstance(table, VPCosineIDDPM):
            return shared | {"beta_schedule": "squaredcos_cap_v2"}
        name = "scaled_linear" if isinstance(table, VPScaledLinear) else "linear"
        betas = {"beta_schedule": name, "beta_start": table.beta_start, "beta_end": table.beta_end}
        return shared | betas | {"rescale_betas_zero_snr": table.zero_terminal_snr}

    @property
    def table(self) -> bool:
        """The process is a table that the schedulers make."""
        if isinstance(self.process, VPCosineIDDPM):
            return (self.process.s, self.process.max_beta) == (0.008, 0.999)
        return isinstance(self.process, VPLinearBetas | VPScaledLinear)

    @property
    def flow(self) -> bool:
        """The network is one of a flow pipeline."""
        return isinstance(self.process, Flow) and not self.raw and self.boundary is None and self.start == 1

    @property
    def spacing(self) -> str | None:
        """The `timestep_spacing` with which Euler's first state is the model's; None where it never is."""
        if self.start == 1:
            return "leading"
        level = float(self.process.sigma(torch.tensor(self.times[0], dtype=torch.float64)))
        return "trailing" if abs(self.start - level) <= ALIKE else None


def stock_scheduler(generator: Generator, arguments: Collection[str]) -> Stock | None:
    """The stock scheduler that samples as a model does with its default steps; None where there is none.

    arguments: those of the pipeline's call."""
    case = case_of(generator, arguments)
    return None if case is None else next((make(case) for fits, make in TABLE if fits(case)), None)


def case_of(generator: Generator, arguments: Collection[str]) -> Case | None:
    """What the table is asked with; None for samplers that change their fresh noise, or have a solver that is not in it."""
    model, spec, net = generator.denoiser, generator.spec, generator.denoiser.net
    times = tuple(spec.grid(model.process).tolist())
    process, kind, boundary, fresh = model.process, model.kind, model.boundary, spec.mode == "sde"
    one = len(times) == 2
    if spec.noise_scale != 1 or not (fresh or spec.solver in ("ddim", "euler")):
        return None
    if not fresh and spec.solver == "euler" and not isinstance(process, Flow):
        return None
    if isinstance(net, Converted):
        # One step from t = 1 ends on the data that the network predicts at the last time of its own process.
        whole = one and times[0] == spec.start_scale == 1 and net.process.variance_preserving
        if fresh or boundary is not None or not whole:
            return None
        return Case(net.process, net.kind, (net.process.t_max, 0.0), False, False, None, arguments)
    if boundary is not None and boundary != Boundary("lcm", timestep_scaling=boundary.timestep_scaling):
        if not _changes_nothing(boundary, process, times[:-1]):
            return None
        boundary = None
    if any(_floor(process, time) * spec.noise_floor**2 > ALIKE for time in times[1:-1]):
        return None
    if not fresh and boundary is not None:
        return None
    fresh = fresh and not (one and boundary is None)
    return Case(process, kind, times, fresh, isinstance(net, Retimed), boundary, arguments, spec.start_scale)


def _floor(process: Process, time: float) -> float:
    at = torch.tensor(time, dtype=torch.float64)
    return float((process.alpha(at) / process.sigma(at)) ** 2)


def _changes_nothing(boundary: Boundary, process: Process, times: Collection[float]) -> bool:
    at = torch.tensor(list(times), dtype=torch.float64)
    zero, one = torch.zeros(len(at), 1, dtype=torch.float64), torch.ones(len(at), 1, dtype=torch.float64)
    of_x, of_x0 = (boundary.apply(process, *pair, at) for pair in ((zero, one), (one, zero)))
    return float(of_x.abs().max()) <= ALIKE and float((of_x0 - 1).abs().max()) <= ALIKE


def _trailing(case: Case) -> bool:
    count = getattr(case.process, "num_timesteps", 0)
    step, rest = divmod(count, case.steps)
    falls = all(a - b == step for a, b in pairwise((*case.times[:-1], -1.0)))
    return step > 0 and rest == 0 and case.start == 1 and falls


def _lcm(case: Case) -> Stock:
    scaling = 1e6 if case.boundary is None else case.boundary.timestep_scaling
    config = {"clip_sample": False, "original_inference_steps": 50, "timestep_scaling": scaling}
    return Stock("LCMScheduler", case.own | config, _lcm_call(case))


def _lcm_call(case: Case) -> dict[str, Any]:
    assert isinstance(case.process, VPTable)
    count = case.process.num_timesteps
    if count % 50 == 0 and case.steps <= 50:
        own = lcm_times(case.steps, num_timesteps=count, original_steps=50).tolist()
        if own[:-1] == list(case.times[:-1]):
            return {"num_inference_steps": case.steps}
    return {"timesteps": [int(time) for time in case.times[:-1]]}


def _ddim(case: Case) -> Stock:
    config = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    return Stock("DDIMScheduler", case.own | config, {"num_inference_steps": case.steps})


def _euler(case: Case) -> Stock:
    config = {"timestep_spacing": case.spacing}
    return Stock("EulerDiscreteScheduler", case.own | config, {"timesteps": list(case.times[:-1])})


def _flow(name: str) -> Callable[[Case], Stock]:
    return lambda case: Stock(name, {"shift": 1.0}, {"sigmas": list(case.times[:-1])})


def _unipc(case: Case) -> Stock:
    config = {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "flow_shift": 1.0,
        "steps_offset": 1,
        "solver_order": 1,
    }
    return Stock("UniPCMultistepScheduler", config, {"num_inference_steps": 1})


Line = tuple[Callable[[Case], bool], Callable[[Case], Stock]]
# The first line that fits. tests/contracts/test_exports.py measures each: differences of the images in [0, 1].
TABLE: tuple[Line, ...] = (
    # Latent consistency, and few steps with fresh noise between them, at indices of a table.
    (
        lambda c: (
            c.table
            and (c.fresh or c.boundary is not None)
            and c.whole
            and ("timesteps" in c.explicit or "timesteps" not in _lcm_call(c))
        ),
        _lcm,
    ),
    # DDIM, and one step from the last index (also of a converted flow).
    (lambda c: c.table and not c.fresh and c.boundary is None and _trailing(c), _ddim),
    # DDIM at other indices; of one step, from a lower index than the last. Its sigma at zero terminal SNR is another one.
    (
        lambda c: (
            c.table
            and not c.fresh
            and c.boundary is None
            and c.spacing is not None
            and c.kind in ("eps", "v")
            and not getattr(c.process, "zero_terminal_snr", False)
            and "timesteps" in c.explicit
        ),
        _euler,
    ),
    # Flows: Euler, and prediction and fresh noise in turn.
    (lambda c: c.flow and not c.fresh and "sigmas" in c.explicit, _flow("FlowMatchEulerDiscreteScheduler")),
    (lambda c: c.flow and c.fresh and "sigmas" in c.explicit, _flow("FlowMatchLCMScheduler")),
    # A flow of a network of another process, read at times 999 t (InstaFlow): one step from t = 1.
    (
        lambda c: c.raw and not c.fresh and c.boundary is None and c.start == 1 and c.times == (1.0, 0.0),
        _unipc,
    ),
)
