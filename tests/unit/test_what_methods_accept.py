"""Each method under each process and with each kind of prediction: refused by name, or trained on what its formula says.

The data are one point m. Then everything is known: the exact net predicts m, and every loss of it is 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from method_support import double_step, gaussian_batch, gaussian_teacher, nested, noise, optim
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.degrade import Degrade
from distill.methods.denoising import Denoising
from distill.methods.dmd import DMD
from distill.methods.families.suits import error_factor
from distill.methods.flow_matching import FlowMatching
from distill.methods.guided import Guided
from distill.methods.hipa import HiPA
from distill.methods.lcm import LCM
from distill.methods.mmd import MMD
from distill.methods.one_step import OneStep
from distill.methods.progressive import Progressive
from distill.methods.reflow import Reflow
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.process.base import KINDS, Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.trig import TrigFlow
from distill.process.vp import VPCosine, VPCosineIDDPM, VPLinear, VPLinearBetas, VPScaledLinear

POINT = (0.4, -0.7)
B = 32


class Exact(nn.Module):
    """Predicts the point, as a net of `kind`; `gain` spoils it."""

    num_classes = 0

    def __init__(self, process: Process, kind: str) -> None:
        super().__init__()
        self.process, self.kind = process, kind
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        point = torch.tensor(POINT, dtype=x.dtype).expand_as(x)
        if self.kind == "x0":
            return self.gain * point
        after = t.clamp(
            min=self.process.t_min + 1e-9 * self.process.t_max
        )  # where no noise is left, it says nothing
        return self.gain * self.process.convert("x0", point, x, after, self.kind)


def exact(process: Process, kind: str) -> Denoiser:
    return Denoiser(Exact(process, kind), process, kind, (2,))


def batch() -> Batch:
    rows = torch.arange(B)
    x0 = torch.tensor(POINT, dtype=torch.float64).expand(B, 2).clone()
    return Batch(rows, rows, Cond.nothing(B), x0=x0, z=noise(B))


METHODS: dict[str, Callable[[Denoiser, Denoiser], DistillModule]] = {
    "flow_matching": lambda s, t: FlowMatching(s),
    "reflow": lambda s, t: Reflow(s),
    "one_step": lambda s, t: OneStep(s, steps=3),
    "denoising": lambda s, t: Denoising(s),
    "denoising, lognormal": lambda s, t: Denoising(s, times="lognormal"),
    "denoising, edm": lambda s, t: Denoising(s, times="lognormal", weight="edm"),
    "guided": Guided,
    "progressive": lambda s, t: Progressive(s, t, steps=4),
    "consistency": Consistency,
    "consistency, uniform": lambda s, t: Consistency(s, t, grid="uniform"),
    "consistency, karras": lambda s, t: Consistency(s, t, grid="karras"),
    "cm": lambda s, t: ConsistencyTraining(s, curriculum="cm", total_steps=100),
    "ict": lambda s, t: ConsistencyTraining(s, curriculum="ict", total_steps=100),
    "ect": lambda s, t: ConsistencyTraining(s, curriculum="ect", total_steps=100),
    "hipa": lambda s, t: HiPA(s, high_frequency={"fourier": 0.0, "edges": 0.0}),
    "lcm": lambda s, t: LCM(s, t, w_min=0, w_max=0),
    "mmd": lambda s, t: MMD(s, steps=3, estimator="biased"),  # the unbiased value may be negative
    "sid": SiD,
    "dmd": DMD,
    "degrade": lambda s, t: Degrade(s, t, total_steps=10),
}
PROCESSES: dict[str, Process] = {
    "flow": Flow(),
    "edm": EDM(),
    "trig": TrigFlow(),
    "trig1": TrigFlow(1.0),
    "cosine": VPCosine(),
    "vplinear": VPLinear(),
    "sd": VPScaledLinear(),
    "sd0": VPScaledLinear(zero_terminal_snr=True),
    "ddpm": VPLinearBetas(),
    "iddpm": VPCosineIDDPM(),
}


def models(process: Process) -> dict[str, tuple[Denoiser, Denoiser]]:
    """By kind: a student and a teacher, where a denoiser of that kind exists under the process."""
    found = {}
    for kind in KINDS:
        with contextlib.suppress(ValueError):
            found[kind] = exact(process, kind), exact(process, kind)
    return found


# What is trained: method -> processes -> kinds of prediction. Everything else is refused.
TRAINED: dict[str, dict[str, str]] = {
    "flow_matching": {"flow": "velocity"},
    "reflow": {"flow": "velocity"},
    "one_step": {"flow": "x0 velocity"},
    "denoising": {
        "flow trig": "x0 velocity",
        "trig1 sd0": "x0 v velocity",
        "cosine sd ddpm iddpm": "x0 eps v velocity",
        "vplinear": "x0 eps v",
    },
    "denoising, lognormal": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 sd0": "x0 v velocity",
        "cosine vplinear sd ddpm iddpm": "x0 eps v velocity",
    },
    "denoising, edm": {"edm": "x0 eps velocity"},
    "guided": {
        "flow trig": "velocity",
        "trig1 vplinear": "v velocity",
        "cosine sd sd0 ddpm iddpm": "x0 v velocity",
    },
    "progressive": {
        "flow trig": "x0 velocity",
        "edm": "x0",
        "trig1 cosine vplinear sd sd0 ddpm iddpm": "x0 v velocity",
    },
    "consistency": {
        "flow trig": "velocity",
        "edm": "x0 eps velocity",
        "trig1": "v velocity",
        "cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "v",
        "sd": "x0 eps v velocity",
    },
    "consistency, uniform": {
        "flow trig": "velocity",
        "trig1": "v velocity",
        "cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "v",
        "sd": "x0 eps v velocity",
    },
    "consistency, karras": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 cosine vplinear sd0 ddpm iddpm": "x0 v velocity",
        "sd": "x0 eps v velocity",
    },
    "cm": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 cosine vplinear sd0 ddpm iddpm": "x0 v velocity",
        "sd": "x0 eps v velocity",
    },
    "ict": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 cosine vplinear sd0 ddpm iddpm": "x0 v velocity",
        "sd": "x0 eps v velocity",
    },
    "ect": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "x0 v",
        "sd": "x0 eps v velocity",
    },
    "hipa": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1": "x0 v velocity",
        "cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "x0 v velocity",
        "sd": "x0 eps v velocity",
    },
    "lcm": {"sd": "x0 eps v velocity", "sd0 ddpm iddpm": "x0 v velocity"},
    "mmd": {
        "flow trig": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig1 vplinear cosine sd0 ddpm iddpm": "x0 v velocity",
        "sd": "x0 eps v velocity",
    },
    "sid": {
        "flow": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig": "velocity",
        "trig1": "v velocity",
        "cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "v",
        "sd": "x0 eps v velocity",
    },
    "dmd": {
        "flow": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig": "velocity",
        "trig1": "v velocity",
        "cosine sd0 ddpm iddpm": "x0 v velocity",
        "vplinear": "v",
        "sd": "x0 eps v velocity",
    },
    "degrade": {
        "flow": "x0 velocity",
        "edm": "x0 eps velocity",
        "trig": "velocity",
        "trig1": "v velocity",
        "cosine sd ddpm iddpm": "x0 eps v velocity",
        "vplinear": "eps v",
        "sd0": "x0 v velocity",
    },
}
FIELDS = (
    r"(kind|process|student|times|grid|weight|fake.weighting|sampling.levels|sigma_data|fake.sigma_data): "
)


def trained(method: str, process: str, kind: str) -> bool:
    kinds = [kinds for names, kinds in TRAINED[method].items() if process in names.split()]
    return any(kind in found.split() for found in kinds)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", METHODS)
def test_refused_by_name_or_right(method: str, process: str) -> None:
    """With each kind of prediction that there is under the process."""
    for kind, (student, teacher) in models(PROCESSES[process]).items():
        if trained(method, process, kind):
            assert_right(method, student, teacher)
        else:
            with pytest.raises(ValueError, match=f"^{FIELDS}"):
                METHODS[method](student, teacher)


def assert_right(method: str, student: Denoiser, teacher: Denoiser) -> None:
    made = METHODS[method](student, teacher)
    made.prepare({update.name: optim() for update in made.updates()}, seed=0)
    for update in made.plan:
        loss = update.loss(batch(), double_step()).total.detach()
        assert bool(loss.isfinite()), update.name
        # Distillation of consistency compares along a solver's step; its fixpoints are tested with the method.
        if made.result().boundary is None and not isinstance(made, Consistency):
            assert abs(float(loss)) < 1e-6, update.name
    if method not in ("sid", "dmd") and not isinstance(made, Consistency):  # theirs compare two scores
        right = float(made.plan[0].loss(batch(), double_step()).total.detach())
        made.student.net.gain.data.mul_(1.1)
        assert float(made.plan[0].loss(batch(), double_step()).total.detach()) > max(1e-9, 1.01 * right)


@pytest.mark.parametrize(
    ("process", "kind"), [("cosine", "x0"), ("cosine", "v"), ("sd", "v"), ("sd", "eps"), ("flow", "x0")]
)
def test_a_teacher_s_error_is_not_multiplied_in_its_last_step(process: str, kind: str) -> None:
    """An error of 0.01 in what the teacher predicts moves no target by more than 0.05. (A predicted x0 is divided by sigma
    when a velocity is asked for, at t_min of a cosine by 4.5e-5: the target of the last step moves by 10.)"""
    under, found = PROCESSES[process], []
    for error in (0.0, 0.01):
        teacher = Denoiser(Told(gaussian_teacher(under), kind, error), under, kind, (2,))
        method = Consistency(exact(under, "velocity"), teacher, loss="l2")
        asked: list[Tensor] = []
        method.student.net.register_forward_hook(lambda net, given, out, asked=asked: asked.append(given[0]))
        method.prepare({"student": optim()}, seed=0)
        method.loss(gaussian_batch(), double_step(256))
        found.append(asked[0])  # the target's state
    assert (found[0] - found[1]).abs().max() < 0.05


def test_a_teacher_whose_error_a_step_multiplies_is_refused() -> None:
    student, teacher = exact(VPCosine(), "v"), exact(VPCosine(), "eps")
    with pytest.raises(
        ValueError, match=r"^teacher: predicts 'eps', whose error a step from t = 1 multiplies by 2035"
    ):
        Consistency(student, teacher)


class Told(nn.Module):
    """An exact teacher as a net of another kind, with an error."""

    num_classes = 0

    def __init__(self, teacher: Denoiser, kind: str, error: float) -> None:
        super().__init__()
        self.teacher, self.kind, self.error = teacher, kind, error

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.teacher.predict(self.kind, x, t.clamp(min=1e-9), cond) + self.error


@pytest.mark.parametrize("process", PROCESSES)
def test_what_an_error_becomes(process: str) -> None:
    """The factor is the derivative of the conversion times the size of what is predicted, here by autograd."""
    under, t = PROCESSES[process], torch.tensor([0.37 * PROCESSES[process].t_max], dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for kind in models(under):
        size = torch.hypot(under.target(kind, one, zero, t), under.target(kind, zero, one, t)).squeeze()
        for told in models(under):
            out = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
            if kind == told:
                slope = torch.ones(())
            else:
                (slope,) = torch.autograd.grad(under.convert(kind, out, one, t, told).sum(), out)
            torch.testing.assert_close(
                error_factor(under, kind, told, t).squeeze(),
                slope.abs().squeeze().double() * size,
                rtol=1e-9,
                atol=0,
            )


def test_times_of_scores_are_not_spread_over_noise_levels() -> None:
    for name in ("generator_times", "fake.times"):
        for law in ("uniform", "logit_normal"):
            student, teacher = models(EDM())["x0"]
            with pytest.raises(
                ValueError, match=rf"^{name}.name: found '{law}' under EDM.*expected lognormal, sid or karras"
            ):
                SiD(student, teacher, **nested({name.replace(".", "_"): {"name": law}}))


def test_a_weight_without_a_mean_is_refused_where_times_reach_the_clean_end() -> None:
    student, teacher = models(Flow())["x0"]
    with pytest.raises(
        ValueError, match=r"^fake.weighting: under Flow\(\) this loss weighs the error .* without bound"
    ):
        DMD(student, teacher, fake={"times": {"name": "uniform"}})
    for times in ({"name": "uniform", "low": 0.02}, {"name": "logit_normal"}, {"name": "lognormal"}):
        DMD(student, teacher, fake={"times": times})


# ---- the standard deviation of the data ----


def test_sigma_data_is_that_of_the_models() -> None:
    process = TrigFlow(0.8)
    student, teacher = models(process)["velocity"]
    boundary = Consistency(student, teacher, grid="karras").result().boundary
    assert boundary is not None
    assert boundary.sigma_data == 0.8
    with pytest.raises(
        ValueError, match=r"^fake.sigma_data: found 0.5, but the model's own sigma_data is 0.8"
    ):
        SiD(student, teacher, fake={"weighting": "edm", "times": {"name": "lognormal"}})
    SiD(student, teacher, fake={"weighting": "edm", "times": {"name": "lognormal"}, "sigma_data": 0.8})

    def preconditioned(sigma_data: float) -> Denoiser:
        net = Exact(EDM(), "x0")
        net.sigma_data = sigma_data
        return Denoiser(net, EDM(), "x0", (2,))

    with pytest.raises(
        ValueError, match=r"^fake.sigma_data: found 0.5, but the model's own sigma_data is 0.7"
    ):
        SiD(exact(EDM(), "x0"), preconditioned(0.7))
    SiD(exact(EDM(), "x0"), preconditioned(0.7), fake={"sigma_data": 0.7})
    weighed = Denoising(preconditioned(0.7), times="lognormal", weight="edm")
    weighed.student.net.gain.data.mul_(1.1)
    draws = double_step().draws
    level = torch.exp(-1.2 + 1.2 * draws.normal("t"))
    error = torch.tensor(POINT, dtype=torch.float64).mul(0.1).square().mean()
    expected = ((level**2 + 0.49) / (0.7 * level) ** 2 * error).mean()
    torch.testing.assert_close(
        weighed.loss(batch(), double_step()).total.detach(), expected, rtol=1e-6, atol=0
    )
