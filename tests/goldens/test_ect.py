"""Goldens of easy consistency tuning (ect: float32, rtol 2e-3) and of FastGen's consistency method (fastgen_cm).

data/consistency/README.md; gradients included. The tables r_* and ratio_* of both are compared here too.
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Load
from torch import Tensor
from translate import bounded_net, close, numbers

from distill.methods.losses.consistency import masked_target, pair_weight, teacher_step
from distill.methods.losses.distances import pseudo_huber, squared_norm
from distill.models.boundary import Boundary
from distill.models.guidance import guide
from distill.process.base import expand
from distill.process.curriculum import ect_r, ect_ratio
from distill.process.edm import EDM
from distill.process.scalings import edm_scalings
from distill.process.times import lognormal_level
from distill.samplers.ode import Field

FAMILY = "consistency"


def denoiser(abk: Tensor, cond: Tensor | None = None) -> Field:
    """(x, sigma) -> the EDM-preconditioned x0 of F(c_in x, ln(sigma) / 4) + cond; c_noise gets no special care at sigma = 0."""
    net = bounded_net(abk)

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = (c.to(x.dtype) for c in edm_scalings(sigma))
        out = net(expand(c_in, x) * x, c_noise) + (0 if cond is None else expand(cond, x))
        return expand(c_skip, x) * x + expand(c_out, x) * out

    return x0


def test_ect_tables(load: Load) -> None:
    file = load(FAMILY, "ect")
    for q in numbers(file, r"ratio_q(\d+)"):
        for stage, expected in enumerate(file[f"ratio_q{q}"]):
            assert ect_ratio(stage, q) == pytest.approx(expected.item(), rel=1e-5)
            for mapping in ("const", "sigmoid"):
                close(ect_r(file["t"], stage, q, mapping), file[f"r_{mapping}_q{q}"][stage], 1e-12, 1e-5)
    close(lognormal_level(file["rnd_normal"].flatten(), -1.1, 2.0), file["train_t"], 1e-6, 1e-5)


def test_ect_losses_and_gradients(load: Load) -> None:
    file = load(FAMILY, "ect")
    process, t = EDM(), file["train_t"].double()
    stages = numbers(file, r"loss_c[\d.]+_stage(\d+)")
    masked = 0
    for key in sorted(key for key in file if key.startswith("loss_c")):
        c, stage = float(key.split("_")[1][1:]), int(key.rsplit("stage", 1)[1])
        r = ect_r(t, stage, 2)
        masked += int((r <= 0).sum())
        abk = file["net_abk"].clone().requires_grad_()
        student = denoiser(abk)
        x_t, x_r = (process.add_noise(file["y"], file["eps"], time) for time in (t, r))
        target = masked_target(student, x_r, r, t, file["y"])
        assert not target.requires_grad
        loss = pseudo_huber(student(x_t, t), target, c) * pair_weight("default", t, r)
        close(loss, file[key], 1e-6, 2e-3)
        loss.mean().backward()
        assert abk.grad is not None
        assert abk.grad.isfinite().all()
        close(abk.grad, file[key.replace("loss", "grad_abk")], 1e-6, 2e-3)
    assert stages[0] == 0
    assert 0 < masked < len(t) * len(stages), "the file holds targets of both sorts"


def test_ect_boundary_forms(load: Load) -> None:
    """What the reference switches with train() and eval() is an argument here."""
    file = load(FAMILY, "ect")
    (name,) = (key for key in file if key.startswith("fwd_eval_sigma_min_"))
    sigma, x = file["fwd_sigma"], file["fwd_x"]
    x0 = denoiser(file["net_abk"])(x, sigma)
    close(x0, file["fwd_train"], 1e-6, 2e-3)
    sigma_min = float(name.rsplit("_", 1)[1])
    boundary = Boundary("cm", sigma_min=sigma_min)
    close(boundary.apply(EDM(), x0, x, sigma), file[name], 1e-6, 2e-3)
    assert torch.equal(boundary.apply(EDM(), x0, x, torch.full((len(x),), sigma_min)), x)


# ---- FastGen: r is never below min_r, so the clean image is never reached ----

MIN_R, RATIO, SCALE = 0.002, 0.9, 2.5


def fastgen_r(t: Tensor, ratio: float) -> Tensor:
    """Their r from the ratio alone: ours at a stage past the cap, then their lower clamp."""
    return ect_r(t, 60, 2, max_ratio=ratio).clamp(min=MIN_R)


def test_fastgen_pairs_and_teacher_step(load: Load) -> None:
    file = load(FAMILY, "fastgen_cm")
    process, t = EDM(), file["t"]
    for key in file:
        if key.startswith("r_sigmoid_ratio"):
            close(fastgen_r(t, float(key.removeprefix("r_sigmoid_ratio"))), file[key], 1e-12, 1e-5)
    r = fastgen_r(t, RATIO)
    close(r, file["r"], 1e-12, 1e-5)
    y_t = process.add_noise(file["x0"], file["noise"], t)
    close(y_t, file["y_t"], 1e-6, 1e-4)
    close(denoiser(file["student_abk"], file["cond"])(y_t, t), file["D_yt"], 1e-6, 1e-4)
    close(guided_step(file, y_t, t, r), file["ode_y_r_cfg2.5"], 1e-6, 1e-4)


def guided_step(file: dict[str, Tensor], y_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Euler with the guided velocity of the teacher; the null condition adds 0."""
    process = EDM()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v = [
            process.convert("x0", denoiser(file["teacher_abk"], cond)(x, t), x, t, "velocity")
            for cond in (None, file["cond"])
        ]
        return guide(*v, SCALE)

    return teacher_step(velocity, y_t, t, r, "euler")


def fastgen_runs(file: dict[str, Tensor]) -> list[str]:
    return sorted(key.removesuffix("_loss") for key in file if key.endswith("_loss"))


@pytest.mark.parametrize("mode", ["ct", "cd"])
def test_fastgen_losses_and_gradients(load: Load, mode: str) -> None:
    file = load(FAMILY, "fastgen_cm")
    process, t = EDM(), file["t"]
    r = fastgen_r(t, RATIO)
    y_t = process.add_noise(file["x0"], file["noise"], t)
    y_r = process.add_noise(file["x0"], file["noise"], r) if mode == "ct" else guided_step(file, y_t, t, r)
    runs = [run for run in fastgen_runs(file) if run.startswith(mode)]
    assert len(runs) >= 6
    for run in runs:
        _, huber, squared, weighting = run.split("_", 3)
        abk = file["student_abk"].clone().requires_grad_()
        student = denoiser(abk, file["cond"])
        prediction, target = student(y_t, t), masked_target(student, y_r, r, t, file["x0"])
        if squared == "sq1":
            assert float(huber.removeprefix("huber")) == 0
            distance = squared_norm(prediction, target)
        else:
            distance = pseudo_huber(prediction, target, float(huber.removeprefix("huber")))
        close(distance, file[f"{run}_unweighted"], 1e-6, 1e-4)
        loss = pair_weight(weighting, t, r) * distance
        assert loss.dtype == torch.float64
        close(loss, file[f"{run}_loss"], 1e-6, 1e-4)
        loss.mean().backward()
        assert abk.grad is not None
        close(abk.grad, file[f"{run}_grad_abk"], 1e-6, 1e-3)


def test_weights_are_the_formulas(load: Load) -> None:
    """The weights again, without the distances that hide their size."""
    file = load(FAMILY, "fastgen_cm")
    t, r = file["t"], file["r"]
    for run in fastgen_runs(file):
        weighting = run.split("_", 3)[3]
        ratio = file[f"{run}_loss"] / file[f"{run}_unweighted"]
        close(pair_weight(weighting, t, r), ratio, 0.0, 1e-6)
    assert math.isinf(pair_weight("default", t, t)[0].item())
